"""Findings, their states, and label vectors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

PRESENT, ABSENT = 1, 0
"""A finding with neither state is unlabeled: null in a manifest, NaN in an array, ignored by losses and metrics."""

NO_FINDING = "No Finding"
"""NIH's name for 'all findings absent'. It is derived from the findings and never stored as a label."""

NIH14 = (
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Pleural_Thickening",
    "Hernia",
)
"""The 14 findings of ChestX-ray14 in the order of the CheXNet paper's table (Rajpurkar et al. 2017)."""

UNKNOWN = "unknown"
"""The group of images whose sex, view or age is not known."""

AGE_BANDS = ((18, "0-18"), (40, "19-40"), (60, "41-60"), (80, "61-80"), (200, "81+"))
"""Last year of each age band, and its name. The audit counts images in the bands that test metrics are given for."""


def closed_world(present: Iterable[str], vocabulary: tuple[str, ...]) -> dict[str, int]:
    """Finding -> state, for a source that lists present findings: all others of its vocabulary are absent.

    Raises:
        ValueError: a finding is not in the vocabulary; the message names it.
    """
    names = {name for name in present if name != NO_FINDING}
    unknown = names - set(vocabulary)
    if unknown:
        raise ValueError(f"unknown finding {sorted(unknown)[0]!r}; known ones: {', '.join(vocabulary)}")
    return {name: PRESENT if name in names else ABSENT for name in vocabulary}


def label_row(findings: Mapping[str, int], columns: tuple[str, ...]) -> npt.NDArray[np.float32]:
    """The label vector (F,) of one image: 1 present, 0 absent, NaN unlabeled."""
    return np.array([findings.get(name, np.nan) for name in columns], dtype=np.float32)


def has_no_finding(label_NF: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """(N,): whether all F findings of an image are labeled absent; unlabeled (NaN) is not absent."""
    return np.asarray((label_NF == ABSENT).all(axis=1), dtype=np.bool_)


def age_band(age_N: npt.ArrayLike) -> npt.NDArray[np.object_]:
    """(N,) names of the age bands of ages in years; NaN, None and negative ages are UNKNOWN."""
    age = np.asarray([np.nan if value is None else value for value in np.asarray(age_N).tolist()], dtype=np.float64)
    names = np.array([name for _, name in AGE_BANDS] + [UNKNOWN], dtype=object)
    index = np.searchsorted([last for last, _ in AGE_BANDS], np.floor(age), side="left")
    return np.asarray(names[np.where(age >= 0, index, len(AGE_BANDS))], dtype=object)
