"""Change single bits of the files of a dataset and a run, and ask whether anybody sees it.

`python -m tests.fuzz.flips --world FOLDER --flips 10000` changes one bit, runs `verify` and a command that reads the
file, and changes it back. A fault is a bit that `verify` does not see, a label that a reader takes for another, an
exception that leaves the command line, and an exit code that says that all is well.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.fuzz.artifacts import World, call, cheap, new_world

READ_EVERY = 10
"""Every so many flips a command reads what was changed: it takes much longer than `verify`."""


@dataclass(frozen=True, slots=True)
class Flip:
    """What became of a changed bit."""

    name: str
    """The file, from the world's root."""
    bit: int
    fault: str = ""
    """Empty where it was seen."""


def complete(world: World) -> World:
    """The world with the digests of its dataset, which the campaign of forged artifacts lays aside."""
    aside = world.root / "dataset.json"
    if aside.exists():
        aside.rename(world.dataset / aside.name)
    return world


def flips(world: World, number: int, seed: int) -> Iterator[Flip]:
    """Change that many bits, each for itself: any file is as likely, and any bit of it."""
    rng = np.random.default_rng(seed)
    paths = [path for folder in (world.dataset, world.run) for path in sorted(folder.rglob("*")) if path.is_file()]
    rows = labels(world)
    with cheap():
        for n in range(number):
            path = paths[int(rng.integers(len(paths)))]
            content = path.read_bytes()
            if not content:
                continue
            bit = int(rng.integers(8 * len(content)))
            changed = bytearray(content)
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            try:
                fault = _verified(world, path) or _read(world, path, rows, with_command=n % READ_EVERY == 0)
            finally:
                path.write_bytes(content)
            yield Flip(path.relative_to(world.root).as_posix(), bit, fault)


def labels(world: World) -> list[dict[str, object]] | None:
    """The rows of the dataset as a loader has them; None where it is refused."""
    from cxrscale.shards import manifest
    from cxrscale.types import UserError

    try:
        rows: list[dict[str, object]] = manifest.load(str(world.dataset)).table.to_pylist()
    except UserError:
        return None
    return rows


def _verified(world: World, path: Path) -> str:
    folder = world.dataset if path.is_relative_to(world.dataset) else world.run
    code, err, exception = call(["verify", str(folder)])
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    if exception:
        return f"verify: {exception}"
    return "" if (code, len(errors)) == (2, 1) else f"verify: exit code {code} with {len(errors)} error lines"


def _read(world: World, path: Path, rows: list[dict[str, object]] | None, *, with_command: bool) -> str:
    """What is wrong with how the file is read."""
    own = path.is_relative_to(world.dataset)
    if own and path.suffix != ".tar" and labels(world) not in (rows, None):
        return "other labels"
    if not with_command:
        return ""
    words = ["first-batch", str(world.dataset)] if own else ["report", str(world.run)]
    code, err, exception = call(words)
    if exception or "Traceback" in err:
        return f"{words[0]}: {exception or err[-200:]}"
    return "" if code in (0, 2) else f"{words[0]}: exit code {code}"


def table(tried: Sequence[Flip]) -> str:
    """One line per kind of file."""
    kinds = Counter(Path(flip.name).suffix for flip in tried)
    faults = Counter(Path(flip.name).suffix for flip in tried if flip.fault)
    lines = [f"{'kind':<12}{'flips':>8}{'faults':>8}"]
    return "\n".join([*lines, *(f"{kind:<12}{count:>8}{faults[kind]:>8}" for kind, count in kinds.most_common())])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--flips", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--world", type=Path, required=True, help="a folder; made where it is not there")
    given = parser.parse_args()
    world = World(given.world.resolve())
    if not world.root.exists():
        new_world(world.root)
    complete(world)
    for folder in (world.dataset, world.run):
        code, err, exception = call(["verify", str(folder)])
        assert code == 0, err + exception
    tried = []
    for flip in flips(world, given.flips, given.seed):
        tried.append(flip)
        if flip.fault:
            print(f"{flip.name} bit {flip.bit}: {flip.fault}", flush=True)
        if len(tried) % 500 == 0:
            print(f"{len(tried)} flips, {time.process_time():.0f} CPU seconds", file=sys.stderr, flush=True)
    print(table(tried))
    return 1 if any(flip.fault for flip in tried) else 0


if __name__ == "__main__":
    sys.exit(main())
