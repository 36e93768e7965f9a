"""How well probabilities are calibrated: Brier score, calibration error, reliability diagrams."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cxrscale.evaluation.metrics.bootstrap import (
    Estimate,
    Floats,
    divide,
    interval,
    known,
    undefined,
    weighted_means,
    weighted_sums,
)

BINS = 15
"""Bins of the calibration error, as in Guo et al. 2017."""


def brier(score_N: npt.ArrayLike, label_N: npt.ArrayLike) -> Estimate:
    """Mean squared difference between probability and outcome (Brier 1950); 0 is perfect. NaN without labels."""
    score, label = known(score_N, label_N)
    return Estimate(float(((score - label) ** 2).mean())) if len(label) else undefined("no labeled image")


def bootstrap_brier(score_N: npt.ArrayLike, label_N: npt.ArrayLike, weights_RN: npt.NDArray[np.integer]) -> Floats:
    """(R,) Brier score of each resample."""
    return weighted_means(
        (np.asarray(score_N, dtype=np.float64) - np.asarray(label_N, dtype=np.float64)) ** 2, weights_RN
    )


def ece(score_N: npt.ArrayLike, label_N: npt.ArrayLike, bins: int = BINS, equal_mass: bool = False) -> Estimate:
    """Expected calibration error: |mean probability - observed share| of each bin, weighted by its images.

    Guo et al. 2017, equation 3, of the probability that the finding is present. (They bin the probability of the
    predicted class; for a rare finding nearly all images would be negatives near 1.)

    Args:
        equal_mass: bins of equally many images instead of equal width. For a rare finding nearly all probabilities
            fall into the lowest bin of equal width.
    """
    score, label = known(score_N, label_N)
    if not len(label):
        return undefined("no labeled image")
    return Estimate(float(bootstrap_ece(score, label, np.ones((1, len(label)), dtype=np.uint8), bins, equal_mass)[0]))


def bootstrap_ece(
    score_N: npt.ArrayLike,
    label_N: npt.ArrayLike,
    weights_RN: npt.NDArray[np.integer],
    bins: int = BINS,
    equal_mass: bool = False,
) -> Floats:
    """(R,) expected calibration error of each resample, in the bins of the full sample.

    A resample's error is biased upwards (noise in a bin cannot make |difference| smaller than 0), most with few
    images: read the interval as the range that this error can take by chance, not as symmetric about the true value.
    """
    score, label = np.asarray(score_N, dtype=np.float64), np.asarray(label_N, dtype=np.float64)
    labeled = np.flatnonzero(~np.isnan(label))
    score, label = score[labeled], label[labeled]
    if not len(label):
        return np.full(len(weights_RN), np.nan)
    member_NB = _bin(score, bins, equal_mass)[:, None] == np.arange(bins)
    drawn = weights_RN[:, labeled]
    gap_RB = np.abs(weighted_sums(member_NB * (score - label)[:, None], drawn))
    return divide(gap_RB.sum(axis=1), drawn.sum(axis=1, dtype=np.float64))


@dataclass(frozen=True, slots=True)
class Reliability:
    """A reliability diagram's points, one for each bin that holds images."""

    predicted: tuple[float, ...]
    """Mean probability."""
    observed: tuple[float, ...]
    """Share of images with the finding."""
    low: tuple[float, ...]
    """95% interval of `observed` (Wilson 1927), which assumes that images are independent."""
    high: tuple[float, ...]
    count: tuple[int, ...]


def reliability(
    score_N: npt.ArrayLike, label_N: npt.ArrayLike, bins: int = BINS, equal_mass: bool = False
) -> Reliability:
    """Mean probability against the observed share, bin by bin; no points without labels."""
    score, label = known(score_N, label_N)
    if not len(label):
        return Reliability((), (), (), (), ())
    from scipy.stats import binomtest  # 0.7 CPU seconds, which a training need not pay

    bin_N = _bin(score, bins, equal_mass)
    count = np.bincount(bin_N, minlength=bins)
    present = np.bincount(bin_N, weights=label, minlength=bins).astype(int)
    total = np.bincount(bin_N, weights=score, minlength=bins)
    filled = np.flatnonzero(count)
    intervals = [binomtest(int(present[b]), int(count[b])).proportion_ci(method="wilson") for b in filled]
    return Reliability(
        tuple((total[filled] / count[filled]).tolist()),
        tuple((present[filled] / count[filled]).tolist()),
        tuple(float(interval.low) for interval in intervals),
        tuple(float(interval.high) for interval in intervals),
        tuple(count[filled].tolist()),
    )


@dataclass(frozen=True, slots=True)
class ProbabilityMetrics:
    """How well the probabilities of a finding are calibrated."""

    brier: Estimate
    ece: Estimate
    ece_equal_mass: Estimate


def probability_metrics(
    score_N: npt.ArrayLike, label_N: npt.ArrayLike, weights_RN: npt.NDArray[np.integer] | None = None
) -> ProbabilityMetrics:
    """Brier score and calibration errors, with intervals where resamples are given."""
    result = ProbabilityMetrics(brier(score_N, label_N), ece(score_N, label_N), ece(score_N, label_N, equal_mass=True))
    if weights_RN is None or result.brier.reason:
        return result
    return ProbabilityMetrics(
        interval(result.brier.value, bootstrap_brier(score_N, label_N, weights_RN)),
        interval(result.ece.value, bootstrap_ece(score_N, label_N, weights_RN)),
        interval(result.ece_equal_mass.value, bootstrap_ece(score_N, label_N, weights_RN, equal_mass=True)),
    )


def _bin(score: Floats, bins: int, equal_mass: bool) -> npt.NDArray[np.intp]:
    """The bin of each score: (low, high], the first one with its lower end."""
    inner = np.linspace(0, 1, bins + 1)[1:-1]
    return np.searchsorted(np.quantile(score, inner) if equal_mass else inner, score, side="left")
