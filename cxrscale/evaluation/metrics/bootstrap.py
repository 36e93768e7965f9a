"""A metric and its interval, from a bootstrap that draws whole patients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cxrscale.types import Scores, UserError

Floats = npt.NDArray[np.float64]
BootstrapWeights = npt.NDArray[np.uint8]

BLOCK = 4_000_000
"""Cells of an (R, N) block worked on at once: 16 to 32 MB a temporary array, whatever R and N are."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A metric with its interval, or the reason why there is none. Beside a value, the reason is a reservation."""

    value: float
    low: float = float("nan")
    high: float = float("nan")
    reason: str = ""

    def plain(self) -> dict[str, float | str | None]:
        """value, low and high as JSON has them (NaN is null), and the reason where there is one."""
        found: dict[str, float | str | None] = {
            "value": json_number(self.value),
            "low": json_number(self.low),
            "high": json_number(self.high),
        }
        return {**found, "reason": self.reason} if self.reason else found


def json_number(value: float) -> float | None:
    """A JSON number; None for NaN and infinities, which JSON does not have."""
    return float(value) if np.isfinite(value) else None


def undefined(reason: str) -> Estimate:
    """No value, and why."""
    return Estimate(float("nan"), reason=reason)


def bootstrap_weights(patients: Sequence[str] | npt.NDArray[np.object_], resamples: int, seed: int) -> BootstrapWeights:
    """(R, N) how often each image enters each bootstrap resample, when whole patients are drawn with replacement.

    uint8 holds any count that can be met: a patient is drawn more than 255 times with a chance below 1e-500.
    """
    _, inverse = np.unique(np.asarray(patients).astype(str), return_inverse=True)
    count = int(inverse.max()) + 1
    rng = np.random.default_rng(seed)
    draws = np.empty((resamples, len(inverse)), dtype=np.uint8)
    for row in draws:
        drawn = np.bincount(rng.integers(count, size=count), minlength=count).astype(np.uint8)
        np.take(drawn, inverse, out=row)
    return draws


def blocks(draws_RN: npt.NDArray[np.integer], columns: int | None = None) -> list[slice]:
    """Slices of the resamples, each small enough to work on at once."""
    rows = max(1, BLOCK // max(1, draws_RN.shape[1] if columns is None else columns))
    return [slice(begin, begin + rows) for begin in range(0, len(draws_RN), rows)]


def weighted_sums(value_NK: npt.ArrayLike, draws_RN: npt.NDArray[np.integer]) -> Floats:
    """(R, K) sums of K per-image values over each resample: one matrix product, exact for counts."""
    value = np.asarray(value_NK, dtype=np.float64)
    result = np.empty((len(draws_RN), value.shape[1]))
    for part in blocks(draws_RN):
        result[part] = draws_RN[part].astype(np.float64) @ value
    return result


def weighted_means(value_N: npt.ArrayLike, draws_RN: npt.NDArray[np.integer]) -> Floats:
    """(R,) mean of a per-image value in each resample; images whose value is NaN are left out."""
    value = np.asarray(value_N, dtype=np.float64)
    known = np.isfinite(value)
    sums = weighted_sums(np.stack([np.where(known, value, 0.0), known], axis=1), draws_RN)
    return divide(sums[:, 0], sums[:, 1])


def divide(part: npt.ArrayLike, whole: npt.ArrayLike) -> Floats:
    """part / whole, NaN where whole is 0."""
    above, below = np.broadcast_arrays(np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64))
    result: Floats = np.divide(above, below, out=np.full(above.shape, np.nan), where=below != 0)
    return result


def interval(value: float, resampled_R: Floats, level: float = 0.95) -> Estimate:
    """The percentile interval of the defined resamples (Efron & Tibshirani 1993, chapter 13).

    Where some resamples leave the value undefined (none of a rare finding's patients was drawn), the reason counts
    those that were used.
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
    """Why a metric of both classes has no value for these labels; empty where it has one."""
    label = np.asarray(label_N, dtype=np.float64)
    if np.isnan(label).all():
        return "no labeled image"
    if not (label == 1).any():
        return "no image with the finding"
    return "" if (label == 0).any() else "no image without the finding"


def require(scores: Scores, where: str) -> None:
    """Refuse scores that no metric or interval can be made of.

    Raises:
        UserError: no image, fewer than two patients, or a score that is NaN (names image and finding).
    """
    if not len(scores.image_id):
        raise UserError(f"{where} holds no image; score a split that has some")
    wrong = np.argwhere(~np.isfinite(scores.score_NF))
    if len(wrong):
        row, finding = wrong[0]
        raise UserError(
            f"{where}: the score of {scores.findings[finding]} of image {scores.image_id[row]} is "
            f"{scores.score_NF[row, finding]} ({len(wrong)} such scores); the model diverged: predict with other weights"
        )
    if len(set(scores.patient.tolist())) < 2:
        raise UserError(
            f"{where}: all {len(scores.image_id)} images are of one patient; an interval needs two patients or more"
        )
