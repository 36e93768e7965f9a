"""A model over batches -> one row of scores per image, gathered from all workers, each image exactly once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from cxrscale.config import Recipe
from cxrscale.evaluation import metrics, score_maps
from cxrscale.models import ClassWeights, forward, losses, probabilities
from cxrscale.training.distributed import all_gather, all_reduce_sum, broadcast_buffers
from cxrscale.types import Batch, DistContext, NonFiniteError, ScoreHistograms, probabilities_of


@dataclass(frozen=True, slots=True)
class ScoredRows:
    """Scores by manifest row; N images, ascending rows."""

    row_N: npt.NDArray[np.int64]
    logit_NF: npt.NDArray[np.float32]
    """Logits; for segmentation one column, the map's highest pixel."""
    maps: ScoreHistograms | None
    """For segmentation."""
    loss: float
    """The recipe's loss over all of them; NaN where no class weights were given, or nothing is labeled."""
    unreadable: int
    """Images that could not be read and are not among the N."""


@torch.no_grad()
def score(
    model: nn.Module,
    batches: Iterable[Batch],
    recipe: Recipe,
    dist: DistContext,
    weights: ClassWeights | None = None,
    own_mask: Callable[[int], npt.NDArray[np.bool_]] | None = None,
) -> ScoredRows:
    """Score every valid row of all ranks' batches; all ranks return the same.

    Args:
        model: (B, 1, H, W) -> logits (B, F) or (B, 1, H, W); its training mode is restored afterwards.
        weights: the class weights of the recipe's loss, which is then computed too.
        own_mask: manifest row -> its true mask at the image's own size; then the histograms of segmentation maps are
            of maps enlarged to that size.

    Raises:
        NonFiniteError: a score is not finite.
    """
    was_training = model.training
    model.eval()
    broadcast_buffers(model, dist)
    rows, scores, valid, all_pixels, mask_pixels = [], [], [], [], []
    sums = torch.zeros(0)
    for batch in batches:
        logits = forward(model, batch, recipe.train, dist.device)
        if weights is not None:
            terms = losses.terms(logits, batch, recipe.loss, weights)
            batch_sums = torch.stack([terms, losses.counts(batch, recipe.loss)], dim=1)
            sums = sums + batch_sums if len(sums) else batch_sums
        rows.append(batch.row_B.cpu().numpy())
        valid.append(batch.valid_B.cpu().numpy())
        if logits.ndim == 4:
            histograms = _histograms(probabilities(logits), batch, own_mask)
            all_pixels.append(histograms.all_NT)
            mask_pixels.append(histograms.true_NT)
            logits = logits.flatten(1).amax(dim=1, keepdim=True)
        scores.append(logits.cpu().numpy())
    model.train(was_training)
    valid_N = all_gather(np.concatenate(valid), dist)
    row_N = all_gather(np.concatenate(rows), dist)
    order = np.flatnonzero(valid_N)[np.argsort(row_N[valid_N], kind="stable")]
    maps = None
    if all_pixels:
        all_NT, true_NT = (all_gather(np.concatenate(part), dist)[order] for part in (all_pixels, mask_pixels))
        maps = ScoreHistograms(all_NT, true_NT, own_size=own_mask is not None)
    total = all_reduce_sum(sums.to(dist.device), dist).cpu()
    # Over no label at all a loss is undefined, not 0.
    loss = float((total[:, 0] / total[:, 1]).sum()) if len(total) else float("nan")
    unreadable = len(np.unique(row_N)) - len(order)
    logit_NF = all_gather(np.concatenate(scores), dist)[order]
    if undefined := int((~np.isfinite(logit_NF)).any(axis=1).sum()):
        raise NonFiniteError(
            f"the model's scores of {undefined} of {len(order)} images are not finite: its weights are damaged, or its "
            "training has diverged"
        )
    return ScoredRows(row_N[order], logit_NF, maps, loss, unreadable)


def summary(rows: ScoredRows, label_NF: npt.NDArray[np.float32], findings: Sequence[str]) -> dict[str, float]:
    """Validation metrics: auroc, auprc, f1, accuracy and brier, as means over the findings that have both classes; with
    several findings also their number (`findings`) and the first three metrics of each (`auroc.Mass`); for segmentation
    also dice, dice_positives and iou.

    Args:
        label_NF: (N, F) labels of the scored rows.

    Decisions are made at threshold 0.5, also for the pixels of maps. What is undefined is NaN.
    """
    values: dict[str, list[float]] = {name: [] for name in ("auroc", "auprc", "f1", "accuracy", "brier")}
    by_finding: dict[str, float] = {}
    for f, finding in enumerate(findings):
        metrics_of_finding = _finding_metrics(rows.logit_NF[:, f], label_NF[:, f])
        both_classes = not metrics.absent_class(label_NF[:, f])
        for name, value in metrics_of_finding.items():
            # Without a positive F1 would be 0 whatever the model does, and accuracy is near 1.
            values[name].append(value if both_classes else float("nan"))
            if len(findings) > 1 and name in ("auroc", "auprc", "f1"):
                by_finding[f"{name}.{finding}"] = value
    means = {name: float(np.nanmean(v)) if np.isfinite(v).any() else float("nan") for name, v in values.items()}
    if len(findings) > 1:
        means["findings"] = float(np.isfinite(values["brier"]).sum())
    if rows.maps is not None:
        dice = metrics.map_dice(rows.maps, top=0.5, min_area=0, bottom=0.5)
        positive = rows.maps.true_NT.sum(axis=1) > 0
        means["dice"] = float(dice.mean())
        means["dice_positives"] = float(dice[positive].mean()) if positive.any() else float("nan")
        # Intersection over union of two sets is d / (2 - d) of their Dice coefficient d.
        means["iou"] = float((dice / (2 - dice)).mean())
    return means | by_finding


def _finding_metrics(logit_N: npt.NDArray[np.float32], label_N: npt.NDArray[np.float32]) -> dict[str, float]:
    probability_N = probabilities_of(logit_N)
    at_half = metrics.at_threshold(probability_N, label_N, 0.5)
    return {
        "auroc": metrics.auroc(logit_N, label_N).value,
        "auprc": metrics.auprc(logit_N, label_N).value,
        "f1": at_half.f1.value,
        "accuracy": at_half.accuracy.value,
        "brier": metrics.brier(probability_N, label_N).value,
    }


def _histograms(
    probability_B1HW: torch.Tensor, batch: Batch, own_mask: Callable[[int], npt.NDArray[np.bool_]] | None
) -> ScoreHistograms:
    if own_mask is None:
        return score_histograms(probability_B1HW, batch.mask_B1HW)
    return own_size_histograms(probability_B1HW, batch, own_mask)


def score_histograms(probability_B1HW: torch.Tensor, mask_B1HW: torch.Tensor | None) -> ScoreHistograms:
    """Histograms of each score map: over all pixels, and over those inside the mask (zeros without one)."""
    count, bins = probability_B1HW.shape[0], score_maps.BINS
    bin_BP = (probability_B1HW.flatten(1) * bins).long().clamp_(0, bins - 1)
    # Each image gets bins of its own, so that one bincount serves the batch.
    bin_BP = bin_BP + torch.arange(count, device=bin_BP.device)[:, None] * bins
    all_BT = torch.bincount(bin_BP.flatten(), minlength=count * bins).view(count, bins)
    true_BT = torch.zeros_like(all_BT)
    if mask_B1HW is not None:
        inside = mask_B1HW.flatten(1) > 0.5
        true_BT = torch.bincount(bin_BP[inside], minlength=count * bins).view(count, bins)
    return ScoreHistograms(all_BT.cpu().numpy().astype(np.int32), true_BT.cpu().numpy().astype(np.int32))


def own_size_histograms(
    probability_B1HW: torch.Tensor, batch: Batch, own_mask: Callable[[int], npt.NDArray[np.bool_]]
) -> ScoreHistograms:
    """Histograms of each map at the size of its image's own mask; zeros for invalid rows. One image is in memory."""
    score_BHW, bins = probability_B1HW[:, 0].float().cpu().numpy(), score_maps.BINS
    all_BT, true_BT = np.zeros((2, len(score_BHW), bins), dtype=np.int32)
    for index in np.flatnonzero(batch.valid_B.cpu().numpy()):
        mask_HW = own_mask(int(batch.row_B[index]))
        # Floor, as in `score_histograms`: 1.0 is in the last bin.
        bin_HW = np.minimum(score_maps.enlarged(score_BHW[index], mask_HW.shape) * bins, bins - 1).astype(np.uint8)
        for counts_BT, inside_HW in ((all_BT, None), (true_BT, mask_HW.view(np.uint8))):
            counts_BT[index] = cv2.calcHist([bin_HW], [0], inside_HW, [bins], [0, bins]).ravel()
    return ScoreHistograms(all_BT, true_BT, own_size=True)
