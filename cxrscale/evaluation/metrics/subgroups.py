"""The same metrics for parts of the images: by sex, age band, view."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cxrscale.evaluation.metrics.bootstrap import Estimate, interval, undefined
from cxrscale.evaluation.metrics.confusion import at_threshold
from cxrscale.evaluation.metrics.ranking import auprc, auroc, bootstrap_auprc, bootstrap_auroc

UNKNOWN = "unknown"
AGE_BANDS = ((18, "0-18"), (40, "19-40"), (60, "41-60"), (80, "61-80"), (200, "81+"))
"""Last year of each band, and its name."""
LEAST = 10
"""Images with and without the finding below which a group gets no figures: one image more would move them."""


@dataclass(frozen=True, slots=True)
class Group:
    """A finding among some of the images."""

    images: int
    """Labeled images."""
    positives: int
    estimates: Mapping[str, Estimate]
    """auroc and auprc; at a threshold also accuracy, precision, recall, specificity, f1."""

    def plain(self) -> dict[str, object]:
        """The same as JSON has it."""
        estimates = {name: estimate.plain() for name, estimate in self.estimates.items()}
        return {"images": self.images, "positives": self.positives, **estimates}


def age_band(age_N: npt.ArrayLike) -> npt.NDArray[np.object_]:
    """(N,) names of age bands of ages in years; NaN, None and negative ages are 'unknown'."""
    age = np.asarray([np.nan if value is None else value for value in np.asarray(age_N).tolist()], dtype=np.float64)
    names = np.array([name for _, name in AGE_BANDS] + [UNKNOWN], dtype=object)
    place = np.searchsorted([last for last, _ in AGE_BANDS], np.floor(age), side="left")
    return np.asarray(names[np.where(age >= 0, place, len(AGE_BANDS))], dtype=object)


def group_names(value_N: npt.ArrayLike) -> npt.NDArray[np.object_]:
    """(N,) group names of a column of words (sex, view); None, NaN and empty are 'unknown'."""
    values = np.asarray(value_N, dtype=object).tolist()
    return np.array([value if isinstance(value, str) and value else UNKNOWN for value in values], dtype=object)


def finding_metrics(
    score_N: npt.ArrayLike,
    label_N: npt.ArrayLike,
    draws_RN: npt.NDArray[np.integer] | None = None,
    threshold: float | None = None,
) -> dict[str, Estimate]:
    """auroc and auprc of a finding, and at a threshold accuracy, precision, recall, specificity and f1.

    With intervals where resamples are given; NaN with the reason where a class is absent.
    """
    found = {"auroc": auroc(score_N, label_N), "auprc": auprc(score_N, label_N)}
    if draws_RN is not None and not found["auroc"].reason:
        found["auroc"] = interval(found["auroc"].value, bootstrap_auroc(score_N, label_N, draws_RN))
        found["auprc"] = interval(found["auprc"].value, bootstrap_auprc(score_N, label_N, draws_RN))
    if threshold is not None:
        found |= at_threshold(score_N, label_N, threshold, draws_RN).rates
    return found


def by_group(
    score_N: npt.ArrayLike,
    label_N: npt.ArrayLike,
    group_N: npt.NDArray[np.object_],
    draws_RN: npt.NDArray[np.integer] | None = None,
    threshold: float | None = None,
    least: int = LEAST,
) -> dict[str, Group]:
    """`finding` of each group, sorted by name with 'unknown' last.

    The resamples are those of all images: a patient who has images in two groups is drawn into both or neither.

    Args:
        least: with fewer images on either side, every estimate is NaN and its reason says how few there are.
    """
    score, label = np.asarray(score_N, dtype=np.float64), np.asarray(label_N, dtype=np.float64)
    found: dict[str, Group] = {}
    for name in sorted(set(group_N.tolist()), key=lambda name: (name == UNKNOWN, name)):
        rows = np.flatnonzero((group_N == name) & ~np.isnan(label))
        positives = int((label[rows] == 1).sum())
        drawn = None if draws_RN is None else draws_RN[:, rows]
        estimates = finding_metrics(score[rows], label[rows], drawn, threshold)
        few = min(positives, len(rows) - positives)
        if few < least:
            side = "with" if positives == few else "without"
            reason = f"{few} images {side} the finding, fewer than {least}"
            estimates = dict.fromkeys(estimates, undefined(reason))
        found[name] = Group(len(rows), positives, estimates)
    return found
