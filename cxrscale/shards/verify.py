"""Re-read every byte of a dataset, and hold it against its digests and its parts against each other."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cxrscale.io import storage
from cxrscale.shards import contents, manifest, tars
from cxrscale.shards.contents import Contents, FileDigest
from cxrscale.types import AccessError, UserError

Progress = Callable[[int], None]
KINDS = ("image", "mask", "json")
_JSON_COLUMNS = ("image_id", "source", "patient", "split", "view", "sex", "age")
"""Columns of the manifest that a sample's JSON has under the same names."""


def verify(root: str, progress: Progress | None = None) -> list[str]:
    """All faults of a dataset, one line per fault; empty if it is intact.

    Each file is held against its digest in dataset.json; each row of the manifest against the members and the JSON of
    its tar; indices against tars; fingerprints against rows. A dataset of an earlier version has no digests but those
    of its tars, so there only the comparisons can find anything.

    Args:
        root: the dataset.
        progress: called with the number of images checked since the last call.

    Raises:
        UserError: there is no manifest.
        AccessError: a file cannot be read, which says nothing about its content.
    """
    try:
        listed = contents.read(root)
    except AccessError:
        raise
    except UserError as error:
        return [str(error)]
    if listed is None:
        data, metadata = manifest.parse(manifest.read(root, None), root)
        contents.tell_of_older(root, contents.UNSEALED)
        return _row_faults(root, data, metadata, None, progress) + _fingerprint_faults(root, data)
    faults = _file_faults(root, listed)
    try:
        data, metadata = manifest.parse(manifest.read(root, listed), root)
    except AccessError:
        raise
    except UserError as error:
        known = any(line.startswith(manifest.NAME) for line in faults)
        return [*faults, *([] if known else [str(error)]), *_tar_faults(root, listed)]
    faults += _row_faults(root, data, metadata, listed, progress)
    damaged = any(line.startswith(manifest.FINGERPRINTS) for line in faults)
    return faults + ([] if damaged else _fingerprint_faults(root, data))


def _file_faults(root: str, listed: Contents) -> list[str]:
    """Of the files other than tars."""
    faults = []
    for name, expected in listed.files.items():
        if name.endswith(".tar"):
            continue
        address = storage.join(root, name)
        if not storage.exists(address):
            faults.append(f"{name}: missing")
        elif (difference := expected.difference(storage.read(address))) is not None:
            faults.append(f"{name}: {difference}")
    return faults + [f"{name}: not in {contents.NAME}" for name in _strays(root, ".idx", listed.files)]


def _tar_faults(root: str, listed: Contents) -> list[str]:
    """Of the tars, where there are no rows to hold them against."""
    faults = []
    for name, expected in listed.files.items():
        address = storage.join(root, name)
        if not name.endswith(".tar") or not storage.exists(address):
            continue
        if (difference := expected.difference(storage.read(address))) is not None:
            faults.append(f"{name}: {difference}")
    return faults


def _row_faults(
    root: str, data: Any, metadata: Mapping[str, Any], listed: Contents | None, progress: Progress | None
) -> list[str]:
    """Of tars, their rows in the manifest, and their indices where these have no digest."""
    expected: Mapping[str, Mapping[str, Any]] = metadata.get("shards", {})
    faults = [f"{name}: not in the manifest" for name in _strays(root, ".tar", expected)]
    if listed is not None and {n for n in listed.files if n.endswith(".tar")} != set(expected):
        faults.append(f"{manifest.NAME} and {contents.NAME} name other tars")
    shard_N = np.asarray(data["shard"].to_pylist(), dtype=object)
    faults += [f"{manifest.NAME}: a row is in no tar that it lists"] if set(shard_N) - set(expected) else []
    for name, entry in expected.items():
        address = storage.join(root, name)
        if not storage.exists(address):
            faults.append(f"{name}: missing")
            continue
        content = storage.read(address)
        rows = data.take(np.flatnonzero(shard_N == name)).to_pylist()
        intact = entry.get("blake3") is None or FileDigest.model_validate(entry).difference(content) is None
        faults += _held_against(name, content, rows) if intact else _damage(name, content, entry, rows)
        index = storage.join(root, tars.index_name(name))
        if intact and listed is None and storage.exists(index):
            right = storage.read(index) == tars.index_of(tars.read_members(io.BytesIO(content)))
            faults += [] if right else [f"{tars.index_name(name)}: differs from {name}"]
        if progress:
            progress(len(rows))
    return faults


def _damage(name: str, content: bytes, tar: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What of a tar differs, as exactly as the CRCs of its members tell."""
    size = [f"{name}: {len(content)} bytes, the manifest has {tar['bytes']}"] if len(content) != tar["bytes"] else []
    faults = [
        f"{name}: {kind} of {row['image_id']} differs from its CRC-32"
        for row in rows
        for kind in KINDS
        if row[f"{kind}_offset"] is not None and zlib.crc32(_member(content, row, kind)) != row[f"{kind}_crc"]
    ]
    return size + faults or [f"{name}: bytes outside the members differ from the manifest's BLAKE3"]


def _held_against(name: str, content: bytes, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows that differ from an intact tar."""
    try:
        members = tars.read_members(io.BytesIO(content))
    except tarfile.TarError as error:
        return [f"{name}: {error}"]
    left = {(offset, length, crc): member for member, (offset, length, crc) in members.items()}
    faults = []
    for row in rows:
        about = f"{manifest.NAME}: row of {row['image_id']}"
        places = {kind: tuple(row[f"{kind}_{part}"] for part in ("offset", "length", "crc")) for kind in KINDS}
        named = {kind: left.pop(place, None) for kind, place in places.items() if place[0] is not None}
        wrong = [kind for kind, member in named.items() if member is None]
        if wrong or not {"image", "json"} <= set(named):
            faults.append(f"{about} has no {(wrong or ['image and json'])[0]} in {name} at that place")
        elif len({str(member).partition(".")[0] for member in named.values()}) > 1:
            faults.append(f"{about} has members of several samples of {name}")
        else:
            faults += [f"{about} has another {what} than {name}" for what in _differing(row, content)]
    return faults + [f"{name}: {member} is in no row of the manifest" for member in left.values()]


def _differing(row: Mapping[str, Any], content: bytes) -> Iterator[str]:
    """What a row says differently than its sample's JSON; what the JSON of an earlier version lacks is not compared."""
    try:
        sample = json.loads(_member(content, row, "json"))
    except ValueError:
        sample = None
    if not isinstance(sample, dict):
        yield "json"
        return
    yield from (name for name in _JSON_COLUMNS if name in sample and sample[name] != row[name])
    labels = {
        name.removeprefix(manifest.LABEL): value for name, value in row.items() if name.startswith(manifest.LABEL)
    }
    yield from (f"label {name}" for name, value in labels.items() if sample.get("labels", {}).get(name) != value)
    if "original_size" in sample and sample["original_size"] != [row["height"], row["width"]]:
        yield "size"
    if "spacing_mm" in sample:
        stored = [row["spacing_row_mm"], row["spacing_column_mm"]]
        known = sample["spacing_mm"] or [None, None]
        if not np.array_equal(np.array(stored, np.float32), np.array(known, np.float32), equal_nan=True):
            yield "spacing"
    if "boxes" in sample and "boxes" in row and sample["boxes"] != json.loads(row["boxes"] or "[]"):
        yield "boxes"
    if row["key"] != manifest.image_key(row["image_id"]):
        yield "key"


def _fingerprint_faults(root: str, data: Any) -> list[str]:
    """Fingerprints that are not of the manifest's rows; datasets of earlier versions may have none."""
    if not storage.exists(storage.join(root, manifest.FINGERPRINTS)):
        return []
    try:
        prints = manifest.fingerprints(root, list(manifest.FINGERPRINT_FIELDS))
    except AccessError:
        raise
    except UserError as error:
        return [str(error)]
    names = ("image_id", "patient", "split")
    same = all(prints[name].to_pylist() == data[name].to_pylist() for name in names)
    return [] if same else [f"{manifest.FINGERPRINTS}: its rows are not those of the manifest"]


def _member(content: bytes, row: Mapping[str, Any], kind: str) -> bytes:
    return content[row[f"{kind}_offset"] : row[f"{kind}_offset"] + row[f"{kind}_length"]]


def _strays(root: str, suffix: str, known: Mapping[str, Any]) -> list[str]:
    return [name for name in storage.listing(root, suffix) if name not in known]
