"""A model over batches -> one row of scores an image, gathered from all workers, each image exactly once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from cxrscale.config import Loss, Train
from cxrscale.evaluation import metrics
from cxrscale.models import ClassWeights, autocast, losses, model_input
from cxrscale.training.distributed import Worker, all_gather, all_reduce_sum, broadcast_buffers
from cxrscale.types import Batch, ScoreHistograms

BINS = 256
"""Bins of the score histograms: thresholds on maps come in steps of 1/256."""


@dataclass(frozen=True, slots=True)
class ScoredRows:
    """Scores by manifest row; N images, ascending rows."""

    row_N: npt.NDArray[np.int64]
    score_NF: npt.NDArray[np.float32]
    """Probabilities; for segmentation one column, the map's highest pixel."""
    maps: ScoreHistograms | None
    loss: float
    """The recipe's loss over all of them; NaN without a loss section."""
    bad: int
    """Images that could not be read and are not among the N."""


@torch.no_grad()
def score(
    net: nn.Module,
    batches: Iterable[Batch],
    train: Train,
    worker: Worker,
    loss: Loss | None = None,
    weights: ClassWeights | None = None,
) -> ScoredRows:
    """Score every valid row of all ranks' batches; all ranks return the same.

    Args:
        net: (B, 1, H, W) -> logits (B, F) or (B, 1, H, W); left in the mode it was in.
        loss: also compute this loss, with the class weights.
    """
    was_training = net.training
    net.eval()
    broadcast_buffers(net, worker)
    rows, scores, valid, everything, inside = [], [], [], [], []
    sums = torch.zeros(0)
    for batch in batches:
        with autocast(train, worker.device):
            logits = net(model_input(batch, train)).float()
        if loss is not None and weights is not None:
            found = torch.stack([losses.terms(logits, batch, loss, weights), losses.counts(batch, loss)], dim=1)
            sums = found if not len(sums) else sums + found
        probability = logits.sigmoid()
        rows.append(batch.row_B.cpu().numpy())
        valid.append(batch.valid_B.cpu().numpy())
        if probability.ndim == 4:
            counts = histograms(probability, batch.mask_B1HW)
            everything.append(counts.all_NT)
            inside.append(counts.true_NT)
            probability = probability.flatten(1).amax(dim=1, keepdim=True)
        scores.append(probability.cpu().numpy())
    net.train(was_training)
    ok = all_gather(np.concatenate(valid), worker)
    row = all_gather(np.concatenate(rows), worker)
    order = np.flatnonzero(ok)[np.argsort(row[ok], kind="stable")]
    maps = None
    if everything:
        both = [all_gather(np.concatenate(part), worker)[order] for part in (everything, inside)]
        maps = ScoreHistograms(*both)
    total = all_reduce_sum(sums.to(worker.device), worker).cpu()
    value = float((total[:, 0] / total[:, 1].clamp_min(1)).sum()) if len(total) else float("nan")
    planned = len(np.unique(row))
    return ScoredRows(row[order], all_gather(np.concatenate(scores), worker)[order], maps, value, planned - len(order))


def summary(rows: ScoredRows, label_NF: npt.NDArray[np.float32], findings: Sequence[str]) -> dict[str, float]:
    """Validation metrics: auroc, auprc, f1, accuracy and brier, as means over the findings that have both classes and,
    of several, the first three for each (`auroc.Mass`); for segmentation dice, dice_positives and iou too.

    Args:
        label_NF: (N, F) of the scored rows.

    Calls are made at 0.5; maps are cut at 0.5. What is undefined is NaN.
    """
    each: dict[str, list[float]] = {name: [] for name in ("auroc", "auprc", "f1", "accuracy", "brier")}
    found: dict[str, float] = {}
    for f, finding in enumerate(findings):
        score, label = rows.score_NF[:, f], label_NF[:, f]
        counts = metrics.confusion(score, label, 0.5)
        known = ~np.isnan(label)
        values = {
            "auroc": metrics.auroc(score, label).value,
            "auprc": metrics.auprc(score, label).value,
            "f1": metrics.f1(counts),
            "accuracy": metrics.ratio(counts["tp"] + counts["tn"], counts["fp"] + counts["fn"]),
            "brier": float(np.square(score[known] - label[known]).mean()) if known.any() else float("nan"),
        }
        for name, value in values.items():
            each[name].append(value)
            if len(findings) > 1 and name in ("auroc", "auprc", "f1"):
                found[f"{name}.{finding}"] = value
    means = {name: float(np.nanmean(v)) if np.isfinite(v).any() else float("nan") for name, v in each.items()}
    if rows.maps is not None:
        dice = metrics.map_dice(rows.maps, top=0.5, min_area=0, bottom=0.5)
        positive = rows.maps.true_NT.sum(axis=1) > 0
        means["dice"] = float(dice.mean())
        means["dice_positives"] = float(dice[positive].mean()) if positive.any() else float("nan")
        # Intersection over union of two sets is d / (2 - d) of their Dice coefficient d.
        means["iou"] = float((dice / (2 - dice)).mean())
    return means | found


def histograms(probability_B1HW: torch.Tensor, mask_B1HW: torch.Tensor | None) -> ScoreHistograms:
    """Score histograms of each map: all pixels, and those inside the mask (zeros without one)."""
    count = probability_B1HW.shape[0]
    bin_BP = (probability_B1HW.flatten(1) * BINS).long().clamp_(0, BINS - 1)
    offset_BP = bin_BP + torch.arange(count, device=bin_BP.device)[:, None] * BINS
    every = torch.bincount(offset_BP.flatten(), minlength=count * BINS).view(count, BINS)
    within = torch.zeros_like(every)
    if mask_B1HW is not None:
        true = mask_B1HW.flatten(1) > 0.5
        within = torch.bincount(offset_BP[true], minlength=count * BINS).view(count, BINS)
    return ScoreHistograms(every.cpu().numpy().astype(np.int32), within.cpu().numpy().astype(np.int32))
