"""The one forward pass of training, scoring and prediction: memory layout, autocast, logits in fp32, probabilities."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from cxrscale.config import Train
from cxrscale.types import Batch


def forward(model: nn.Module, batch: Batch, settings: Train, device: torch.device) -> torch.Tensor:
    """The model's fp32 logits of a batch: (B, F) to classify, (B, 1, H, W) to segment.

    Args:
        model: also wrapped or compiled; it stays in the mode it is in.
        settings: `precision` and `channels_last`.
        device: the device of model and batch.
    """
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    images = [one.float().contiguous(memory_format=layout) for one in (batch.image_BCHW, *batch.also_BCHW)]
    with _autocast(settings, device):
        logits: torch.Tensor = model(*images)
    # bf16 has 8 bits of mantissa: losses and probabilities are computed in fp32.
    return logits.float()


def probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Probabilities in 0..1 of each logit; every finding, or pixel, is a binary decision of its own."""
    return logits.sigmoid()


def _autocast(settings: Train, device: torch.device) -> AbstractContextManager[object]:
    """bf16 autocast where the recipe (or `auto` on a GPU) asks for it."""
    wanted = settings.precision == "bf16" or (settings.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16) if wanted else nullcontext()
