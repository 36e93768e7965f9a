"""Checkpoint files: written while training goes on, verified by the digest in their names, resumed from the newest."""

from __future__ import annotations

import io
import logging
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from cxrscale.io import seal, storage
from cxrscale.models import load_tensors
from cxrscale.training.state import TrainState
from cxrscale.types import UserError, one_line

LOG = logging.getLogger("cxrscale")
BEST = "best.pt"
FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d{9})-([0-9a-f]{16})\.pt")


class CheckpointWriter:
    """Writes files in a background thread, one after another; an error is raised by the next call."""

    def __init__(self, folder: str, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Write the checkpoint of an optimizer step, and remove all but the newest `keep`."""
        self._submit(lambda: save_checkpoint(self.folder, step, state, self.keep))

    def write(self, address: str, state: Mapping[str, Any]) -> None:
        """Write a state to an address of its own."""
        self._submit(lambda: storage.write(address, dump(state)))

    def wait(self) -> None:
        """Block until everything is written.

        Raises:
            UserError: it could not be written, for instance because the disk is full.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Wait, and end the thread."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def _submit(self, task: Callable[[], None]) -> None:
        # One at a time: a disk slower than training would otherwise fill the memory with states.
        self.wait()
        self._pending = self._pool.submit(task)


def save_checkpoint(folder: str, step: int, state: Mapping[str, Any], keep: int) -> None:
    """Write a complete checkpoint and remove all but the newest `keep`.

    The file's name carries a digest of its content: a damaged file is recognized without a second file to lose.
    """
    content = dump(state)
    written = f"step-{step:09d}-{storage.digest(content)[:16]}.pt"
    storage.write(storage.join(folder, written), content)
    prune(folder, written, keep)


def prune(folder: str, newest: str, keep: int) -> None:
    """Of the checkpoints up to `newest`, keep it and those before it, `keep` in total; later ones are damaged."""
    stored = steps(folder)
    # Another file of the same step, from before the epoch's validation, is older but its name may sort as newer.
    names = [name for name, step in stored.items() if name == newest or step < stored[newest]]
    superseded = {name for name, step in stored.items() if step <= stored[newest]}
    for name in superseded - set(names[-keep:]):
        storage.remove(storage.join(folder, name))


def resume(folder: str, state: TrainState, manifest_digest: str) -> str | None:
    """Load the newest intact checkpoint into the state; returns its name, None where there is none.

    Of two of the same step, one is from before the epoch's validation and the other, which is newer, from after it. One
    that is damaged, or whose weights are not finite, is skipped with a warning, and the one before it is used.

    Raises:
        UserError: the checkpoint was trained on other shards.
    """
    newest: tuple[str, int, dict[str, Any]] | None = None
    for name, step, stored in _usable(folder):
        if newest is not None and step != newest[1]:
            break
        if newest is None or stored["progress"]["epoch"] > newest[2]["progress"]["epoch"]:
            newest = name, step, stored
    if newest is None:
        return None
    if newest[2]["manifest"] != manifest_digest:
        raise UserError(f"{folder}: this run was trained on other shards; give tracking.name another name")
    try:
        state.load_state_dict(newest[2])
    except Exception as error:  # torch raises whatever a value of another type or shape leads to
        raise UserError(
            f"{storage.join(folder, newest[0])} does not fit the recipe's model and optimizer "
            f"({one_line(error, limit=160)}); remove it, or give another tracking.name"
        ) from None
    return newest[0]


def _usable(folder: str) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(name, step, content) of the checkpoints, the newest first; those that cannot be used are named in a warning."""
    for name, step in reversed(steps(folder).items()):
        content = storage.read(storage.join(folder, name))
        if storage.digest(content)[:16] != name[-19:-3]:
            LOG.warning("%s is damaged; falling back to the checkpoint before it", storage.join(folder, name))
            continue
        stored = read(content, name)
        if not isinstance(stored.get("progress"), dict) or not isinstance(stored["progress"].get("epoch"), int):
            raise UserError(f"{name} is not a checkpoint of a training (its field progress is missing or no progress)")
        if not all(value.isfinite().all() for value in stored["model"].values()):
            LOG.warning(
                "%s holds infinite or NaN weights; falling back to the one before it", storage.join(folder, name)
            )
            continue
        yield name, step, stored


def dump(state: Mapping[str, Any]) -> bytes:
    """Serialize a state of tensors and plain values; the comment of the zip archive is its seal."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.comment = seal.BLANK.encode()
    return seal.close(buffer.getvalue())


def read(content: bytes, name: str) -> dict[str, Any]:
    """Deserialize a state, on the CPU.

    Raises:
        UserError: these bytes are not a checkpoint.
    """
    try:
        state = load_tensors(content)
    except Exception as error:  # torch.load raises whatever the pickle or zip reader does
        raise UserError(f"{name} is not a checkpoint ({one_line(error, limit=120)})") from None
    if not isinstance(state, dict):
        raise UserError(f"{name} is not a checkpoint (it holds a {type(state).__name__})")
    for key, kind in (("model", dict), ("manifest", str)):
        if not isinstance(state.get(key), kind):
            raise UserError(f"{name} is not a checkpoint (its field {key} is missing or no {kind.__name__})")
    if not all(isinstance(value, torch.Tensor) for value in state["model"].values()):
        raise UserError(f"{name} is not a checkpoint (a weight in it is no tensor)")
    return state


def steps(folder: str) -> dict[str, int]:
    """File name -> optimizer steps done, of each checkpoint in the folder; the oldest first."""
    matches = {name: _NAME.fullmatch(name) for name in storage.listing(folder, ".pt")}
    return {name: int(match[1]) for name, match in matches.items() if match}
