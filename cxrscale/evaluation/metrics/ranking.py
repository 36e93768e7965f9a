"""How well scores rank images with a finding above those without: AUROC, AUPRC, their resamples and curves.

scikit-learn is imported where it is called: its import takes 1.7 CPU seconds, and most processes of a training never
score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cxrscale.evaluation.metrics.bootstrap import (
    Estimate,
    Floats,
    absent_class,
    blocks,
    divide,
    interval,
    known,
    undefined,
)


def auroc(score_N: npt.ArrayLike, label_N: npt.ArrayLike) -> Estimate:
    """Area under the ROC curve; NaN with the reason where a class is absent. NaN labels are left out."""
    score, label = known(score_N, label_N)
    if reason := absent_class(label):
        return undefined(reason)
    from sklearn.metrics import roc_auc_score

    return Estimate(float(roc_auc_score(label, score)))


def auprc(score_N: npt.ArrayLike, label_N: npt.ArrayLike) -> Estimate:
    """Average precision; NaN with the reason where a class is absent."""
    score, label = known(score_N, label_N)
    if reason := absent_class(label):
        return undefined(reason)
    from sklearn.metrics import average_precision_score

    return Estimate(float(average_precision_score(label, score)))


def macro_auroc(score_NF: npt.NDArray[np.floating], label_NF: npt.NDArray[np.float32]) -> float:
    """Mean AUROC over the findings that have both classes; NaN where none has."""
    values = [auroc(score_NF[:, f], label_NF[:, f]).value for f in range(score_NF.shape[1])]
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def macro(value_F: Sequence[float] | Floats, resampled_FR: Floats) -> Estimate:
    """Mean over the findings whose value is defined, with the interval of that same mean.

    A resample in which one of these findings is undefined is left out: a mean over fewer findings is another
    quantity.
    """
    value = np.asarray(value_F, dtype=np.float64)
    defined = np.isfinite(value)
    if not defined.any():
        return undefined("no finding has both classes")
    return interval(float(value[defined].mean()), np.asarray(resampled_FR)[defined].mean(axis=0))


def bootstrap_auroc(score_N: npt.ArrayLike, label_N: npt.ArrayLike, weights_RN: npt.NDArray[np.integer]) -> Floats:
    """(R,) AUROC of each resample by the rank-sum identity with weights; ties count one half. NaN: a class absent.

    One sort serves all resamples: each positive outranks the drawn negatives that score lower and half of those that
    score the same, which are two positions in the running sum over the sorted negatives.
    """
    score, label = np.asarray(score_N, dtype=np.float64), np.asarray(label_N, dtype=np.float64)
    positive, negative = np.flatnonzero(label == 1), np.flatnonzero(label == 0)
    result = np.full(len(weights_RN), np.nan)
    if not len(positive) or not len(negative):
        return result
    negative = negative[np.argsort(score[negative], kind="stable")]
    below = np.searchsorted(score[negative], score[positive], side="left")
    not_above = np.searchsorted(score[negative], score[positive], side="right")
    for part in blocks(weights_RN):
        drawn = weights_RN[part]
        running = _running(drawn, negative)
        weight = drawn[:, positive]
        wins = np.einsum("rp,rp->r", running[:, below] + running[:, not_above], weight, dtype=np.float64) / 2
        result[part] = divide(wins, weight.sum(axis=1, dtype=np.float64) * running[:, -1])
    return result


def bootstrap_auprc(score_N: npt.ArrayLike, label_N: npt.ArrayLike, weights_RN: npt.NDArray[np.integer]) -> Floats:
    """(R,) average precision of each resample: the precision at each drawn positive's score, averaged over them.

    NaN: a class absent. Equal scores share one threshold, as in scikit-learn.
    """
    score, label = np.asarray(score_N, dtype=np.float64), np.asarray(label_N, dtype=np.float64)
    positive, labeled = np.flatnonzero(label == 1), np.flatnonzero(~np.isnan(label))
    result = np.full(len(weights_RN), np.nan)
    if not len(positive) or len(positive) == len(labeled):
        return result
    labeled = labeled[np.argsort(-score[labeled], kind="stable")]
    positive = positive[np.argsort(-score[positive], kind="stable")]
    called = np.searchsorted(-score[labeled], -score[positive], side="right")
    true = np.searchsorted(-score[positive], -score[positive], side="right")
    for part in blocks(weights_RN):
        drawn = weights_RN[part]
        calls, tp = _running(drawn, labeled), _running(drawn, positive)
        precision = np.nan_to_num(divide(tp[:, true], calls[:, called]))
        mean = divide(np.einsum("rp,rp->r", precision, drawn[:, positive], dtype=np.float64), tp[:, -1])
        result[part] = np.where(tp[:, -1] < calls[:, -1], mean, np.nan)
    return result


def _running(weights_RN: npt.NDArray[np.integer], order_K: npt.NDArray[np.intp]) -> npt.NDArray[np.int32]:
    """(R, K + 1) drawn images among the first k in the given order."""
    running = np.zeros((len(weights_RN), len(order_K) + 1), dtype=np.int32)
    np.cumsum(weights_RN[:, order_K], axis=1, dtype=np.int32, out=running[:, 1:])
    return running


@dataclass(frozen=True, slots=True)
class Curve:
    """Points of a curve, few enough to plot; none, with the reason, where a class is absent."""

    x: tuple[float, ...]
    y: tuple[float, ...]
    threshold: tuple[float, ...]
    """The threshold of each point: images that score at least this are called positive. Infinity calls none."""
    reason: str = ""


def roc_curve(score_N: npt.ArrayLike, label_N: npt.ArrayLike, points: int = 200) -> Curve:
    """False positive rate (x) and recall (y) over all thresholds, from the highest down."""
    score, label = known(score_N, label_N)
    reason = absent_class(label)
    if reason:
        return Curve((), (), (), reason)
    from sklearn.metrics import roc_curve as points_of

    x, y, threshold = points_of(label, score)
    return _thin(x, y, threshold, points)


def pr_curve(score_N: npt.ArrayLike, label_N: npt.ArrayLike, points: int = 200) -> Curve:
    """Recall (x) and precision (y) over all thresholds, from the highest down; begins at recall 0, precision 1."""
    score, label = known(score_N, label_N)
    reason = absent_class(label)
    if reason:
        return Curve((), (), (), reason)
    from sklearn.metrics import precision_recall_curve

    y, x, threshold = precision_recall_curve(label, score)
    return _thin(x[::-1], y[::-1], np.r_[np.inf, threshold[::-1]], points)


def _thin(x: Floats, y: Floats, threshold: Floats, points: int) -> Curve:
    """At most `points` of the curve's own points, evenly along its length, including both ends."""
    length = np.r_[0.0, np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y)))]
    kept = np.unique(np.searchsorted(length, np.linspace(0.0, length[-1], points)))
    return Curve(tuple(x[kept].tolist()), tuple(y[kept].tolist()), tuple(threshold[kept].tolist()))
