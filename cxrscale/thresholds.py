"""Cut-offs searched on validation predictions alone, exactly, over all cut points."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cxrscale.metrics import Estimate, Floats
from cxrscale.schema import MapCounts


@dataclass(frozen=True, slots=True)
class Triplet:
    """The SIIM winners' rule: no mask unless `min_area` pixels score >= top; then every pixel >= bottom."""

    top: float
    min_area: int
    bottom: float
    dice: float
    """Mean Dice over the pictures it was searched on, empty against empty = 1."""


def best_f1(score_N: npt.ArrayLike, label_N: npt.ArrayLike) -> Estimate:
    """The threshold of the highest F1 in `value`; calls are score >= threshold. NaN with the reason without positives.

    Every distinct score is a candidate; the one returned lies midway to the next lower score, so that a score that
    another machine computes a rounding error lower still falls on the same side.
    """
    score, label = np.asarray(score_N, dtype=np.float64), np.asarray(label_N, dtype=np.float64)
    known = ~np.isnan(label)
    score, present = score[known], label[known] == 1
    if not present.any():
        return Estimate(float("nan"), reason="no picture with the finding in validation")
    order = np.argsort(-score, kind="stable")
    ranked, hits = score[order], present[order].cumsum()
    last = np.flatnonzero(np.r_[ranked[1:] != ranked[:-1], True])
    f1: Floats = 2 * hits[last] / (last + 1 + present.sum())
    best = int(f1.argmax())
    cut = ranked[last[best]]
    below = ranked[last[best] + 1] if last[best] + 1 < len(ranked) else 0.0
    return Estimate(float((cut + below) / 2))


def best_triplet(maps: MapCounts, areas: tuple[int, ...] | None = None) -> Triplet:
    """The triplet of the highest mean Dice, over all bins of top and bottom and the given minimum areas.

    Args:
        maps: histograms over N validation maps of T bins.
        areas: candidates of min_area in pixels; None: 0 and the squares up to a fiftieth of the picture.

    With the gate G (N, tops x areas) and Dice D (N, bottoms), the mean is (G' D + (1 - G)' empty) / N: two matrix
    products instead of a loop over maps.
    """
    above = maps.all_NT[:, ::-1].cumsum(axis=1)[:, ::-1]
    inside = maps.true_NT[:, ::-1].cumsum(axis=1)[:, ::-1]
    bins, true_pixels = above.shape[1], inside[:, 0]
    total = above + true_pixels[:, None]
    dice_NT = np.where(total == 0, 1.0, 2 * inside / np.maximum(total, 1))
    empty_N = (true_pixels == 0).astype(np.float64)
    choices = _areas(int(maps.all_NT[0].sum())) if areas is None else areas
    best: tuple[float, int, int, int] = (-1.0, 0, 0, 0)
    for area in choices:
        gate_NT = (above >= max(1, area)).astype(np.float64)
        mean_TT = (gate_NT.T @ dice_NT + ((1 - gate_NT).T @ empty_N)[:, None]) / len(above)
        mean_TT[np.triu_indices(bins, 1)] = -1.0  # a bottom above the top would cut into what the gate has seen
        top, bottom = np.unravel_index(int(mean_TT.argmax()), mean_TT.shape)
        if mean_TT[top, bottom] > best[0] + 1e-12:
            best = (float(mean_TT[top, bottom]), int(top), area, int(bottom))
    return Triplet(best[1] / bins, best[2], best[3] / bins, best[0])


def _areas(pixels: int) -> tuple[int, ...]:
    side = round((pixels / 50) ** 0.5)
    return tuple(sorted({step * step for step in range(0, side + 1, max(1, side // 16))}))
