"""Metrics of calls at a threshold: confusion matrices, recall, precision and others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cxrscale.evaluation.metrics.bootstrap import (
    Estimate,
    Floats,
    absent_class,
    divide,
    interval,
    undefined,
    weighted_sums,
)

CELLS = ("tp", "fp", "fn", "tn")
RATES = ("f1", "precision", "recall", "specificity", "accuracy")
"""In the order of the tables."""
NO_PRECISION = "nothing is called present at this threshold"


@dataclass(frozen=True, slots=True)
class AtThreshold:
    """A finding at one threshold; an image is called positive where score >= threshold."""

    threshold: float
    confusion: Mapping[str, int]
    """tp, fp, fn, tn: numbers of images."""
    accuracy: Estimate
    precision: Estimate
    recall: Estimate
    specificity: Estimate
    f1: Estimate


def confusion(score_N: npt.ArrayLike, label_N: npt.ArrayLike, threshold: float) -> dict[str, int]:
    """tp, fp, fn, tn, calling positive where score >= threshold; NaN labels are left out."""
    return dict(zip(CELLS, _cells(score_N, label_N, threshold).sum(axis=0).tolist(), strict=True))


def bootstrap_confusion(
    score_N: npt.ArrayLike, label_N: npt.ArrayLike, threshold: float, weights_RN: npt.NDArray[np.integer]
) -> Floats:
    """(R, 4) tp, fp, fn, tn of each resample."""
    return weighted_sums(_cells(score_N, label_N, threshold), weights_RN)


def f1(counts: Mapping[str, int]) -> float:
    """2 tp / (2 tp + fp + fn); NaN where no image is positive or called positive."""
    return float(rates(*(counts[name] for name in CELLS))["f1"])


def ratio(part: int, rest: int) -> float:
    """part / (part + rest), NaN where both are 0: recall(tp, fn), precision(tp, fp), specificity(tn, fp)."""
    return float(divide(part, part + rest))


def rates(tp: npt.ArrayLike, fp: npt.ArrayLike, fn: npt.ArrayLike, tn: npt.ArrayLike) -> dict[str, Floats]:
    """accuracy, precision, recall, specificity and f1 of counts of one shape; NaN where the divisor is 0."""
    tp, fp, fn, tn = (np.asarray(count, dtype=np.float64) for count in (tp, fp, fn, tn))
    return {
        "accuracy": divide(tp + tn, tp + fp + fn + tn),
        "precision": divide(tp, tp + fp),
        "recall": divide(tp, tp + fn),
        "specificity": divide(tn, tn + fp),
        "f1": divide(2 * tp, 2 * tp + fp + fn),
    }


def at_threshold(
    score_N: npt.ArrayLike,
    label_N: npt.ArrayLike,
    threshold: float,
    weights_RN: npt.NDArray[np.integer] | None = None,
) -> AtThreshold:
    """Confusion matrix and rates at a threshold, with intervals where resamples are given.

    A rate whose divisor is 0 is NaN with the reason. So is F1 where no image has the finding: 0 would read as the
    model's failure.
    """
    counts = confusion(score_N, label_N, threshold)
    resampled = None if weights_RN is None else rates(*bootstrap_confusion(score_N, label_N, threshold, weights_RN).T)
    absent = absent_class(label_N)
    reasons = {
        "accuracy": absent if absent == "no labeled image" else "",
        "precision": NO_PRECISION,
        "recall": absent,
        "specificity": absent,
        "f1": absent if absent != "no image without the finding" else "",
    }
    result: dict[str, Estimate] = {}
    for name, value in rates(*(counts[cell] for cell in CELLS)).items():
        if not np.isfinite(value) or (name == "f1" and reasons[name]):
            result[name] = undefined(reasons[name])
        else:
            result[name] = Estimate(float(value)) if resampled is None else interval(float(value), resampled[name])
    return AtThreshold(threshold, counts, **result)


def at_thresholds(
    score_N: npt.ArrayLike,
    label_N: npt.ArrayLike,
    thresholds: Sequence[float] = (0.5, 0.25),
    weights_RN: npt.NDArray[np.integer] | None = None,
) -> list[AtThreshold]:
    """The same finding at several thresholds, to compare their recall and precision."""
    return [at_threshold(score_N, label_N, threshold, weights_RN) for threshold in thresholds]


def _cells(score_N: npt.ArrayLike, label_N: npt.ArrayLike, threshold: float) -> npt.NDArray[np.int64]:
    """(N, 4) the cell of the confusion matrix that each image is in; an unlabeled one is in none."""
    score, label = np.asarray(score_N, dtype=np.float64), np.asarray(label_N, dtype=np.float64)
    called, present, absent = score >= threshold, label == 1, label == 0
    cells = (called & present, called & absent, ~called & present, ~called & absent)
    return np.stack(cells, axis=1).astype(np.int64)
