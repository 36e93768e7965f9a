"""Metrics over gathered scores: every image counts once, intervals come from a bootstrap over patients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.metrics import average_precision_score, roc_auc_score

from cxrscale.schema import MapCounts

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A metric with its interval, or the reason why there is none."""

    value: float
    low: float = float("nan")
    high: float = float("nan")
    reason: str = ""


def auroc(score_N: npt.ArrayLike, label_N: npt.ArrayLike) -> Estimate:
    """Area under the ROC curve; NaN with the reason where a class is absent. NaN labels are left out."""
    score, label = _known(score_N, label_N)
    reason = _undefined(label)
    return Estimate(float("nan"), reason=reason) if reason else Estimate(float(roc_auc_score(label, score)))


def auprc(score_N: npt.ArrayLike, label_N: npt.ArrayLike) -> Estimate:
    """Average precision; NaN with the reason where a class is absent."""
    score, label = _known(score_N, label_N)
    reason = _undefined(label)
    return Estimate(float("nan"), reason=reason) if reason else Estimate(float(average_precision_score(label, score)))


def macro_auroc(score_NF: npt.NDArray[np.float32], label_NF: npt.NDArray[np.float32]) -> float:
    """Mean AUROC over the findings that have both classes; NaN where none has."""
    values = [auroc(score_NF[:, f], label_NF[:, f]).value for f in range(score_NF.shape[1])]
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def patient_draws(
    patients: Sequence[str] | npt.NDArray[np.object_], resamples: int, seed: int
) -> npt.NDArray[np.int32]:
    """(R, N) how often each picture enters each bootstrap resample, when whole patients are drawn with replacement."""
    _, inverse = np.unique(np.asarray(patients).astype(str), return_inverse=True)
    count = int(inverse.max()) + 1
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(count, np.full(count, 1 / count), size=resamples)
    return np.asarray(draws[:, inverse], dtype=np.int32)


def auroc_draws(score_N: npt.ArrayLike, label_N: npt.ArrayLike, draws_RN: npt.NDArray[np.int32]) -> Floats:
    """(R,) AUROC of each resample by the rank-sum identity with weights; ties count one half. NaN: a class absent.

    One sort serves all resamples: within each group of equal scores, positives beat the negatives below and
    half of those beside them.
    """
    score, label = np.asarray(score_N, dtype=np.float64), np.asarray(label_N, dtype=np.float64)
    known = ~np.isnan(label)
    order = np.flatnonzero(known)[np.argsort(score[known], kind="stable")]
    ranked, positive = score[order], label[order] == 1
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]]) if len(order) else np.zeros(0, dtype=np.intp)
    result = np.full(len(draws_RN), np.nan)
    if not len(order):
        return result
    for begin in range(0, len(draws_RN), 256):  # bounds memory: 256 x 25,596 float32 is 26 MB
        weight = draws_RN[begin : begin + 256, order].astype(np.float32)
        up = np.add.reduceat(weight * positive, starts, axis=1).astype(np.float64)
        down = np.add.reduceat(weight * ~positive, starts, axis=1).astype(np.float64)
        below = np.cumsum(down, axis=1) - down
        pairs = up.sum(axis=1) * down.sum(axis=1)
        wins = (up * (below + 0.5 * down)).sum(axis=1)
        result[begin : begin + 256] = np.divide(wins, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)
    return result


def mean_draws(value_N: npt.ArrayLike, draws_RN: npt.NDArray[np.int32]) -> Floats:
    """(R,) mean of a per-picture value in each resample; pictures whose value is NaN are left out."""
    value = np.asarray(value_N, dtype=np.float64)
    known = np.isfinite(value)
    weight = draws_RN[:, known].astype(np.float64)
    total = weight.sum(axis=1)
    result: Floats = np.divide(weight @ value[known], total, out=np.full(len(total), np.nan), where=total > 0)
    return result


def interval(value: float, resampled_R: Floats, level: float = 0.95) -> Estimate:
    """The percentile interval of the defined resamples (Efron & Tibshirani 1993, chapter 13)."""
    defined = resampled_R[np.isfinite(resampled_R)]
    if not np.isfinite(value) or len(defined) < 2:
        return Estimate(value, reason="too few resamples hold both classes" if np.isfinite(value) else "undefined")
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high))


def confusion(score_N: npt.ArrayLike, label_N: npt.ArrayLike, threshold: float) -> dict[str, int]:
    """tp, fp, fn, tn where score >= threshold is a call of 'present'; NaN labels are left out."""
    score, label = _known(score_N, label_N)
    called, present = score >= threshold, label == 1
    return {
        "tp": int((called & present).sum()),
        "fp": int((called & ~present).sum()),
        "fn": int((~called & present).sum()),
        "tn": int((~called & ~present).sum()),
    }


def f1(counts: dict[str, int]) -> float:
    """2 tp / (2 tp + fp + fn); NaN where nothing is present nor called."""
    below = 2 * counts["tp"] + counts["fp"] + counts["fn"]
    return 2 * counts["tp"] / below if below else float("nan")


def ratio(part: int, rest: int) -> float:
    """part / (part + rest), NaN where both are 0: recall(tp, fn), precision(tp, fp), specificity(tn, fp)."""
    return part / (part + rest) if part + rest else float("nan")


def map_dice(maps: MapCounts, top: float, min_area: int, bottom: float) -> Floats:
    """(N,) Dice of each picture under the triplet: no mask unless `min_area` pixels score >= top; then all >= bottom.

    An empty prediction of an empty mask is 1 (the rule of the SIIM-ACR challenge).
    """
    above = maps.all_NT[:, ::-1].cumsum(axis=1)[:, ::-1]
    inside = maps.true_NT[:, ::-1].cumsum(axis=1)[:, ::-1]
    bins = maps.all_NT.shape[1]
    strong = above[:, bin_of(top, bins)] >= max(1, min_area)
    predicted = np.where(strong, above[:, bin_of(bottom, bins)], 0)
    overlap = np.where(strong, inside[:, bin_of(bottom, bins)], 0)
    total = predicted + inside[:, 0]
    return np.asarray(np.where(total == 0, 1.0, 2 * overlap / np.maximum(total, 1)), dtype=np.float64)


def bin_of(threshold: float, bins: int) -> int:
    """The histogram bin that a threshold in 0..1 begins."""
    return min(bins - 1, max(0, round(threshold * bins)))


def _known(score_N: npt.ArrayLike, label_N: npt.ArrayLike) -> tuple[Floats, Floats]:
    score, label = np.asarray(score_N, dtype=np.float64), np.asarray(label_N, dtype=np.float64)
    known = ~np.isnan(label)
    return score[known], label[known]


def _undefined(label: Floats) -> str:
    if not len(label):
        return "no labelled picture"
    if not (label == 1).any():
        return "no picture with the finding"
    return "" if (label == 0).any() else "no picture without the finding"
