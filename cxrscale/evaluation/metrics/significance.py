"""Tests of whether two runs differ on the same images: DeLong, bootstrap, Holm."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.stats import norm, rankdata

from cxrscale.evaluation.metrics.bootstrap import Floats, absent_class

TOO_FEW = "fewer than two images on one side"


def delong(
    score_KN: npt.ArrayLike, label_N: npt.ArrayLike, patient_N: Sequence[str] | npt.NDArray[np.object_] | None = None
) -> tuple[Floats, Floats]:
    """(K,) AUROCs of K scores of the same images, and their (K, K) covariance. NaN labels are left out.

    DeLong, DeLong & Clarke-Pearson 1988 over midranks (Sun & Xu 2014): N log N instead of positives times negatives.

    Args:
        patient_N: treat patients, not images, as independent (Obuchowski 1997). ChestX-ray14's official test split
            has nine images per patient: treated as independent they make p-values too small. With one image per
            patient both are the same.

    NaN where a class is absent; the covariance also where a class has fewer than two images (patients).
    """
    label = np.asarray(label_N, dtype=np.float64)
    score = np.asarray(score_KN, dtype=np.float64)
    positive, negative = np.flatnonzero(label == 1), np.flatnonzero(label == 0)
    p, n, runs = len(positive), len(negative), len(score)
    if not p or not n:
        return np.full(runs, np.nan), np.full((runs, runs), np.nan)
    order = np.r_[positive, negative]
    rank = rankdata(score[:, order], axis=1)
    win_KP = (rank[:, :p] - rankdata(score[:, positive], axis=1)) / n  # share of negatives that each positive outranks
    win_KN = 1 - (rank[:, p:] - rankdata(score[:, negative], axis=1)) / p  # share of positives above each negative
    area = win_KP.mean(axis=1)
    if patient_N is None:
        group_P, group_N, groups = np.arange(p), p + np.arange(n), p + n
    else:
        _, group = np.unique(np.asarray(patient_N).astype(str)[order], return_inverse=True)
        group_P, group_N, groups = group[:p], group[p:], int(group.max()) + 1
    positive_KG, positive_groups = _by_group(win_KP - area[:, None], group_P, groups)
    negative_KG, negative_groups = _by_group(win_KN - area[:, None], group_N, groups)
    if positive_groups < 2 or negative_groups < 2:
        return area, np.full((runs, runs), np.nan)
    covariance = positive_KG @ positive_KG.T * positive_groups / (positive_groups - 1) / p**2
    covariance += negative_KG @ negative_KG.T * negative_groups / (negative_groups - 1) / n**2
    both = positive_KG @ negative_KG.T * groups / (groups - 1) / (p * n)
    return area, covariance + both + both.T


def delong_test(
    score_a_N: npt.ArrayLike,
    score_b_N: npt.ArrayLike,
    label_N: npt.ArrayLike,
    patient_N: Sequence[str] | npt.NDArray[np.object_] | None = None,
) -> tuple[float, str]:
    """Two-sided p-value of two AUROCs over the same images being equal; NaN with the reason where it is undefined."""
    reason = absent_class(label_N)
    if reason:
        return float("nan"), reason
    area, covariance = delong(np.stack([np.asarray(score_a_N), np.asarray(score_b_N)]), label_N, patient_N)
    variance = float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    difference = float(area[0] - area[1])
    if np.isnan(variance):
        return float("nan"), TOO_FEW if patient_N is None else TOO_FEW.replace("images", "patients")
    if variance <= 1e-15:  # the same ranking twice leaves rounding errors of 1e-17
        return (1.0, "") if abs(difference) < 1e-12 else (float("nan"), "the difference has no variance")
    return float(2 * norm.sf(abs(difference) / variance**0.5)), ""


def bootstrap_p(difference_R: Floats) -> float:
    """Two-sided p-value of 'no difference' from resamples: twice the smaller tail at 0, never below 2 / (R + 1).

    Davison & Hinkley 1997, section 4.4; it is 0.05 where the 95% percentile interval touches 0. NaN with fewer than two
    defined resamples.
    """
    defined = difference_R[np.isfinite(difference_R)]
    if len(defined) < 2:
        return float("nan")
    tail = min(int((defined <= 0).sum()), int((defined >= 0).sum()))
    return min(1.0, 2 * (tail + 1) / (len(defined) + 1))


def holm(p_K: npt.ArrayLike) -> Floats:
    """(K,) p-values adjusted for K tests (Holm 1979): rejecting those <= 0.05 keeps the probability of any false
    rejection below 5%. NaN stays NaN and is not counted as a test.
    """
    p = np.asarray(p_K, dtype=np.float64)
    result = np.full(len(p), np.nan)
    tested = np.flatnonzero(np.isfinite(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    factor = np.arange(len(order), 0, -1)
    result[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * factor)) if len(order) else []
    return result


def _by_group(value_KN: Floats, group_N: npt.NDArray[np.intp], groups: int) -> tuple[Floats, int]:
    """(K, G) sums over groups, and how many groups have a member."""
    summed = np.stack([np.bincount(group_N, row, groups) for row in value_KN]).astype(np.float64)
    return summed, len(np.unique(group_N))
