"""Maps of a batch, by whatever way a model allows: exactly, by Grad-CAM, or of a segmenter the scores themselves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from cxrscale.config import Recipe
from cxrscale.evaluation import MapMethod
from cxrscale.models import Averaged, GradientMaps, forward, pooled_features, probabilities
from cxrscale.types import Batch, UserError

Maps = npt.NDArray[np.float32]


class MapMaker:
    """A model that says where its logits come from."""

    def __init__(self, model: nn.Module, recipe: Recipe, device: torch.device, method: MapMethod | None = None) -> None:
        """Find out which maps the model has, by one forward pass.

        Args:
            model: in evaluation mode, on the device.
            method: what is known of its architecture; None: find out.

        Raises:
            UserError: it has none, or the package that computes them is missing.
        """
        if isinstance(model, Averaged):
            raise UserError("an ensemble has no maps of its own; explain its members one by one")
        self._model, self._device = model, device
        # With bf16 a map's mean differs from its logit by more than rounding explains.
        self._settings = recipe.train.model_copy(update={"precision": "fp32"})
        self._gradients: GradientMaps | None = None
        self.method: MapMethod = "score map"
        if recipe.data.task == "segment":
            return
        blank_11HW = torch.zeros(1, 1, recipe.augment.size, recipe.augment.size, device=device)
        self.method = method or ("grad-cam" if self._exact(_batch_of(blank_11HW))[1] is None else "exact")
        if self.method == "grad-cam":
            self._gradients = GradientMaps(model)
            self._gradients.maps(blank_11HW, [0])

    def __call__(self, batch: Batch, findings: Sequence[int]) -> tuple[torch.Tensor, Maps]:
        """((B, F) logits of all findings, (B, len(findings), h, w) maps of some of them).

        Exact maps and Grad-CAM are in logits, score maps are probabilities. A map that is not finite is NaN.
        """
        if self._gradients is not None:
            with torch.no_grad():
                logits = forward(self._model, batch, self._settings, self._device)
            return logits, self._gradients.maps(batch.image_BCHW, findings).cpu().numpy()
        logits, map_BFhw = self._exact(batch)
        if self.method == "score map":
            return logits.flatten(2).amax(dim=2), probabilities(logits).cpu().numpy()
        if map_BFhw is None:
            # Weights at random can give infinite features.
            return logits, np.full((len(logits), len(findings), 1, 1), np.nan, np.float32)
        return logits, map_BFhw[:, list(findings)].cpu().numpy()

    def logits(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """(B, F) logits, of a segmenter (B, 1) those of the highest pixel."""
        with torch.no_grad():
            logits = forward(self._model, _batch_of(image_BCHW), self._settings, self._device)
        return logits.flatten(2).amax(dim=2) if logits.ndim == 4 else logits

    def _exact(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        with torch.no_grad(), pooled_features(self._model) as features:
            logits = forward(self._model, batch, self._settings, self._device)
            return logits, features.maps(logits) if logits.ndim == 2 else None


def _batch_of(image_BCHW: torch.Tensor) -> Batch:
    count = len(image_BCHW)
    label_BF = torch.full((count, 1), torch.nan)
    return Batch(image_BCHW, label_BF, None, torch.arange(count), torch.ones(count, dtype=torch.bool))
