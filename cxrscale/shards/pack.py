"""Records -> tars and their manifest: one task a shard, each whole or absent, the same bytes at any worker count."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cxrscale import __version__
from cxrscale.cluster import run_tasks
from cxrscale.config import NIH14, Pack
from cxrscale.io import storage
from cxrscale.shards import manifest, splits
from cxrscale.shards.encode import EncodedSample, encode_sample
from cxrscale.types import ImageRecord, UnreadableImageError, UserError

PARTS = ".parts"
QUARANTINE = "quarantine.jsonl"


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """What one task packs."""

    name: str
    """The tar's file name: train-00000.tar."""
    split: str
    records: tuple[tuple[str, ImageRecord], ...]
    """(key of the tar's members, record) in the order of the tar."""


@dataclass(frozen=True, slots=True)
class PackResult:
    """What a pack left behind."""

    root: str
    images: int
    quarantined: int
    fresh: bool
    """False where everything had been done before."""


Progress = Callable[[int, int, int], None]
"""Called with (images finished since the last call, of which quarantined, images in all)."""


def plan_shards(records: Sequence[ImageRecord], split: Sequence[str], pack: Pack) -> list[ShardPlan]:
    """Group records into shards, a split at a time, patients in hashed order so that a sequential reader sees a mix.

    Pure: depends on the records, not on their order.

    Raises:
        UserError: two records share an id.
    """
    ids = [record.image_id for record in records]
    if len(set(ids)) != len(ids):
        twice = next(name for name in sorted(ids) if ids.count(name) > 1)
        raise UserError(f"image {twice} stands twice in the archive; remove one of the files")
    place = {patient: rank for rank, patient in enumerate(splits.shuffled([r.patient for r in records], seed=0))}
    order = sorted(range(len(records)), key=lambda i: (split[i], place[records[i].patient], records[i].image_id))
    keys = _member_keys(ids)
    plans = []
    for name in sorted(set(split)):
        rows = [i for i in order if split[i] == name]
        for number, start in enumerate(range(0, len(rows), pack.samples_per_shard)):
            chosen = rows[start : start + pack.samples_per_shard]
            plans.append(ShardPlan(f"{name}-{number:05d}.tar", name, tuple((keys[ids[i]], records[i]) for i in chosen)))
    return plans


def pack(
    records: Sequence[ImageRecord],
    split: Sequence[str],
    settings: Pack,
    out: str,
    *,
    patients_from: str | None = None,
    local: bool = False,
    progress: Progress | None = None,
) -> PackResult:
    """Write the dataset; what an earlier, interrupted call finished is kept, what it left half-done is swept away.

    Args:
        records: what an archive reader returned.
        split: (N,) the split of each record.
        out: a folder or fsspec address.
        patients_from: the source whose patients these are; None: the archive's own.
        local: in this process instead of on Ray.

    Raises:
        UserError: `out` holds shards of other input or settings, cannot be written, or nothing could be read.
    """
    findings = _findings(records)
    plans = plan_shards(records, split, settings)
    digest = _input_digest(plans, settings)
    done = _published_result(out, digest)
    if done is not None:
        return done
    storage.sweep(out)
    storage.sweep(storage.join(out, PARTS))
    jobs = [(plan, findings, settings, digest, out) for plan in plans]
    if progress:
        progress(0, 0, len(records))
    for part in run_tasks(pack_shard, jobs, local=local, workers=settings.workers):
        if progress:
            progress(part["images"] + part["quarantined"], part["quarantined"], len(records))
    source = records[0].source
    return _publish(plans, findings, settings, digest, out, source, patients_from or source)


def pack_shard(plan: ShardPlan, findings: tuple[str, ...], settings: Pack, digest: str, out: str) -> dict[str, int]:
    """Write one tar, its index and its part of the manifest, unless they are there and whole.

    Returns:
        How many images the tar holds and how many were quarantined.
    """
    import webdataset  # only here: it imports torch, which takes seconds

    cv2.setNumThreads(1)
    part_address = storage.join(out, PARTS, plan.name + ".parquet")
    finished = _finished_part(part_address, digest, storage.join(out, plan.name))
    if finished is not None:
        return finished
    samples: list[tuple[str, ImageRecord, EncodedSample]] = []
    quarantined: list[dict[str, str]] = []
    with storage.publishing(storage.join(out, plan.name)) as path:
        with path.open("wb") as file:
            # mtime=0 and plain USTAR make the tar a function of its members alone.
            writer = webdataset.TarWriter(file, mtime=0, format=tarfile.USTAR_FORMAT, encoder=False)
            for key, record in plan.records:
                try:
                    sample = encode_sample(record, plan.split, settings, findings)
                except UnreadableImageError as reason:
                    quarantined.append({"image_id": record.image_id, "path": record.path, "reason": str(reason)})
                    continue
                writer.write({"__key__": key, **sample.members})
                samples.append((key, record, sample.without_bytes()))
            writer.close()
        members = _read_back(path, samples)
        tar_digest, tar_bytes = storage.file_digest(path), path.stat().st_size
    storage.write(storage.join(out, plan.name.replace(".tar", ".idx")), _index(samples, members))
    about = {
        "input": digest,
        "tar": {"blake3": tar_digest, "bytes": tar_bytes},
        "images": len(samples),
        "quarantined": quarantined,
    }
    rows = _rows(plan, findings, samples, members)
    with storage.publishing(part_address) as path:
        pq.write_table(rows.replace_schema_metadata({b"part": json.dumps(about).encode()}), path)
    return _counts(about)


def _counts(part: dict[str, Any]) -> dict[str, int]:
    return {"images": part["images"], "quarantined": len(part["quarantined"])}


def _member_keys(ids: Sequence[str]) -> dict[str, str]:
    """Tar member names: no dots (they would end the key), under 100 characters, unique."""
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


def _findings(records: Sequence[ImageRecord]) -> tuple[str, ...]:
    if not records:
        raise UserError("the archive has no images; check the folder")
    named = {name for record in records for name in record.findings}
    known = [name for name in NIH14 if name in named]
    return (*known, *sorted(named - set(known)))


def _input_digest(plans: Sequence[ShardPlan], settings: Pack) -> str:
    """Names input and settings; `workers` and the place of the archive do not change what is written."""
    choices = settings.model_dump(mode="json", exclude={"workers", "max_quarantined"})
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
    return storage.digest(json.dumps([manifest.FORMAT, choices, rows], sort_keys=True).encode())


def _published_result(out: str, digest: str) -> PackResult | None:
    address = storage.join(out, manifest.NAME)
    if not storage.exists(address):
        return None
    about = manifest.load(out).about[0]
    if about["input"] != digest:
        raise UserError(f"{out} holds shards of another archive or other settings; give another --out or remove it")
    return PackResult(out, about["images"], len(about["quarantined"]), fresh=False)


def _finished_part(address: str, digest: str, tar: str) -> dict[str, int] | None:
    """The counts of a shard that an earlier run finished; None where it is missing, other, or its tar is not whole."""
    if not storage.exists(address) or not storage.exists(tar):
        return None
    about = json.loads(pq.read_schema(pa.BufferReader(storage.read(address))).metadata[b"part"])
    if about["input"] != digest or storage.digest(storage.read(tar)) != about["tar"]["blake3"]:
        return None
    return _counts(about)


def _read_back(
    path: Path, samples: Sequence[tuple[str, ImageRecord, EncodedSample]]
) -> dict[str, tuple[int, int, int]]:
    """Member name -> (offset, length, CRC-32), read from the finished tar and checked against what was meant."""
    members = {}
    with tarfile.open(path) as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            members[member.name] = (member.offset_data, member.size, zlib.crc32(file.read()))
    for key, record, sample in samples:
        for suffix, crc in sample.crcs.items():
            if members[f"{key}.{suffix}"][2] != crc:
                raise UserError(f"{path}: {record.image_id} read back differently than written; check the disk")
    return members


def _index(samples: Sequence[tuple[str, ImageRecord, EncodedSample]], members: dict[str, tuple[int, int, int]]) -> str:
    """DALI's index of the tar (wds2idx v1.2), for `fn.readers.webdataset(index_paths=...)`."""
    lines = [f"v1.2 {len(samples)}"]
    for key, _, sample in samples:
        fields = [(suffix, *members[f"{key}.{suffix}"][:2], f"{key}.{suffix}") for suffix in sample.crcs]
        lines.append(" ".join(str(value) for field in fields for value in field))
    return "\n".join(lines) + "\n"


def _rows(
    plan: ShardPlan,
    findings: tuple[str, ...],
    samples: Sequence[tuple[str, ImageRecord, EncodedSample]],
    members: dict[str, tuple[int, int, int]],
) -> pa.Table:
    rows = []
    for key, record, sample in samples:
        row = {**sample.row(record, findings), "split": plan.split, "shard": plan.name}
        row["key"] = manifest.image_key(record.image_id)
        for kind, suffix in (("image", sample.image_suffix), ("mask", "mask.png"), ("json", "json")):
            offset, length, crc = members.get(f"{key}.{suffix}", (None, None, None))
            row |= {f"{kind}_offset": offset, f"{kind}_length": length, f"{kind}_crc": crc}
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=_part_schema(findings))


def _part_schema(findings: tuple[str, ...]) -> pa.Schema:
    extra = [("dhash", pa.binary(32)), ("thumbnail", pa.binary(1024)), ("pixel_sum", pa.float64())]
    return pa.schema([*manifest.schema(findings), *extra, ("pixel_squares", pa.float64()), ("pixels", pa.int64())])


def _publish(
    plans: Sequence[ShardPlan],
    findings: tuple[str, ...],
    settings: Pack,
    digest: str,
    out: str,
    source: str,
    patients_from: str,
) -> PackResult:
    """Join the parts: quarantine list, fingerprints, and the manifest last, so that nothing half-done is ever seen."""
    storage.sweep(out)  # a task that was killed and run again has left its half behind
    tables, shards, quarantined = [], {}, []
    for plan in plans:
        table = pq.read_table(io.BytesIO(storage.read(storage.join(out, PARTS, plan.name + ".parquet"))))
        about = json.loads(table.schema.metadata[b"part"])
        tables.append(table.replace_schema_metadata(None))
        shards[plan.name] = about["tar"]
        quarantined += about["quarantined"]
    rows = pa.concat_tables(tables)
    if not len(rows):
        raise UserError(f"none of the {len(quarantined)} images could be read; the first: {quarantined[0]['reason']}")
    if quarantined:
        storage.write(storage.join(out, QUARANTINE), "".join(json.dumps(line) + "\n" for line in quarantined))
    prints = rows.select(["image_id", "patient", "split", "dhash", "thumbnail"])
    with storage.publishing(storage.join(out, manifest.FINGERPRINTS)) as path:
        pq.write_table(prints, path, compression="zstd")
    total = float(np.sum(rows["pixels"].to_numpy()))
    mean = float(np.sum(rows["pixel_sum"].to_numpy())) / total
    square = float(np.sum(rows["pixel_squares"].to_numpy())) / total
    about = {
        "format": manifest.FORMAT,
        "version": __version__,
        "source": source,
        "patients_from": patients_from,
        "input": digest,
        "pack": settings.model_dump(mode="json", exclude={"workers"}),
        "shards": shards,
        "images": len(rows),
        "quarantined": quarantined,
        "pixel_mean": mean / 255,
        "pixel_std": float(np.sqrt(max(0.0, square - mean * mean))) / 255,
    }
    names = [*(name for name, _ in manifest.FIELDS), *(manifest.LABEL + name for name in findings)]
    manifest.write(storage.join(out, manifest.NAME), rows.select(names), about)
    for plan in plans:
        storage.remove(storage.join(out, PARTS, plan.name + ".parquet"))
    storage.remove_empty_folder(storage.join(out, PARTS))
    return PackResult(out, len(rows), len(quarantined), fresh=True)
