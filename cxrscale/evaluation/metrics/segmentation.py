"""Dice and IoU of predicted masks, computed from histograms of score maps instead of the maps."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cxrscale.evaluation.metrics.bootstrap import Estimate, Floats, interval, undefined, weighted_means
from cxrscale.types import ScoreHistograms


def map_dice(maps: ScoreHistograms, top: float, min_area: int, bottom: float) -> Floats:
    """(N,) Dice of each image under a mask rule: no mask unless `min_area` pixels score >= top; then all >= bottom.

    An empty prediction of an empty mask counts 1 (the rule of the SIIM-ACR challenge).
    """
    overlap, total = _overlap(maps, top, min_area, bottom)
    return np.asarray(np.where(total == 0, 1.0, 2 * overlap / np.maximum(total, 1)), dtype=np.float64)


def map_iou(maps: ScoreHistograms, top: float, min_area: int, bottom: float) -> Floats:
    """(N,) intersection over union (Jaccard) of each image under a mask rule; empty against empty counts 1."""
    overlap, total = _overlap(maps, top, min_area, bottom)
    return np.asarray(np.where(total == 0, 1.0, overlap / np.maximum(total - overlap, 1)), dtype=np.float64)


def has_mask(maps: ScoreHistograms) -> npt.NDArray[np.bool_]:
    """(N,) whether any pixel is inside the true mask."""
    return np.asarray(maps.true_NT.sum(axis=1) > 0)


def empty_baseline(maps: ScoreHistograms) -> float:
    """Mean Dice over all images when no mask is predicted: the share without one (0.7785 on SIIM's training table)."""
    return 1.0 - float(has_mask(maps).mean())


def overlaps(
    maps: ScoreHistograms, top: float, min_area: int, bottom: float, weights_RN: npt.NDArray[np.integer] | None = None
) -> dict[str, Estimate]:
    """dice_all, dice_positives, iou_all, iou_positives, with intervals where resamples are given.

    `_all` counts empty against empty as 1, as SIIM-ACR did; compare it with `empty_baseline`. `_positives` are means
    over images with a mask, NaN with the reason where there is none.
    """
    positive = has_mask(maps)
    result: dict[str, Estimate] = {}
    for name, value_N in (
        ("dice", map_dice(maps, top, min_area, bottom)),
        ("iou", map_iou(maps, top, min_area, bottom)),
    ):
        for part, selected_N in (("all", value_N), ("positives", np.where(positive, value_N, np.nan))):
            kept = selected_N[np.isfinite(selected_N)]
            if not len(kept):
                result[f"{name}_{part}"] = undefined("no image with a mask" if len(value_N) else "no image")
            elif weights_RN is None:
                result[f"{name}_{part}"] = Estimate(float(kept.mean()))
            else:
                result[f"{name}_{part}"] = interval(float(kept.mean()), weighted_means(selected_N, weights_RN))
    return result


def pixels_above(maps: ScoreHistograms, first: int) -> npt.NDArray[np.int64]:
    """(N,) pixels of each map in the bins from `first` on."""
    return np.asarray(maps.all_NT[:, first:].sum(axis=1, dtype=np.int64))


def bin_of(threshold: float, bins: int) -> int:
    """The histogram bin that a threshold in 0..1 begins."""
    return min(bins - 1, max(0, round(threshold * bins)))


def _overlap(
    maps: ScoreHistograms, top: float, min_area: int, bottom: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(N,) pixels in both masks, and the sum of the pixels of each."""
    above = maps.all_NT[:, ::-1].cumsum(axis=1)[:, ::-1]
    inside = maps.true_NT[:, ::-1].cumsum(axis=1)[:, ::-1]
    bins = maps.all_NT.shape[1]
    strong = above[:, bin_of(top, bins)] >= max(1, min_area)
    predicted = np.where(strong, above[:, bin_of(bottom, bins)], 0)
    overlap = np.where(strong, inside[:, bin_of(bottom, bins)], 0)
    return overlap.astype(np.int64), (predicted + inside[:, 0]).astype(np.int64)
