"""Leaks: patients and images that splits and datasets share, and what cannot be checked about them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from cxrscale import sources
from cxrscale.io import storage
from cxrscale.shards import duplicates, ids, manifest
from cxrscale.shards.audit_models import DuplicatePair, Duplicates, Leaks, SharedPatient
from cxrscale.shards.build import UNLABELED
from cxrscale.shards.manifest import Manifest


@dataclass(frozen=True)
class JoinedDatasets:
    """Several datasets as one, and the dataset of each row."""

    data: Manifest
    roots: tuple[str, ...]
    index_N: npt.NDArray[np.int64]
    """(N,) index of each row's dataset in `roots`."""
    namespaces: tuple[str, ...]
    """For each root, the source that gave its patient IDs: equal IDs are the same patient only within a namespace."""

    @cached_property
    def duplicates(self) -> tuple[npt.NDArray[np.int64], dict[str, int]]:
        """Pairs of rows that show the same image, (P, 2); and root -> number of images without a fingerprint.

        Found when it is first asked for: 12 s for the 112,120 images of ChestX-ray14.
        """
        return _duplicate_pairs(self)


def join_datasets(*roots: str) -> JoinedDatasets:
    """The datasets of one or more folders or addresses.

    Raises:
        UserError: a folder has no dataset, or two of them have an image of the same ID.
    """
    data = manifest.load(*roots)
    position = {root: index for index, root in enumerate(roots)}
    index_N = np.array([position[root] for root in data.column("root").tolist()], dtype=np.int64)
    namespaces = tuple(str(item.get("patients_from", item["source"])) for item in data.metadata)
    return JoinedDatasets(data, roots, index_N, namespaces)


def find_leaks(joined: JoinedDatasets) -> Leaks:
    """Patients and images that splits and datasets share.

    A patient is known by its ID and the namespace of the ID. Two patients with the same image are one. Nobody trains
    on unlabeled images, so they leak nothing.

    Raises:
        UserError: fingerprints cannot be read.
    """
    names = _namespaced_patients(joined)
    pairs, missing = joined.duplicates
    patients = duplicates.merge_patients(names, pairs.tolist())
    unreliable_N = _unreliable_patient_ids(joined)
    known = {patient for patient, unreliable in zip(patients, unreliable_N.tolist(), strict=True) if not unreliable}
    unknown_N = unreliable_N & np.array([patient not in known for patient in patients])
    overlapping, cross_dataset = _shared_patients(joined, names, unreliable_N, patients)
    found = _classify_pairs(joined, names, pairs)
    not_checked = [
        *_unknown_patients(joined, unknown_N),
        *_separate_namespaces(joined, unreliable_N),
        *_not_compared(joined, missing),
    ]
    return Leaks(
        verdict=tuple(_verdict(overlapping, cross_dataset, found, not_checked)),
        not_checked=tuple(not_checked),
        patients=len(set(patients)),
        images_of_unknown_patients=int(unknown_N.sum()),
        patients_in_two_splits=tuple(overlapping),
        patients_in_two_datasets=tuple(cross_dataset),
        duplicates=found,
    )


def merged_patients(joined: JoinedDatasets) -> list[str]:
    """(N,) patient of each image; patients of one namespace and ID, or with the same image, are one.

    Raises:
        UserError: fingerprints cannot be read.
    """
    pairs, _ = joined.duplicates
    return duplicates.merge_patients(_namespaced_patients(joined), pairs.tolist())


def persons(joined: JoinedDatasets) -> npt.NDArray[np.object_]:
    """(N,) `merged_patients`: what intervals resample and counts of patients count. Where all IDs are of one namespace
    its name is left out.

    Raises:
        UserError: fingerprints cannot be read.
    """
    merged = merged_patients(joined)
    if len(set(joined.namespaces)) == 1:
        prefix = f"{joined.namespaces[0]}:"
        merged = [name.removeprefix(prefix) for name in merged]
    return np.array(merged, dtype=object)


def _namespaced_patients(joined: JoinedDatasets) -> list[str]:
    rows = zip(joined.index_N.tolist(), joined.data.patient, strict=True)
    return [f"{joined.namespaces[index]}:{patient}" for index, patient in rows]


def _duplicate_pairs(joined: JoinedDatasets) -> tuple[npt.NDArray[np.int64], dict[str, int]]:
    """Pairs of rows that show the same image, (P, 2); and root -> number of images without a fingerprint."""
    row_of = {image_id: row for row, image_id in enumerate(joined.data.image_id.tolist())}
    prints: dict[int, tuple[bytes, bytes]] = {}
    for root in joined.roots:
        if storage.exists(storage.join(root, manifest.FINGERPRINTS)):
            table = manifest.fingerprints(root, ("image_id", "dhash", "thumbnail"))
            columns = (table[name].to_pylist() for name in table.column_names)
            prints |= {
                row_of[name]: (dhash, thumb) for name, dhash, thumb in zip(*columns, strict=True) if name in row_of
            }
    rows = np.array(sorted(prints), dtype=np.int64)
    hashes = np.frombuffer(b"".join(prints[row][0] for row in rows.tolist()), dtype=np.uint8).reshape(-1, 32)
    thumbs = np.frombuffer(b"".join(prints[row][1] for row in rows.tolist()), dtype=np.uint8).reshape(-1, 1024)
    counts = np.bincount(np.delete(joined.index_N, rows), minlength=len(joined.roots))
    missing = {root: int(count) for root, count in zip(joined.roots, counts, strict=True) if count}
    return (rows[duplicates.find_within(hashes, thumbs)] if len(rows) else np.empty((0, 2), dtype=np.int64)), missing


def _shared_patients(
    joined: JoinedDatasets, names: Sequence[str], unreliable_N: npt.NDArray[np.bool_], patients: Sequence[str]
) -> tuple[list[SharedPatient], list[SharedPatient]]:
    """(patients in two splits or more, patients in two datasets or more)."""
    rows_of: dict[str, list[int]] = {}
    for row, patient in enumerate(patients):
        rows_of.setdefault(patient, []).append(row)
    split, ids, index = joined.data.split.tolist(), joined.data.image_id.tolist(), joined.index_N.tolist()

    def shared(patient: str, rows: Iterable[int]) -> SharedPatient:
        images: dict[str, list[str]] = {}
        for row in rows:
            images.setdefault(split[row], []).append(ids[row])
        return SharedPatient(
            patient=patient,
            also=tuple(sorted({names[row] for row in rows if not unreliable_N[row]} - {patient})),
            datasets=tuple(joined.roots[i] for i in sorted({index[row] for row in rows})),
            splits={name: len(some) for name, some in sorted(images.items())},
            images={name: some[0] for name, some in sorted(images.items())},
        )

    items = sorted(rows_of.items())
    return (
        [shared(patient, rows) for patient, rows in items if len({split[row] for row in rows} - {UNLABELED}) > 1],
        [shared(patient, rows) for patient, rows in items if len({index[row] for row in rows}) > 1],
    )


def _classify_pairs(joined: JoinedDatasets, names: Sequence[str], pairs: npt.NDArray[np.int64]) -> Duplicates:
    """Duplicates between splits leak; those within a split count twice."""
    split, ids, index = joined.data.split.tolist(), joined.data.image_id.tolist(), joined.index_N.tolist()
    between_splits, between_datasets, within = [], [], []
    for a, b in pairs.tolist():
        pair = DuplicatePair(
            images=(ids[a], ids[b]),
            patients=(names[a], names[b]),
            datasets=(joined.roots[index[a]], joined.roots[index[b]]),
            splits=(split[a], split[b]),
        )
        leaks = split[a] != split[b] and UNLABELED not in (split[a], split[b])
        if leaks:
            between_splits.append(pair)
        if index[a] != index[b]:
            between_datasets.append(pair)
        elif not leaks:
            within.append(pair)
    return Duplicates(
        pairs=len(pairs),
        between_splits=tuple(between_splits),
        between_datasets=tuple(between_datasets),
        within_dataset_and_split=tuple(within),
    )


def _verdict(
    overlapping: Sequence[SharedPatient],
    cross_dataset: Sequence[SharedPatient],
    found: Duplicates,
    not_checked: Sequence[str],
) -> list[str]:
    """A few plain sentences; those about a leak begin with LEAK."""
    lines = []
    if not overlapping:
        scope = " in what could be checked" if not_checked else ""
        lines.append(f"No leak found{scope}: no patient and no image is in two splits.")
        if cross_dataset:
            patients = _count(len(cross_dataset), "patient")
            images = _count(len(found.between_datasets), "image")
            lines.append(f"In two datasets, but always in the same split: {patients}, {images}.")
        return lines
    first = overlapping[0]
    where = " and ".join(f"{name} ({image})" for name, image in first.images.items() if name != UNLABELED)
    lines.append(f"LEAK: {_count(len(overlapping), 'patient')} in two splits, e.g. {first.patient} in {where}.")
    if copies := found.between_splits:
        (one, other), (split, other_split) = copies[0].images, copies[0].splits
        lines.append(
            f"LEAK: {_count(len(copies), 'image')} in two splits, e.g. {one} in {split}, which is the same as {other} "
            f"in {other_split}."
        )
    return lines


def _count(count: int, noun: str) -> str:
    return f"1 {noun}" if count == 1 else f"{count:,} {noun}s"


# What could not be checked


def _unreliable_patient_ids(joined: JoinedDatasets) -> npt.NDArray[np.bool_]:
    """(N,) images whose source has no reliable patient IDs, and that got none from a duplicate in another dataset."""
    data, namespaces, index_N = joined.data, joined.namespaces, joined.index_N
    patients: dict[str, set[str]] = {}
    for index, metadata in enumerate(data.metadata):
        if metadata["source"] == namespaces[index]:
            patients.setdefault(namespaces[index], set()).update(data.patient[index_N == index].tolist())
    unreliable_N = data.patient == data.image_id
    for index, metadata in enumerate(data.metadata):
        rows_N = index_N == index
        if metadata["source"] == namespaces[index]:
            unreliable_N |= rows_N & (not _has_reliable_patient_ids(metadata["source"]))
        elif namespaces[index] in patients:
            unreliable_N |= rows_N & ~np.isin(data.patient.astype(str), sorted(patients[namespaces[index]]))
        elif ids.is_old(metadata):  # it has hashed patients beside the source's own image IDs
            hashed = [ids.old_patient_hash(metadata["source"], name) for name in data.image_id[rows_N]]
            unreliable_N[rows_N] |= data.patient[rows_N] == np.array(hashed, dtype=object)
    return np.asarray(unreliable_N, dtype=np.bool_)


def _has_reliable_patient_ids(source: str) -> bool:
    """A dataset may be of a source that this version does not have; its IDs are trusted."""
    return source not in sources.names() or sources.get(source).reliable_patient_ids


def _unknown_patients(joined: JoinedDatasets, unknown_N: npt.NDArray[np.bool_]) -> list[str]:
    lines = []
    for index, root in enumerate(joined.roots):
        rows_N = joined.index_N == index
        count, total = int((unknown_N & rows_N).sum()), int(rows_N.sum())
        if not count:
            continue
        source = joined.data.metadata[index]["source"]
        which = "all these images" if count < total else "these images"
        hint = "" if _has_reliable_patient_ids(source) else " (NIH ChestX-ray14)"
        lines.append(
            f"the patients of {count:,} of {total:,} images of {root} are unknown, so one of them may be in two "
            f"splits; shard it again as `cxrscale shard {source} ROOT --patients-from DATASET`, with a dataset that "
            f"has {which} under their patients{hint}"
        )
    return lines


def _separate_namespaces(joined: JoinedDatasets, unreliable_N: npt.NDArray[np.bool_]) -> list[str]:
    """Datasets with independent patient IDs. Those whose patients are all unknown are reported elsewhere."""
    roots, namespaces = joined.roots, joined.namespaces
    known = [index for index in range(len(roots)) if not unreliable_N[joined.index_N == index].all()]
    return [
        f"{roots[a]} and {roots[b]} have independent patient IDs ({namespaces[a]}, {namespaces[b]}), so a patient of "
        "both is detected only if they share an image; nothing can be done about the others"
        for position, a in enumerate(known)
        for b in known[position + 1 :]
        if namespaces[a] != namespaces[b]
    ]


def _not_compared(joined: JoinedDatasets, missing: Mapping[str, int]) -> list[str]:
    """Images that were compared with no other.

    Args:
        missing: root -> number of images without a fingerprint.
    """
    lines = [
        f"{count:,} images of {root} have no fingerprint, so duplicates of them cannot be found; run "
        f"`cxrscale verify {root} --repair`"
        for root, count in missing.items()
    ]
    quarantined = sum(len(metadata["quarantined"]) for metadata in joined.data.metadata)
    if quarantined:
        lines.append(
            f"{_count(quarantined, 'quarantined image')} could not be read and had no part in any comparison; repair "
            "the files, or leave them out"
        )
    return lines
