"""All files of a run or a search, each held against the digest that it carries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cxrscale.io import lease, png_damage, seal, storage, walk
from cxrscale.training import checkpoint, resume, run_info, tracking
from cxrscale.types import UserError

OTHERS = ("wandb", "ray")
"""Folders of Weights & Biases and of Ray, whose files carry no digest of ours."""
WEIGHTS = (checkpoint.BEST, "model.onnx", "model.pt2")
"""What a run's file of weights is called: as trained, or exported to ONNX or with torch.export."""
_PASSING = {lease.NAME, run_info.STOP_FILE, run_info.ERROR_FILE}
"""Files that are there only while a command runs."""


@dataclass(frozen=True, slots=True)
class RunFiles:
    """What was found in a run's folder."""

    checked: int
    """Files that fit the digest that they carry."""
    faults: tuple[str, ...]
    """One line per file that is missing or does not."""
    without: tuple[str, ...]
    """Files without a digest: of an earlier version, or not ours."""
    others: int
    """Files of Weights & Biases and Ray, which were not looked at."""


def weights_file(run: str | Path) -> str:
    """The path or address of the file that holds a run's weights; that of a best.pt where there is none yet."""
    paths = [storage.join(run, name) for name in WEIGHTS]
    return next((path for path in paths if storage.exists(path)), paths[0])


def verify(run: str, on_file: Callable[[], None] | None = None) -> RunFiles:
    """Read every file of a run or search, its trials included.

    JSON, Parquet, YAML, HTML and checkpoints carry a seal (see `io.seal`), each line of a log a CRC-32, and each chunk
    of a PNG too.

    Args:
        run: its folder or address.
        on_file: called after each file.

    Raises:
        UserError: there is no run and no search.
        AccessError: a file cannot be read, which says nothing about its content.
    """
    names = {"/".join(found.parts): found.path for found in walk(run)}
    if run_info.RUN_INFO not in names and resume.SEARCH_INFO not in names:
        raise UserError(f"{run} has neither {run_info.RUN_INFO} nor {resume.SEARCH_INFO}: give a run or a search")
    faults, without, checked, others = [f"{name}: missing" for name in _missing(run, set(names))], [], 0, 0
    for name, path in names.items():
        parts = name.split("/")
        if not _PASSING.isdisjoint(parts):
            continue
        if not set(OTHERS).isdisjoint(parts[:-1]):
            others += 1
            continue
        fault = _fault(name, storage.read(path))
        if fault is None:
            without.append(name)
        elif fault:
            faults.append(f"{name}: {fault}")
        else:
            checked += 1
        if on_file:
            on_file()
    return RunFiles(checked, tuple(faults), tuple(without), others)


def _missing(run: str, names: set[str]) -> list[str]:
    """What runs, here or in the folders of a search's trials, must have by what their run.json says."""
    wanted = {resume.RECIPE}
    for name in names:
        folder, _, base = name.rpartition("/")
        if base != run_info.RUN_INFO:
            continue
        try:
            info = run_info.read_run_info(storage.join(run, *filter(None, [folder])))
        except UserError:
            continue  # its seal will say so
        needed = [resume.RECIPE, *([tracking.TRAIN_LOG] if info.finished and info.sessions else [])]
        # An ensemble has weights without a session of training.
        whole = info.finished and (info.best is not None or not info.sessions)
        here = [one for one in WEIGHTS if f"{folder}/{one}".removeprefix("/") in names]
        needed += (here or [checkpoint.BEST])[:1] if whole else []
        wanted |= {f"{folder}/{one}".removeprefix("/") for one in needed}
    return sorted(wanted - names)


def _fault(name: str, content: bytes) -> str | None:
    """What is wrong with a file; empty where nothing is, None where it carries no digest."""
    if name.endswith(".png"):
        return png_damage(content)
    if name.endswith(".jsonl"):
        return _fault_of_log(name, content)
    intact = seal.is_intact(content)
    if intact is None:
        return None
    return "" if intact else "differs from the digest that it carries"


def _fault_of_log(name: str, content: bytes) -> str | None:
    if content and not content.endswith(b"\n"):
        return "its last line is cut short; resuming the run mends it"
    try:
        tracking.parse_log(content, name)
    except UserError as error:
        return str(error).removeprefix(f"{name}: ")
    lines = content.splitlines()
    sealed = sum(f'"{tracking.CRC}"'.encode() in line for line in lines)
    if sealed == len(lines):
        return ""
    # A version that writes CRCs gives one to every line; of a file without, nothing can be said.
    return f"{len(lines) - sealed} of {len(lines)} lines have no CRC-32" if sealed else None
