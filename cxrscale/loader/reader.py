"""Rows of the manifest -> encoded bytes, checked before any decoder sees them."""

from __future__ import annotations

import json
import logging
import os
import resource
import weakref
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import cv2
import numpy as np
import numpy.typing as npt

from cxrscale.io import storage
from cxrscale.loader.cache import CacheUse, RemoteShard, staged_copy
from cxrscale.loader.hashing import Rows
from cxrscale.shards import Manifest
from cxrscale.types import UserError

EncodedBytes = npt.NDArray[np.uint8]

UNDECODABLE = "is no image that can be decoded, though its bytes are those that were packed"

_log = logging.getLogger("cxrscale")


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """The files of B images, (length,) uint8 each; a bad one is replaced by a small gray image."""

    images: list[EncodedBytes]
    masks: list[EncodedBytes] | None
    """None unless asked for."""
    valid_B: npt.NDArray[np.bool_]
    """False where an image or its mask was bad."""


@dataclass(frozen=True, slots=True)
class BadSample:
    """A row that cannot be used, and the reason."""

    row: int
    reason: str


class Reader(Protocol):
    """The source of a backend's bytes."""

    bad: list[BadSample]
    """Bad rows so far, each once."""

    def read(self, row_B: Rows, masks: bool) -> EncodedBatch:
        """The rows' files; the arrays are read-only."""

    def sizes(self, row_B: Rows) -> tuple[Rows, Rows]:
        """(height_B, width_B) of the stored images in pixels."""

    def reject(self, row: int, reason: str) -> None:
        """From now on deliver this row as bad: a backend could not decode its bytes."""


class OpenShards:
    """Shards, of which the most recently used ones are open: a dataset can have more than a process may open files."""

    def __init__(self, shards: Sequence[RemoteShard], limit: int | None = None) -> None:
        """Opens none yet.

        Args:
            limit: how many are open at most; None: an eighth of what the process may open, at most 1024.
        """
        self.shards = shards
        self._limit = limit or min(1024, max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8))
        self._use = CacheUse()
        self._handles: OrderedDict[int, int] = OrderedDict()
        weakref.finalize(self, _close_all, self._handles)

    def read(self, number: int, offset: int, length: int) -> bytes:
        """Bytes of a shard.

        A map of the file would save the copy, but a file that is truncated under its map ends the process (SIGBUS).

        Raises:
            UserError: the shard is missing or too short.
            AccessError: it cannot be read.
        """
        address = self.shards[number].address
        try:
            data = self._read(number, offset, length)
        except OSError:
            # Perhaps a network disk has another file by now, of which only a new handle knows.
            data = storage.patiently(address, lambda: self._read(number, offset, length))
        if len(data) < length:
            raise UserError(f"{address} is shorter than its manifest says; run `cxrscale verify` and shard again")
        return data

    def _read(self, number: int, offset: int, length: int) -> bytes:
        try:
            data = os.pread(self._handle(number), length, offset)
            # A signal, or the system's limit of 2 GB, can have cut it short, as can the end of the file.
            while len(data) < length and (
                more := os.pread(self._handle(number), length - len(data), offset + len(data))
            ):
                data += more
        except FileNotFoundError:
            address = self.shards[number].address
            raise UserError(f"{address} is missing; run `cxrscale verify`, then shard again") from None
        except OSError:
            self._close(number)
            raise
        return data

    def _handle(self, number: int) -> int:
        handle = self._handles.get(number)
        if handle is not None:
            self._handles.move_to_end(number)
            return handle
        while len(self._handles) >= self._limit:
            self._close(next(iter(self._handles)))
        shard = self.shards[number]
        if storage.is_remote(shard.address):
            with staged_copy(shard, self._use) as file:
                handle = os.dup(file.fileno())
        else:
            handle = os.open(storage.local_path(shard.address), os.O_RDONLY | os.O_CLOEXEC)
        self._handles[number] = handle
        return handle

    def _close(self, number: int) -> None:
        handle = self._handles.pop(number, None)
        if handle is not None:
            os.close(handle)


def _close_all(handles: OrderedDict[int, int]) -> None:
    while handles:
        os.close(handles.popitem()[1])


class ShardReader:
    """Members of shards, each compared with its CRC-32.

    A row whose bytes are bad, or that a backend rejects, is logged and listed in `bad` once, and delivered as a gray
    image with valid = False.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.bad: list[BadSample] = []
        self._shard_N, shards = _shards(manifest)
        self._open = OpenShards(shards)
        self._image_N3 = _members(manifest, "image")
        self._mask_N3 = _members(manifest, "mask")
        self._json_N3 = _members(manifest, "json")
        self._height_N, self._width_N = _stored_sizes(manifest)
        self._rejected: set[int] = set()

    def sizes(self, row_B: Rows) -> tuple[Rows, Rows]:
        """(height_B, width_B) of the stored images in pixels."""
        return self._height_N[row_B], self._width_N[row_B]

    def read(self, row_B: Rows, masks: bool) -> EncodedBatch:
        """The rows' files; with masks, a row without one counts as bad.

        Raises:
            UserError: a shard is missing or shorter than the manifest says.
        """
        images, mask_files, valid_B = [], [], np.ones(len(row_B), np.bool_)
        for index, row in enumerate(row_B.tolist()):
            try:
                if row in self._rejected:
                    raise _Damaged("was rejected")
                image = self._member(row, self._image_N3, "image")
                mask = self._member(row, self._mask_N3, "mask") if masks else None
            except _Damaged as damage:
                self._record(row, str(damage), "run `cxrscale verify`")
                image, mask, valid_B[index] = placeholder(), placeholder(), False
            images.append(image)
            if mask is not None:
                mask_files.append(mask)
        return EncodedBatch(images, mask_files if masks else None, valid_B)

    def sample_json(self, row: int) -> Any:
        """The JSON of a row's sample, which has what the manifest of an earlier version lacks; None where it is bad.

        Raises:
            UserError: a shard is missing or shorter than the manifest says.
        """
        try:
            return json.loads(self._member(row, self._json_N3, "json").tobytes())
        except (_Damaged, ValueError) as damage:
            self._record(row, f"its JSON cannot be read ({damage})", "run `cxrscale verify`")
            return None

    def reject(self, row: int, reason: str) -> None:
        """From now on deliver this row as bad: a backend could not decode its bytes."""
        self._rejected.add(row)
        self._record(row, reason, "shard it again from its source")

    def _member(self, row: int, member_N3: Rows, kind: str) -> EncodedBytes:
        offset, length, crc = member_N3[row].tolist()
        if offset < 0:
            raise _Damaged(f"has no {kind}")
        data = self._open.read(int(self._shard_N[row]), offset, length)
        if zlib.crc32(data) != crc:
            raise _Damaged(f"the {kind}'s bytes do not match their CRC-32")
        return np.frombuffer(data, np.uint8)

    def _record(self, row: int, reason: str, remedy: str) -> None:
        if any(sample.row == row for sample in self.bad):
            return
        self.bad.append(BadSample(row, reason))
        name, shard = self.manifest.image_id[row], self._open.shards[int(self._shard_N[row])].address
        _log.warning("%s in %s: %s; left out, %s", name, shard, reason, remedy)


class MemoryReader:
    """Files that are already in memory, for prediction; row i is the i-th of them.

    Args:
        images: the files' bytes.
        masks: the masks' files, each on its image's own grid.
        sizes: (height, width) of each; None: read from the files' headers.
    """

    def __init__(
        self,
        images: Sequence[bytes],
        masks: Sequence[bytes] | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        self.load(images, masks, sizes)

    def load(
        self,
        images: Sequence[bytes],
        masks: Sequence[bytes] | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        """Other files, in place of those that it has."""
        self.bad: list[BadSample] = []
        self._images = [_plain(np.frombuffer(image, np.uint8)) for image in images]
        self._masks = None if masks is None else [np.frombuffer(mask, np.uint8) for mask in masks]
        read_sizes = [_decoded_size(image) for image in self._images] if sizes is None else list(sizes)
        self._valid = [size is not None for size in read_sizes]
        self._size_N2 = np.array([size or (1, 1) for size in read_sizes], np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._images)

    def sizes(self, row_B: Rows) -> tuple[Rows, Rows]:
        """(height_B, width_B) in pixels; 1 x 1 where a file is no image."""
        return self._size_N2[row_B, 0], self._size_N2[row_B, 1]

    def read(self, row_B: Rows, masks: bool) -> EncodedBatch:
        """The rows' files; one that is no image is delivered as a gray image with valid = False."""
        rows = row_B.tolist()
        valid_B = np.array([self._valid[row] for row in rows], np.bool_)
        for row in rows:
            if not self._valid[row]:
                self.reject(row, "is no image that can be decoded")
        images = [self._images[row] if self._valid[row] else placeholder() for row in rows]
        if not masks:
            return EncodedBatch(images, None, valid_B)
        if self._masks is None:
            raise UserError("data.task=segment needs masks and these images have none; set data.task=classify")
        return EncodedBatch(images, [self._masks[row] if self._valid[row] else placeholder() for row in rows], valid_B)

    def reject(self, row: int, reason: str) -> None:
        """From now on deliver this file as bad."""
        self._valid[row] = False
        if all(sample.row != row for sample in self.bad):
            self.bad.append(BadSample(row, reason))
            _log.warning("file %d %s; left out", row, reason)


def find_undecodable(encoded: EncodedBatch) -> Rows:
    """Indices in the batch whose image or mask OpenCV cannot decode."""
    flags = cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION
    files = zip(encoded.images, encoded.masks or encoded.images, strict=True)
    valid = [all(len(file) and cv2.imdecode(file, flags) is not None for file in pair) for pair in files]
    return np.flatnonzero(~np.array(valid, np.bool_)).astype(np.int64)


@lru_cache(maxsize=1)
def placeholder() -> EncodedBytes:
    """The file of a small gray image, which a decoder gets in place of bad bytes."""
    data: EncodedBytes = cv2.imencode(".jpg", np.full((8, 8), 128, np.uint8))[1].ravel()
    return data


class _Damaged(Exception):
    """One member's bytes are bad; the message says how."""


def _members(manifest: Manifest, kind: str) -> Rows:
    """(N, 3) offset, length and CRC-32 of each row's image or mask; -1 where it has none."""
    columns = [manifest.table[f"{kind}_{name}"].fill_null(0) for name in ("offset", "length", "crc")]
    member_N3 = np.stack([column.to_numpy().astype(np.int64) for column in columns], axis=1)
    member_N3[manifest.table[f"{kind}_offset"].is_null().to_numpy()] = -1
    return member_N3


def _metadata(manifest: Manifest) -> dict[str, Mapping[str, Any]]:
    """Each dataset's metadata, by the dataset's root."""
    # `load` joins the datasets in the order of `metadata`, so the n-th new root is the n-th dataset.
    roots = dict.fromkeys(manifest.column("root").tolist())
    return dict(zip(roots, manifest.metadata, strict=True))


def _shards(manifest: Manifest) -> tuple[Rows, list[RemoteShard]]:
    """(N,) the index of each row's shard, and the shards."""
    metadata = _metadata(manifest)
    pairs = list(zip(manifest.column("root").tolist(), manifest.column("shard").tolist(), strict=True))
    numbers = {pair: number for number, pair in enumerate(dict.fromkeys(pairs))}
    shards = []
    for root, name in numbers:
        entry = metadata[root].get("shards", {}).get(name, {})
        shards.append(RemoteShard(storage.join(root, name), entry.get("blake3"), entry.get("bytes")))
    return np.array([numbers[pair] for pair in pairs], np.int64), shards


def _stored_sizes(manifest: Manifest) -> tuple[Rows, Rows]:
    """(height_N, width_N): shards hold squares of pack.size, or, with codec=source, images of any size."""
    roots = manifest.column("root")
    height_N = manifest.table["height"].fill_null(0).to_numpy().astype(np.int64)
    width_N = manifest.table["width"].fill_null(0).to_numpy().astype(np.int64)
    for root, metadata in _metadata(manifest).items():
        if metadata["pack"]["codec"] != "source":
            height_N[roots == root] = width_N[roots == root] = metadata["pack"]["size"]
    return height_N, width_N


def _plain(image: EncodedBytes) -> EncodedBytes:
    """A JPEG or PNG as it is; any other image, which not every backend decodes, as a PNG."""
    if bytes(image[:3]) == b"\xff\xd8\xff" or bytes(image[:4]) == b"\x89PNG" or not len(image):
        return image
    loaded = cv2.imdecode(image, cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION)
    return image if loaded is None else np.asarray(cv2.imencode(".png", loaded)[1], np.uint8).ravel()


def _decoded_size(image: EncodedBytes) -> tuple[int, int] | None:
    """(height, width), or None where the bytes are no image. Decodes them: only that shows that they can be decoded."""
    flags = cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION
    loaded = cv2.imdecode(image, flags) if len(image) else None
    return None if loaded is None else (int(loaded.shape[0]), int(loaded.shape[1]))
