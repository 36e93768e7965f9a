"""A raw archive -> a shard set: read the tables, give every patient a split, pack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cxrscale import archives, pictures, splits, storage, twins
from cxrscale.config import Pack
from cxrscale.schema import ImageRecord, InputError, Unreadable
from cxrscale.shards import manifest
from cxrscale.shards.pack import Packed, Progress, pack

UNLABELLED = "unlabelled"
"""The split of pictures without a label (or, in a segmentation set, without a mask row): they are never trained on,
never counted as negative, and can still be predicted."""


def build(
    source: str,
    root: str,
    settings: Pack,
    out: str,
    *,
    twins_of: str | None = None,
    local: bool = False,
    progress: Progress | None = None,
) -> Packed:
    """Shard an archive.

    Args:
        source: nih, siim, ...
        root: the archive's folder or address.
        out: where the shard set goes.
        twins_of: a shard set that holds the same pictures under their true patients (NIH, for SIIM): patient and
            split are taken from there.
        local: in this process instead of on Ray.
        progress: told of every finished shard.

    Raises:
        InputError: the archive cannot be read, or `out` not be written.
    """
    records = sorted(archives.read(source, root), key=lambda record: record.image_id)[: settings.limit]
    if twins_of is None:
        split = assign(records, settings)
    else:
        records, split = adopt(records, twins_of, settings)
    return pack(records, split, settings, out, local=local, progress=progress)


def assign(records: Sequence[ImageRecord], settings: Pack) -> list[str]:
    """The split of each record, by patient; records without labels are set apart."""
    labelled = [_is_labelled(record, settings) for record in records]
    chosen = [record for record, keep in zip(records, labelled, strict=True) if keep]
    who = [record.patient for record in chosen]
    has_list = any(record.split for record in chosen)
    if settings.split == "official" and has_list:
        names = splits.official(who, [r.split for r in chosen], settings.val_fraction, settings.split_seed)
    else:
        share = settings.val_fraction * (1 - settings.test_fraction)
        names = splits.random(who, share, settings.test_fraction, settings.split_seed)
    drawn = iter(names.tolist())
    return [next(drawn) if keep else UNLABELLED for keep in labelled]


def adopt(records: Sequence[ImageRecord], twins_of: str, settings: Pack) -> tuple[list[ImageRecord], list[str]]:
    """Give each record the patient and split of the same picture in another shard set.

    Records without a twin keep their own patient and go to train: a picture whose patient is unknown must not
    judge a net that may have seen that patient.

    Raises:
        InputError: the other shard set holds none of these pictures.
    """
    manifest.load(twins_of)
    other = pq.read_table(_open(storage.join(twins_of, manifest.FINGERPRINTS)))
    readable, marks = [], []
    for record in records:
        try:
            marks.append(twins.fingerprint(pictures.load(storage.read(record.path), name=record.path).grey_HW))
            readable.append(record.image_id)
        except (Unreadable, InputError):
            continue  # packing meets it again and quarantines it with the reason
    pairs = twins.find(
        _matrix([mark.dhash for mark in marks]),
        _matrix([mark.thumbnail for mark in marks]),
        _matrix(other["dhash"].to_pylist()),
        _matrix(other["thumbnail"].to_pylist()),
    )
    if not len(pairs):
        raise InputError(
            f"--twins {twins_of}: none of these {len(records)} pictures is there; give the right shard set"
        )
    patient, split = other["patient"].to_pylist(), other["split"].to_pylist()
    home = {readable[a]: (patient[b], split[b]) for a, b in pairs.tolist()}
    adopted, names = [], []
    for record in records:
        who, name = home.get(record.image_id, (record.patient, splits.TRAIN))
        adopted.append(replace(record, patient=who))
        names.append(name if _is_labelled(record, settings) else UNLABELLED)
    return adopted, names


def _is_labelled(record: ImageRecord, settings: Pack) -> bool:
    return record.rles is not None if settings.masks else bool(record.findings)


def _matrix(rows: Sequence[bytes]) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    return np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(len(rows), -1)


def _open(address: str) -> pa.BufferReader:
    return pa.BufferReader(storage.read(address))
