"""All that training changes: model, optimizer, moving average and progress; what a checkpoint stores and restores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

_STORED_NAMES = {"lr_scale": "rate_scale"}
"""Fields of `Progress` whose name in checkpoint files is another: checkpoints of earlier versions must load."""


@dataclass(slots=True)
class Progress:
    """How far a run has come: with the recipe it determines every batch that follows."""

    epoch: int = 0
    step: int = 0
    """Optimizer steps done within the epoch."""
    best: float | None = None
    """The best value of train.monitor so far."""
    bad_epochs: int = 0
    """Epochs since then."""
    plateau_epochs: int = 0
    """Epochs without improvement since the learning rate last fell."""
    lr_scale: float = 1.0
    """Factor on the learning rate: the product of all plateaus so far."""
    history: list[dict[str, float]] = field(default_factory=list)
    """The validation metrics of each finished epoch."""
    bad_rows: int = 0
    """Rows of the epoch so far that were left out: their image could not be read."""
    window_loss: float = 0.0
    window_steps: int = 0
    """Sum of the losses of the steps since the last log line, and their number: the line after a resume is complete."""

    def state_dict(self) -> dict[str, Any]:
        """The fields under the names that checkpoint files have for them."""
        return {_STORED_NAMES.get(name, name): value for name, value in asdict(self).items()}

    @classmethod
    def from_state_dict(cls, stored: Mapping[str, Any]) -> Progress:
        """Restore what `state_dict` returned; what earlier versions did not store has its default."""
        names = {item.name: _STORED_NAMES.get(item.name, item.name) for item in fields(cls)}
        return cls(**{name: stored[key] for name, key in names.items() if key in stored})


@dataclass(slots=True)
class TrainState:
    """Model, optimizer, moving average and progress of a run."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: AveragedModel | None
    progress: Progress

    @property
    def eval_model(self) -> nn.Module:
        """The model that is validated and kept: the moving average where there is one."""
        return self.model if self.ema is None else self.ema.module

    def state_dict(self) -> dict[str, Any]:
        """Everything, as copies in host memory that further training does not change."""
        state: dict[str, Any] = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.ema is not None:
            # "average" is the key of checkpoints since the first version.
            state["average"] = self.ema.state_dict()
        return {**to_host(state), "progress": self.progress.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.load_state_dict(state["average"])
        self.progress = Progress.from_state_dict(state["progress"])


def to_host(value: Any) -> Any:
    """A copy of a nested state with all its tensors in host memory."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: to_host(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_host(item) for item in value)
    return value
