"""Whether what a model sees, or what it answers, has drifted from what it was made with: population stability.

The index compares two distributions over bins that hold equal shares of the reference (deciles, fewer for small ones):
PSI = sum((actual - expected) * ln(actual / expected)). Of two samples of one distribution, of N and M values, it is
about (1/N + 1/M) times a chi-squared variable with one degree of freedom less than there are bins (Yurdakul 2018,
"Statistical properties of the population stability index"), so that a limit follows from the sizes of the samples. The
usual rule of thumb calls 0.2 a shift that matters; an alarm needs both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BINS = 10
PER_BIN = 20
"""Values that a bin holds at least, of the reference and on average of what is compared with it: with fewer, chance
alone leaves bins almost empty, whose logarithms are large."""
FEWEST = 2 * PER_BIN
"""Values of a reference below which nothing is fitted."""
MATTERS = 0.2
"""The index from which a shift matters in practice."""
CHANCE = 0.001
"""How often two samples of one distribution lie above the limit."""
_LEAST = 1e-4
"""Share that an empty bin counts as, so that the index stays finite."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A statistic's distribution on the images that a model was made with."""

    edges: tuple[float, ...]
    """Inner edges of the bins, ascending; equal values fall into the upper bin."""
    expected: tuple[float, ...]
    """Share of the images in each bin, one more than edges."""
    count: int
    """The images."""


@dataclass(frozen=True, slots=True)
class Drift:
    """A statistic of the newest images against its reference."""

    index: float
    """The population stability index; NaN for fewer than `PER_BIN` images per bin."""
    limit: float
    """From which on there is an alarm."""
    count: int
    """The images."""

    @property
    def alarm(self) -> bool:
        """Whether the statistic has drifted."""
        return self.index > self.limit


def fit_reference(value_N: npt.ArrayLike) -> Reference | None:
    """The deciles of a statistic; None where there are too few values, or all are equal.

    Args:
        value_N: one per image; NaN is left out.
    """
    value = np.asarray(value_N, dtype=np.float64)
    value = value[np.isfinite(value)]
    if len(value) < FEWEST:
        return None
    bins = min(BINS, len(value) // PER_BIN)
    edges = np.unique(np.quantile(value, np.linspace(0, 1, bins + 1)[1:-1]))
    shares = _shares(value, edges)
    if (shares > 0).sum() < 2:
        return None
    return Reference(tuple(edges.tolist()), tuple(shares.tolist()), len(value))


def measure(reference: Reference, value_N: Sequence[float] | npt.NDArray[np.float64]) -> Drift:
    """The drift of a statistic.

    Args:
        value_N: of the newest images; NaN is left out.
    """
    from scipy.stats import chi2

    value = np.asarray(value_N, dtype=np.float64)
    value = value[np.isfinite(value)]
    count = len(value)
    if count < PER_BIN * len(reference.expected):
        return Drift(float("nan"), MATTERS, count)
    actual = np.maximum(_shares(value, np.array(reference.edges)), _LEAST)
    expected = np.maximum(np.array(reference.expected), _LEAST)
    index = float(((actual - expected) * np.log(actual / expected)).sum())
    chance = float(chi2.ppf(1 - CHANCE, len(expected) - 1)) * (1 / count + 1 / reference.count)
    return Drift(index, max(MATTERS, chance), count)


def false_alarms(reference: Reference, value_N: npt.ArrayLike, window: int, windows: int = 100) -> float:
    """How often images that have not drifted raise the alarm: the share of random windows of a test split that do.

    Args:
        value_N: of the test split; NaN is left out.
        window: images of each; all, once, where there are no more.
        windows: how many are drawn.

    Returns:
        In 0..1; NaN where the images are too few to be compared.
    """
    value = np.asarray(value_N, dtype=np.float64)
    value = value[np.isfinite(value)]
    rng = np.random.default_rng(0)
    drawn = [rng.choice(value, window, replace=False) for _ in range(windows)] if len(value) > window else [value]
    found = [measure(reference, one) for one in drawn]
    return float("nan") if np.isnan(found[0].index) else float(np.mean([one.alarm for one in found]))


def _shares(value_N: npt.NDArray[np.float64], edges: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The share of the values in each bin."""
    counts = np.bincount(np.searchsorted(edges, value_N, side="right"), minlength=len(edges) + 1)
    return counts / len(value_N)
