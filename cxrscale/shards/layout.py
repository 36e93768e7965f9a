"""Which image goes into which tar, and under which name: plain functions of the records."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from cxrscale import sources
from cxrscale.config import NIH14, Pack
from cxrscale.io import storage
from cxrscale.shards import manifest, splits
from cxrscale.types import ImageRecord, UserError


@dataclass(frozen=True, slots=True)
class SplitRecords:
    """Records with their splits: what is packed."""

    records: Sequence[ImageRecord]
    split: Sequence[str]
    """(N,) split of each record."""
    patient_namespace: str | None = None
    """The source that gave the patient IDs; None: the records' own source."""
    source_ids: Sequence[tuple[str, str]] = ()
    """(N,) (image ID, patient ID) of each record in its source; the patient is "" if another dataset gave it. They are
    for the private map only and enter no file of the dataset."""
    key_fingerprint: str | None = None
    """Of the key that made the IDs; None: they are the source's own."""
    book: sources.LedgerBook | None = None
    """What was matched and left out when the source was read; it becomes the dataset's ledger.json."""

    def private_map(self) -> list[tuple[str, str, str, str]]:
        """The rows of `ids.write_map`."""
        return [
            (record.image_id, image_id, record.patient, patient)
            for record, (image_id, patient) in zip(self.records, self.source_ids, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """The content of one shard, which one task packs."""

    name: str
    """File name of the tar: train-00000.tar."""
    split: str
    records: tuple[tuple[str, ImageRecord], ...]
    """(key of the members, record) in tar order."""


def plan_shards(records: Sequence[ImageRecord], split: Sequence[str], settings: Pack) -> list[ShardPlan]:
    """Group records into shards, split by split, with patients in hashed order so that a sequential reader sees a mix.

    A pure function of the records; their order does not matter.

    Raises:
        UserError: two records have the same ID.
    """
    ids = [record.image_id for record in records]
    if len(set(ids)) != len(ids):
        twice = next(name for name in sorted(ids) if ids.count(name) > 1)
        raise UserError(f"image {twice} is in the source twice; remove one of the files")
    rank_of = {patient: rank for rank, patient in enumerate(splits.shuffled([r.patient for r in records], seed=0))}
    order = sorted(range(len(records)), key=lambda i: (split[i], rank_of[records[i].patient], records[i].image_id))
    keys = _member_keys(ids)
    plans = []
    for name in sorted(set(split)):
        rows = [i for i in order if split[i] == name]
        for number, start in enumerate(range(0, len(rows), settings.samples_per_shard)):
            chosen = rows[start : start + settings.samples_per_shard]
            plans.append(ShardPlan(f"{name}-{number:05d}.tar", name, tuple((keys[ids[i]], records[i]) for i in chosen)))
    return plans


def all_findings(records: Sequence[ImageRecord]) -> tuple[str, ...]:
    """The findings that any record names: those of ChestX-ray14 in its order, then the others by name.

    Raises:
        UserError: there are no records.
    """
    if not records:
        raise UserError("the source has no images; check the folder")
    named = {name for record in records for name in record.findings}
    known = [name for name in NIH14 if name in named]
    return (*known, *sorted(named - set(known)))


def input_digest(plans: Sequence[ShardPlan], settings: Pack) -> str:
    """Identifies records and settings; `workers` and the folder of the source do not change what is written."""
    options = settings.model_dump(mode="json", exclude={"workers", "max_quarantined", "key_file", "burned_in"})
    # Under the field names and values of version 0.1, so that `cxrscale shard` still recognizes its datasets.
    options["patients"] = options.pop("patient_ids")
    options["repeats"] = {"keep": "keep", "merge": "unite"}[options.pop("duplicates")]
    if settings.burned_in != "keep":
        options["burned_in"] = settings.burned_in
    if settings.codec == "source":
        options["metadata"] = "removed"
    if settings.masks:
        options["masks_keep"] = "area"
    rows = [
        (
            plan.name,
            key,
            r.image_id,
            r.patient,
            sorted(r.findings.items()),
            r.view,
            r.sex,
            r.age,
            r.rles,
            [[box.finding, box.x, box.y, box.width, box.height] for box in r.boxes],
        )
        for plan in plans
        for key, r in plan.records
    ]
    return storage.digest(json.dumps([manifest.FORMAT, options, rows], sort_keys=True).encode())


def _member_keys(ids: Sequence[str]) -> dict[str, str]:
    """Image ID -> name of its tar members: unique, below 100 characters, without dots (WebDataset's key ends there)."""
    keys: dict[str, str] = {}
    taken: set[str] = set()
    for image_id in sorted(ids):
        stem = image_id.removesuffix(".png").removesuffix(".jpeg").removesuffix(".jpg")
        key = "".join(char if (char.isalnum() and char.isascii()) or char in "-_" else "_" for char in stem)[-70:]
        if key in taken:
            key = f"{key}-{manifest.image_key(image_id) & 0xFFFFFFFF:08x}"
        taken.add(key)
        keys[image_id] = key
    return keys
