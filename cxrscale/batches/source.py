"""Rows of the manifest -> encoded bytes, checked before any decoder sees them."""

from __future__ import annotations

import logging
import mmap
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO, Protocol

import cv2
import numpy as np
import numpy.typing as npt

from cxrscale import storage
from cxrscale.batches.plan import Rows
from cxrscale.batches.staging import Shard, staged
from cxrscale.schema import InputError
from cxrscale.shards.manifest import Manifest

Bytes = npt.NDArray[np.uint8]

UNDECODABLE = "is no picture that can be decoded, though its bytes are those that were packed"

_log = logging.getLogger("cxrscale")


@dataclass(frozen=True, slots=True)
class Encoded:
    """The files of B pictures, (length,) uint8 each; a bad one is replaced by a small grey picture."""

    images: list[Bytes]
    masks: list[Bytes] | None
    """None unless asked for."""
    ok_B: npt.NDArray[np.bool_]
    """False where a picture or its mask was bad."""


@dataclass(frozen=True, slots=True)
class BadSample:
    """A row that cannot be used, and why."""

    row: int
    reason: str


class Source(Protocol):
    """Where the readers take bytes from."""

    bad: list[BadSample]
    """Rows found bad so far, each once."""

    def read(self, row_B: Rows, masks: bool) -> Encoded:
        """The rows' files; the arrays may be views of mapped files: do not write to them."""

    def sizes(self, row_B: Rows) -> tuple[Rows, Rows]:
        """(height_B, width_B) of the stored pictures in pixels."""

    def reject(self, row: int, reason: str) -> None:
        """From now on deliver this row as bad: a reader could make nothing of its bytes."""


class ShardSource:
    """Slices of memory-mapped shards, each compared with its CRC-32.

    A row whose bytes are bad, or that a reader rejects, is logged and listed in `bad` once, and delivered as a grey
    picture with ok False.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.bad: list[BadSample] = []
        self._shard_N, self._shards = _shards(manifest)
        self._image_N3 = _places(manifest, "image")
        self._mask_N3 = _places(manifest, "mask")
        self._height_N, self._width_N = _stored_sizes(manifest)
        self._maps: dict[int, Bytes] = {}
        self._rejected: set[int] = set()

    def sizes(self, row_B: Rows) -> tuple[Rows, Rows]:
        """(height_B, width_B) of the stored pictures in pixels."""
        return self._height_N[row_B], self._width_N[row_B]

    def read(self, row_B: Rows, masks: bool) -> Encoded:
        """The rows' files; with masks, a row without one counts as bad.

        Raises:
            InputError: a shard is missing or shorter than the manifest says.
        """
        images, mask_files, ok_B = [], [], np.ones(len(row_B), np.bool_)
        for place, row in enumerate(row_B.tolist()):
            try:
                if row in self._rejected:
                    raise _Damaged("was rejected")
                image = self._member(row, self._image_N3, "picture")
                mask = self._member(row, self._mask_N3, "mask") if masks else None
            except _Damaged as damage:
                self._record(row, str(damage), "run `cxrscale verify`")
                image, mask, ok_B[place] = placeholder(), placeholder(), False
            images.append(image)
            if mask is not None:
                mask_files.append(mask)
        return Encoded(images, mask_files if masks else None, ok_B)

    def reject(self, row: int, reason: str) -> None:
        """From now on deliver this row as bad: a reader could make nothing of its bytes."""
        self._rejected.add(row)
        self._record(row, reason, "shard it again from its archive")

    def _member(self, row: int, place_N3: Rows, what: str) -> Bytes:
        offset, length, crc = place_N3[row].tolist()
        if offset < 0:
            raise _Damaged(f"has no {what}")
        number = int(self._shard_N[row])
        if number not in self._maps:
            self._maps[number] = self._mapped(self._shards[number])
        data = self._maps[number][offset : offset + length]
        if len(data) < length:
            address = self._shards[number].address
            raise InputError(f"{address} is shorter than its manifest says; run `cxrscale verify` and shard again")
        if zlib.crc32(data.data) != crc:
            raise _Damaged(f"the {what}'s bytes do not match their CRC-32")
        return data

    def _mapped(self, shard: Shard) -> Bytes:
        if storage.is_remote(shard.address):
            with staged(shard) as file:
                return _mapped(file)
        try:
            with storage.local_path(shard.address).open("rb") as file:
                return _mapped(file)
        except FileNotFoundError:
            raise InputError(f"{shard.address} is missing; run `cxrscale verify`, then shard again") from None
        except OSError as error:
            raise InputError(
                f"{shard.address} cannot be read ({error.strerror}); check the disk and its permissions"
            ) from None

    def _record(self, row: int, reason: str, remedy: str) -> None:
        if any(sample.row == row for sample in self.bad):
            return
        self.bad.append(BadSample(row, reason))
        name, shard = self.manifest.image_id[row], self._shards[int(self._shard_N[row])].address
        _log.warning("%s in %s: %s; left out, %s", name, shard, reason, remedy)


class MemorySource:
    """Files that are in memory already, for prediction; row i is the i-th of them.

    Args:
        images: the files' bytes.
        masks: the masks' files, each on its picture's own grid.
        sizes: (height, width) of each; None: read from the files' headers.
    """

    def __init__(
        self,
        images: Sequence[bytes],
        masks: Sequence[bytes] | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        self.bad: list[BadSample] = []
        self._images = [_plain(np.frombuffer(image, np.uint8)) for image in images]
        self._masks = None if masks is None else [np.frombuffer(mask, np.uint8) for mask in masks]
        found = [_decoded_size(image) for image in self._images] if sizes is None else list(sizes)
        self._ok = [size is not None for size in found]
        self._size_N2 = np.array([size or (1, 1) for size in found], np.int64).reshape(-1, 2)

    def sizes(self, row_B: Rows) -> tuple[Rows, Rows]:
        """(height_B, width_B) in pixels; 1 x 1 where a file is no picture."""
        return self._size_N2[row_B, 0], self._size_N2[row_B, 1]

    def read(self, row_B: Rows, masks: bool) -> Encoded:
        """The rows' files; what is no picture is delivered as a grey one with ok False."""
        rows = row_B.tolist()
        ok_B = np.array([self._ok[row] for row in rows], np.bool_)
        for row in rows:
            if not self._ok[row]:
                self.reject(row, "is no picture that can be decoded")
        images = [self._images[row] if self._ok[row] else placeholder() for row in rows]
        if not masks:
            return Encoded(images, None, ok_B)
        if self._masks is None:
            raise InputError("data.task=segment wants masks and these pictures have none; set data.task=classify")
        return Encoded(images, [self._masks[row] if self._ok[row] else placeholder() for row in rows], ok_B)

    def reject(self, row: int, reason: str) -> None:
        """From now on deliver this file as bad."""
        self._ok[row] = False
        if all(sample.row != row for sample in self.bad):
            self.bad.append(BadSample(row, reason))
            _log.warning("file %d %s; left out", row, reason)


def undecodable(encoded: Encoded) -> Rows:
    """The places in the batch whose picture or mask OpenCV cannot decode."""
    flags = cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION
    files = zip(encoded.images, encoded.masks or encoded.images, strict=True)
    ok = [all(len(file) and cv2.imdecode(file, flags) is not None for file in pair) for pair in files]
    return np.flatnonzero(~np.array(ok, np.bool_)).astype(np.int64)


@lru_cache(maxsize=1)
def placeholder() -> Bytes:
    """The file of a small grey picture: what a decoder gets in place of bytes that are bad."""
    data: Bytes = cv2.imencode(".jpg", np.full((8, 8), 128, np.uint8))[1].ravel()
    return data


class _Damaged(Exception):
    """One member's bytes are bad; the message says how."""


def _places(manifest: Manifest, member: str) -> Rows:
    """(N, 3) offset, length and CRC-32 of a member; -1 where there is none."""
    columns = [manifest.table[f"{member}_{name}"].fill_null(0) for name in ("offset", "length", "crc")]
    place_N3 = np.stack([column.to_numpy().astype(np.int64) for column in columns], axis=1)
    place_N3[manifest.table[f"{member}_offset"].is_null().to_numpy()] = -1
    return place_N3


def _about(manifest: Manifest) -> dict[str, Mapping[str, Any]]:
    """What each shard set's manifest says of it, by the root of the set."""
    # `load` joins the sets in the order of `about`, so the n-th new root is the n-th set.
    roots = dict.fromkeys(manifest.column("root").tolist())
    return dict(zip(roots, manifest.about, strict=True))


def _shards(manifest: Manifest) -> tuple[Rows, list[Shard]]:
    """(N,) the number of each row's shard, and the shards."""
    about = _about(manifest)
    pairs = list(zip(manifest.column("root").tolist(), manifest.column("shard").tolist(), strict=True))
    numbers = {pair: number for number, pair in enumerate(dict.fromkeys(pairs))}
    shards = []
    for root, name in numbers:
        stated = about[root].get("shards", {}).get(name, {})
        shards.append(Shard(storage.join(root, name), stated.get("blake3"), stated.get("bytes")))
    return np.array([numbers[pair] for pair in pairs], np.int64), shards


def _stored_sizes(manifest: Manifest) -> tuple[Rows, Rows]:
    """(height_N, width_N): shards hold squares of pack.size, or, with the codec `source`, the archive's own sizes."""
    roots = manifest.column("root")
    height_N = manifest.table["height"].fill_null(0).to_numpy().astype(np.int64)
    width_N = manifest.table["width"].fill_null(0).to_numpy().astype(np.int64)
    for root, about in _about(manifest).items():
        if about["pack"]["codec"] != "source":
            height_N[roots == root] = width_N[roots == root] = about["pack"]["size"]
    return height_N, width_N


def _mapped(file: BinaryIO) -> Bytes:
    """A local shard as an array over its mapped file, which stays mapped for as long as the array lives."""
    try:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except ValueError:
        raise InputError(f"{file.name} is empty; run `cxrscale verify`, then shard again") from None


def _plain(image: Bytes) -> Bytes:
    """A JPEG or PNG as it is; any other picture, which not every reader decodes, as a PNG."""
    if bytes(image[:3]) == b"\xff\xd8\xff" or bytes(image[:4]) == b"\x89PNG" or not len(image):
        return image
    picture = cv2.imdecode(image, cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION)
    return image if picture is None else np.asarray(cv2.imencode(".png", picture)[1], np.uint8).ravel()


def _decoded_size(image: Bytes) -> tuple[int, int] | None:
    """(height, width), or None where the bytes are no picture. Decodes it: nothing less proves that it decodes."""
    flags = cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION
    picture = cv2.imdecode(image, flags) if len(image) else None
    return None if picture is None else (int(picture.shape[0]), int(picture.shape[1]))
