"""Class activation maps (Zhou et al. 2016, arXiv 1512.04150): where a classifier's logits come from, exactly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

EXACT = 1e-3
"""The mean of a map and its logit may differ by so much of the largest logit: rounding, in bf16 too much."""


class Features:
    """The features that a classifier pools in a forward pass."""

    def __init__(self, model: nn.Module) -> None:
        self._linear = _linear(model)
        self.feature_BChw: torch.Tensor | None = None

    def maps(self, logit_BF: torch.Tensor) -> torch.Tensor | None:
        """(B, F, h, w) maps whose means are the logits of the same forward pass; None where the model has none.

        A model has such maps where its logits are a linear layer of averaged features and nothing stands between:
        DenseNet, ResNet, EfficientNet. MobileNetV3 has a layer between, a vision transformer no features to average.
        """
        if self._linear is None or self.feature_BChw is None or self.feature_BChw.ndim != 4:
            return None
        weight_FC, bias_F = self._linear.weight.float(), self._linear.bias
        if weight_FC.shape[1] != self.feature_BChw.shape[1]:
            return None
        map_BFhw = torch.einsum("fc,bchw->bfhw", weight_FC, self.feature_BChw.float())
        if bias_F is not None:
            map_BFhw = map_BFhw + bias_F.float()[:, None, None]
        error = (map_BFhw.mean(dim=(2, 3)) - logit_BF).abs().max()
        return map_BFhw if error <= EXACT * max(1.0, float(logit_BF.abs().max())) else None


@contextmanager
def pooled_features(model: nn.Module) -> Iterator[Features]:
    """Keep what the model's pooling layer sees in the forward passes of the block."""
    features, pool = Features(model), getattr(model, "global_pool", None)

    def keep(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        features.feature_BChw = inputs[0].detach()

    handle = pool.register_forward_pre_hook(keep) if isinstance(pool, nn.Module) else None
    try:
        yield features
    finally:
        if handle is not None:
            handle.remove()


def _linear(model: nn.Module) -> nn.Linear | None:
    """The classifier of a model of timm."""
    getter: Any = getattr(model, "get_classifier", None)
    layer = getter() if callable(getter) else None
    return layer if isinstance(layer, nn.Linear) else None
