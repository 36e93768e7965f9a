"""The recipe's optimizer, its learning rate at a step, and the moving average of the weights."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cxrscale.config import Optim


def build_optimizer(model: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """The optimizer over the trainable parameters, fused: one kernel per step instead of hundreds."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if optim.name == "sgd":
        momentum = optim.betas[0]
        return torch.optim.SGD(
            trainable, optim.lr, momentum=momentum, weight_decay=optim.weight_decay, nesterov=momentum > 0, fused=True
        )
    kind = torch.optim.AdamW if optim.name == "adamw" else torch.optim.Adam
    return kind(trainable, optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=True)


def build_ema(model: nn.Module, optim: Optim) -> AveragedModel | None:
    """The moving average of the weights, or None; its buffers (batch-norm statistics) are copies of the model's."""
    if not optim.ema_decay:
        return None
    # The count of updates stays on the CPU (no device given): reading it must not wait for the GPU.
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(optim.ema_decay))  # type: ignore[no-untyped-call]


def learning_rate(optim: Optim, step: int, total: int) -> float:
    """The learning rate at an optimizer step, before plateaus: linear warmup, then constant or a half cosine to 0."""
    if step < optim.warmup_steps:
        return optim.lr * ((step + 1) / optim.warmup_steps)
    if optim.schedule != "cosine":
        return optim.lr
    progress = (step - optim.warmup_steps) / max(1, total - optim.warmup_steps)
    return optim.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
