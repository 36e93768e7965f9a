"""Findings and their states, and tasks as columns over them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

PRESENT, ABSENT = 1, 0
"""A finding that is neither is unlabeled: null in a manifest, NaN in an array, left out of losses and metrics."""

NO_FINDING = "No Finding"
"""NIH's name for 'all findings absent'. It is derived, never stored as a label of its own."""

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


def closed_world(present: Iterable[str], vocabulary: tuple[str, ...]) -> dict[str, int]:
    """States where the archive lists what is present and all else of its vocabulary counts as absent.

    Raises:
        ValueError: a finding is not in the vocabulary; the message names it.
    """
    names = {name for name in present if name != NO_FINDING}
    unknown = names - set(vocabulary)
    if unknown:
        raise ValueError(f"finding {sorted(unknown)[0]!r} is none of {', '.join(vocabulary)}")
    return {name: PRESENT if name in names else ABSENT for name in vocabulary}


def label_row(findings: Mapping[str, int], columns: tuple[str, ...]) -> npt.NDArray[np.float32]:
    """The label vector (F,) of one image: 1, 0, or NaN where a column is unlabeled."""
    return np.array([findings.get(name, np.nan) for name in columns], dtype=np.float32)


def has_no_finding(label_NF: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Which of N images have every one of the F findings labeled absent; NaN is not absent."""
    return np.asarray((label_NF == ABSENT).all(axis=1), dtype=np.bool_)
