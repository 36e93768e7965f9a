"""What a run watches for while it trains: losses and weights that are not finite, rows whose image cannot be read."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import torch

from cxrscale.config import Recipe
from cxrscale.training.distributed import all_reduce_sum
from cxrscale.training.state import Progress, TrainState
from cxrscale.types import Batch, DistContext, NonFiniteError, UserError

REMEDY = (
    "lower optim.lr or set optim.max_grad_norm=1; under the same tracking.name the run then resumes from its last "
    "checkpoint"
)


class Window:
    """The steps since the last log line: their losses and bad rows stay on the device until somebody needs them."""

    def __init__(self, progress: Progress, recipe: Recipe, steps: int, dist: DistContext) -> None:
        """`steps` is the number of steps per epoch."""
        self._progress, self._recipe, self._steps, self._dist = progress, recipe, steps, dist
        self._losses: list[torch.Tensor] = []
        self._bad: list[torch.Tensor] = []
        self._restart()

    def _restart(self) -> None:
        self._began, self._waited, self._done = time.perf_counter(), 0.0, 0

    def timed(self, batches: Iterator[Batch]) -> Batch:
        """The next batch; how long it took counts as waiting for data."""
        began = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - began
        return batch

    def add(self, loss: torch.Tensor, bad: torch.Tensor) -> None:
        """A step: this rank's share of the loss, and how many rows of the global batch were left out."""
        self._losses.append(loss)
        self._bad.append(bad)
        self._done += 1

    def settle(self, step: int) -> None:
        """Fetch what has gathered into the progress, after `step` optimizer steps; every rank calls it together.

        Raises:
            NonFiniteError: a loss is not finite; names the first step.
            UserError: too many bad rows.
        """
        progress = self._progress
        # DDP averages gradients of world x (rank's share): the mean over ranks is the loss of the global batch.
        loss_T = (all_reduce_sum(torch.stack(self._losses), self._dist) / self._dist.world).tolist()
        for number, loss in enumerate(loss_T, step - len(loss_T) + 1):
            if not math.isfinite(loss):
                raise NonFiniteError(f"the loss is {loss} at step {number}: {REMEDY}")
        progress.window_loss += sum(loss_T)
        progress.window_steps += len(loss_T)
        progress.bad_rows += int(torch.stack(self._bad).sum())
        self._losses, self._bad = [], []
        bad, total = progress.bad_rows, progress.step * self._recipe.sampler.batch_size
        limit, ended = self._recipe.data.max_bad_rows, progress.step == self._steps
        if (limit is not None and bad > limit) or (ended and bad == total):
            raise bad_rows_error(bad, total, "training", self._recipe)

    def line(self, lr: float, norm: float) -> dict[str, float]:
        """The values of the log line, which ends the window."""
        recipe, progress, seconds = self._recipe, self._progress, time.perf_counter() - self._began
        values = {
            "epoch": progress.epoch,
            "loss": progress.window_loss / progress.window_steps,
            "lr": lr,
            "gradient_norm": norm,
            "images_per_second": self._done * recipe.sampler.batch_size / seconds,
            "data_wait": self._waited / seconds,
            "bad_rows": progress.bad_rows,
            "steps": self._steps * recipe.train.epochs,
        }
        progress.window_loss, progress.window_steps = 0.0, 0
        self._restart()
        return values


def bad_rows_error(bad: int, total: int, part: str, recipe: Recipe) -> UserError:
    """The error of too many rows whose images cannot be read; `part` is training or validation."""
    limit = recipe.data.max_bad_rows
    field = f"data.max_bad_rows={limit}" if limit is not None else "data.shards"
    return UserError(
        f"{field}: {bad} of the epoch's {total} rows of {part} could not be read; "
        f"`cxrscale verify {' '.join(recipe.data.shards)}` names them"
    )


def check_weights(state: TrainState, step: int, dist: DistContext) -> None:
    """Look for what is not finite in all that a checkpoint holds; the same answer on every rank.

    Raises:
        NonFiniteError: names one of them.
    """
    named = {f"weight {name}": value for name, value in state.model.state_dict().items()}
    if state.ema is not None:
        named |= {f"average of weight {name}": value for name, value in state.ema.module.state_dict().items()}
    for number, moments in state.optimizer.state_dict()["state"].items():
        named |= {f"{name} of parameter {number}": value for name, value in moments.items() if torch.is_tensor(value)}
    tensors = {name: value for name, value in named.items() if value.is_floating_point() and value.numel()}
    on_device = [value for value in tensors.values() if value.device.type == dist.device.type]
    # The largest magnitude of each tensor, in few kernels; NaN stays NaN.
    wrong_N = ~torch.stack([value.float() for value in torch._foreach_norm(on_device, math.inf)]).isfinite()
    if float(all_reduce_sum(wrong_N.any().float(), dist)):
        names = [name for name, value in tensors.items() if not bool(value.isfinite().all())]
        name = names[0] if names else "a weight of another worker"
        raise NonFiniteError(
            f"{name} is not finite after step {step} ({len(names)} of {len(tensors)} tensors are not): {REMEDY}"
        )
