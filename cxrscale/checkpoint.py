"""What a checkpoint holds, and how a run resumes from the newest one that is whole."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from cxrscale import storage
from cxrscale.schema import InputError

LOG = logging.getLogger("cxrscale")
BEST = "best.pt"
_NAME = re.compile(r"step-(\d{9})-([0-9a-f]{16})\.pt")


@dataclass(slots=True)
class Progress:
    """Where a run stands: with the recipe it determines every batch to come."""

    epoch: int = 0
    step: int = 0
    """Optimizer steps done within the epoch."""
    best: float | None = None
    """The best value of train.metric so far."""
    bad_epochs: int = 0
    """Epochs since then."""
    plateau_epochs: int = 0
    """Epochs without improvement since the rate last fell."""
    rate_scale: float = 1.0
    """What plateaus have made of the learning rate."""
    history: list[dict[str, float]] = field(default_factory=list)
    """The validation metrics of each finished epoch."""


def save(
    folder: str,
    step: int,
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    about: Mapping[str, Any],
    keep: int,
) -> None:
    """Write a whole checkpoint and let go of all but the newest `keep`.

    The file's name carries a digest of its content: a damaged file is recognised without a second file to lose.
    """
    content = dump(
        {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "progress": asdict(progress), **about}
    )
    storage.write(storage.join(folder, f"step-{step:09d}-{storage.digest(content)[:16]}.pt"), content)
    for name in _names(folder)[:-keep]:
        storage.remove(storage.join(folder, name))


def resume(folder: str, net: nn.Module, optimizer: torch.optim.Optimizer, manifest_digest: str) -> Progress | None:
    """Load the newest whole checkpoint into net and optimizer; None where there is none.

    A damaged one is passed over for the one before, and said so.

    Raises:
        InputError: the checkpoint was trained on other shards.
    """
    for name in reversed(_names(folder)):
        content = storage.read(storage.join(folder, name))
        expected = _NAME.fullmatch(name)
        assert expected is not None
        if storage.digest(content)[:16] != expected[2]:
            LOG.warning("%s is damaged; falling back to the checkpoint before it", storage.join(folder, name))
            continue
        state = read(content, name)
        if state["manifest"] != manifest_digest:
            raise InputError(f"{folder}: this run was trained on other shards; give tracking.name another name")
        net.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return Progress(**state["progress"])
    return None


def dump(state: Mapping[str, Any]) -> bytes:
    """The bytes of a state of tensors and plain values."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return buffer.getvalue()


def read(content: bytes, name: str) -> dict[str, Any]:
    """The state behind the bytes, on the CPU.

    Raises:
        InputError: these bytes are no checkpoint.
    """
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the pickle or zip reader does
        raise InputError(f"{name} is no checkpoint ({' '.join(str(error).split())[:120]})") from None
    return state


def _names(folder: str) -> list[str]:
    return [name for name in storage.listing(folder, ".pt") if _NAME.fullmatch(name)]
