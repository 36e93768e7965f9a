"""Patients to splits. Pure functions over arrays: what shares a patient shares a split."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from cxrscale.config import Data
from cxrscale.types import UserError

TRAIN, VAL, TEST = "train", "val", "test"
UNLISTED = "unlisted"
"""The split of images that none of a user's lists names."""
CHEXNET_PATIENTS = {TRAIN: 28_744, VAL: 1_672, TEST: 389}
"""Patients in each split of the CheXNet paper (Rajpurkar et al. 2017); together all 30,805 of ChestX-ray14."""
Splits = npt.NDArray[np.object_]


def official(patients: Sequence[str], archive: Sequence[str | None], val_fraction: float, seed: int) -> Splits:
    """The archive's own test list; validation is carved out of the rest by patient.

    Args:
        patients: (N,) patient of each image.
        archive: (N,) 'train_val', 'test' or None (counted as train_val) for each image.
        val_fraction: share of the images outside the test list.
        seed: which of the possible validation parts is drawn.

    Raises:
        UserError: a patient stands on both sides of the archive's list.
    """
    is_test = np.array([name == TEST for name in archive])
    who = np.array(patients, dtype=object)
    both = set(who[is_test]) & set(who[~is_test])
    if both:
        raise UserError(
            f"patient {min(both)} is in the official test list and outside it; use pack.split=random or mend the lists"
        )
    rest = np.flatnonzero(~is_test)
    split = np.full(len(who), TEST, dtype=object)
    split[rest] = _allocate(who[rest], [(VAL, val_fraction)], seed)
    return split


def random(patients: Sequence[str], val_fraction: float, test_fraction: float, seed: int) -> Splits:
    """(N,) splits drawn by patient; fractions are shares of the N images."""
    who = np.array(patients, dtype=object)
    return _allocate(who, [(TEST, test_fraction), (VAL, val_fraction)], seed)


def chexnet(patients: Sequence[str], seed: int) -> Splits:
    """(N,) train, val, test drawn at random in the proportions of the CheXNet paper, counted in patients.

    The paper names its sizes and no patients, so this draws a split like its own, not the same one. With as many
    patients as ChestX-ray14 has, the sizes come out exactly; with others val and test have their share, rounded, and
    at least one patient each from three patients on. All images of a patient count: the 389 have some 1,300 to
    1,800, while the paper's test has 420, of which it does not say how they were chosen.

    Args:
        patients: (N,) patient of each image.
        seed: which of the possible splits is drawn.
    """
    order = shuffled(patients, seed)
    whole = sum(CHEXNET_PATIENTS.values())
    least = 1 if len(order) >= len(CHEXNET_PATIENTS) else 0
    test, val = (max(least, round(len(order) * CHEXNET_PATIENTS[name] / whole)) for name in (TEST, VAL))
    home = dict.fromkeys(order[:test], TEST) | dict.fromkeys(order[test : test + val], VAL)
    return np.array([home.get(name, TRAIN) for name in patients], dtype=object)


def kfold(
    patients: Sequence[str],
    positive: npt.ArrayLike,
    mask_pixels: npt.ArrayLike | None,
    folds: int,
    seed: int,
) -> Splits:
    """(N,) 'fold0', 'fold1', ... by patient, alike in their share of positives and in the sizes of their masks.

    Patients are dealt one by one, those with positives first, the larger before the smaller, equal ones in hashed
    order. One with positives goes to the fold that has the fewest of their kind (by quarter of mask size); one without
    goes to the smallest fold. So no two folds differ by more images than the largest patient has, and with at least
    as many positive patients as folds each fold has one. Depends on the images, not on their order.

    scikit-learn's StratifiedGroupKFold is not used: it follows the order of the rows, it drew other folds once its
    shuffling was mended (#32540), it may leave a fold empty (#34828), and it takes 10 s for ChestX-ray14 where this
    takes 0.2 s.

    Args:
        patients: (N,) patient of each image.
        positive: (N,) 1 or True where the finding is present; 0 and NaN (unlabeled) are not.
        mask_pixels: (N,) size of each mask in pixels, NaN where there is none; None where there are no masks at all.
            Only those of positives count.
        folds: 2 or more, at most as many as there are patients.
        seed: which of the possible folds are drawn.

    Raises:
        UserError: `folds` is below 2 or above the number of patients.
    """
    names, owner = np.unique(np.array(patients, dtype=str), return_inverse=True)
    if not 2 <= folds <= len(names):
        raise UserError(f"folds={folds}: give 2 up to the number of patients, {len(names)}")
    stratum = _strata(np.asarray(positive, dtype=np.float64) == 1, mask_pixels)
    count_PS = np.zeros((len(names), stratum.max() + 1), dtype=np.int64)
    np.add.at(count_PS, (owner, stratum), 1)
    place = {name: rank for rank, name in enumerate(shuffled(names.tolist(), seed))}
    hashed = np.array([place[name] for name in names.tolist()])
    fold_P = _assign_folds(count_PS[:, 1:], count_PS.sum(axis=1), hashed, folds)
    return np.array([f"fold{number}" for number in fold_P[owner]], dtype=object)


def from_lists(image_ids: Sequence[str], lists: Mapping[str, Collection[str]]) -> Splits:
    """(N,) the split that a user's lists give each image; UNLISTED where none names it.

    Lists are of images: ask `crossing` whether they part a patient.

    Args:
        image_ids: (N,) ids, unique.
        lists: split -> the ids in it.

    Raises:
        UserError: an id is in two lists, or not among the images.
    """
    known = set(image_ids)
    home: dict[str, str] = {}
    for split, ids in lists.items():
        for image_id in sorted(set(ids)):
            if image_id not in known:
                raise UserError(f"list {split}: no image {image_id!r} in the archive; mend or remove the line")
            if image_id in home:
                raise UserError(f"list {split}: image {image_id!r} is in list {home[image_id]} too; keep one")
            home[image_id] = split
    return np.array([home.get(image_id, UNLISTED) for image_id in image_ids], dtype=object)


def overlapping_patients(patients: Sequence[str], split: Sequence[str]) -> list[str]:
    """The patients that stand in more than one split, sorted; empty is what one wants."""
    homes: dict[str, set[str]] = {}
    for patient, name in zip(patients, split, strict=True):
        homes.setdefault(patient, set()).add(name)
    return sorted(patient for patient, names in homes.items() if len(names) > 1)


def shuffled(names: Sequence[str], seed: int) -> list[str]:
    """The distinct names in an order that depends on the seed and the names alone."""
    return sorted(set(names), key=lambda name: (hashlib.blake2b(f"{seed}:{name}".encode()).digest(), name))


def _strata(is_positive: npt.NDArray[np.bool_], mask_pixels: npt.ArrayLike | None) -> npt.NDArray[np.int64]:
    """(N,) 0 where negative, 1 to 4 by quarter of the positives' mask sizes, 5 where positive without a mask."""
    stratum = np.where(is_positive, 5, 0)
    if mask_pixels is None:
        return stratum
    size = np.asarray(mask_pixels, dtype=np.float64)
    masked = is_positive & (size > 0)
    if masked.any():
        quarters = np.quantile(size[masked], (0.25, 0.5, 0.75))
        stratum[masked] = 1 + np.searchsorted(quarters, size[masked])
    return stratum


def _assign_folds(
    count_PS: npt.NDArray[np.int64], size_P: npt.NDArray[np.int64], hashed_P: npt.NDArray[np.int64], folds: int
) -> npt.NDArray[np.int64]:
    """(P,) fold of each patient, as `kfold` says.

    Args:
        count_PS: (P, S) positives of each patient in each stratum; all of its images are `size_P`.
        hashed_P: (P,) places that decide between patients of one size.
    """
    # All positives are a stratum too. Weights make the rare ones count as much; whole numbers, for no machine to round.
    count_PC = np.column_stack([count_PS, count_PS.sum(axis=1)])
    total_C = np.maximum(1, count_PC.sum(axis=0))
    weight_C = np.rint((total_C.max() / total_C) ** 2).astype(np.int64)
    order = np.lexsort((hashed_P, -size_P, -count_PC[:, -1]))
    is_positive = count_PC[order, -1] > 0
    negatives, largest = size_P[order[~is_positive]].sum(), size_P.max()
    fold_P = np.zeros(len(size_P), dtype=np.int64)
    held_FC, held_F = np.zeros((folds, len(total_C)), dtype=np.int64), np.zeros(folds, dtype=np.int64)
    for p in order[is_positive]:
        # What the sum of squared counts grows by depends on the fold through held x count alone.
        for fold in np.lexsort((held_F, held_FC @ (count_PC[p] * weight_C))):
            after_F = held_F.copy()
            after_F[fold] += size_P[p]
            # The smallest fold always passes. Patients without positives can fill all others up to the largest, or
            # the sizes are even as it is.
            if (after_F.max() - after_F).sum() <= negatives or np.ptp(after_F) <= largest:
                break
        fold_P[p], held_F = fold, after_F
        held_FC[fold] += count_PC[p]
    for p in order[~is_positive]:
        fold_P[p] = held_F.argmin()
        held_F[fold_P[p]] += size_P[p]
    return fold_P


def _allocate(who: Splits, parts: Sequence[tuple[str, float]], seed: int) -> Splits:
    """Fill each part with whole patients up to its share, in hashed order; the rest is train.

    A patient that no longer fits is passed over for smaller ones, so that a part's size is met exactly whenever
    single-image patients are left: the shares of the literature (11,212 of 86,524) come out to the image.
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


def refuse_leaks(split_N: npt.NDArray[np.object_], persons: Sequence[str], data: Data) -> None:
    """Refuse data in which a patient stands in more than one of a recipe's three parts: train, val and test.

    Args:
        split_N: (N,) the split of each image.
        persons: (N,) who each image shows: its patient, or `leaks.persons`, which knows of duplicates.

    Raises:
        UserError: names one such patient and how many there are.
    """
    who = np.array(persons, dtype=object)
    parts = {"train": data.train_split, "val": data.val_split, "test": data.test_split}
    rows = {part: np.flatnonzero(np.isin(split_N.astype(str), names)) for part, names in parts.items()}
    shared = overlapping_patients(
        [name for part in parts for name in who[rows[part]].tolist()],
        [part for part in parts for _ in rows[part]],
    )
    if shared and not data.allow_leaks:
        raise UserError(
            f"data.shards: {len(shared)} patients stand in more than one of train, val and test, e.g. {shared[0]}; "
            "look with `cxrscale audit`, shard again (SIIM with --patients-from), or say data.allow_leaks=true"
        )
