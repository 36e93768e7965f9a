"""What a lost worker costs: steps that are done again, and seconds until the run is where it was.

    python -m tests.benchmarks.lost_worker [--intervals 5 20 80] [--rounds 2] [--out JSON]

One of two workers is killed (SIGKILL) in the middle between two checkpoints, under Ray (`cxrscale train`) and under
`torchrun --max-restarts` with the same loop, in turns; each checkpoint interval has runs of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from cxrscale import config
from cxrscale.training import tracking
from tests.benchmarks import scaling, scaling_start

WORKERS = 2
AFTER = 100
"""The worker is lost after about so many steps: half an interval after a checkpoint."""
PATIENCE_S = 600.0


@dataclass(frozen=True, slots=True)
class Loss:
    """What the loss of a worker cost one run."""

    interval: int
    """Steps between two checkpoints."""
    steps: int
    """Optimizer steps that were done again."""
    restart_s: float
    """From the kill to the end of the first step after it."""
    caught_up_s: float
    """From the kill until a step ended that had not been done before."""
    step_s: float
    """Median seconds per step before the kill."""
    load: float
    """Of the machine, when the worker was lost."""


def measure(command: Sequence[str], run: str, interval: int, victim: Callable[[psutil.Process], bool]) -> Loss:
    """Start the training, kill the first of its processes that `victim` picks, and wait until it has caught up.

    Raises:
        SystemExit: the command ended before, or took too long.
    """
    target = AFTER // interval * interval + interval // 2
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, env=scaling_start.environment(), cwd=scaling_start.ROOT, stdout=log, stderr=log
        )
        try:

            def until(true: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
                end = time.monotonic() + PATIENCE_S
                while True:
                    lines = [line for line in tracking.read_log(run) if line["kind"] == "train"]
                    if true(lines):
                        return lines
                    if process.poll() is not None or time.monotonic() > end:
                        log.seek(0)
                        raise SystemExit(f"{' '.join(command[:4])} did not come so far:\n{log.read()[-3000:]}")
                    time.sleep(0.05)

            before = until(lambda lines: len(lines) >= target)
            found = [child for child in psutil.Process(process.pid).children(recursive=True) if victim(child)]
            found[-1].send_signal(signal.SIGKILL)
            killed, load = time.time(), os.getloadavg()[0]
            return _loss(interval, killed, load, before, until)
        finally:
            _end(process)


def _loss(
    interval: int,
    killed: float,
    load: float,
    before: list[dict[str, Any]],
    until: Callable[[Callable[[list[dict[str, Any]]], bool]], list[dict[str, Any]]],
) -> Loss:
    """Follow the log from the kill until the run has caught up."""
    peak = len(before)

    def restarted(lines: list[dict[str, Any]]) -> bool:
        nonlocal peak
        # The lines of steps that will be done again are dropped at once: then the log is shorter, or a line is younger
        # than the silence before it.
        new = [line for line in lines[-1:] if line["time"] > killed + 2]
        if not new and len(lines) >= peak:
            peak = len(lines)
        return len(lines) < peak or bool(new)

    resumed = until(restarted)
    start = len([line for line in resumed if line["time"] < killed + 2])
    first = until(lambda lines: len(lines) > start)[start]
    last = until(lambda lines: len(lines) > peak)[peak]
    gaps = [after["time"] - one["time"] for one, after in pairwise(before)]
    return Loss(
        interval=interval,
        steps=peak - start,
        restart_s=first["time"] - killed,
        caught_up_s=last["time"] - killed,
        step_s=statistics.median(gaps[5:]),
        load=load,
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """The command and all that it has started; the measurement is over."""
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(60)
    process.kill()
    process.wait()
    for child in family:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(family, timeout=30)


def is_ray_worker(process: psutil.Process) -> bool:
    """Whether it is one of Ray Train's workers."""
    return _title(process).startswith("ray::RayTrainWorker")


def is_torchrun_worker(process: psutil.Process) -> bool:
    """Whether it is one of torchrun's workers."""
    return "tests.benchmarks.scaling_bare" in _title(process) and "torch.distributed.run" not in _title(process)


def _title(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def overrides(given: argparse.Namespace, source: str, root: Path, interval: int) -> list[str]:
    """What the trainings change in the recipe."""
    changes = argparse.Namespace(size=given.size, batch=given.batch, steps=3 * AFTER)
    more = [f"train.checkpoint_steps={interval}", f"scaling.num_workers={WORKERS}", "sampler.seed=0"]
    return [*scaling.overrides(changes, source, root), *more]


def measured(given: argparse.Namespace) -> dict[str, list[Loss]]:
    """All rounds: launcher -> losses."""
    losses: dict[str, list[Loss]] = {"Ray": [], "torchrun": []}
    with tempfile.TemporaryDirectory(prefix="cxr") as folder:
        root = Path(folder)
        source = scaling.shards(root)
        for number in range(given.rounds):
            for interval in given.intervals:
                changes = overrides(given, source, root / "runs", interval)
                name = f"ray-{interval}-{number}"
                ray = [sys.executable, "-m", "cxrscale", "train", given.job, *changes, f"tracking.name={name}"]
                losses["Ray"].append(measure(ray, str(root / "runs" / name), interval, is_ray_worker))
                resolved, bare = root / f"{interval}.yaml", str(root / "runs" / f"torchrun-{interval}-{number}")
                resolved.write_text(config.to_yaml(config.load_recipe(given.job, changes)))
                torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(WORKERS)]
                torchrun += ["--max-restarts", "3", "-m", "tests.benchmarks.scaling_bare", str(resolved), bare]
                losses["torchrun"].append(measure(torchrun, bare, interval, is_torchrun_worker))
                for launcher, of in losses.items():
                    print(f"{launcher:10}{of[-1]}", flush=True)
    return losses


def main(arguments: Sequence[str]) -> None:
    """Measure, print medians per launcher and interval, and keep all of it where --out says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", default="jobs/demo.yaml")
    parser.add_argument("--intervals", type=int, nargs="+", default=[5, 20, 80], help="steps between two checkpoints")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16, help="images per step, over all workers")
    parser.add_argument("--size", type=int, default=64, help="input side in pixels")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    losses = measured(given)
    for launcher, every in losses.items():
        for interval in given.intervals:
            of = [loss for loss in every if loss.interval == interval]
            steps, restart, caught_up, step = (
                statistics.median(getattr(loss, name) for loss in of)
                for name in ("steps", "restart_s", "caught_up_s", "step_s")
            )
            print(
                f"{launcher:10} checkpoint every {interval:3} steps: {steps:4g} steps again, first step after "
                f"{restart:6.1f} s, caught up after {caught_up:6.1f} s ({1000 * step:.0f} ms per step)"
            )
    if given.out:
        settings = {name: getattr(given, name) for name in ("job", "intervals", "rounds", "batch", "size")}
        machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
        kept = {name: [asdict(loss) for loss in every] for name, every in losses.items()}
        given.out.write_text(json.dumps({"machine": machine, "settings": settings, "measured": kept}, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
