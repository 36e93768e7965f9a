"""Patients to splits. Pure functions on arrays: images of one patient are always in one split."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from cxrscale.config import Data
from cxrscale.types import UserError

TRAIN, VAL, TEST = "train", "val", "test"
UNLISTED = "unlisted"
"""The split of images that are in none of the user's lists."""
CHEXNET_PATIENTS = {TRAIN: 28_744, VAL: 1_672, TEST: 389}
"""Number of patients per split in the CheXNet paper (Rajpurkar et al. 2017); together all 30,805 of ChestX-ray14."""
Splits = npt.NDArray[np.object_]


def official(patients: Sequence[str], published: Sequence[str | None], val_fraction: float, seed: int) -> Splits:
    """The published test list; the validation split is drawn from the rest, by patient.

    Args:
        patients: (N,) patient of each image.
        published: (N,) 'train_val', 'test' or None (counts as train_val) for each image.
        val_fraction: share of the images outside the test list.
        seed: selects one of the possible validation splits.

    Raises:
        UserError: a patient is in the published test list and outside it.
    """
    is_test_N = np.array([name == TEST for name in published])
    patient_N = np.array(patients, dtype=object)
    both = set(patient_N[is_test_N]) & set(patient_N[~is_test_N])
    if both:
        raise UserError(
            f"patient {min(both)} is in the official test list and outside it; use pack.split=random, "
            "or correct the lists"
        )
    rest = np.flatnonzero(~is_test_N)
    split_N = np.full(len(patient_N), TEST, dtype=object)
    split_N[rest] = _allocate(patient_N[rest], [(VAL, val_fraction)], seed)
    return split_N


def random(patients: Sequence[str], val_fraction: float, test_fraction: float, seed: int) -> Splits:
    """(N,) splits drawn by patient; fractions are shares of the N images."""
    return _allocate(np.array(patients, dtype=object), [(TEST, test_fraction), (VAL, val_fraction)], seed)


def chexnet(patients: Sequence[str], seed: int) -> Splits:
    """(N,) train, val, test drawn at random in the proportions of the CheXNet paper, counted in patients.

    The paper gives the sizes of its splits but not the patients, so this is a split like the paper's, not the same
    one. For the patients of ChestX-ray14 the sizes are exact. For other numbers of patients, val and test get their
    rounded share, and at least one patient each if there are three or more. All images of a patient are used: 389
    patients have some 1,300 to 1,800, while the paper's test split has 420 and does not say how they were chosen.

    Args:
        patients: (N,) patient of each image.
        seed: selects one of the possible splits.
    """
    order = shuffled(patients, seed)
    total = sum(CHEXNET_PATIENTS.values())
    least = 1 if len(order) >= len(CHEXNET_PATIENTS) else 0
    test, val = (max(least, round(len(order) * CHEXNET_PATIENTS[name] / total)) for name in (TEST, VAL))
    split_of = dict.fromkeys(order[:test], TEST) | dict.fromkeys(order[test : test + val], VAL)
    return np.array([split_of.get(name, TRAIN) for name in patients], dtype=object)


def kfold(
    patients: Sequence[str],
    positive: npt.ArrayLike,
    mask_pixels: npt.ArrayLike | None,
    folds: int,
    seed: int,
) -> Splits:
    """(N,) 'fold0', 'fold1', ... by patient, stratified by label and by quartile of the mask size.

    Patients are assigned one by one: those with positives first, larger before smaller, equal ones in hashed order. A
    patient with positives goes to the fold with the fewest positives of the same mask sizes, one without goes to the
    smallest fold. Two folds therefore differ by at most as many images as the largest patient has, and if there are as
    many patients with positives as folds, each fold has one. The order of the images does not matter.

    scikit-learn's StratifiedGroupKFold is not used: its folds depend on the order of the rows and changed when its
    shuffling was fixed (#32540), it may leave a fold empty (#34828), and it takes 10 s for ChestX-ray14 where this
    function takes 0.2 s.

    Args:
        patients: (N,) patient of each image.
        positive: (N,) 1 or True where the finding is present; 0 and NaN (unlabeled) are not positive.
        mask_pixels: (N,) size of each mask in pixels, NaN without a mask; None if there are no masks at all. Only the
            masks of positives are used.
        folds: 2 or more, at most the number of patients.
        seed: selects one of the possible sets of folds.

    Raises:
        UserError: `folds` is below 2 or above the number of patients.
    """
    names, owner = np.unique(np.array(patients, dtype=str), return_inverse=True)
    if not 2 <= folds <= len(names):
        raise UserError(f"folds={folds}: give 2 up to the number of patients, {len(names)}")
    stratum = _strata(np.asarray(positive, dtype=np.float64) == 1, mask_pixels)
    count_PS = np.zeros((len(names), stratum.max() + 1), dtype=np.int64)
    np.add.at(count_PS, (owner, stratum), 1)
    rank_of = {name: rank for rank, name in enumerate(shuffled(names.tolist(), seed))}
    rank_P = np.array([rank_of[name] for name in names.tolist()])
    fold_P = _assign_folds(count_PS[:, 1:], count_PS.sum(axis=1), rank_P, folds)
    return np.array([f"fold{number}" for number in fold_P[owner]], dtype=object)


def from_lists(image_ids: Sequence[str], lists: Mapping[str, Collection[str]]) -> Splits:
    """(N,) split of each image from the user's lists; UNLISTED for images in none of them.

    The lists contain images, not patients: use `overlapping_patients` to check that no patient is in two of them.

    Args:
        image_ids: (N,) unique IDs.
        lists: split -> the IDs in it.

    Raises:
        UserError: an ID is in two lists, or not among the images.
    """
    known = set(image_ids)
    split_of: dict[str, str] = {}
    for split, ids in lists.items():
        for image_id in sorted(set(ids)):
            if image_id not in known:
                raise UserError(f"list {split}: the source has no image {image_id!r}; correct or remove the line")
            if image_id in split_of:
                raise UserError(f"list {split}: image {image_id!r} is also in list {split_of[image_id]}; keep one")
            split_of[image_id] = split
    return np.array([split_of.get(image_id, UNLISTED) for image_id in image_ids], dtype=object)


def overlapping_patients(patients: Sequence[str], split: Sequence[str]) -> list[str]:
    """The patients in more than one split, sorted; empty for a valid split."""
    splits_of: dict[str, set[str]] = {}
    for patient, name in zip(patients, split, strict=True):
        splits_of.setdefault(patient, set()).add(name)
    return sorted(patient for patient, names in splits_of.items() if len(names) > 1)


def shuffled(names: Sequence[str], seed: int) -> list[str]:
    """The distinct names in an order that depends only on the seed and the names."""
    return sorted(set(names), key=lambda name: (hashlib.blake2b(f"{seed}:{name}".encode()).digest(), name))


def _strata(is_positive: npt.NDArray[np.bool_], mask_pixels: npt.ArrayLike | None) -> npt.NDArray[np.int64]:
    """(N,) 0 for negatives, 1 to 4 for positives by quartile of their mask sizes, 5 for positives without a mask."""
    stratum = np.where(is_positive, 5, 0)
    if mask_pixels is None:
        return stratum
    size = np.asarray(mask_pixels, dtype=np.float64)
    masked = is_positive & (size > 0)
    if masked.any():
        quartiles = np.quantile(size[masked], (0.25, 0.5, 0.75))
        stratum[masked] = 1 + np.searchsorted(quartiles, size[masked])
    return stratum


def _assign_folds(
    count_PS: npt.NDArray[np.int64], size_P: npt.NDArray[np.int64], rank_P: npt.NDArray[np.int64], folds: int
) -> npt.NDArray[np.int64]:
    """(P,) fold of each patient, as described in `kfold`.

    Args:
        count_PS: (P, S) positives of each patient in each stratum.
        size_P: (P,) all images of each patient.
        rank_P: (P,) unique ranks, which decide between patients of the same size.
        folds: number of folds.
    """
    # One more stratum for all positives together. Weights make rare strata count as much as frequent ones; they are
    # integers, so that no machine rounds differently.
    count_PC = np.column_stack([count_PS, count_PS.sum(axis=1)])
    total_C = np.maximum(1, count_PC.sum(axis=0))
    weight_C = np.rint((total_C.max() / total_C) ** 2).astype(np.int64)
    order = np.lexsort((rank_P, -size_P, -count_PC[:, -1]))
    is_positive = count_PC[order, -1] > 0
    negatives, largest = size_P[order[~is_positive]].sum(), size_P.max()
    fold_P = np.zeros(len(size_P), dtype=np.int64)
    held_FC, held_F = np.zeros((folds, len(total_C)), dtype=np.int64), np.zeros(folds, dtype=np.int64)
    for p in order[is_positive]:
        # Adding p increases the sum of squared counts by a term that depends on the fold only through held @ count.
        for fold in np.lexsort((held_F, held_FC @ (count_PC[p] * weight_C))):
            after_F = held_F.copy()
            after_F[fold] += size_P[p]
            # Accept if patients without positives can still fill all other folds up to the largest, or if the sizes
            # are balanced already. The smallest fold is always accepted.
            if (after_F.max() - after_F).sum() <= negatives or np.ptp(after_F) <= largest:
                break
        fold_P[p], held_F = fold, after_F
        held_FC[fold] += count_PC[p]
    for p in order[~is_positive]:
        fold_P[p] = held_F.argmin()
        held_F[fold_P[p]] += size_P[p]
    return fold_P


def _allocate(patient_N: Splits, parts: Sequence[tuple[str, float]], seed: int) -> Splits:
    """Fill each part with patients up to its share of the images, in hashed order; the rest is train.

    A patient who no longer fits is skipped in favor of smaller ones, so that the size of a part is exact as long as
    patients with a single image are left: the shares of the literature (11,212 of 86,524) are met to the image.
    """
    if not len(patient_N):
        return np.zeros(0, dtype=object)
    names, inverse, counts = np.unique(patient_N.astype(str), return_inverse=True, return_counts=True)
    size = dict(zip(names.tolist(), counts.tolist(), strict=True))
    split_of = dict.fromkeys(names.tolist(), TRAIN)
    order = shuffled(names.tolist(), seed)
    for part, fraction in parts:
        room = round(fraction * len(patient_N))
        for name in order:
            if room and split_of[name] == TRAIN and size[name] <= room:
                split_of[name], room = part, room - size[name]
    split_N: Splits = np.array([split_of[name] for name in names.tolist()], dtype=object)[inverse]
    return split_N


def refuse_leaks(split_N: npt.NDArray[np.object_], patients: Sequence[str], data: Data) -> None:
    """Refuse data with a patient in more than one of a recipe's three parts: train, val and test.

    Args:
        split_N: (N,) split of each image.
        patients: (N,) patient of each image: the manifest's, or `leakage.merged_patients`, which uses duplicates too.
        data: the recipe's data section.

    Raises:
        UserError: there are such patients; the message has their number and an example.
    """
    patient_N = np.array(patients, dtype=object)
    parts = {"train": data.train_split, "val": data.val_split, "test": data.test_split}
    rows = {part: np.flatnonzero(np.isin(split_N.astype(str), names)) for part, names in parts.items()}
    shared = overlapping_patients(
        [name for part in parts for name in patient_N[rows[part]].tolist()],
        [part for part in parts for _ in rows[part]],
    )
    if shared and not data.allow_leaks:
        raise UserError(
            f"data.shards: {len(shared)} patients are in more than one of train, val and test, e.g. {shared[0]}; "
            "see `cxrscale audit`, shard again (SIIM with --patients-from), or set data.allow_leaks=true"
        )
