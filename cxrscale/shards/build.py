"""A raw archive -> a dataset: read the tables, give every patient a split, pack."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cxrscale import sources
from cxrscale.cluster import run_tasks
from cxrscale.config import PRESENT, Pack
from cxrscale.io import load_image, storage
from cxrscale.shards import duplicates, manifest, splits
from cxrscale.shards.pack import PackResult, Progress, pack
from cxrscale.types import ImageRecord, UnreadableImageError, UserError

PATIENT_KEY = "CXRSCALE_PATIENT_KEY"
"""The environment variable that keys the patients' hashes; the same key gives the same names in every dataset."""

UNLABELED = "unlabelled"
"""The split of images without a label (or, in a segmentation set, without a mask row): they are never trained on,
never counted as negative, and can still be predicted."""


def build(
    source: str,
    root: str,
    settings: Pack,
    out: str,
    *,
    patients_from_dataset: str | None = None,
    local: bool = False,
    progress: Progress | None = None,
) -> PackResult:
    """Shard an archive.

    Args:
        source: nih, siim, ...
        root: the archive's folder or address.
        out: where the dataset goes.
        patients_from_dataset: a dataset that holds the same images under their true patients (NIH, for SIIM): patient and
            split are taken from there.
        local: in this process instead of on Ray.
        progress: told of every finished shard.

    Raises:
        UserError: the archive cannot be read, or `out` not be written.
    """
    records = sorted(sources.read(source, root), key=lambda record: record.image_id)[: settings.limit]
    if patients_from_dataset is not None:
        records, split = inherit_patients(records, patients_from_dataset, settings, local=local)
        patients_from = str(manifest.load(patients_from_dataset).about[0]["patients_from"])
    else:
        if settings.duplicates == "merge":
            records = merge_duplicates(records, settings, local=local)
        split, patients_from = assign(records, settings), None
        records = [replace(record, patient=hash_patient_id(record, settings)) for record in records]
    return pack(records, split, settings, out, patients_from=patients_from, local=local, progress=progress)


def hash_patient_id(record: ImageRecord, settings: Pack) -> str:
    """What the shards call a patient: 16 digits of BLAKE2b keyed by CXRSCALE_PATIENT_KEY, or the archive's own name.

    Without a key of one's own the hash hides nothing from whoever has a list of the patients to try.
    """
    if settings.patient_ids == "original":
        return record.patient
    key = os.environ.get(PATIENT_KEY, "cxrscale").encode()[:64]
    return hashlib.blake2b(f"{record.source}:{record.patient}".encode(), key=key, digest_size=8).hexdigest()


def assign(records: Sequence[ImageRecord], settings: Pack) -> list[str]:
    """The split of each record, by patient; records without labels are set apart."""
    labeled = [_is_labeled(record, settings) for record in records]
    chosen = [record for record, keep in zip(records, labeled, strict=True) if keep]
    names = _splits(chosen, settings) if chosen else np.zeros(0, dtype=object)
    drawn = iter(names.tolist())
    return [next(drawn) if keep else UNLABELED for keep in labeled]


def _splits(records: Sequence[ImageRecord], settings: Pack) -> splits.Splits:
    who, seed = [record.patient for record in records], settings.split_seed
    if settings.split == "chexnet":
        return splits.chexnet(who, seed)
    if settings.split == "kfold":
        positive = [bool(record.rles) or PRESENT in record.findings.values() for record in records]
        return splits.kfold(who, positive, [_mask_pixels(record) for record in records], settings.folds, seed)
    if settings.split == "lists":
        return splits.from_lists([record.image_id for record in records], _lists(settings))
    if settings.split == "official" and any(record.split for record in records):
        return splits.official(who, [record.split for record in records], settings.val_fraction, seed)
    share = settings.val_fraction * (1 - settings.test_fraction)
    return splits.random(who, share, settings.test_fraction, seed)


def _mask_pixels(record: ImageRecord) -> float:
    """Pixels of the record's runs, overlaps counted twice: near enough to tell small masks from large."""
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

    Records without a duplicate keep their own patient and go to train: an image whose patient is unknown must not
    judge a model that may have seen that patient.

    Raises:
        UserError: the other dataset holds none of these images.
    """
    other = pq.read_table(pa.BufferReader(storage.read(storage.join(patients_from_dataset, manifest.FINGERPRINTS))))
    marks = fingerprints(records, settings, local=local)
    readable = list(marks)
    pairs = duplicates.find_between(
        _matrix([marks[name].dhash for name in readable]),
        _matrix([marks[name].thumbnail for name in readable]),
        _matrix(other["dhash"].to_pylist()),
        _matrix(other["thumbnail"].to_pylist()),
    )
    if not len(pairs):
        raise UserError(
            f"--patients-from {patients_from_dataset}: none of these {len(records)} images is there; give the right dataset"
        )
    patient, split = other["patient"].to_pylist(), other["split"].to_pylist()
    home = {readable[a]: (patient[b], split[b]) for a, b in pairs.tolist()}
    adopted, names = [], []
    for record in records:
        who, name = home.get(record.image_id, (hash_patient_id(record, settings), splits.TRAIN))
        adopted.append(replace(record, patient=who))
        names.append(name if _is_labeled(record, settings) else UNLABELED)
    return adopted, names


def merge_duplicates(records: Sequence[ImageRecord], settings: Pack, *, local: bool) -> list[ImageRecord]:
    """Make one patient of all who share an image: a file that occurs twice must not stand in two splits."""
    marks = fingerprints(records, settings, local=local)
    place = {record.image_id: number for number, record in enumerate(records)}
    readable = list(marks)
    pairs = duplicates.find_within(
        _matrix([marks[name].dhash for name in readable]), _matrix([marks[name].thumbnail for name in readable])
    )
    rows = np.array([place[name] for name in readable], dtype=np.int64)[pairs]
    names = duplicates.merge_patients([record.patient for record in records], rows)
    return [replace(record, patient=name) for record, name in zip(records, names, strict=True)]


def fingerprints(records: Sequence[ImageRecord], settings: Pack, *, local: bool) -> dict[str, duplicates.Fingerprint]:
    """Image id -> fingerprint, of every image that can be read; packing meets the others again and says why."""
    jobs = [(tuple(records[start : start + 500]),) for start in range(0, len(records), 500)]
    found: dict[str, duplicates.Fingerprint] = {}
    for part in run_tasks(_fingerprints, jobs, local=local, workers=settings.workers):
        found |= part
    return {record.image_id: found[record.image_id] for record in records if record.image_id in found}


def _fingerprints(records: Sequence[ImageRecord]) -> dict[str, duplicates.Fingerprint]:
    cv2.setNumThreads(1)
    found = {}
    for record in records:
        with suppress(UnreadableImageError, UserError):
            image_HW = load_image(storage.read(record.path), name=record.path).image_HW
            found[record.image_id] = duplicates.fingerprint(image_HW)
    return found


def _is_labeled(record: ImageRecord, settings: Pack) -> bool:
    return record.rles is not None if settings.masks else bool(record.findings)


def _matrix(rows: Sequence[bytes]) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    return np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(len(rows), -1)
