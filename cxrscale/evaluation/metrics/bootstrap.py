"""A metric and its interval, from a bootstrap that resamples patients, not images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cxrscale.io import Number
from cxrscale.types import Scores, UserError

Floats = npt.NDArray[np.float64]
BootstrapWeights = npt.NDArray[np.uint8]

BLOCK = 4_000_000
"""Cells of an (R, N) block that are processed at once: 16 to 32 MB per temporary array, whatever R and N are."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95% interval; in JSON, NaN is null."""

    value: Number
    """NaN where it is undefined."""
    low: Number = float("nan")
    high: Number = float("nan")
    reason: str = ""
    """Why there is no value or no interval; beside both, a caveat."""

    @property
    def defined(self) -> bool:
        """Whether there is a value."""
        return math.isfinite(self.value)


def undefined(reason: str) -> Estimate:
    """No value, and why."""
    return Estimate(float("nan"), reason=reason)


def bootstrap_weights(patients: Sequence[str] | npt.NDArray[np.object_], resamples: int, seed: int) -> BootstrapWeights:
    """(R, N) how often each image is in each bootstrap resample: patients are resampled, not images.

    uint8 holds every count that can occur: a patient is drawn more than 255 times with probability below 1e-500.
    """
    _, inverse = np.unique(np.asarray(patients).astype(str), return_inverse=True)
    count = int(inverse.max()) + 1
    rng = np.random.default_rng(seed)
    weights_RN = np.empty((resamples, len(inverse)), dtype=np.uint8)
    for row in weights_RN:
        drawn = np.bincount(rng.integers(count, size=count), minlength=count).astype(np.uint8)
        np.take(drawn, inverse, out=row)
    return weights_RN


def blocks(weights_RN: npt.NDArray[np.integer], columns: int | None = None) -> list[slice]:
    """Slices of the resamples, each small enough to be processed at once."""
    rows = max(1, BLOCK // max(1, weights_RN.shape[1] if columns is None else columns))
    return [slice(begin, begin + rows) for begin in range(0, len(weights_RN), rows)]


def weighted_sums(value_NK: npt.ArrayLike, weights_RN: npt.NDArray[np.integer]) -> Floats:
    """(R, K) sums of K per-image values over each resample: one matrix product, exact for counts."""
    value = np.asarray(value_NK, dtype=np.float64)
    result = np.empty((len(weights_RN), value.shape[1]))
    for part in blocks(weights_RN):
        result[part] = weights_RN[part].astype(np.float64) @ value
    return result


def weighted_means(value_N: npt.ArrayLike, weights_RN: npt.NDArray[np.integer]) -> Floats:
    """(R,) mean of a per-image value in each resample; images whose value is NaN are left out."""
    value = np.asarray(value_N, dtype=np.float64)
    known = np.isfinite(value)
    sums = weighted_sums(np.stack([np.where(known, value, 0.0), known], axis=1), weights_RN)
    return divide(sums[:, 0], sums[:, 1])


def divide(part: npt.ArrayLike, total: npt.ArrayLike) -> Floats:
    """part / total, NaN where total is 0."""
    parts, totals = np.broadcast_arrays(np.asarray(part, dtype=np.float64), np.asarray(total, dtype=np.float64))
    result: Floats = np.divide(parts, totals, out=np.full(parts.shape, np.nan), where=totals != 0)
    return result


def interval(value: float, resampled_R: Floats, level: float = 0.95) -> Estimate:
    """The percentile interval of the defined resamples (Efron & Tibshirani 1993, chapter 13).

    Where the value is undefined in some resamples (no patient with a rare finding was drawn), the reason counts those
    that were used.
    """
    if not np.isfinite(value):
        return undefined("undefined")
    defined = resampled_R[np.isfinite(resampled_R)]
    if len(defined) < 2:
        return Estimate(value, reason="too few resamples hold both classes")
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    all_used = len(defined) == len(resampled_R)
    reason = "" if all_used else f"interval from the {len(defined)} of {len(resampled_R)} resamples that define it"
    return Estimate(value, float(low), float(high), reason)


def known(score_N: npt.ArrayLike, label_N: npt.ArrayLike) -> tuple[Floats, Floats]:
    """Scores and labels of the labeled images, float64."""
    score, label = np.asarray(score_N, dtype=np.float64), np.asarray(label_N, dtype=np.float64)
    labeled = ~np.isnan(label)
    return score[labeled], label[labeled]


def absent_class(label_N: npt.ArrayLike) -> str:
    """Why a metric that needs both classes has no value for these labels; empty where it has one."""
    label = np.asarray(label_N, dtype=np.float64)
    if np.isnan(label).all():
        return "no labeled image"
    if not (label == 1).any():
        return "no image with the finding"
    return "" if (label == 0).any() else "no image without the finding"


def require(scores: Scores, source: str) -> None:
    """Refuse scores from which no metric or interval can be computed.

    Args:
        source: the file or run that holds them, for the message.

    Raises:
        UserError: no image, fewer than two patients, or a score that is NaN (names image and finding).
    """
    if not len(scores.image_id):
        raise UserError(f"{source} holds no image; score a split that has some")
    invalid = np.argwhere(~np.isfinite(scores.logit_NF))
    if len(invalid):
        row, finding = invalid[0]
        raise UserError(
            f"{source}: the score of {scores.findings[finding]} of image {scores.image_id[row]} is "
            f"{scores.logit_NF[row, finding]} ({len(invalid)} such scores); the model diverged, use other weights"
        )
    if len(set(scores.patient.tolist())) < 2:
        raise UserError(
            f"{source}: all {len(scores.image_id)} images are of one patient; an interval needs two patients or more"
        )
