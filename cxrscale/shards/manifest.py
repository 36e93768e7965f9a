"""The manifest: one Parquet row per image. It is the dataset; the tars only hold the bytes that it points to."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cxrscale.io import parquet, rle_masks, storage
from cxrscale.shards import contents, ids, manifest_schema
from cxrscale.types import Box, UserError

FORMAT = 1
NAME = "manifest.parquet"
FINGERPRINTS = "fingerprints.parquet"
FINGERPRINT_FIELDS = {
    "image_id": pa.string(),
    "patient": pa.string(),
    "split": pa.string(),
    "dhash": pa.binary(32),
    "thumbnail": pa.binary(1024),
}
LABEL = "label."
"""Prefix of the label columns: `label.Effusion` is int8, 1 present, 0 absent, null unlabeled."""

OLD_IDS = "its image ids are the source's own and can name patients; shard it again to hide them"
"""What `contents.tell_of_older` says of a dataset without keyed ids."""
_AGAIN = f"remove it and {NAME} beside it, then `cxrscale shard` again"

FIELDS: tuple[tuple[str, pa.DataType], ...] = (
    ("image_id", pa.string()),
    ("key", pa.int64()),
    ("source", pa.string()),
    ("patient", pa.string()),
    ("split", pa.string()),
    ("view", pa.string()),
    ("sex", pa.string()),
    ("age", pa.int16()),
    ("width", pa.int32()),
    ("height", pa.int32()),
    ("spacing_row_mm", pa.float32()),
    ("spacing_column_mm", pa.float32()),
    ("shard", pa.string()),
    ("image_offset", pa.int64()),
    ("image_length", pa.int64()),
    ("image_crc", pa.uint32()),
    ("mask_offset", pa.int64()),
    ("mask_length", pa.int64()),
    ("mask_crc", pa.uint32()),
    ("json_offset", pa.int64()),
    ("json_length", pa.int64()),
    ("json_crc", pa.uint32()),
    ("mask_pixels", pa.int64()),
    ("mask_rle", pa.string()),
    ("boxes", pa.string()),
)
"""Columns before the labels. Lengths are in bytes, CRCs are the CRC-32 of a member's bytes, offsets count from the
start of the tar. Mask columns are null for images without a mask; mask_pixels is the mask's area at the stored size.
mask_rle is the mask at the image's own size (`width` x `height`), run-length encoded as in SIIM-ACR; null where it is
empty. Datasets of versions before 0.3 lack that column. boxes is JSON, as in the sample's own: [finding, x, y, width,
height] of each of the source's boxes, in pixels of the image at its own size, (x, y) the upper left corner; null
without any. Datasets that were written before that column existed have their boxes in the samples' JSON alone."""


def image_key(image_id: str) -> int:
    """The image's signed 64-bit key, BLAKE2b of its ID; sampling and augmentation hash it."""
    return int.from_bytes(hashlib.blake2b(image_id.encode(), digest_size=8).digest(), "little", signed=True)


def schema(findings: Sequence[str]) -> pa.Schema:
    """The Arrow schema of a manifest, with a label column for each finding."""
    return pa.schema([*FIELDS, *((LABEL + name, pa.int8()) for name in findings)])


@dataclass(frozen=True)
class Manifest:
    """One dataset, or several joined, as columns; rows are numbered from 0 in table order."""

    table: pa.Table
    """FIELDS, the labels, and `root`: the folder or address that contains the row's shard."""
    digest: str
    """The name of the dataset, from its dataset.json, or BLAKE3 of the names in order; it identifies the data exactly.
    That of a dataset of an earlier version is BLAKE3 of its manifest."""
    metadata: tuple[Mapping[str, Any], ...]
    """For each dataset: format, pack section, input digest, shard digests, pixel statistics."""

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @cached_property
    def image_id(self) -> npt.NDArray[np.object_]:
        """(N,) unique IDs: keyed hashes, or with pack.patient_ids=original the source's own."""
        return self.column("image_id")

    @cached_property
    def key(self) -> npt.NDArray[np.int64]:
        """(N,) keys of the images, from `image_key`."""
        return np.asarray(self.table["key"].to_numpy(), dtype=np.int64)

    @cached_property
    def patient(self) -> npt.NDArray[np.object_]:
        """(N,) patients."""
        return self.column("patient")

    @cached_property
    def split(self) -> npt.NDArray[np.object_]:
        """(N,) splits."""
        return self.column("split")

    def column(self, name: str) -> npt.NDArray[Any]:
        """A column as numpy; null becomes NaN in columns of numbers and None in columns of strings."""
        values: npt.NDArray[Any] = self.table[name].to_numpy(zero_copy_only=False)
        return values

    @cached_property
    def has_own_masks(self) -> bool:
        """Whether the masks are known at the images' own sizes; not in datasets of versions before 0.3."""
        if "mask_rle" not in self.table.column_names:
            return False
        filled_N = np.nan_to_num(self.column("mask_pixels").astype(float)) > 0
        encoded_N = np.asarray(self.table["mask_rle"].is_valid().to_numpy(zero_copy_only=False))
        return bool(filled_N.any() and encoded_N[filled_N].all())

    def own_mask(self, row: int) -> rle_masks.Mask:
        """(H, W) mask of a row at the image's own size, for datasets with `has_own_masks`; empty without one."""
        shape = self.table["height"][row].as_py(), self.table["width"][row].as_py()
        encoding = self.table["mask_rle"][row].as_py()
        return rle_masks.union((encoding,) if encoding else (), shape)

    @cached_property
    def has_boxes(self) -> bool:
        """Whether the manifest has the column of boxes; not in datasets of earlier versions."""
        return "boxes" in self.table.column_names

    def boxes(self, row: int) -> tuple[Box, ...]:
        """The source's boxes of a row, in pixels of the image at its own size, for datasets with `has_boxes`."""
        text = self.table["boxes"][row].as_py()
        return () if text is None else tuple(Box(*box) for box in json.loads(text))

    def rows(self, *splits: str) -> npt.NDArray[np.int64]:
        """The rows of one or more splits, ascending.

        Raises:
            UserError: one of them is empty; the message lists the splits of the dataset.
        """
        counts = self.split_counts()
        for name in splits:
            if name not in counts:
                available = ", ".join(f"{other} ({count})" for other, count in counts.items())
                raise UserError(
                    f"split {name!r} has no images; the manifest has {available}: name one of them in data.*_split"
                )
        return np.flatnonzero(np.isin(self.split.astype(str), splits)).astype(np.int64)

    def only(self, rows: npt.ArrayLike, name: str) -> Manifest:
        """This manifest with the given rows as one split of that name: batches are made of splits."""
        split_N = self.split.copy()
        split_N[np.asarray(rows, dtype=np.int64)] = name
        column = self.table.schema.get_field_index("split")
        table = self.table.set_column(column, "split", pa.array(split_N, pa.string()))
        return Manifest(table, self.digest, self.metadata)

    def split_counts(self) -> dict[str, int]:
        """Images in each split."""
        names, counts = np.unique(self.split.astype(str), return_counts=True)
        return {str(name): int(count) for name, count in zip(names, counts, strict=True)}

    def findings(self) -> tuple[str, ...]:
        """The findings with a label column."""
        return tuple(name.removeprefix(LABEL) for name in self.table.column_names if name.startswith(LABEL))

    def labels(self, findings: Sequence[str]) -> npt.NDArray[np.float32]:
        """(N, F) labels: 1, 0, or NaN for unlabeled.

        Raises:
            UserError: a finding has no column; the message lists those that have one.
        """
        for name in findings:
            if LABEL + name not in self.table.column_names:
                available = ", ".join(self.findings())
                raise UserError(f"data.findings: the shards have no label {name!r}; they have {available}")
        columns = [self.table[LABEL + name].cast(pa.float32()).to_numpy(zero_copy_only=False) for name in findings]
        return np.stack(columns, axis=1).astype(np.float32)


def open_dataset(*roots: str | Path) -> Manifest:
    """Open one or more datasets as one: the columns of their manifests. No tar is opened.

    Args:
        roots: folders or addresses that `cxrscale shard` or `build_shards` wrote.

    Raises:
        UserError: a folder has no manifest, or an image ID is in two datasets.

    Example:
        >>> import cxrscale as cx
        >>> dataset = cx.open_dataset("shards/nih")
        >>> len(dataset), dataset.split_counts(), dataset.findings()
    """
    return load(*map(str, roots))


def load(*roots: str) -> Manifest:
    """Read the manifests of one or more datasets and join them; label columns that a dataset lacks are null there.

    Raises:
        UserError: a folder has no manifest, or a file that is not one or is damaged, or an image ID is in two datasets,
            or their IDs have different keys.
    """
    if not roots:
        raise UserError("data.shards is empty; give data.shards=[FOLDER], as `cxrscale shard` printed it")
    parts, metadata, digests = [], [], []
    for root in roots:
        listed = contents.read(root)
        if listed is None:
            contents.tell_of_older(root, contents.UNSEALED)
        data = read(root, listed)
        digests.append(storage.digest(data) if listed is None else listed.digest)
        table, about = parse(data, root)
        metadata.append(about)
        if ids.is_old(metadata[-1]):
            contents.tell_of_older(root, OLD_IDS)
        parts.append(table.replace_schema_metadata(None).append_column("root", pa.array([root] * len(table))))
    joined = pa.concat_tables(parts, promote_options="default").combine_chunks()
    manifest = Manifest(
        joined, digests[0] if len(digests) == 1 else storage.digest("".join(digests).encode()), tuple(metadata)
    )
    _check_unique(manifest)
    ids.refuse_other_keys(roots, metadata)
    _check_labels(manifest)
    return manifest


def encode(rows: pa.Table, metadata: Mapping[str, Any]) -> bytes:
    """The bytes of a manifest; the same rows and metadata give the same bytes."""
    table = rows.replace_schema_metadata({b"cxrscale": json.dumps(metadata, sort_keys=True).encode()})
    return parquet.encode(table, row_group_size=1 << 20)


def write(address: str, rows: pa.Table, metadata: Mapping[str, Any]) -> None:
    """Publish a manifest."""
    storage.write(address, encode(rows, metadata))


def read(root: str, listed: contents.Contents | None) -> bytes:
    """The bytes of a dataset's manifest, held against the dataset's dataset.json where there is one.

    Raises:
        UserError: there is no manifest, or it is damaged.
    """
    address = storage.join(root, NAME)
    if not storage.exists(address):
        raise UserError(f"{address} does not exist; make the shards with `cxrscale shard`, or give its output folder")
    return contents.read_file(root, NAME, listed)


def parse(data: bytes, root: str) -> tuple[pa.Table, dict[str, Any]]:
    """A manifest's known columns, and its metadata.

    Raises:
        UserError: these bytes are no manifest, or one of another format.
    """
    address = storage.join(root, NAME)
    table = parquet.read_table(data, address, "run `cxrscale shard` again")
    text = (table.schema.metadata or {}).get(b"cxrscale")
    if text is None:
        raise UserError(f"{address} is not a cxrscale manifest; give a folder that `cxrscale shard` wrote")
    metadata = manifest_schema.read_metadata(text, address, FORMAT)
    names = {name for name, _ in FIELDS}
    table = table.select([name for name in table.column_names if name in names or name.startswith(LABEL)])
    manifest_schema.check_table(table, FIELDS, ("mask_rle", "boxes"), metadata, address)
    first = table["source"][0].as_py()
    # What a dataset of another program may lack, and what is then not known.
    unknown = {
        "version": "",
        "input": "",
        "quarantined": [],
        "shards": {},
        "pixel_mean": math.nan,
        "pixel_std": math.nan,
    }
    return table, {"source": first, **unknown, **metadata}


def fingerprints(root: str, columns: Sequence[str]) -> pa.Table:
    """Columns of a dataset's fingerprints.

    Raises:
        UserError: there are none, or they are damaged.
    """
    address = storage.join(root, FINGERPRINTS)
    data = contents.read_file(root, FINGERPRINTS, contents.read(root))
    table = parquet.read_table(data, address, _AGAIN, columns)
    parquet.check_columns(table, {name: FINGERPRINT_FIELDS[name] for name in columns}, address, _AGAIN)
    parquet.check_no_nulls(table, columns, address, _AGAIN)
    return table


def _check_unique(manifest: Manifest) -> None:
    ids, counts = np.unique(manifest.image_id.astype(str), return_counts=True)
    if (counts > 1).any():
        raise UserError(f"data.shards: image {ids[counts > 1][0]} is in two datasets; leave one of them out")


def _check_labels(manifest: Manifest) -> None:
    for name in manifest.findings():
        column = manifest.table[LABEL + name]
        if column.type != pa.int8():
            raise UserError(f"data.shards: label {name:.80} is of type {column.type}, not int8: shard again")
        extremes = pc.min_max(column).as_py()
        wrong = [value for value in extremes.values() if value not in (None, 0, 1)]
        if wrong:
            raise UserError(
                f"data.shards: label {name} is {wrong[0]} for an image; labels are 1 (present), 0 (absent) or null "
                "(unlabeled): shard again"
            )
