"""The one forward pass: memory layout, autocast, logits in fp32, probabilities; used by training, scoring, prediction."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from cxrscale.config import Train
from cxrscale.types import Batch


def autocast(train: Train, device: torch.device) -> AbstractContextManager[object]:
    """bf16 autocast where the recipe (or `auto` on a GPU) asks for it."""
    wanted = train.precision == "bf16" or (train.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16) if wanted else nullcontext()


def model_input(net_batch: Batch, train: Train) -> torch.Tensor:
    """The batch's images (B, 1, H, W) fp32 in the memory layout that the recipe asks for."""
    layout = torch.channels_last if train.channels_last else torch.contiguous_format
    return net_batch.image_BCHW.float().contiguous(memory_format=layout)
