"""Tests of whether two runs differ on the same images: DeLong, bootstrap, Holm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

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
    placed = _place(np.asarray(score_KN, dtype=np.float64), label_N, patient_N)
    runs = len(np.asarray(score_KN))
    if placed is None:
        return np.full(runs, np.nan), np.full((runs, runs), np.nan)
    area = placed.win_KP.mean(axis=1)
    parts = _covariances(placed, np.eye(runs))
    return area, np.full((runs, runs), np.nan) if parts is None else parts[0]


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
    placed = _place(np.stack([np.asarray(score_a_N), np.asarray(score_b_N)]).astype(np.float64), label_N, patient_N)
    assert placed is not None
    # Of the difference, image by image: as a sum of variances and covariances it would drown in their rounding errors.
    contrast = np.array([[1.0, -1.0]])
    difference = float((contrast @ placed.win_KP).mean())
    parts = _covariances(placed, contrast)
    if parts is None:
        return float("nan"), TOO_FEW if patient_N is None else TOO_FEW.replace("images", "patients")
    variance, terms = float(parts[0][0, 0]), parts[1]
    # Beside rounding errors of 1e-16 of the terms and of 1e-16 of the difference, which would mean z > 1e8.
    if variance <= 1e-12 * terms or variance <= 1e-18 * difference**2:
        return (1.0, "") if difference == 0 else (float("nan"), "the difference has no variance")
    return float(2 * ndtr(-abs(difference) / variance**0.5)), ""


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


@dataclass(frozen=True, slots=True)
class _Placements:
    """Where the images of each class rank among those of the other, for K scores of P positives and M negatives."""

    win_KP: Floats
    """The share of negatives that each positive outranks."""
    win_KM: Floats
    """The share of positives that outrank each negative."""
    group_P: npt.NDArray[np.intp]
    """What is independent of one another: images, or patients."""
    group_M: npt.NDArray[np.intp]
    groups: int


def _place(
    score_KN: Floats, label_N: npt.ArrayLike, patient_N: Sequence[str] | npt.NDArray[np.object_] | None
) -> _Placements | None:
    """None where a class is absent. Equal rankings give shares that are equal to the last bit."""
    label = np.asarray(label_N, dtype=np.float64)
    positive, negative = np.flatnonzero(label == 1), np.flatnonzero(label == 0)
    p, n = len(positive), len(negative)
    if not p or not n:
        return None
    from scipy.stats import rankdata  # 0.7 CPU seconds, which a training need not pay

    order = np.r_[positive, negative]
    rank = rankdata(score_KN[:, order], axis=1)
    win_KP = (rank[:, :p] - rankdata(score_KN[:, positive], axis=1)) / n
    win_KM = 1 - (rank[:, p:] - rankdata(score_KN[:, negative], axis=1)) / p
    if patient_N is None:
        return _Placements(win_KP, win_KM, np.arange(p), p + np.arange(n), p + n)
    _, group = np.unique(np.asarray(patient_N).astype(str)[order], return_inverse=True)
    return _Placements(win_KP, win_KM, group[:p], group[p:], int(group.max()) + 1)


def _covariances(placed: _Placements, contrast_CK: Floats) -> tuple[Floats, float] | None:
    """(C, C) covariance of contrasts of the AUROCs, and the size of the terms that it is the sum of.

    None where a class has fewer than two groups.
    """
    win_CP, win_CM = contrast_CK @ placed.win_KP, contrast_CK @ placed.win_KM
    p, n, groups = win_CP.shape[1], win_CM.shape[1], placed.groups
    area = win_CP.mean(axis=1)
    positive_CG, positive_groups = _by_group(win_CP - area[:, None], placed.group_P, groups)
    negative_CG, negative_groups = _by_group(win_CM - area[:, None], placed.group_M, groups)
    if positive_groups < 2 or negative_groups < 2:
        return None
    terms = (
        positive_CG @ positive_CG.T * positive_groups / (positive_groups - 1) / p**2,
        negative_CG @ negative_CG.T * negative_groups / (negative_groups - 1) / n**2,
        positive_CG @ negative_CG.T * groups / (groups - 1) / (p * n),
    )
    size = float(sum(np.abs(term).max() for term in terms))
    return terms[0] + terms[1] + terms[2] + terms[2].T, size


def _by_group(value_KN: Floats, group_N: npt.NDArray[np.intp], groups: int) -> tuple[Floats, int]:
    """(K, G) sums over groups, and how many groups have a member."""
    summed = np.stack([np.bincount(group_N, row, groups) for row in value_KN]).astype(np.float64)
    return summed, len(np.unique(group_N))
