"""Do maps depend on what was learned, and scores on where the finding is?"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from cxrscale.evaluation.metrics import BootstrapWeights, Estimate, Floats, interval, undefined, weighted_means

PLACES = 4
"""Places elsewhere that are occluded, beside the boxes."""
_TRIES = 400


def rank_correlation(a_hw: npt.ArrayLike, b_hw: npt.ArrayLike) -> float:
    """Spearman's correlation of two maps of one shape, ties by mean rank; NaN where one is constant or not finite, or
    their shapes differ."""
    a_P, b_P = (np.asarray(one, dtype=np.float64).ravel() for one in (a_hw, b_hw))
    if (
        a_P.shape != b_P.shape
        or not (np.isfinite(a_P).all() and np.isfinite(b_P).all())
        or np.ptp(a_P) == 0
        or np.ptp(b_P) == 0
    ):
        return float("nan")
    return float(np.corrcoef(rankdata(a_P), rankdata(b_P))[0, 1])


def mean_over_patients(value_N: npt.ArrayLike, weights_RN: BootstrapWeights, reason: str) -> Estimate:
    """The mean of what is defined, with its interval.

    Args:
        weights_RN: bootstrap weights of the values.
        reason: why nothing is defined, where that is so.
    """
    value = np.asarray(value_N, dtype=np.float64)
    if not np.isfinite(value).any():
        return undefined(reason)
    return interval(float(np.nanmean(value)), weighted_means(value, weights_RN))


def other_places(truth_K4: Floats, count: int, seed: int) -> list[Floats]:
    """The boxes moved to other places of the image: `count` times (K, 4), of the same sizes, drawn uniformly, apart
    from the true boxes and from each other. Fewer, or none, where there is no room.

    Args:
        truth_K4: (left, top, right, bottom) as shares of the image.
        seed: the places are a pure function of boxes and seed.
    """
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        moved: list[Floats] = []
        for box_4 in truth_K4:
            size_2 = box_4[2:] - box_4[:2]
            corner_T2 = rng.uniform(size=(_TRIES, 2)) * (1 - size_2)
            box_T4 = np.concatenate([corner_T2, corner_T2 + size_2], axis=1)
            taken_K4 = np.concatenate([truth_K4, np.array(moved).reshape(-1, 4)])
            free_T = ~_touch(box_T4, taken_K4).any(axis=1)
            if not free_T.any():
                break
            moved.append(np.asarray(box_T4[int(free_T.argmax())]))
        if len(moved) == len(truth_K4):
            found.append(np.array(moved))
    return found


def _touch(a_T4: Floats, b_K4: Floats) -> npt.NDArray[np.bool_]:
    """(T, K) whether two boxes have area in common."""
    low_TK2 = np.maximum(a_T4[:, None, :2], b_K4[None, :, :2])
    high_TK2 = np.minimum(a_T4[:, None, 2:], b_K4[None, :, 2:])
    return np.asarray((high_TK2 > low_TK2).all(axis=2))
