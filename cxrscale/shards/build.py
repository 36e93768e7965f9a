"""A raw source -> a dataset: read the tables, assign patients to splits, pack."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np

from cxrscale import sources
from cxrscale.cluster import run_tasks
from cxrscale.config import PRESENT, Pack
from cxrscale.io import load_image
from cxrscale.shards import duplicates, ids, manifest, splits
from cxrscale.shards.encode import read_image_file
from cxrscale.shards.ids import Key
from cxrscale.shards.layout import SplitRecords
from cxrscale.shards.pack import PackResult, pack
from cxrscale.types import ImageRecord, UnreadableImageError, UserError

UNLABELED = "unlabelled"
"""The split of images without a label (with pack.masks: without a row in the mask table). They are never trained on and
never count as negative, but can be predicted. The spelling is part of the manifest format."""


def build_shards(
    source: str,
    root: str | Path,
    settings: Pack,
    out: str | Path,
    *,
    patients_from_dataset: str | None = None,
    keep_map: str | None = None,
    local: bool = False,
) -> PackResult:
    """Make a dataset from a source; what an earlier, interrupted call finished is not done again.

    Args:
        source: one of `sources.names()`.
        root: the source's folder or address.
        settings: the pack section. `sources.get(source).pack_defaults` are the defaults of the command line.
        out: folder or address of the dataset.
        patients_from_dataset: a dataset with the same images under their true patients (NIH, for SIIM); patients and
            splits are taken from there.
        keep_map: a private file outside `out`, for the map from the dataset's IDs to the source's own, as CSV.
        local: in this process instead of on Ray.

    Raises:
        UserError: the source cannot be read, or `out` cannot be written, or its IDs would have another key than those
            of the other dataset.

    Example:
        >>> import cxrscale as cx
        >>> from cxrscale.config import Pack
        >>> cx.build_shards("nih", "/data/nih", Pack(size=512), "shards/nih", local=True)
    """
    if keep_map is not None:
        ids.check_map_address(keep_map, str(out))
    prepared = prepare(source, str(root), settings, patients_from_dataset=patients_from_dataset, local=local)
    if keep_map is not None:
        ids.write_map(keep_map, str(out), prepared.private_map())
    return pack(prepared, settings, str(out), local=local)


def prepare(
    source: str, root: str, settings: Pack, *, patients_from_dataset: str | None = None, local: bool = False
) -> SplitRecords:
    """Read the tables of a source, assign its patients to splits and hash the IDs: `build_shards` without the packing.

    Lists of a split and tables are matched with the source's own IDs; the hashes come last.

    Args:
        source, root, settings, patients_from_dataset, local: as in `build_shards`.

    Raises:
        UserError: the source or the other dataset cannot be read, its IDs have another key, or there is no key.
    """
    key, namespace = ids.read_key(settings), None
    if patients_from_dataset is not None:
        other = manifest.load(patients_from_dataset).metadata[0]
        ids.refuse_other_key(patients_from_dataset, other, key)
        namespace = str(other["patients_from"])
    content = sources.read(source, root)
    book, records = content.book, content.records[: settings.limit]
    own_ids = [(record.image_id, record.patient) for record in records]
    if patients_from_dataset is not None:
        inherited, split = inherit_patients(records, patients_from_dataset, settings, local=local)
        own_ids = [
            (record.image_id, record.patient if patient is None else "")
            for record, patient in zip(records, inherited, strict=True)
        ]
    else:
        if settings.duplicates == "merge":
            records = merge_duplicates(records, settings, local=local)
        _note_split(source, records, settings, book)
        inherited, split = [None] * len(records), assign(records, settings)
    hashed = [with_hashed_ids(record, key, patient) for record, patient in zip(records, inherited, strict=True)]
    return SplitRecords(hashed, split, namespace, own_ids, None if key is None else key.fingerprint, book)


def _note_split(source: str, records: Sequence[ImageRecord], settings: Pack, book: sources.LedgerBook) -> None:
    """Say which split `official` is for this source.

    Raises:
        UserError: the source publishes a test list, and it is not there; no other split takes its place.
    """
    if settings.split != "official" or any(record.split for record in records):
        return
    if sources.get(source).publishes_split:
        raise UserError(
            f"pack.split=official: {source}'s official lists are not in its folder; put them beside the label table, "
            "or set pack.split=random"
        )
    book.note(f"{source} publishes no test list: splits are random by patient")


def with_hashed_ids(record: ImageRecord, key: Key | None, patient: str | None = None) -> ImageRecord:
    """The record under the IDs of the dataset; unchanged without a key.

    Args:
        patient: the patient's ID in the dataset, where another dataset has given it.
    """
    if key is None:
        return record if patient is None else replace(record, patient=patient)
    patient = patient or key.hash(record.source, record.patient)
    return replace(record, image_id=key.hash(record.source, record.image_id), patient=patient)


def assign(records: Sequence[ImageRecord], settings: Pack) -> list[str]:
    """(N,) split of each record, by patient; records without labels get UNLABELED."""
    is_labeled = [_is_labeled(record, settings) for record in records]
    labeled = [record for record, keep in zip(records, is_labeled, strict=True) if keep]
    names = iter(_splits(labeled, settings).tolist() if labeled else [])
    return [next(names) if keep else UNLABELED for keep in is_labeled]


def _splits(records: Sequence[ImageRecord], settings: Pack) -> splits.Splits:
    patients, seed = [record.patient for record in records], settings.split_seed
    if settings.split == "chexnet":
        return splits.chexnet(patients, seed)
    if settings.split == "kfold":
        positive = [bool(record.rles) or PRESENT in record.findings.values() for record in records]
        return splits.kfold(patients, positive, [_mask_pixels(record) for record in records], settings.folds, seed)
    if settings.split == "lists":
        return splits.from_lists([record.image_id for record in records], _lists(records, settings))
    if settings.split == "official" and any(record.split for record in records):
        return splits.official(patients, [record.split for record in records], settings.val_fraction, seed)
    share = settings.val_fraction * (1 - settings.test_fraction)
    return splits.random(patients, share, settings.test_fraction, seed)


def _mask_pixels(record: ImageRecord) -> float:
    """Total length of the record's runs; overlaps count twice, which is exact enough to stratify by mask size."""
    runs = [rle.split()[1::2] for rle in record.rles or ()]
    return float(sum(int(length) for rle in runs for length in rle)) or float("nan")


def _lists(records: Sequence[ImageRecord], settings: Pack) -> dict[str, list[str]]:
    """Split -> IDs of the images that its list names; a name that no image has stays as it is."""
    if not settings.split_lists:
        raise UserError("pack.split=lists needs pack.split_lists={train: FILE, val: FILE, test: FILE}")
    known = {record.image_id for record in records}
    ids_of = _ids_by_name(records)
    lists = {}
    for split, path in settings.split_lists.items():
        lists[split] = [_listed_id(name, path, known, ids_of) for name in sources.read_names(path)]
    return lists


def _ids_by_name(records: Sequence[ImageRecord]) -> dict[str, list[str]]:
    """What a list may call an image, without folders, suffix and upper case -> the IDs of the images called so."""
    ids_of: dict[str, list[str]] = {}
    for record in records:
        for name in {sources.image_key(record.image_id), sources.image_key(record.path)}:
            ids_of.setdefault(name, []).append(record.image_id)
    return ids_of


def _listed_id(name: str, path: str, known: Collection[str], ids_of: Mapping[str, list[str]]) -> str:
    """The ID of the image that a list calls `name`.

    Raises:
        UserError: several images are called so.
    """
    # Kermany's IDs are the last two folders and the name: train-NORMAL-IM-0115-0001.
    joined = re.sub(r"[/\\]+", "-", name)
    for key in (sources.image_key(joined), sources.image_key(name)):
        ids = [name] if name in known else ids_of.get(key, [])
        if len(ids) == 1:
            return ids[0]
        if ids:
            raise UserError(f"{path}: {name!r:.80} is the name of {' and '.join(sorted(ids)[:2])}; write the whole ID")
    return name


def inherit_patients(
    records: Sequence[ImageRecord], patients_from_dataset: str, settings: Pack, *, local: bool
) -> tuple[list[str | None], list[str]]:
    """The patient and the split of the same image in another dataset, for each record.

    Records without a duplicate there keep their patient and go to train: an image of an unknown patient must not be
    used to evaluate a model that may have been trained on the same patient.

    Returns:
        (N,) patients, as in the other dataset, None where it does not have the image; (N,) splits.

    Raises:
        UserError: the other dataset has none of these images.
    """
    other = manifest.fingerprints(patients_from_dataset, ("patient", "split", "dhash", "thumbnail"))
    prints = fingerprints(records, settings, local=local)
    readable = list(prints)
    if not readable:
        raise UserError(f"--patients-from {patients_from_dataset}: none of the {len(records)} images can be read")
    pairs = duplicates.find_between(
        _matrix([prints[name].dhash for name in readable]),
        _matrix([prints[name].thumbnail for name in readable]),
        _matrix(other["dhash"].to_pylist()),
        _matrix(other["thumbnail"].to_pylist()),
    )
    if not len(pairs):
        raise UserError(
            f"--patients-from {patients_from_dataset}: it has none of these {len(records)} images; "
            "give a dataset that has them"
        )
    patient, split = other["patient"].to_pylist(), other["split"].to_pylist()
    found = {readable[a]: (patient[b], split[b]) for a, b in pairs.tolist()}
    patients: list[str | None] = []
    names: list[str] = []
    for record in records:
        patient_id, name = found.get(record.image_id, (None, splits.TRAIN))
        patients.append(patient_id)
        names.append(name if _is_labeled(record, settings) else UNLABELED)
    return patients, names


def merge_duplicates(records: Sequence[ImageRecord], settings: Pack, *, local: bool) -> list[ImageRecord]:
    """Merge patients who share an image, so that a file that occurs twice cannot be in two splits."""
    prints = fingerprints(records, settings, local=local)
    row_of = {record.image_id: row for row, record in enumerate(records)}
    readable = list(prints)
    pairs = duplicates.find_within(
        _matrix([prints[name].dhash for name in readable]), _matrix([prints[name].thumbnail for name in readable])
    )
    rows = np.array([row_of[name] for name in readable], dtype=np.int64)[pairs]
    names = duplicates.merge_patients([record.patient for record in records], rows)
    return [replace(record, patient=name) for record, name in zip(records, names, strict=True)]


def fingerprints(records: Sequence[ImageRecord], settings: Pack, *, local: bool) -> dict[str, duplicates.Fingerprint]:
    """Image ID -> fingerprint, for every image that can be read. Packing quarantines the others, with the reason."""
    jobs = [(tuple(records[start : start + 500]),) for start in range(0, len(records), 500)]
    prints: dict[str, duplicates.Fingerprint] = {}
    for part in run_tasks(_fingerprints, jobs, local=local, workers=settings.workers):
        prints |= part
    return {record.image_id: prints[record.image_id] for record in records if record.image_id in prints}


def _fingerprints(records: Sequence[ImageRecord]) -> dict[str, duplicates.Fingerprint]:
    cv2.setNumThreads(1)
    prints = {}
    for record in records:
        with suppress(UnreadableImageError):
            image_HW = load_image(read_image_file(record.path), name=record.path).image_HW
            prints[record.image_id] = duplicates.fingerprint(image_HW)
    return prints


def _is_labeled(record: ImageRecord, settings: Pack) -> bool:
    return record.rles is not None if settings.masks else bool(record.findings)


def _matrix(rows: Sequence[bytes]) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    return np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(len(rows), -1)
