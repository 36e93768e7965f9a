"""Planned shards -> tars and their manifest: one task per shard, the same bytes for any number of workers."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from cxrscale import __version__, sources
from cxrscale.cluster import run_tasks
from cxrscale.config import Pack
from cxrscale.io import encode_artifact, lease, parquet, seal, storage, without_quotes
from cxrscale.shards import contents, layout, manifest, tars
from cxrscale.shards.contents import FileDigest
from cxrscale.shards.encode import EncodedSample, encode_sample
from cxrscale.shards.layout import ShardPlan, SplitRecords
from cxrscale.types import ImageRecord, UnreadableImageError, UserError

PARTS = ".parts"
QUARANTINE = "quarantine.jsonl"
_PART_FIELDS = {
    "dhash": manifest.FINGERPRINT_FIELDS["dhash"],
    "thumbnail": manifest.FINGERPRINT_FIELDS["thumbnail"],
    "tiny_mask": pa.bool_(),
    "pixel_sum": pa.float64(),
    "pixel_squares": pa.float64(),
    "pixels": pa.int64(),
}
"""Columns of a shard's part that the manifest does not have."""


@dataclass(frozen=True, slots=True)
class PackResult:
    """A finished dataset."""

    root: str
    images: int
    quarantined: int
    fresh: bool
    """False if an earlier run had finished everything."""
    burned_in: int = 0
    """How many of the packed images say that text which identifies the patient is burned into their pixels."""
    tiny_masks: int = 0
    """How many masks cover no stored pixel by half and keep the one that they cover most."""


Progress = Callable[[int, int, int], None]
"""Called with (images finished since the last call, how many of them are quarantined, total images)."""


def pack(
    prepared: SplitRecords, settings: Pack, out: str, *, local: bool = False, progress: Progress | None = None
) -> PackResult:
    """Write a dataset. Shards that an earlier, interrupted call finished are kept; unfinished ones are removed.

    Args:
        prepared: the records of one source with their splits.
        settings: the pack section.
        out: a folder or an fsspec address.
        local: in this process instead of on Ray.
        progress: called after every shard.

    Raises:
        UserError: `out` has shards of other records or settings, cannot be written, or no image could be read.
    """
    records = prepared.records
    findings = layout.all_findings(records)
    plans = layout.plan_shards(records, prepared.split, settings)
    digest = layout.input_digest(plans, settings)
    finished = _published_result(out, digest, prepared.key_fingerprint)
    if finished is not None:
        _remove_leftovers(out)
        return finished
    with lease.held(out, f"dataset {out}") as owned:
        storage.remove(storage.join(out, contents.NAME))  # of a manifest that was removed
        storage.remove_temporary_files(out)
        storage.remove_temporary_files(storage.join(out, PARTS))
        jobs = [(plan, findings, settings, digest, out, owned.owner) for plan in plans]
        if progress:
            progress(0, 0, len(records))
        for part in run_tasks(_pack_under_lease, jobs, local=local, workers=settings.workers):
            if progress:
                progress(part["images"] + part["quarantined"], part["quarantined"], len(records))
        source = records[0].source
        origin = {
            "source": source,
            "patients_from": prepared.patient_namespace or source,
            "key_fingerprint": prepared.key_fingerprint,
        }
        ledger = {} if prepared.book is None else {sources.LEDGER: encode_artifact(prepared.book.ledger())}
        return _publish(plans, settings, out, {**origin, "input": digest}, ledger)


def _pack_under_lease(
    plan: ShardPlan, findings: tuple[str, ...], settings: Pack, digest: str, out: str, owner: str
) -> dict[str, int]:
    with lease.share(out, owner):
        return pack_shard(plan, findings, settings, digest, out)


def pack_shard(plan: ShardPlan, findings: tuple[str, ...], settings: Pack, digest: str, out: str) -> dict[str, int]:
    """Write one tar, its index and its part of the manifest, unless they exist already and are complete.

    Returns:
        Numbers of images in the tar and of quarantined images.
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
            # With mtime=0 and plain USTAR, the bytes of the tar depend on its members only.
            writer = webdataset.TarWriter(file, mtime=0, format=tarfile.USTAR_FORMAT, encoder=False)
            with _closed_while_open(writer):
                for key, record in plan.records:
                    try:
                        sample = encode_sample(record, plan.split, settings, findings)
                    except UnreadableImageError as reason:
                        quarantined.append({"image_id": record.image_id, "reason": _stored_reason(reason, record)})
                        continue
                    writer.write({"__key__": key, **sample.members})
                    samples.append((key, record, sample.without_bytes()))
                writer.close()
        members = _read_back(path, samples)
        tar_digest, tar_bytes = storage.file_digest(path), path.stat().st_size
    index = tars.index_of(members)
    storage.write(storage.join(out, tars.index_name(plan.name)), index)
    metadata = {
        "input": digest,
        "tar": {"blake3": tar_digest, "bytes": tar_bytes},
        "index": FileDigest.of(index).model_dump(),
        "images": len(samples),
        "quarantined": quarantined,
        "burned_in": sum(sample.burned_in for _, _, sample in samples),
    }
    rows = _rows(plan, findings, samples, members).replace_schema_metadata({b"part": json.dumps(metadata).encode()})
    storage.write(part_address, parquet.encode(rows, sealed=True))
    return _counts(metadata)


@contextmanager
def _closed_while_open(writer: Any) -> Iterator[None]:
    """Close the writer also after an error: it would do so when it is collected, when its file is closed already."""
    try:
        yield
    except BaseException:
        with suppress(OSError, ValueError):
            writer.close()
        raise


def _stored_reason(reason: UnreadableImageError, record: ImageRecord) -> str:
    """The reason without the file's path and a header's text, which both can name the patient."""
    text = str(reason)
    for name in (record.path, storage.absolute(record.path), PurePosixPath(record.path).name):
        text = text.replace(name, "the file")
    return without_quotes(text)


def _counts(part: dict[str, Any]) -> dict[str, int]:
    return {"images": part["images"], "quarantined": len(part["quarantined"])}


def _published_result(out: str, digest: str, key_fingerprint: str | None) -> PackResult | None:
    address = storage.join(out, manifest.NAME)
    if not storage.exists(address):
        return None
    listed = contents.read(out)
    _, metadata = manifest.parse(manifest.read(out, listed), out)
    if metadata["input"] != digest:
        other = "another source, other settings or another version"
        if metadata.get("key_fingerprint") != key_fingerprint:
            other = "ids of another key, or the source's own"
        raise UserError(f"{out} holds shards of {other}; give another --out or remove it")
    if listed is None and storage.listing(storage.join(out, PARTS)):
        return None  # it was killed between the manifest and dataset.json
    counts = {name: metadata.get(name, 0) for name in ("burned_in", "tiny_masks")}
    return PackResult(out, metadata["images"], len(metadata["quarantined"]), fresh=False, **counts)


def _finished_part(address: str, digest: str, tar: str) -> dict[str, int] | None:
    """The counts of a shard that an earlier run finished; None if it is missing, different or damaged."""
    if not storage.exists(address) or not storage.exists(tar):
        return None
    content = storage.read(address)
    if not seal.is_intact(content):
        return None  # damaged, or written by an earlier version
    metadata = json.loads(parquet.read_metadata(content, address, "remove it")[b"part"])
    if metadata["input"] != digest or storage.digest(storage.read(tar)) != metadata["tar"]["blake3"]:
        return None
    return _counts(metadata)


def _read_back(path: Path, samples: Sequence[tuple[str, ImageRecord, EncodedSample]]) -> tars.Members:
    """The members of the finished tar, checked against the encoded bytes."""
    with path.open("rb") as file:
        members = tars.read_members(file)
    for key, record, sample in samples:
        for suffix, crc in sample.crcs.items():
            if members[f"{key}.{suffix}"][2] != crc:
                raise UserError(
                    f"{path}: {record.image_id} was read back with other bytes than were written; check the disk"
                )
    return members


def _rows(
    plan: ShardPlan,
    findings: tuple[str, ...],
    samples: Sequence[tuple[str, ImageRecord, EncodedSample]],
    members: tars.Members,
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
    return pa.schema([*manifest.schema(findings), *_PART_FIELDS.items()])


def _json_lines(entries: Sequence[Mapping[str, str]]) -> bytes:
    return "".join(json.dumps(entry) + "\n" for entry in entries).encode()


def _publish(
    plans: Sequence[ShardPlan],
    settings: Pack,
    out: str,
    origin: Mapping[str, str | None],
    files: Mapping[str, bytes],
) -> PackResult:
    """Join the parts: lists and fingerprints, then the manifest, so that no reader sees a partial dataset, then
    dataset.json. The parts go last: from them alone the same command completes what was cut short.

    Args:
        origin: `input` (the digest of records and settings), `source`, `patients_from` (the source that gave the
            patient IDs), and `key_fingerprint`.
        files: name -> content of further files.
    """
    storage.remove_temporary_files(out)  # a task that was killed and run again has left a temporary file
    parts, shards, indices, quarantined, burned_in = [], {}, {}, [], 0
    for plan in plans:
        address = storage.join(out, PARTS, plan.name + ".parquet")
        table = parquet.read_table(storage.read(address), address, "run the same command again")
        part = json.loads(table.schema.metadata[b"part"])
        parts.append(table.replace_schema_metadata(None))
        shards[plan.name] = part["tar"]
        indices[tars.index_name(plan.name)] = part["index"]
        quarantined += part["quarantined"]
        burned_in += part.get("burned_in", 0)
    rows = pa.concat_tables(parts)
    if not len(rows):
        raise UserError(f"none of the {len(quarantined)} images could be read; the first: {quarantined[0]['reason']}")
    tiny_masks = int(np.sum(rows["tiny_mask"].to_numpy(zero_copy_only=False)))
    metadata = {
        "format": manifest.FORMAT,
        "version": __version__,
        **origin,
        "pack": settings.model_dump(mode="json", exclude={"workers", "key_file", "split_lists"}),
        "shards": shards,
        "images": len(rows),
        "quarantined": quarantined,
        "burned_in": burned_in,
        "tiny_masks": tiny_masks,
        **_pixel_statistics(rows),
    }
    names = [name for name in rows.column_names if name not in _PART_FIELDS]
    files = {
        **files,
        **({QUARANTINE: _json_lines(quarantined)} if quarantined else {}),
        manifest.FINGERPRINTS: parquet.encode(rows.select(list(manifest.FINGERPRINT_FIELDS))),
        manifest.NAME: manifest.encode(rows.select(names), metadata),
    }
    for name, content in files.items():
        storage.write(storage.join(out, name), content)
    if not quarantined:
        storage.remove(storage.join(out, QUARANTINE))  # of an earlier state of the source
    digests = {name: FileDigest.of(content) for name, content in files.items()}
    stored = {name: FileDigest.model_validate(entry) for name, entry in (shards | indices).items()}
    contents.write(out, digests | stored)
    _remove_parts(out)
    return PackResult(out, len(rows), len(quarantined), fresh=True, burned_in=burned_in, tiny_masks=tiny_masks)


def _pixel_statistics(rows: pa.Table) -> dict[str, float]:
    """Mean and standard deviation over all pixels of all images, from 0 to 1."""
    total = float(np.sum(rows["pixels"].to_numpy()))
    mean = float(np.sum(rows["pixel_sum"].to_numpy())) / total
    square = float(np.sum(rows["pixel_squares"].to_numpy())) / total
    return {"pixel_mean": mean / 255, "pixel_std": float(np.sqrt(max(0.0, square - mean * mean))) / 255}


def _remove_parts(out: str) -> None:
    for name in storage.listing(storage.join(out, PARTS)):
        storage.remove(storage.join(out, PARTS, name))
    storage.remove_empty_folder(storage.join(out, PARTS))


def _remove_leftovers(out: str) -> None:
    """Remove what a process left that was killed after it had published the manifest."""
    if storage.exists(storage.join(out, lease.NAME)) or storage.listing(storage.join(out, PARTS)):
        # Else that process is alive, and removes them itself.
        with suppress(lease.BusyError), lease.held(out, f"dataset {out}"):
            _remove_parts(out)
