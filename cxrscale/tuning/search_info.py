"""sweep.json: what a search was made from, when it ran, and its verdict."""

from __future__ import annotations

from cxrscale.io import Artifact, ArtifactPart, read_artifact, storage, write_artifact
from cxrscale.training import RunInputs, resume, run_info


class SearchSession(ArtifactPart):
    """One launch of a search; times are Unix seconds."""

    began: float
    ended: float | None = None
    """None while it runs, or after a kill."""


class SearchTotals(ArtifactPart):
    """What all trials took together."""

    worker_hours: float = 0.0
    gpu_hours: float = 0.0
    cost: float | None = None
    """None without a price."""


class SearchInfo(SearchTotals, run_info.Environment, RunInputs, Artifact):
    """The content of sweep.json; the environment is that of the last session's driver."""

    schema_version: int = 1
    finished: bool = False
    """False where it was interrupted; re-run the same command to resume."""
    verdict: str = ""
    """Whether the best trial beats the unchanged recipe; empty until finished."""
    sessions: tuple[SearchSession, ...] = ()


def is_search(run: str) -> bool:
    """Whether the folder holds a search."""
    return storage.exists(storage.join(run, resume.SEARCH_INFO))


def read_search_info(run: str) -> SearchInfo:
    """A search's sweep.json.

    Raises:
        UserError: there is none, or it is not one.
    """
    return read_artifact(SearchInfo, storage.join(run, resume.SEARCH_INFO), "give another tracking.name")


def write_search_info(run: str, info: SearchInfo) -> None:
    """Write a search's sweep.json."""
    write_artifact(storage.join(run, resume.SEARCH_INFO), info)
