"""Patients to splits. Pure functions over arrays: what shares a patient shares a split."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cxrscale.schema import InputError

TRAIN, VAL, TEST = "train", "val", "test"
Splits = npt.NDArray[np.object_]


def official(patients: Sequence[str], archive: Sequence[str | None], val_fraction: float, seed: int) -> Splits:
    """The archive's own test list; validation is carved out of the rest by patient.

    Args:
        patients: (N,) patient of each picture.
        archive: (N,) 'train_val', 'test' or None (counted as train_val) for each picture.
        val_fraction: share of the pictures outside the test list.
        seed: which of the possible validation parts is drawn.

    Raises:
        InputError: a patient stands on both sides of the archive's list.
    """
    is_test = np.array([name == TEST for name in archive])
    who = np.array(patients, dtype=object)
    both = set(who[is_test]) & set(who[~is_test])
    if both:
        raise InputError(
            f"patient {min(both)} is in the official test list and outside it; use pack.split=random or mend the lists"
        )
    rest = np.flatnonzero(~is_test)
    split = np.full(len(who), TEST, dtype=object)
    split[rest] = _carve(who[rest], [(VAL, val_fraction)], seed)
    return split


def random(patients: Sequence[str], val_fraction: float, test_fraction: float, seed: int) -> Splits:
    """(N,) splits drawn by patient; fractions are shares of the N pictures."""
    who = np.array(patients, dtype=object)
    return _carve(who, [(TEST, test_fraction), (VAL, val_fraction)], seed)


def crossing(patients: Sequence[str], split: Sequence[str]) -> list[str]:
    """The patients that stand in more than one split, sorted; empty is what one wants."""
    homes: dict[str, set[str]] = {}
    for patient, name in zip(patients, split, strict=True):
        homes.setdefault(patient, set()).add(name)
    return sorted(patient for patient, names in homes.items() if len(names) > 1)


def shuffled(names: Sequence[str], seed: int) -> list[str]:
    """The distinct names in an order that depends on the seed and the names alone."""
    return sorted(set(names), key=lambda name: (hashlib.blake2b(f"{seed}:{name}".encode()).digest(), name))


def _carve(who: Splits, parts: Sequence[tuple[str, float]], seed: int) -> Splits:
    """Fill each part with whole patients up to its share, in hashed order; the rest is train.

    A patient that no longer fits is passed over for smaller ones, so that a part's size is met exactly whenever
    single-picture patients are left: the shares of the literature (11,212 of 86,524) come out to the picture.
    """
    split = np.full(len(who), TRAIN, dtype=object)
    names, inverse, counts = np.unique(who.astype(str), return_inverse=True, return_counts=True)
    size = dict(zip(names.tolist(), counts.tolist(), strict=True))
    home = dict.fromkeys(names.tolist(), TRAIN)
    order = shuffled(names.tolist(), seed)
    for part, fraction in parts:
        room = round(fraction * len(who))
        for name in order:
            if room and home[name] == TRAIN and size[name] <= room:
                home[name], room = part, room - size[name]
    split[:] = np.array([home[name] for name in names.tolist()], dtype=object)[inverse] if len(who) else split
    return split
