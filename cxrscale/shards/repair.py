"""Rebuild what a dataset's tars and manifest can give back: indices and fingerprints."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow as pa

from cxrscale.io import load_image, parquet, storage
from cxrscale.shards import contents, duplicates, manifest, tars
from cxrscale.shards.contents import Contents
from cxrscale.types import UnreadableImageError, UserError


def repair(root: str) -> list[str]:
    """Rewrite indices and fingerprints that are missing or damaged, from the tars; labels and images are never touched.

    Returns:
        One line per file: what was rewritten, or why it could not be.

    Raises:
        UserError: manifest or dataset.json is damaged.
        AccessError: a file cannot be read or written.
    """
    listed = contents.read(root)
    data, metadata = manifest.parse(manifest.read(root, listed), root)
    lines, prints = [], dict[str, duplicates.Fingerprint]()
    wants_prints = not _is_right(root, manifest.FINGERPRINTS, listed)
    shard_N = np.asarray(data["shard"].to_pylist(), dtype=object)
    for name, entry in metadata.get("shards", {}).items():
        index = tars.index_name(name)
        wants_index = not _is_right(root, index, listed)
        if not wants_index and not wants_prints:
            continue
        address = storage.join(root, name)
        content = storage.read(address) if storage.exists(address) else b""
        if storage.digest(content) != entry.get("blake3"):
            lines += [f"{index}: not rebuilt, {name} is damaged"] if wants_index else []
            continue
        if wants_index:
            lines.append(_put(root, index, tars.index_of(tars.read_members(io.BytesIO(content))), listed))
        if wants_prints:
            prints |= _stored_fingerprints(content, data.take(np.flatnonzero(shard_N == name)))
    if wants_prints and len(prints) == len(data):
        rows = data.select(["image_id", "patient", "split"])
        for column in ("dhash", "thumbnail"):
            values = [getattr(prints[name], column) for name in rows["image_id"].to_pylist()]
            rows = rows.append_column(column, pa.array(values, manifest.FINGERPRINT_FIELDS[column]))
        content = parquet.encode(rows.replace_schema_metadata(None))
        lines.append(_put(root, manifest.FINGERPRINTS, content, listed))
    elif wants_prints:
        lines.append(f"{manifest.FINGERPRINTS}: not rebuilt, a tar is damaged")
    return lines


def _is_right(root: str, name: str, listed: Contents | None) -> bool:
    """Whether a file is as it was written; in a dataset without digests, whether it can be read."""
    address = storage.join(root, name)
    if not storage.exists(address):
        return False
    content = storage.read(address)
    if listed is not None:
        return name in listed.files and listed.files[name].difference(content) is None
    if not name.endswith(".parquet"):
        return content.startswith(b"v1.2 ")
    try:
        return parquet.read_table(content, address, "") is not None
    except UserError:
        return False


def _put(root: str, name: str, content: bytes, listed: Contents | None) -> str:
    """Write a rebuilt file if it is the one that was lost."""
    if listed is not None and name not in listed.files:
        return f"{name}: not rebuilt, it is not in {contents.NAME}"
    if listed is not None and listed.files[name].difference(content) is not None:
        return f"{name}: not rebuilt, since these versions of pyarrow and OpenCV write other bytes than was packed"
    storage.write(storage.join(root, name), content)
    return f"{name}: rewritten"


def _stored_fingerprints(tar: bytes, rows: Any) -> dict[str, duplicates.Fingerprint]:
    found = {}
    for row in rows.select(["image_id", "image_offset", "image_length"]).to_pylist():
        image = tar[row["image_offset"] : row["image_offset"] + row["image_length"]]
        try:
            found[row["image_id"]] = duplicates.fingerprint(load_image(image).image_HW)
        except UnreadableImageError:
            continue
    return found
