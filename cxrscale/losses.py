"""Losses as (sum, count): dividing the sums by the counts of all ranks gives the same mean at any world size."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from cxrscale.config import Loss
from cxrscale.schema import Batch

Terms = list[tuple[float, torch.Tensor, torch.Tensor]]
"""(weight, sum over what counts, how many count) for each term of the loss."""


def terms(logits: torch.Tensor, batch: Batch, loss: Loss) -> Terms:
    """The active terms of the loss for one rank's rows.

    Args:
        logits: (B, F) to classify, (B, 1, H, W) to segment.
        batch: rows with valid = False and labels that are NaN count nothing.
    """
    if batch.mask_B1HW is None:
        target, weight = batch.label_BF, batch.valid_B[:, None] & ~batch.label_BF.isnan()
    else:
        target, weight = batch.mask_B1HW, batch.valid_B[:, None, None, None].expand_as(batch.mask_B1HW)
    # bf16 has 8 bits of mantissa: logits are reduced in fp32.
    logits = logits.float()
    target = torch.where(weight, target, torch.zeros_like(target))
    found: Terms = []
    if loss.bce:
        found.append((loss.bce, *_masked(bce(logits, target, loss.positive_weight), weight)))
    if loss.focal:
        found.append((loss.focal, *_masked(focal(logits, target, loss.focal_gamma), weight)))
    if loss.dice:
        found.append((loss.dice, *_masked(soft_dice(logits, target), batch.valid_B)))
    return found


def bce(logits: torch.Tensor, target: torch.Tensor, positive_weight: float = 1.0) -> torch.Tensor:
    """Binary cross-entropy -[w y log p + (1 - y) log(1 - p)], element by element."""
    weight = torch.tensor(positive_weight, device=logits.device, dtype=logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, target, pos_weight=weight, reduction="none")


def focal(logits: torch.Tensor, target: torch.Tensor, gamma: float) -> torch.Tensor:
    """(1 - p_t)^gamma times binary cross-entropy, element by element (Lin et al. 2017, without alpha)."""
    cross_entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    # p_t = exp(-cross_entropy); the clamp keeps the gradient of x^gamma finite at 0 for gamma < 1.
    return (1 - torch.exp(-cross_entropy)).clamp_min(1e-6) ** gamma * cross_entropy


def soft_dice(logits_B1HW: torch.Tensor, mask_B1HW: torch.Tensor, smooth: float = 1.0) -> torch.Tensor:
    """1 - (2 |p m| + s) / (|p| + |m| + s) for each picture, (B,) in 0..1 (Milletari et al. 2016, linear form).

    `smooth` makes an empty prediction of an empty mask perfect instead of undefined.
    """
    probability = logits_B1HW.sigmoid().flatten(1)
    mask = mask_B1HW.flatten(1)
    overlap = (probability * mask).sum(1)
    return 1 - (2 * overlap + smooth) / (probability.sum(1) + mask.sum(1) + smooth)


def _masked(values: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (values * weight).sum(), weight.sum().float()
