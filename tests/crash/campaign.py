"""Every crash point of a command: killed at its n-th effect and run again, it leaves what it leaves undisturbed.

    python -m tests.crash.campaign FOLDER [SCENARIO...] [--s3] [--every N] [--first N] [--points N...]

FOLDER is empty and gets a small dataset and a run; with --s3 both are in a bucket. Prints one line per scenario; ends
with 1 where a point failed. `tune` is tried only where it is named: each attempt starts trials on Ray.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.crash import harness
from tests.crash.world import Bucket, State, World, comparable, differences, ray_head, s3_server
from tests.tiny import TINY_CLASSIFIER

TINY = (
    *TINY_CLASSIFIER,
    "sampler.steps_per_epoch=3",
    "tracking.log_steps=2",
    "train.epochs=2",
    "train.checkpoint_steps=1",
    "train.keep_checkpoints=2",
)


PACK = ("pack.size=64", "pack.samples_per_shard=8")
SEARCH = (
    "tune.space={optim.lr: [1.0e-3, 1.0e-4]}",
    "tune.method=grid",
    "tune.baseline_seeds=0",
    "train.epochs=1",
    "scaling.num_workers=1",
)


@dataclass(frozen=True, slots=True)
class Scenario:
    """A command."""

    name: str
    words: tuple[str, ...]


def scenarios(source: str, work: str, root: str) -> list[Scenario]:
    """In the order in which one gives the next what it needs; shards and runs are under `root`."""
    run, shards = f"{root}/runs/tiny", f"{root}/nih"
    train = ["train", f"{work}/recipe.yaml", *TINY, f"data.shards={shards}", f"tracking.runs_dir={root}/runs"]
    return [
        Scenario("shard", ("shard", "nih", source, "--out", shards, *PACK, "--local")),
        Scenario("train", (*train, "tracking.name=tiny", "--local")),
        Scenario("threshold", ("threshold", run, "--resamples", "10")),
        Scenario("evaluate", ("evaluate", run, "--resamples", "10")),
        Scenario("predict", ("predict", f"{work}/a.png", "--run", run, "--out", f"{root}/p")),
        Scenario("tune", ("tune", *train[1:], *SEARCH, "tracking.name=search")),
    ]


def check(
    scenario: Scenario, world: World, log: Path, choose: Callable[[int], Sequence[int]]
) -> tuple[int, int, list[str]]:
    """Try its crash points: (effects, points tried, failures).

    Args:
        choose: the points to try of so many effects.
    """
    before, roots = world.state(), [str(world.work), *(["s3://"] if world.bucket else [])]
    code, effects = harness.run(scenario.words, roots, None, log)
    if code:
        return 0, 0, [f"undisturbed: exit code {code}\n{log.read_text()}"]
    after, failures = world.state(), []
    points = choose(effects)
    for at in points:
        world.restore(before)
        code, _ = harness.run(scenario.words, roots, at, log)
        if code != -9:
            # A lease is renewed and a log is written by the clock: there may be a few effects less.
            if code or at < effects - 4:
                failures.append(f"{scenario.name} {at}: not killed, exit code {code}\n{log.read_text()}")
            continue
        failures += [f"{scenario.name} {at}: {line}" for line in _again(scenario, world, log, after)]
    world.restore(after)
    return effects, len(points), failures


def _again(scenario: Scenario, world: World, log: Path, expected: State) -> list[str]:
    """What is wrong after the command is run again."""
    code, _ = harness.run(scenario.words, [], None, log)
    # Killed after it had said so, a run is finished.
    refused = bool(code) and not re.search("is finished[;,]", log.read_text())
    found = [f"exit code {code}: {log.read_text()[-2000:]}"] if refused else []
    return found + differences(comparable(expected), comparable(world.state()))


def main(arguments: Sequence[str]) -> int:
    """Run the campaign; 1 where a point failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--every", type=int, default=1, help="try each N-th point only")
    parser.add_argument("--first", type=int, default=0, help="begin with this point")
    parser.add_argument("--points", type=int, nargs="+", help="try these points only")
    parser.add_argument("--s3", action="store_true", help="shards and runs are in a bucket")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    folder = given.folder.resolve()
    work = folder / "work"
    # The temporary folder too is looked at.
    (work / "tmp").mkdir(parents=True)
    os.environ |= {
        "CXRSCALE_PATIENT_KEY": "a key for tests",
        "CXRSCALE_CACHE": str(work / "cache"),
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(work / "tmp"),
        "MPLCONFIGDIR": str(folder / "matplotlib"),
    }
    # Imported once: each attempt is a fork of this process.
    import sklearn.metrics  # noqa: F401

    from cxrscale.cli import app  # noqa: F401
    from cxrscale.inference import predictions  # noqa: F401
    from cxrscale.loader import dali  # noqa: F401
    from cxrscale.reporting import audit_page, run_report  # noqa: F401
    from cxrscale.training import launch  # noqa: F401
    from cxrscale.tuning import sweep  # noqa: F401

    source = folder / "synthetic" / "nih"
    # In a process of its own: once OpenCV's threads run, a fork that uses them hangs.
    draw = f"archive.write({str(source.parent)!r}, images=40, size=64, seed=3)"
    command = f"from cxrscale.sources.synthetic import archive; {draw}"
    subprocess.run([sys.executable, "-W", "ignore", "-c", command], check=True)
    (work / "recipe.yaml").write_text("{}\n")
    shutil.copy(next(source.rglob("*.png")), work / "a.png")
    with ExitStack() as stack:
        if given.s3:
            stack.enter_context(s3_server())
        if "tune" in given.names:
            stack.enter_context(ray_head())
        world = World(work, Bucket("crash") if given.s3 else None)
        return _campaign(scenarios(str(source), str(work), "s3://crash" if given.s3 else str(work)), world, given)


def _campaign(chosen: Sequence[Scenario], world: World, given: argparse.Namespace) -> int:
    failed = 0
    for scenario in chosen:
        if scenario.name == "tune" and "tune" not in given.names:
            continue
        wanted = not given.names or scenario.name in given.names

        def choose(effects: int, wanted: bool = wanted) -> Sequence[int]:
            if not wanted:
                return []
            return given.points or range(given.first, effects, given.every)

        effects, tried, failures = check(scenario, world, world.work.parent / "log.txt", choose)
        failed += len(failures)
        for line in failures:
            print(line, flush=True)
        if wanted or failures:
            summary = f"{effects} effects, {tried} crash points tried, {len(failures)} failures"
            print(f"{scenario.name}: {summary}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
