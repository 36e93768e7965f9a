"""run.json: what a run was made from, with which versions, on what hardware, how long it took and what it cost."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cxrscale import __version__
from cxrscale.io import Artifact, ArtifactPart, read_artifact, storage, write_artifact
from cxrscale.training import tracking
from cxrscale.types import NonFiniteError, UserError, one_line

RUN_INFO = "run.json"
OUTCOME = "outcome.json"
"""Written by rank 0 at the end for the driver, which moves it into run.json."""
ERROR_FILE = "error.txt"
"""Kind and message of a UserError on a worker, for the driver to raise."""
STOP_FILE = "stop"
"""Written by the driver, which gets the signals, to ask the workers to stop with a checkpoint."""
PACKAGES = (
    "torch",
    "timm",
    "segmentation-models-pytorch",
    "ray",
    "nvidia-dali-cuda130",
    "numpy",
    "opencv-python-headless",
)


class RunInputs(ArtifactPart):
    """What a run is made from."""

    recipe: str = ""
    """The stem of the recipe's file."""
    shards: tuple[str, ...] = ()
    """Folders or addresses of the datasets."""
    manifest: str
    """Digest of their manifests."""
    inputs: tuple[Any, ...] = ()
    """For each dataset, the input that it was built from, as its manifest has it."""
    files: Mapping[str, str] = {}
    """Address -> digest of each further file that the recipe names: weights, predictions of hard images."""


class Hardware(ArtifactPart):
    """The driver's machine."""

    machine: str
    """Its architecture, e.g. x86_64."""
    cpus: int | None
    memory_gb: float


class Environment(ArtifactPart):
    """What runs, and where."""

    versions: Mapping[str, str]
    """cxrscale, Python, and the packages that results depend on."""
    hardware: Hardware
    git: str | None
    """The checkout's commit; None outside of one."""


class Change(ArtifactPart):
    """A field's value in the session before, and now."""

    old: Any
    new: Any


class BadRows(ArtifactPart):
    """Rows that an epoch left out of loss and metrics, since their image could not be read."""

    train: int
    val: int


class Session(ArtifactPart):
    """One launch of a run; times are Unix seconds."""

    began: float
    ended: float | None = None
    """None while it runs, or after a kill."""
    workers: int
    device: str | None = None
    """The name of the GPU, or CPU; None until the session ends normally."""
    changed: Mapping[str, Change] = {}
    """The recipe's fields that differ from the session before."""
    error: str | None = None
    """What ended it; None where nothing was wrong, or after a kill."""


class Usage(ArtifactPart):
    """What all sessions of a run took together."""

    seconds: float = 0.0
    """Wall time."""
    worker_hours: float = 0.0
    gpu_hours: float = 0.0
    cost: float | None = None
    """Of the GPU hours, or of the worker hours where there is no GPU; None without a price."""


class Outcome(Artifact):
    """How a session ended."""

    schema_version: int = 1
    finished: bool
    epochs: int
    best: float | None
    """The best value of train.monitor."""
    device: str
    workers: int
    bad_rows: tuple[BadRows, ...] = ()


class RunInfo(Usage, Environment, RunInputs, Artifact):
    """The content of run.json; the environment is that of the last session's driver."""

    schema_version: int = 1
    finished: bool = False
    """False where the run was stopped or killed; re-run the same command to resume."""
    epochs: int | None = None
    """Epochs done; None where no session has ended normally."""
    best: float | None = None
    """The best value of train.monitor."""
    error: str | None = None
    """What ended the last session; None where nothing was wrong, or after a kill."""
    diverged: bool = False
    """Whether that was a loss, a weight or a score that is not finite: a resume may then lower optim.lr."""
    bad_rows: tuple[BadRows, ...] = ()
    """Of each epoch done."""
    sessions: tuple[Session, ...] = ()

    @property
    def ending(self) -> str:
        """How the run stands, in words: what every command and page says of it."""
        if self.finished:
            return "finished"
        if not self.sessions:
            return "not begun"
        if self.sessions[-1].ended is None:
            return "running, or killed"
        if self.error is not None:
            return "diverged" if self.diverged else "failed"
        return "stopped"


def read_run_info(run: str) -> RunInfo:
    """A run's run.json, with the outcome that lies beside it where the driver was lost before it could move it there.

    Raises:
        UserError: there is none, or it is not one.
    """
    info = read_artifact(RunInfo, storage.join(run, RUN_INFO), "give the folder that `cxrscale train` printed")
    outcome = _outcome(run)
    if outcome is None or not info.sessions or info.sessions[-1].ended is not None:
        return info
    *earlier, last = info.sessions
    return info.model_copy(update={"sessions": (*earlier, _ran(last, outcome)), **_results(outcome)})


def _outcome(run: str) -> Outcome | None:
    address = storage.join(run, OUTCOME)
    return read_artifact(Outcome, address, "remove it") if storage.exists(address) else None


def _results(outcome: Outcome) -> dict[str, Any]:
    """What run.json takes from an outcome."""
    return {name: getattr(outcome, name) for name in ("finished", "epochs", "best", "bad_rows")}


def _ran(session: Session, outcome: Outcome) -> Session:
    return session.model_copy(update={"device": outcome.device, "workers": outcome.workers})


def write_new(run: str, inputs: RunInputs) -> None:
    """Write the run.json of a run that has not begun."""
    write_artifact(storage.join(run, RUN_INFO), RunInfo(**dict(inputs), **dict(environment())))


@contextmanager
def record_session(
    run: str, inputs: RunInputs, workers: int, price: float | None, changed: Mapping[str, Change] | None = None
) -> Iterator[None]:
    """Keep run.json while a run is trained: each launch is a session of it, and time lost to kills is counted too.

    Args:
        inputs: what the run is made from.
        workers: the maximum of workers of this session.
        price: of an hour of a GPU, or of a worker where there is none.
        changed: the recipe's fields that differ from the session before.
    """
    address = storage.join(run, RUN_INFO)
    earlier = _earlier_sessions(run)
    session = Session(began=round(time.time(), 1), workers=workers, changed=changed or {})
    base: dict[str, Any] = {**dict(inputs), **dict(environment())}
    sessions = (*earlier, session)
    write_artifact(address, RunInfo(**base, **dict(sum_usage(sessions, price)), sessions=sessions))
    # Of a session whose driver was lost: it is part of the earlier sessions by now.
    storage.remove(storage.join(run, OUTCOME))
    try:
        yield
    except UserError as error:
        base |= {"error": str(error), "diverged": isinstance(error, NonFiniteError)}
        raise
    except Exception as error:  # no mistake of the user: memory that is not there, a fault of ours
        base |= {"error": one_line(error, with_type=True, limit=500)}
        raise
    finally:
        session = session.model_copy(update={"ended": round(time.time(), 1), "error": base.get("error")})
        if (outcome := _outcome(run)) is not None:
            session, base = _ran(session, outcome), base | _results(outcome)
        sessions = (*earlier, session)
        write_artifact(address, RunInfo(**base, **dict(sum_usage(sessions, price)), sessions=sessions))
        storage.remove(storage.join(run, OUTCOME))


def bad_rows(history: Sequence[Mapping[str, float]]) -> tuple[BadRows, ...]:
    """What each epoch's metrics say of rows that were left out; epochs of earlier versions count none."""
    return tuple(
        BadRows(train=int(metrics.get("bad_rows_train", 0)), val=int(metrics.get("bad_rows_val", 0)))
        for metrics in history
    )


def sum_usage(sessions: Sequence[Session], price: float | None) -> Usage:
    """Wall seconds, hours of GPUs and of workers over all sessions, and their price."""
    # A killed session has no device: assume that of the run's other sessions, as far as known.
    known = next((session.device for session in reversed(sessions) if session.device), None)
    spans = [
        (session.ended - session.began, session.workers, session.device or known)
        for session in sessions
        if session.ended
    ]
    workers = sum(seconds * count for seconds, count, _ in spans) / 3600
    gpus = sum(seconds * count for seconds, count, device in spans if device not in (None, "CPU")) / 3600
    return Usage(
        seconds=round(sum(seconds for seconds, _, _ in spans), 1),
        worker_hours=round(workers, 4),
        gpu_hours=round(gpus, 4),
        cost=None if price is None else round((gpus or workers) * price, 2),
    )


def environment() -> Environment:
    """The versions, the hardware and the commit of this process."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    hardware = Hardware(machine=platform.machine(), cpus=os.cpu_count(), memory_gb=round(memory, 1))
    return Environment(versions=_versions(), hardware=hardware, git=git_commit())


def git_commit() -> str | None:
    """The checkout's commit, with -dirty where files differ from it; None outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _versions() -> dict[str, str]:
    versions = {"cxrscale": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _earlier_sessions(run: str) -> tuple[Session, ...]:
    """The sessions so far; one that was killed ended with the last line that it logged."""
    if not storage.exists(storage.join(run, RUN_INFO)):
        return ()
    return close_sessions(read_run_info(run).sessions, tracking.read_log(run))


def close_sessions(sessions: Sequence[Session], lines: Sequence[Mapping[str, Any]]) -> tuple[Session, ...]:
    """The sessions with an end each: where a kill left none, the time of the run's last log line."""
    last = max((line["time"] for line in lines), default=0.0)
    return tuple(
        session.model_copy(update={"ended": session.ended or max(session.began, last)}) for session in sessions
    )
