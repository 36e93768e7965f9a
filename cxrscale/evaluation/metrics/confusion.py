"""What calls at a threshold are worth: confusion matrices, recall, precision and their like."""

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
    json_number,
    undefined,
    weighted_sums,
)

CELLS = ("tp", "fp", "fn", "tn")
NO_PRECISION = "nothing is called present at this threshold"


@dataclass(frozen=True, slots=True)
class AtThreshold:
    """A finding at one threshold; calls are score >= threshold."""

    threshold: float
    confusion: Mapping[str, int]
    """tp, fp, fn, tn: images."""
    rates: Mapping[str, Estimate]
    """accuracy, precision, recall, specificity, f1."""

    def plain(self) -> dict[str, object]:
        """The same as JSON has it."""
        rates = {name: rate.plain() for name, rate in self.rates.items()}
        return {"threshold": json_number(self.threshold), "confusion": dict(self.confusion), **rates}


def confusion(score_N: npt.ArrayLike, label_N: npt.ArrayLike, threshold: float) -> dict[str, int]:
    """tp, fp, fn, tn where score >= threshold is a call of 'present'; NaN labels are left out."""
    return dict(zip(CELLS, _cells(score_N, label_N, threshold).sum(axis=0).tolist(), strict=True))


def bootstrap_confusion(
    score_N: npt.ArrayLike, label_N: npt.ArrayLike, threshold: float, draws_RN: npt.NDArray[np.integer]
) -> Floats:
    """(R, 4) tp, fp, fn, tn of each resample."""
    return weighted_sums(_cells(score_N, label_N, threshold), draws_RN)


def f1(counts: Mapping[str, int]) -> float:
    """2 tp / (2 tp + fp + fn); NaN where nothing is present nor called."""
    return float(rates(*(counts[name] for name in CELLS))["f1"])


def ratio(part: int, rest: int) -> float:
    """part / (part + rest), NaN where both are 0: recall(tp, fn), precision(tp, fp), specificity(tn, fp)."""
    return float(divide(part, part + rest))


def rates(tp: npt.ArrayLike, fp: npt.ArrayLike, fn: npt.ArrayLike, tn: npt.ArrayLike) -> dict[str, Floats]:
    """accuracy, precision, recall, specificity and f1 of counts of any one shape; NaN where the divisor is 0."""
    hit, alarm, miss, quiet = (np.asarray(part, dtype=np.float64) for part in (tp, fp, fn, tn))
    return {
        "accuracy": divide(hit + quiet, hit + alarm + miss + quiet),
        "precision": divide(hit, hit + alarm),
        "recall": divide(hit, hit + miss),
        "specificity": divide(quiet, quiet + alarm),
        "f1": divide(2 * hit, 2 * hit + alarm + miss),
    }


def at_threshold(
    score_N: npt.ArrayLike,
    label_N: npt.ArrayLike,
    threshold: float,
    draws_RN: npt.NDArray[np.integer] | None = None,
) -> AtThreshold:
    """Confusion matrix and rates at a threshold, with intervals where resamples are given.

    A rate without a divisor is NaN with the reason; recall and F1 also where no image has the finding: an F1 of 0
    would blame the model for it.
    """
    counts = confusion(score_N, label_N, threshold)
    resampled = None if draws_RN is None else rates(*bootstrap_confusion(score_N, label_N, threshold, draws_RN).T)
    absent = absent_class(label_N)
    reasons = {
        "accuracy": absent if absent == "no labeled image" else "",
        "precision": NO_PRECISION,
        "recall": absent,
        "specificity": absent,
        "f1": absent if absent != "no image without the finding" else "",
    }
    found: dict[str, Estimate] = {}
    for name, value in rates(*(counts[cell] for cell in CELLS)).items():
        if not np.isfinite(value) or (name == "f1" and reasons[name]):
            found[name] = undefined(reasons[name])
        else:
            found[name] = Estimate(float(value)) if resampled is None else interval(float(value), resampled[name])
    return AtThreshold(threshold, counts, found)


def at_thresholds(
    score_N: npt.ArrayLike,
    label_N: npt.ArrayLike,
    thresholds: Sequence[float] = (0.5, 0.25),
    draws_RN: npt.NDArray[np.integer] | None = None,
) -> list[AtThreshold]:
    """The same finding at several thresholds, beside one another: what a lower one finds more and what it costs."""
    return [at_threshold(score_N, label_N, threshold, draws_RN) for threshold in thresholds]


def _cells(score_N: npt.ArrayLike, label_N: npt.ArrayLike, threshold: float) -> npt.NDArray[np.int64]:
    """(N, 4) which cell of the confusion matrix each image is in; an unlabeled one is in none."""
    score, label = np.asarray(score_N, dtype=np.float64), np.asarray(label_N, dtype=np.float64)
    called, present, absent = score >= threshold, label == 1, label == 0
    cells = (called & present, called & absent, ~called & present, ~called & absent)
    return np.stack(cells, axis=1).astype(np.int64)
