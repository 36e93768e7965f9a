"""Metrics of subgroups of the images: by sex, age band, view."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cxrscale.config import UNKNOWN
from cxrscale.evaluation.metrics.bootstrap import Estimate, interval, undefined
from cxrscale.evaluation.metrics.confusion import RATES, at_threshold
from cxrscale.evaluation.metrics.ranking import auprc, auroc, bootstrap_auprc, bootstrap_auroc

MIN_IMAGES = 10
"""With fewer images with or without the finding a group gets no metrics: a single image would change them."""


@dataclass(frozen=True, slots=True)
class Group:
    """The metrics of a finding in one subgroup."""

    images: int
    """Labeled images."""
    positives: int
    estimates: Mapping[str, Estimate]
    """auroc and auprc; at a threshold also accuracy, precision, recall, specificity, f1."""


def group_names(value_N: npt.ArrayLike) -> npt.NDArray[np.object_]:
    """(N,) group names from a text column (sex, view); None, NaN and empty are 'unknown'."""
    values = np.asarray(value_N, dtype=object).tolist()
    return np.array([value if isinstance(value, str) and value else UNKNOWN for value in values], dtype=object)


def finding_metrics(
    score_N: npt.ArrayLike,
    label_N: npt.ArrayLike,
    weights_RN: npt.NDArray[np.integer] | None = None,
    threshold: float | None = None,
) -> dict[str, Estimate]:
    """auroc and auprc of a finding, and at a threshold accuracy, precision, recall, specificity and f1.

    With intervals where resamples are given; NaN with the reason where a class is absent.
    """
    result = {"auroc": auroc(score_N, label_N), "auprc": auprc(score_N, label_N)}
    if weights_RN is not None and not result["auroc"].reason:
        result["auroc"] = interval(result["auroc"].value, bootstrap_auroc(score_N, label_N, weights_RN))
        result["auprc"] = interval(result["auprc"].value, bootstrap_auprc(score_N, label_N, weights_RN))
    if threshold is not None:
        rates = at_threshold(score_N, label_N, threshold, weights_RN)
        result |= {name: getattr(rates, name) for name in RATES}
    return result


def by_group(
    score_N: npt.ArrayLike,
    label_N: npt.ArrayLike,
    group_N: npt.NDArray[np.object_],
    weights_RN: npt.NDArray[np.integer] | None = None,
    threshold: float | None = None,
    min_images: int = MIN_IMAGES,
) -> dict[str, Group]:
    """`finding_metrics` of each group, sorted by name with 'unknown' last.

    The resamples are those of all images: a patient with images in two groups is drawn for both or for neither.

    Args:
        min_images: with fewer images with or without the finding, every estimate is NaN and the reason has the number.
    """
    score, label = np.asarray(score_N, dtype=np.float64), np.asarray(label_N, dtype=np.float64)
    result: dict[str, Group] = {}
    for name in sorted(set(group_N.tolist()), key=lambda name: (name == UNKNOWN, name)):
        rows = np.flatnonzero((group_N == name) & ~np.isnan(label))
        positives = int((label[rows] == 1).sum())
        drawn = None if weights_RN is None else weights_RN[:, rows]
        estimates = finding_metrics(score[rows], label[rows], drawn, threshold)
        fewer = min(positives, len(rows) - positives)
        if fewer < min_images:
            side = "with" if positives == fewer else "without"
            reason = f"{fewer} images {side} the finding, fewer than {min_images}"
            estimates = dict.fromkeys(estimates, undefined(reason))
        result[name] = Group(len(rows), positives, estimates)
    return result
