"""Losses as sums and what they count: sums over counts of all ranks are the mean at any world size.

To add a term, add its weight to `config.Loss` (a field marked with TermWeight) and an entry to TERMS, under the field's
name; this module refuses to be imported while the two differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from cxrscale.config import LOSS_WEIGHTS, Loss
from cxrscale.types import Batch

CostMatrix = tuple[tuple[float, float], tuple[float, float]]


@dataclass(frozen=True, slots=True)
class ClassWeights:
    """Factors on the terms of images with and without each finding; (F,) each."""

    positive_F: torch.Tensor
    negative_F: torch.Tensor


def class_weights(loss: Loss, label_NF: npt.NDArray[np.float32], device: torch.device) -> ClassWeights:
    """The recipe's factors; with `class_balance`, times the other class's share among the N labeled training images.

    w+ = |N| / (|P| + |N|) and w- = |P| / (|P| + |N|), as in CheXNet's pneumonia loss (Rajpurkar et al. 2017); both 1
    for a finding that no image is labeled for.
    """
    findings = label_NF.shape[1]
    positive, negative = np.ones(findings, np.float32), np.ones(findings, np.float32)
    if loss.class_balance:
        known = np.maximum(1, (~np.isnan(label_NF)).sum(axis=0))
        share = (label_NF == 1).sum(axis=0) / known
        labeled = (~np.isnan(label_NF)).any(axis=0)
        positive, negative = np.where(labeled, 1 - share, 1), np.where(labeled, share, 1)
    factors = (loss.positive_weight * positive, loss.negative_weight * negative)
    return ClassWeights(*(torch.as_tensor(factor, dtype=torch.float32, device=device) for factor in factors))


@dataclass(frozen=True, slots=True)
class LossTerm:
    """One term of the loss."""

    function: Callable[[torch.Tensor, torch.Tensor, Loss, ClassWeights], torch.Tensor]
    """(logits, target, recipe's section, class weights) -> the values, not reduced."""
    per_image: bool = False
    """Whether the function gives one value per image, (B,), instead of one per label or pixel, shaped like `logits`."""


def counts(batch: Batch, loss: Loss) -> torch.Tensor:
    """(T,) how many elements (labels, or pixels) or images each active term of the loss sums over."""
    elements = _counted(batch).sum().float()
    images = batch.valid_B.sum().float()
    return torch.stack([images if TERMS[name].per_image else elements for name in active(loss)])


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
        term = TERMS[name]
        value = term.function(logits, target, loss, weights) * (batch.valid_B if term.per_image else counted)
        sums.append(getattr(loss, name) * value.sum())
    return torch.stack(sums)


def active(loss: Loss) -> list[str]:
    """The weights of the terms that are computed, in a fixed order."""
    return [name for name in TERMS if getattr(loss, name)]


def _counted(batch: Batch) -> torch.Tensor:
    """Which elements of the target enter the loss."""
    if batch.mask_B1HW is None:
        return batch.valid_B[:, None] & ~batch.label_BF.isnan()
    return batch.valid_B[:, None, None, None].expand_as(batch.mask_B1HW)


def bce(logits: torch.Tensor, target: torch.Tensor, weights: ClassWeights) -> torch.Tensor:
    """Binary cross-entropy -[w+ y log p + w- (1 - y) log(1 - p)], element by element; (B, F) or (B, 1, H, W)."""
    factor = torch.where(target > 0.5, weights.positive_F, weights.negative_F)
    return factor * F.binary_cross_entropy_with_logits(logits, target, reduction="none")


def cost_matrix(logits: torch.Tensor, target: torch.Tensor, matrix: CostMatrix) -> torch.Tensor:
    """Cross-entropy times matrix[label][prediction], element by element; a logit above 0 predicts the finding.

    The class-weighted softmax cross-entropy of the Effusion tutorial (system B of jobs/effusion-resnet.yaml), written
    for one logit: softmax over (0, z) gives present sigmoid(z), so its cross-entropy is the binary one. The entry is
    a constant to the gradient.
    """
    predicted = logits > 0
    where_absent = torch.where(predicted, matrix[0][1], matrix[0][0])
    where_present = torch.where(predicted, matrix[1][1], matrix[1][0])
    factor = torch.where(target > 0.5, where_present, where_absent)
    return factor * F.binary_cross_entropy_with_logits(logits, target, reduction="none")


def focal(logits: torch.Tensor, target: torch.Tensor, gamma: float, alpha: float | None = None) -> torch.Tensor:
    """alpha_t (1 - p_t)^gamma times binary cross-entropy, element by element (Lin et al. 2017, eq. 5).

    alpha_t is alpha where the finding is present and 1 - alpha where it is absent; 1 without an alpha (eq. 4).
    """
    cross_entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    # p_t = exp(-cross_entropy), and expm1 keeps 1 - p_t exact where it is small.
    value = _power(-torch.expm1(-cross_entropy), gamma) * cross_entropy
    return value if alpha is None else value * torch.where(target > 0.5, alpha, 1 - alpha)


def asymmetric(logits: torch.Tensor, target: torch.Tensor, gammas: tuple[float, float], clip: float) -> torch.Tensor:
    """Asymmetric loss, element by element (Ridnik et al. 2021, eq. 4 to 7), with gammas = (g+, g-).

    -(1 - p)^g+ log p where the finding is present, -q^g- log(1 - q) with q = max(p - clip, 0) where it is absent. The
    gradient goes through the powers too, as in the paper's analysis (section 2.4); its published code can stop it
    there, which makes another loss.
    """
    positive, negative = gammas
    present = -_power(torch.sigmoid(-logits), positive) * F.logsigmoid(logits)
    # 1 - q from sigmoid(-z), which keeps its digits where p is close to 1.
    if clip:
        below = (torch.sigmoid(-logits) + clip).clamp_max(1)
        absent = -_power(1 - below, negative) * below.log()
    else:
        absent = -_power(torch.sigmoid(logits), negative) * F.logsigmoid(-logits)
    return torch.where(target > 0.5, present, absent)


def soft_dice(logits_B1HW: torch.Tensor, mask_B1HW: torch.Tensor, smooth: float = 1.0) -> torch.Tensor:
    """1 - (2 |p m| + s) / (|p| + |m| + s) for each image, (B,) in 0..1 (Milletari et al. 2016, linear form).

    `smooth` makes an empty prediction of an empty mask perfect instead of undefined.
    """
    probability = logits_B1HW.sigmoid().flatten(1)
    mask = mask_B1HW.flatten(1)
    overlap = (probability * mask).sum(1)
    return 1 - (2 * overlap + smooth) / (probability.sum(1) + mask.sum(1) + smooth)


def lovasz(logits_B1HW: torch.Tensor, mask_B1HW: torch.Tensor) -> torch.Tensor:
    """The Lovasz hinge of each image, (B,): the convex extension of 1 - IoU over hinge errors (Berman et al. 2018).

    Errors are sorted from the largest down, and each costs what the Jaccard loss rises by when it joins the wrong ones
    (algorithm 1). An empty mask costs its largest error.
    """
    mask = mask_B1HW.flatten(1)
    errors = 1 - logits_B1HW.flatten(1) * (2 * mask - 1)
    ranked, order = errors.sort(dim=1, descending=True)
    inside = mask.gather(1, order)
    area = inside.sum(1, keepdim=True)
    jaccard = 1 - (area - inside.cumsum(1)) / (area + (1 - inside).cumsum(1))
    rise = jaccard.diff(dim=1, prepend=torch.zeros_like(area))
    return (ranked.relu() * rise).sum(1)


def _power(base: torch.Tensor, exponent: float) -> torch.Tensor:
    """base ** exponent for base in 0..1; the clamp keeps the gradient finite at 0 where the exponent is below 1."""
    return base.clamp_min(1e-12) ** exponent


TERMS: dict[str, LossTerm] = {
    "bce": LossTerm(lambda logits, target, _, weights: bce(logits, target, weights)),
    "cost_matrix_weight": LossTerm(lambda logits, target, loss, _: cost_matrix(logits, target, loss.cost_matrix)),
    "focal": LossTerm(lambda logits, target, loss, _: focal(logits, target, loss.focal_gamma, loss.focal_alpha)),
    "asymmetric": LossTerm(
        lambda logits, target, loss, _: asymmetric(logits, target, loss.asymmetric_gammas, loss.asymmetric_clip)
    ),
    "dice": LossTerm(lambda logits, target, *_: soft_dice(logits, target), per_image=True),
    "lovasz": LossTerm(lambda logits, target, *_: lovasz(logits, target), per_image=True),
}
"""The terms by the field of `config.Loss` that holds their weight, in the order in which they are summed."""


def check_terms(weights: Iterable[str], names: Iterable[str]) -> None:
    """Compare the weights of the configuration with the terms that are implemented.

    Raises:
        RuntimeError: they differ; names those on one side only.
    """
    missing, unknown = sorted(set(weights) - set(names)), sorted(set(names) - set(weights))
    if missing or unknown:
        raise RuntimeError(
            f"config.Loss and models.losses.TERMS differ: weights without a term {missing}, "
            f"terms without a weight {unknown}"
        )


check_terms(LOSS_WEIGHTS, TERMS)
