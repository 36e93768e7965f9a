"""Feed thousands of damaged inputs to the readers: `python -m tests.fuzz.campaign --runs 1000 --seed 0`.

A child process reads each input, so that a crash of a native decoder ends only the child. The bytes of an input depend
only on its kind, the seed and its number; `--keep FOLDER` saves the inputs with a fault.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import chain, repeat
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

from cxrscale.io.images import load_image
from cxrscale.sources import nih, rsna, siim
from cxrscale.types import UnreadableImageError, UserError
from tests.fuzz.mutations import KINDS, mutated

SAME, OTHER, REFUSED = "same", "other", "refused"
READY = "ready"
WARNED, CRASH, DEATH, HANG = "warned", "crash", "death", "hang"
STATUSES = (SAME, OTHER, REFUSED, WARNED, CRASH, DEATH, HANG)
IMAGES = ("png", "png-resealed", "jpeg", "dicom")
CHECKED = ("png",)
"""Kinds with checksums: reading one as a different image is a fault; for other kinds it cannot be detected."""
CPU_SECONDS = 2.0
"""The CPU time limit of one input."""
WALL = 30.0
"""Seconds without an answer after which a child counts as hanging: far above CPU_SECONDS, for busy machines."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of reading one input."""

    kind: str
    seed: int
    number: int
    status: str
    """same: read like the undamaged file; other: read as something else; refused; warned: raised a warning; crash: any
    other exception, or a reason that is not one line; death: the process died; hang."""
    message: str = ""
    """The reason, the exception or the signal."""
    seconds: float = 0.0
    """CPU time."""
    peak_mb: int = 0
    """The peak memory of the child so far."""

    @property
    def is_fault(self) -> bool:
        """Whether this result is an error. For tables, pandas may warn that it drops values beyond the header."""
        never = {CRASH, DEATH, HANG}
        never |= {WARNED} if self.kind in IMAGES else set()
        never |= {OTHER} if self.kind in CHECKED else set()
        return self.status in never or self.seconds > CPU_SECONDS


def read_damaged(kind: str, seed: int, number: int, folder: Path) -> Outcome:
    """Read one damaged input in this process.

    Args:
        folder: where a table is written before it is read.
    """
    which, data = mutated(kind, seed, number)
    undamaged = _undamaged(kind, which, folder)
    start = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = _read(kind, data, folder)
        status, message = (SAME if _equal(result, undamaged) else OTHER), ""
    except (UnreadableImageError, UserError) as reason:
        status, message = REFUSED, str(reason)
        if not message.strip() or "\n" in message or "\r" in message:
            status, message = CRASH, f"no reason of one line: {message[:200]!r}"
    except Warning as warning:
        status, message = WARNED, f"{type(warning).__name__}: {warning}"
    except BaseException as error:  # a panic of a decoder in Rust is not an Exception
        last = traceback.extract_tb(error.__traceback__)[-1]
        status, message = (
            CRASH,
            f"{type(error).__name__}: {str(error)[:200]!r} at {Path(last.filename).name}:{last.lineno}",
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return Outcome(kind, seed, number, status, message, time.process_time() - start, peak)


@cache
def _undamaged(kind: str, which: int, folder: Path) -> Any:
    return _read(kind, KINDS[kind].files()[which], folder)


def _read(kind: str, data: bytes, folder: Path) -> Any:
    if kind in IMAGES:
        # With the suffix .dcm, a file with a damaged preamble is read too.
        return load_image(data, name="image.dcm" if kind == "dicom" else "image").image_HW
    path = folder / "table.csv"
    path.write_bytes(data)
    readers = {
        "nih-labels": nih.read_table,
        "nih-boxes": nih.read_boxes,
        "siim-masks": siim.read_table,
        "rsna-labels": rsna.read_table,
    }
    return readers[kind](str(path))


def _equal(result: Any, undamaged: Any) -> bool:
    return np.array_equal(result, undamaged) if isinstance(undamaged, np.ndarray) else bool(result == undamaged)


Attempt = Callable[[str, int, int, Path], Outcome]
"""Kind, seed, number, and a folder to work in."""


def campaign(
    kinds: Sequence[str],
    runs: int,
    seed: int,
    workers: int = 1,
    attempt: Attempt = read_damaged,
    wall: float = WALL,
) -> list[Outcome]:
    """The outcomes of inputs 0 to `runs` of each kind, read by `workers` children in parallel.

    Args:
        attempt: the function with which a child reads an input.
        wall: seconds after which a child counts as hanging.
    """
    tasks = [(kind, seed, number) for kind in kinds for number in range(runs)]
    shares = [tasks[first::workers] for first in range(workers)]
    with ThreadPoolExecutor(workers) as pool:
        done = list(pool.map(_by_children, shares, repeat(attempt), repeat(wall)))
    return sorted(chain(*done), key=lambda outcome: (kinds.index(outcome.kind), outcome.number))


def _by_children(tasks: Sequence[tuple[str, int, int]], attempt: Attempt, wall: float) -> list[Outcome]:
    """One child after another: a new one starts only after the previous one died or hung."""
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        waiting = iter(tasks)
        task = next(waiting, None)
        while task:
            process, line = _start(attempt, folder)
            with line:
                while task:
                    outcome = _ask(process, line, task, wall)
                    outcomes.append(outcome)
                    task = next(waiting, None)
                    if outcome.status in (DEATH, HANG):
                        break
            process.join()
    return outcomes


def _ask(process: BaseProcess, line: Connection, task: tuple[str, int, int], wall: float) -> Outcome:
    try:
        line.send(task)
        if not line.poll(wall):
            process.kill()
            return Outcome(*task, HANG, f"no answer in {wall:g} s")
        answer = line.recv()
    except (EOFError, ConnectionError):  # also if it died after its last answer
        process.join()
        return Outcome(*task, DEATH, f"exit code {process.exitcode}")
    if isinstance(answer, str):
        raise RuntimeError(f"{task}: {answer}")
    assert isinstance(answer, Outcome)
    return answer


def _start(attempt: Attempt, folder: str) -> tuple[BaseProcess, Connection]:
    # A fork would inherit locks that are held by threads of this process; a new interpreter inherits none.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, attempt, folder), daemon=True)
    process.start()
    theirs.close()
    if not ours.poll(10 * WALL) or ours.recv() != READY:
        raise RuntimeError("the child does not start")
    return process, ours


def _serve(line: Connection, attempt: Attempt, folder: str) -> None:
    """The child: answers tasks until its parent closes the connection."""
    line.send(READY)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # native decoders also write their errors to stderr
    while True:
        try:
            kind, seed, number = line.recv()
        except EOFError:
            return
        try:
            line.send(attempt(kind, seed, number, Path(folder)))
        except Exception:  # a bug in this campaign: the parent must stop instead of counting a death
            line.send(traceback.format_exc())
            return


def table(outcomes: Sequence[Outcome]) -> str:
    """One line per kind: how many of each status, the slowest input, the peak memory."""
    lines = [f"{'kind':<14}{'inputs':>8}" + "".join(f"{name:>9}" for name in STATUSES) + "  slowest ms   peak MB"]
    for kind in dict.fromkeys(outcome.kind for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.kind == kind]
        counts = Counter(outcome.status for outcome in own)
        slowest = max(own, key=lambda outcome: outcome.seconds)
        lines.append(
            f"{kind:<14}{len(own):>8}"
            + "".join(f"{counts[name]:>9}" for name in STATUSES)
            + f"{1000 * slowest.seconds:>12.0f}{max(outcome.peak_mb for outcome in own):>10}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=1000, help="inputs per kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--workers", type=int, default=1, help="child processes in parallel")
    parser.add_argument("--keep", type=Path, help="a folder for the inputs with a fault")
    given = parser.parse_args()
    outcomes = campaign(given.kinds, given.runs, given.seed, given.workers)
    print(table(outcomes))
    faults = [outcome for outcome in outcomes if outcome.is_fault]
    for fault in faults:
        print(f"{fault.kind} {fault.number}: {fault.status} {fault.seconds:.1f} s {fault.message}")
        if given.keep:
            given.keep.mkdir(parents=True, exist_ok=True)
            name = f"{fault.kind}-{given.seed}-{fault.number}"
            (given.keep / name).write_bytes(mutated(fault.kind, given.seed, fault.number)[1])
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
