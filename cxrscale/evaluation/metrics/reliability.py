"""Whether a probability of 0.3 comes true three times in ten: Brier score, calibration error, reliability."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest

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
"""As Guo et al. 2017 count calibration error."""


def brier(score_N: npt.ArrayLike, label_N: npt.ArrayLike) -> Estimate:
    """Mean squared difference between probability and outcome (Brier 1950); 0 is perfect. NaN without labels."""
    score, label = known(score_N, label_N)
    return Estimate(float(((score - label) ** 2).mean())) if len(label) else undefined("no labeled image")


def bootstrap_brier(score_N: npt.ArrayLike, label_N: npt.ArrayLike, draws_RN: npt.NDArray[np.integer]) -> Floats:
    """(R,) Brier score of each resample."""
    return weighted_means(
        (np.asarray(score_N, dtype=np.float64) - np.asarray(label_N, dtype=np.float64)) ** 2, draws_RN
    )


def ece(score_N: npt.ArrayLike, label_N: npt.ArrayLike, bins: int = BINS, equal_mass: bool = False) -> Estimate:
    """Expected calibration error: |mean probability - observed share| of each bin, weighted by its images.

    Guo et al. 2017, equation 3, taken over the probability that the finding is present (they bin the probability of
    the predicted class, which for a rare finding is a bin of absences near 1).

    Args:
        equal_mass: bins of equally many images instead of equal width. With rare findings nearly all probabilities
            fall into the lowest of equal widths.
    """
    score, label = known(score_N, label_N)
    if not len(label):
        return undefined("no labeled image")
    return Estimate(float(bootstrap_ece(score, label, np.ones((1, len(label)), dtype=np.uint8), bins, equal_mass)[0]))


def bootstrap_ece(
    score_N: npt.ArrayLike,
    label_N: npt.ArrayLike,
    draws_RN: npt.NDArray[np.integer],
    bins: int = BINS,
    equal_mass: bool = False,
) -> Floats:
    """(R,) expected calibration error of each resample, in the bins of the whole sample.

    A resample's error is biased upwards (noise in a bin cannot make |difference| smaller than 0), most with few
    images: read the interval as what this error could be by chance, not as symmetric about the truth.
    """
    score, label = np.asarray(score_N, dtype=np.float64), np.asarray(label_N, dtype=np.float64)
    labeled = np.flatnonzero(~np.isnan(label))
    score, label = score[labeled], label[labeled]
    if not len(label):
        return np.full(len(draws_RN), np.nan)
    member_NB = _bin(score, bins, equal_mass)[:, None] == np.arange(bins)
    drawn = draws_RN[:, labeled]
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
    """95% interval of `observed` by Wilson 1927, which takes images for independent."""
    high: tuple[float, ...]
    count: tuple[int, ...]


def reliability(
    score_N: npt.ArrayLike, label_N: npt.ArrayLike, bins: int = BINS, equal_mass: bool = False
) -> Reliability:
    """Mean probability against the observed share, bin by bin; no points without labels."""
    score, label = known(score_N, label_N)
    if not len(label):
        return Reliability((), (), (), (), ())
    place = _bin(score, bins, equal_mass)
    count = np.bincount(place, minlength=bins)
    present = np.bincount(place, weights=label, minlength=bins).astype(int)
    total = np.bincount(place, weights=score, minlength=bins)
    held = np.flatnonzero(count)
    between = [binomtest(int(present[b]), int(count[b])).proportion_ci(method="wilson") for b in held]
    return Reliability(
        tuple((total[held] / count[held]).tolist()),
        tuple((present[held] / count[held]).tolist()),
        tuple(float(found.low) for found in between),
        tuple(float(found.high) for found in between),
        tuple(count[held].tolist()),
    )


def probability_metrics(
    score_N: npt.ArrayLike, label_N: npt.ArrayLike, draws_RN: npt.NDArray[np.integer] | None = None
) -> dict[str, Estimate]:
    """brier, ece and ece_equal_mass, with intervals where resamples are given."""
    found = {
        "brier": brier(score_N, label_N),
        "ece": ece(score_N, label_N),
        "ece_equal_mass": ece(score_N, label_N, equal_mass=True),
    }
    if draws_RN is None or found["brier"].reason:
        return found
    resampled = {
        "brier": bootstrap_brier(score_N, label_N, draws_RN),
        "ece": bootstrap_ece(score_N, label_N, draws_RN),
        "ece_equal_mass": bootstrap_ece(score_N, label_N, draws_RN, equal_mass=True),
    }
    return {name: interval(estimate.value, resampled[name]) for name, estimate in found.items()}


def _bin(score: Floats, bins: int, equal_mass: bool) -> npt.NDArray[np.intp]:
    """The bin of each score: (low, high], the first one with its lower end."""
    inner = np.linspace(0, 1, bins + 1)[1:-1]
    return np.searchsorted(np.quantile(score, inner) if equal_mass else inner, score, side="left")
