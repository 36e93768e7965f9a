"""run.json: what a run was made from, with what, on what, how long it took and what it cost."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cxrscale import __version__
from cxrscale.io import storage
from cxrscale.training import tracking
from cxrscale.types import UserError

RUN_INFO = "run.json"
RESULT = "outcome.json"
"""What rank 0 leaves for the driver at the end: whether it finished, its device, the number of workers."""
PACKAGES = (
    "torch",
    "timm",
    "segmentation-models-pytorch",
    "ray",
    "nvidia-dali-cuda130",
    "numpy",
    "opencv-python-headless",
)


def read_run_info(run: str) -> dict[str, Any]:
    """A run's run.json.

    Raises:
        UserError: there is none.
    """
    address = storage.join(run, RUN_INFO)
    if not storage.exists(address):
        raise UserError(f"{address} does not exist; give the folder that `cxrscale train` printed")
    found: dict[str, Any] = json.loads(storage.read(address))
    return found


@contextmanager
def record_session(run: str, inputs: Mapping[str, Any], workers: int, price: float | None) -> Iterator[None]:
    """Keep run.json while a run is trained: each launch is a session of it, and time lost to kills is counted too.

    Args:
        inputs: what the run is made from.
        workers: the most workers of this session.
        price: of an hour of a GPU, or of a worker where there is none.
    """
    sessions = _earlier(run)
    sessions.append({"began": round(time.time(), 1), "ended": None, "workers": workers, "device": None})
    about = {**inputs, "versions": versions(), "hardware": hardware(), "git": git_commit(), "finished": False}
    _write(run, about, sessions, price)
    try:
        yield
    finally:
        sessions[-1]["ended"] = round(time.time(), 1)
        said = storage.join(run, RESULT)
        if storage.exists(said):
            outcome = json.loads(storage.read(said))
            sessions[-1] |= {"device": outcome["device"], "workers": outcome["workers"]}
            about |= {name: outcome[name] for name in ("finished", "epochs", "best")}
            storage.remove(said)
        _write(run, about, sessions, price)


def totals(sessions: list[dict[str, Any]], price: float | None) -> dict[str, float | None]:
    """Wall seconds, hours of GPUs and of workers over all sessions, and the price of these."""
    # A session that was killed did not say what it ran on: what the run's other sessions ran on, as far as known.
    known = next((s["device"] for s in reversed(sessions) if s["device"]), None)
    spans = [(s["ended"] - s["began"], s["workers"], s["device"] or known) for s in sessions if s["ended"]]
    workers = sum(seconds * count for seconds, count, _ in spans) / 3600
    gpus = sum(seconds * count for seconds, count, device in spans if device not in (None, "CPU")) / 3600
    return {
        "seconds": round(sum(seconds for seconds, _, _ in spans), 1),
        "worker_hours": round(workers, 4),
        "gpu_hours": round(gpus, 4),
        "cost": None if price is None else round((gpus or workers) * price, 2),
    }


def versions() -> dict[str, str]:
    """What runs: cxrscale, Python, and the packages that results hang on."""
    found = {"cxrscale": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """The driver's machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return {"machine": platform.machine(), "cpus": os.cpu_count(), "memory_gb": round(memory, 1)}


def git_commit() -> str | None:
    """The checkout's commit, with -dirty where files differ from it; None outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _earlier(run: str) -> list[dict[str, Any]]:
    """The sessions so far; one that was killed ended with the last line that it logged."""
    if not storage.exists(storage.join(run, RUN_INFO)):
        return []
    sessions: list[dict[str, Any]] = read_run_info(run)["sessions"]
    last = max((line["time"] for line in tracking.read_log(run)), default=0.0)
    for each in sessions:
        each["ended"] = each["ended"] or max(each["began"], last)
    return sessions


def _write(run: str, about: Mapping[str, Any], sessions: list[dict[str, Any]], price: float | None) -> None:
    content = {**about, **totals(sessions, price), "sessions": sessions}
    storage.write(storage.join(run, RUN_INFO), json.dumps(content, indent=2) + "\n")
