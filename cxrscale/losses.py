"""Losses as sums and what they count: sums over counts of all ranks are the mean at any world size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from cxrscale.config import Loss
from cxrscale.schema import Batch


@dataclass(frozen=True, slots=True)
class ClassWeights:
    """Factors on the terms of pictures with and without each finding; (F,) each."""

    positive_F: torch.Tensor
    negative_F: torch.Tensor


def class_weights(loss: Loss, label_NF: npt.NDArray[np.float32], device: torch.device) -> ClassWeights:
    """The recipe's factors; with `balance`, times the other class's share among the N labelled training pictures.

    w+ = |N| / (|P| + |N|) and w- = |P| / (|P| + |N|), as in CheXNet's pneumonia loss (Rajpurkar et al. 2017); both 1
    for a finding that no picture is labelled for.
    """
    findings = label_NF.shape[1]
    positive, negative = np.ones(findings, np.float32), np.ones(findings, np.float32)
    if loss.balance:
        known = np.maximum(1, (~np.isnan(label_NF)).sum(axis=0))
        share = (label_NF == 1).sum(axis=0) / known
        labelled = (~np.isnan(label_NF)).any(axis=0)
        positive, negative = np.where(labelled, 1 - share, 1), np.where(labelled, share, 1)
    factors = (loss.positive_weight * positive, loss.negative_weight * negative)
    return ClassWeights(*(torch.as_tensor(factor, dtype=torch.float32, device=device) for factor in factors))


def counts(batch: Batch, loss: Loss) -> torch.Tensor:
    """(T,) how many elements (labels, or pixels) or pictures each active term of the loss sums over."""
    elements = _counted(batch).sum().float()
    pictures = batch.valid_B.sum().float()
    per_picture = {"dice", "lovasz"}
    return torch.stack([pictures if name in per_picture else elements for name in active(loss)])


def terms(logits: torch.Tensor, batch: Batch, loss: Loss, weights: ClassWeights) -> torch.Tensor:
    """(T,) each active term of the loss, summed over one rank's rows and times its weight in the recipe.

    Args:
        logits: (B, F) to classify, (B, 1, H, W) to segment.
        batch: rows with valid = False and labels that are NaN count nothing.
    """
    counted = _counted(batch)
    target = batch.label_BF if batch.mask_B1HW is None else batch.mask_B1HW
    # bf16 has 8 bits of mantissa: logits are reduced in fp32.
    logits = logits.float()
    target = torch.where(counted, target, torch.zeros_like(target))
    sums = []
    for name in active(loss):
        if name == "bce":
            value = (bce(logits, target, weights) * counted).sum()
        elif name == "focal":
            value = (focal(logits, target, loss.focal_gamma) * counted).sum()
        else:
            value = (soft_dice(logits, target) * batch.valid_B).sum()
        sums.append(getattr(loss, name) * value)
    return torch.stack(sums)


def active(loss: Loss) -> list[str]:
    """The terms that the recipe gives a weight, in a fixed order."""
    return [name for name in ("bce", "focal", "dice") if getattr(loss, name)]


def _counted(batch: Batch) -> torch.Tensor:
    """Which elements of the target enter the loss."""
    if batch.mask_B1HW is None:
        return batch.valid_B[:, None] & ~batch.label_BF.isnan()
    return batch.valid_B[:, None, None, None].expand_as(batch.mask_B1HW)


def bce(logits: torch.Tensor, target: torch.Tensor, weights: ClassWeights) -> torch.Tensor:
    """Binary cross-entropy -[w+ y log p + w- (1 - y) log(1 - p)], element by element; (B, F) or (B, 1, H, W)."""
    factor = torch.where(target > 0.5, weights.positive_F, weights.negative_F)
    return factor * F.binary_cross_entropy_with_logits(logits, target, reduction="none")


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
