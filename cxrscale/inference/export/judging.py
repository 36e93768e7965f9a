"""A run's own model on a sample of its images, and how far other forms of it are from that."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from cxrscale.evaluation import DEFAULT_MASK_RULE, Thresholds, calls
from cxrscale.inference.export import parity
from cxrscale.inference.export.contract import Difference
from cxrscale.inference.trained import TrainedModel
from cxrscale.loader import evaluation_batches, usable_rows
from cxrscale.shards import Manifest
from cxrscale.types import UserError, probabilities_of

SAMPLE = 256
"""Validation images that forms are compared on."""
CALIBRATION = 64
"""Training images that ranges of activations are calibrated on."""
DYNAMIC = (1, 7, 32)
"""Batch sizes that a form is tried with, whatever it was exported with."""


class Judge:
    """Validation images with the float32 outputs of a run's own model."""

    def __init__(self, trained: TrainedModel, images: Sequence[torch.Tensor], chosen: Thresholds | None) -> None:
        """Args:
        trained: on the CPU.
        images: batches of (B, 1, H, W).
        chosen: the run's thresholds; None: calls are made at 0.5.
        """
        self._trained, self._chosen = trained, chosen
        self.images = list(images)
        self._own = [_logits(trained.model, image_BCHW) for image_BCHW in self.images]

    @property
    def maps(self) -> bool:
        """Whether the outputs are maps."""
        return self._trained.recipe.data.task == "segment"

    def difference(self, model: nn.Module, images: int = SAMPLE) -> Difference:
        """How far a form of the model is from it.

        Args:
            images: of the sample, at least so many where it has them.
        """
        total = parity.Tally()
        for image_BCHW, own in zip(self.images, self._own, strict=True):
            total += self._tally(own, _logits(model, image_BCHW))
            if total.images >= images:
                break
        return total.difference(maps=self.maps)

    def rounding(self) -> float:
        """How far the run's own probabilities are from those of its model in float64, on a batch of the sample."""
        exact = copy.deepcopy(self._trained.model).double()
        with torch.no_grad():
            logits = exact(self.images[0].double()).numpy()
        return float(np.abs(probabilities_of(self._own[0]) - probabilities_of(logits)).max())

    def check_batches(self, model: nn.Module) -> Difference:
        """The same over batches of `DYNAMIC` sizes, images again and again where the sample has too few.

        Raises:
            UserError: the form refuses a batch of such a size.
        """
        first, own = self.images[0], self._own[0]
        total = parity.Tally()
        for size in DYNAMIC:
            index = np.arange(size) % len(first)
            try:
                logits = _logits(model, first[torch.from_numpy(index)])
            except Exception as error:  # a runtime raises whatever its operators do
                raise UserError(f"the exported model refuses a batch of {size}: {str(error)[:160]!r}") from None
            total += self._tally(own[index], logits)
        return total.difference(maps=self.maps)

    def _tally(self, own: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> parity.Tally:
        if own.shape != other.shape:
            raise UserError(f"the exported model gives {other.shape}, where the run's own gives {own.shape}")
        return parity.tally(probabilities_of(own), probabilities_of(other), self._called(own), self._called(other))

    def _called(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
        if self.maps:
            rule = (self._chosen and self._chosen.mask_rule) or DEFAULT_MASK_RULE
            return np.asarray(probabilities_of(logits) >= rule.bottom)
        if self._chosen is None:
            return logits >= 0
        found = calls.call_images(logits, self._trained.recipe.data.findings, self._chosen, {})
        return np.asarray(found.called_NF == 1)


def sample(trained: TrainedModel, data: Manifest, splits: Sequence[str], count: int) -> list[torch.Tensor]:
    """Batches of up to `count` images of the splits, evenly spaced, as the model sees them.

    Raises:
        UserError: the splits are empty, or no image of the sample can be read.
    """
    recipe, name = trained.recipe, "the sample"
    rows = usable_rows(data, splits, recipe.data)
    chosen = data.only(rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)], name)
    batches = [batch.image_BCHW[batch.valid_B] for batch in evaluation_batches(chosen, (name,), recipe)]
    found = [image_BCHW for image_BCHW in batches if len(image_BCHW)]
    if not found:
        raise UserError(f"no image of split {', '.join(splits)} can be read; run `cxrscale verify`")
    return found


@torch.no_grad()
def _logits(model: nn.Module, image_BCHW: torch.Tensor) -> npt.NDArray[np.float32]:
    """In float32: autocast is for training."""
    logits: npt.NDArray[np.float32] = model(image_BCHW.float()).float().numpy()
    return logits
