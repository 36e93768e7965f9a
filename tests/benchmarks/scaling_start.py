"""The same training by every launcher: how long until its first step, and how many steps per second then."""

from __future__ import annotations

import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from cxrscale.training import tracking

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 540.0
NICENESS = "RAY_worker_niceness"
"""Ray starts workers at 15, which loses against anything else on the machine; torchrun's have 0."""
STAGES = {
    "accepted": "the job server has taken the job",
    "checked": "Python up, inputs checked, run folder made",
    "trainer": "Ray joined or started, Train's controller up",
    "built": "workers up, torch imported, manifest read, model built",
    "batch": "first batch",
    "step": "first optimizer step",
    "end": "command returned",
}
"""What has happened when a stage is over; `trainer` is Ray's alone."""


@dataclass(frozen=True, slots=True)
class Launcher:
    """A way to launch the training."""

    name: str
    workers: int
    command: tuple[str, ...]
    """{run} and {name} stand for the run's folder and its name."""
    cluster: bool = False
    """On the benchmark's own cluster."""


def launchers(recipe: str, overrides: Sequence[str], resolved: Path, workers: int) -> list[Launcher]:
    """All of them, with one worker and with `workers`.

    Args:
        recipe: of jobs/, relative to the checkout, as `submit` wants it.
        overrides: of the recipe.
        resolved: the same as one file, for the bare loop.
    """
    train = ("train", recipe, *overrides, "tracking.name={name}")
    python_module = (sys.executable, "-m", "cxrscale")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node")
    bare = ("-m", "tests.benchmarks.scaling_bare", str(resolved), "{run}")
    result = [Launcher("--local", 1, (*python_module, *train, "--local"))]
    for count in dict.fromkeys((1, workers)):
        ray = (*python_module, *train, f"scaling.num_workers={count}")
        result += [
            Launcher(f"torchrun, {count}", count, (*torchrun, str(count), *bare)),
            Launcher(f"Ray, a cluster at hand, {count}", count, ray, cluster=True),
        ]
    ray = (*train, f"scaling.num_workers={workers}")
    return [
        *result,
        Launcher(f"Ray, no cluster, {workers}", workers, (*python_module, *ray)),
        Launcher(f"submit to a cluster, {workers}", workers, (*python_module, "submit", *ray), cluster=True),
    ]


def started(launcher: Launcher, root: Path, name: str, environment: dict[str, str], warm_up: int) -> dict[str, float]:
    """Run one launcher to its end; seconds from the command to each stage, and steps per second once warm.

    Raises:
        SystemExit: the command failed; its output is in the message.
    """
    run = root / name
    command = [word.format(run=run, name=name) for word in launcher.command]
    marks = {
        "checked": run / "recipe.yaml",
        "trainer": run / "ray",
        "built": run / tracking.TRAIN_LOG,
        "batch": run / tracking.SAMPLES,
    }
    seen: dict[str, float] = {}
    with tempfile.TemporaryFile("w+") as log:
        start = time.time()
        with subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log, text=True) as process:
            try:
                while process.poll() is None and time.time() - start < PATIENCE_S:
                    for stage, path in marks.items():
                        if stage not in seen and path.exists():
                            seen[stage] = time.time() - start
                    if "submit" in command and "accepted" not in seen and re.search(r"^job ", _text(log), re.M):
                        seen["accepted"] = time.time() - start
                    time.sleep(0.02)
            finally:
                process.terminate()
        if process.returncode:
            raise SystemExit(f"{launcher.name} failed:\n{_text(log)[-3000:]}")
        seen["end"] = time.time() - start
    lines = [line for line in tracking.read_log(str(run)) if line["kind"] == "train"]
    seen["step"] = lines[0]["time"] - start
    return seen | {"steps_per_s": rate(lines, warm_up), "load": os.getloadavg()[0]}


def rate(lines: Sequence[dict[str, float]], warm_up: int) -> float:
    """Steps per second from train_log.jsonl, by the median time of a step after `warm_up` lines."""
    kept = lines[warm_up:]
    gaps = [(after["time"] - before["time"]) / (after["step"] - before["step"]) for before, after in pairwise(kept)]
    return 1 / statistics.median(gaps)


def environment(address: dict[str, str] | None = None) -> dict[str, str]:
    """What the commands run in: one thread and one priority for every worker, and no cluster but the one given."""
    dropped = {"PYTHONDONTWRITEBYTECODE", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"}
    own = {name: value for name, value in os.environ.items() if name not in dropped}
    return own | {"OMP_NUM_THREADS": "1", NICENESS: "0"} | (address or {})


@contextmanager
def cluster(workers: int) -> Iterator[dict[str, str]]:
    """A head and a worker with so many CPUs on this machine by cluster/local.sh; yields what to export."""
    script = str(ROOT / "cluster" / "local.sh")
    with tempfile.TemporaryDirectory(prefix="cxr") as folder:
        port = _ports(3)
        settings = {"CXR_DIR": folder, "CXR_PORT": str(port), "CXR_DASHBOARD_PORT": str(port + 1)}
        control = environment() | settings | {"CXR_WORKER_CPUS": str(max(workers, os.cpu_count() or 1))}
        del control["OMP_NUM_THREADS"]  # Ray gives each worker as many threads as CPUs
        try:
            # On a machine with too much to do a node of Ray gives up before it is up.
            for _ in range(5):
                up = subprocess.run([script, "up", "1"], env=control, capture_output=True, text=True)
                if not up.returncode:
                    break
            else:
                raise SystemExit(f"cluster/local.sh: {up.stderr}")
            exports = [line.removeprefix("export ") for line in up.stdout.splitlines() if line.startswith("export ")]
            yield dict(pair.split("=", 1) for pair in " ".join(exports).split())
        finally:
            subprocess.run([script, "down"], env=control, capture_output=True)


def stages(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    """Medians over rounds of the seconds to each stage, and of the speed."""
    return {key: statistics.median(item[key] for item in rounds) for key in rounds[0]}


def show(table: dict[str, dict[str, float]]) -> None:
    """Print seconds from the command to the end of each stage."""
    print(f"\n{'seconds from the command to':34}" + "".join(f"{stage:>10}" for stage in STAGES) + f"{'steps/s':>10}")
    for name, row in table.items():
        cells = "".join(f"{row[stage]:10.1f}" if stage in row else f"{'':>10}" for stage in STAGES)
        print(f"{name:34}{cells}{row['steps_per_s']:10.2f}")
    for stage, meaning in STAGES.items():
        print(f"  {stage}: {meaning}")


def _text(log: object) -> str:
    # The child writes at the file's one offset, so the log is read by its name in /proc and never sought.
    return Path(f"/proc/self/fd/{log.fileno()}").read_text()  # type: ignore[attr-defined]


def _ports(count: int) -> int:
    """The first of so many free ports in a row, above those of Ray's workers."""
    for port in range(21_000 + os.getpid() % 8000, 40_000, 7):
        try:
            probes = [socket.create_server(("", port + more)) for more in range(count)]
        except OSError:
            continue
        for probe in probes:
            probe.close()
        return port
    raise SystemExit("no free ports")


def keep(path: Path, figures: object) -> None:
    """Write figures as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=2) + "\n")
