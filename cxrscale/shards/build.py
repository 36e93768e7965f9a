"""A raw source -> a dataset: read the tables, assign patients to splits, pack."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cxrscale import sources
from cxrscale.cluster import run_tasks
from cxrscale.config import PATIENT_KEY, PRESENT, Pack
from cxrscale.io import load_image, storage
from cxrscale.shards import duplicates, manifest, splits
from cxrscale.shards.encode import read_image_file
from cxrscale.shards.pack import PackResult, SplitRecords, pack
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
        local: in this process instead of on Ray.

    Raises:
        UserError: the source cannot be read, or `out` cannot be written.

    Example:
        >>> import cxrscale as cx
        >>> from cxrscale.config import Pack
        >>> cx.build_shards("nih", "/data/nih", Pack(size=512), "shards/nih", local=True)
    """
    prepared = prepare(source, str(root), settings, patients_from_dataset=patients_from_dataset, local=local)
    return pack(prepared, settings, str(out), local=local)


def prepare(
    source: str, root: str, settings: Pack, *, patients_from_dataset: str | None = None, local: bool = False
) -> SplitRecords:
    """Read the tables of a source and assign its patients to splits: all of `build_shards` but the packing.

    Args:
        source, root, settings, patients_from_dataset, local: as in `build_shards`.

    Raises:
        UserError: the source or the other dataset cannot be read.
    """
    records = sorted(sources.read(source, root), key=lambda record: record.image_id)[: settings.limit]
    if patients_from_dataset is not None:
        records, split = inherit_patients(records, patients_from_dataset, settings, local=local)
        namespace = str(manifest.load(patients_from_dataset).metadata[0]["patients_from"])
        return SplitRecords(records, split, namespace)
    if settings.duplicates == "merge":
        records = merge_duplicates(records, settings, local=local)
    split = assign(records, settings)
    records = [replace(record, patient=hash_patient_id(record, settings)) for record in records]
    return SplitRecords(records, split)


def hash_patient_id(record: ImageRecord, settings: Pack) -> str:
    """The patient's ID in the dataset: 16 hexadecimal digits of keyed BLAKE2b, or the source's own ID.

    CXRSCALE_PATIENT_KEY is the key. Without a secret one, anyone with a list of the patient IDs can reverse the hashes.
    """
    if settings.patient_ids == "original":
        return record.patient
    key = os.environ.get(PATIENT_KEY, "cxrscale").encode()[:64]
    return hashlib.blake2b(f"{record.source}:{record.patient}".encode(), key=key, digest_size=8).hexdigest()


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
        return splits.from_lists([record.image_id for record in records], _lists(settings))
    if settings.split == "official" and any(record.split for record in records):
        return splits.official(patients, [record.split for record in records], settings.val_fraction, seed)
    share = settings.val_fraction * (1 - settings.test_fraction)
    return splits.random(patients, share, settings.test_fraction, seed)


def _mask_pixels(record: ImageRecord) -> float:
    """Total length of the record's runs; overlaps count twice, which is exact enough to stratify by mask size."""
    runs = [rle.split()[1::2] for rle in record.rles or ()]
    return float(sum(int(length) for rle in runs for length in rle)) or float("nan")


def _lists(settings: Pack) -> dict[str, list[str]]:
    if not settings.split_lists:
        raise UserError("pack.split=lists needs pack.split_lists={train: FILE, val: FILE, test: FILE}")
    return {name: storage.read(path).decode().split() for name, path in settings.split_lists.items()}


def inherit_patients(
    records: Sequence[ImageRecord], patients_from_dataset: str, settings: Pack, *, local: bool
) -> tuple[list[ImageRecord], list[str]]:
    """Give each record the patient and split of the same image in another dataset.

    Records without a duplicate there keep their patient and go to train: an image of an unknown patient must not be
    used to evaluate a model that may have been trained on the same patient.

    Raises:
        UserError: the other dataset has none of these images.
    """
    other = pq.read_table(pa.BufferReader(storage.read(storage.join(patients_from_dataset, manifest.FINGERPRINTS))))
    prints = fingerprints(records, settings, local=local)
    readable = list(prints)
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
    inherited, names = [], []
    for record in records:
        patient_id, name = found.get(record.image_id, (hash_patient_id(record, settings), splits.TRAIN))
        inherited.append(replace(record, patient=patient_id))
        names.append(name if _is_labeled(record, settings) else UNLABELED)
    return inherited, names


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
