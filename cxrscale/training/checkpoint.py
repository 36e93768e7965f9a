"""What a checkpoint holds, how it is written while training goes on, and how a run resumes from the newest."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from cxrscale.io import storage
from cxrscale.types import UserError

LOG = logging.getLogger("cxrscale")
BEST = "best.pt"
FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d{9})-([0-9a-f]{16})\.pt")


@dataclass(slots=True)
class Progress:
    """Where a run stands: with the recipe it determines every batch to come."""

    epoch: int = 0
    step: int = 0
    """Optimizer steps done within the epoch."""
    best: float | None = None
    """The best value of train.monitor so far."""
    bad_epochs: int = 0
    """Epochs since then."""
    plateau_epochs: int = 0
    """Epochs without improvement since the rate last fell."""
    rate_scale: float = 1.0
    """What plateaus have made of the learning rate."""
    history: list[dict[str, float]] = field(default_factory=list)
    """The validation metrics of each finished epoch."""


@dataclass(slots=True)
class TrainState:
    """All that training changes."""

    net: nn.Module
    optimizer: torch.optim.Optimizer
    average: AveragedModel | None
    progress: Progress

    @property
    def chosen(self) -> nn.Module:
        """The model that is validated and kept: the average where there is one."""
        return self.net if self.average is None else self.average.module

    def state(self) -> dict[str, Any]:
        """Everything, as copies on the host that further training does not touch."""
        state: dict[str, Any] = {"model": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.average is not None:
            state["average"] = self.average.state_dict()
        return {**on_host(state), "progress": asdict(self.progress)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` once returned."""
        self.net.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.progress = Progress(**state["progress"])


class CheckpointWriter:
    """Writes files while training goes on, one after another; an error comes up at the next call."""

    def __init__(self, folder: str, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Write a checkpoint after so many optimizer steps, and let go of all but the newest `keep`."""
        self._do(lambda: save_checkpoint(self.folder, step, state, self.keep))

    def write(self, address: str, state: Mapping[str, Any]) -> None:
        """Write a state under an address of its own."""
        self._do(lambda: storage.write(address, dump(state)))

    def wait(self) -> None:
        """Until everything is written.

        Raises:
            UserError: it could not be, for instance on a full disk.
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

    def _do(self, work: Callable[[], None]) -> None:
        # One at a time: a disk slower than training would otherwise fill the memory with states.
        self.wait()
        self._pending = self._pool.submit(work)


def save_checkpoint(folder: str, step: int, state: Mapping[str, Any], keep: int) -> None:
    """Write a whole checkpoint and let go of all but the newest `keep`.

    The file's name carries a digest of its content: a damaged file is recognized without a second file to lose.
    """
    content = dump(state)
    written = f"step-{step:09d}-{storage.digest(content)[:16]}.pt"
    storage.write(storage.join(folder, written), content)
    there = steps(folder)
    # One of the same step, from before the epoch's validation, would be older under a name that may sort as newer.
    names = [name for name, of in there.items() if name == written or of != step]
    for name in set(there) - set(names[-keep:]):
        storage.remove(storage.join(folder, name))


def resume(folder: str, learner: TrainState, manifest_digest: str) -> bool:
    """Load the newest whole checkpoint into the learner; False where there is none.

    A damaged one is passed over for the one before, and said so.

    Raises:
        UserError: the checkpoint was trained on other shards.
    """
    for name in reversed(steps(folder)):
        content = storage.read(storage.join(folder, name))
        expected = _NAME.fullmatch(name)
        assert expected is not None
        if storage.digest(content)[:16] != expected[2]:
            LOG.warning("%s is damaged; falling back to the checkpoint before it", storage.join(folder, name))
            continue
        state = read(content, name)
        if state["manifest"] != manifest_digest:
            raise UserError(f"{folder}: this run was trained on other shards; give tracking.name another name")
        learner.load(state)
        return True
    return False


def on_host(value: Any) -> Any:
    """Copies of all tensors of a nested state in the host's memory."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: on_host(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(on_host(each) for each in value)
    return value


def dump(state: Mapping[str, Any]) -> bytes:
    """The bytes of a state of tensors and plain values."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return buffer.getvalue()


def read(content: bytes, name: str) -> dict[str, Any]:
    """The state behind the bytes, on the CPU.

    Raises:
        UserError: these bytes are no checkpoint.
    """
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the pickle or zip reader does
        raise UserError(f"{name} is no checkpoint ({' '.join(str(error).split())[:120]})") from None
    return state


def steps(folder: str) -> dict[str, int]:
    """File name -> optimizer steps done, of each checkpoint there; the oldest first."""
    found = {name: _NAME.fullmatch(name) for name in storage.listing(folder, ".pt")}
    return {name: int(match[1]) for name, match in found.items() if match}
