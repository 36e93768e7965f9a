"""The recipe's optimizer, its learning rate at a step, and the moving average of the weights."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cxrscale.config import Optim


def build_optimizer(net: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """The optimizer over what is trained, fused: one kernel a step instead of hundreds."""
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    if optim.name == "sgd":
        momentum = optim.betas[0]
        return torch.optim.SGD(
            trained, optim.lr, momentum=momentum, weight_decay=optim.weight_decay, nesterov=momentum > 0, fused=True
        )
    kind = torch.optim.AdamW if optim.name == "adamw" else torch.optim.Adam
    return kind(trained, optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=True)


def ema_model(net: nn.Module, optim: Optim) -> AveragedModel | None:
    """The moving average of the weights, None without; buffers (batch-norm statistics) are the model's own."""
    # The count of updates stays on the CPU (no device given): reading it must not wait for the GPU.
    if not optim.ema_decay:
        return None
    return AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(optim.ema_decay))  # type: ignore[no-untyped-call]


def learning_rate(optim: Optim, step: int, total: int) -> float:
    """The rate at an optimizer step, before plateaus: linear warm-up, then constant or a half cosine to 0."""
    if step < optim.warmup_steps:
        return optim.lr * ((step + 1) / optim.warmup_steps)
    if optim.schedule != "cosine":
        return optim.lr
    done = (step - optim.warmup_steps) / max(1, total - optim.warmup_steps)
    return optim.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
