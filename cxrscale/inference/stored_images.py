"""Images of a dataset as inputs: `DATASET/SHARD.tar/ID` names one, and its bytes come from the shard."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from cxrscale.io import encode_jpeg, encode_png, load_image, resize_image, storage
from cxrscale.loader import ShardReader
from cxrscale.shards import Manifest, manifest
from cxrscale.types import GrayImage, UnreadableImageError, UserError

Pixels = Mapping[str, Any]
"""How a dataset stores images: codec, size, quality of its pack section."""
FIELDS = ("codec", "size", "quality")
_NAME = re.compile(r"(?P<root>.+)/(?P<shard>[^/]+\.tar)/(?P<image_id>.+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image of a dataset."""

    image_id: str
    data: bytes
    """As the shard holds it."""
    pixels: Pixels
    height: int | None
    """Of the image before it was stored, where the dataset says it."""
    width: int | None
    spacing_mm: tuple[float, float] | None

    def as_stored(self, pixels: Pixels) -> bytes:
        """The image as shards of other settings would hold it; its own bytes where the settings are its own.

        Raises:
            UnreadableImageError: it cannot be decoded.
        """
        if self.pixels == pixels:
            return self.data
        return encode_as_stored(load_image(self.data, name=self.image_id).image_HW, pixels)

    def warnings(self, pixels: Pixels) -> tuple[str, ...]:
        """What sets it apart from images that were stored by these settings from the start."""
        if self.pixels["codec"] == "source" or self.pixels == pixels:
            return ()
        if pixels["codec"] == "source" or self.pixels["size"] < pixels["size"]:
            wanted = "whole" if pixels["codec"] == "source" else f"at {pixels['size']} pixels"
            return (f"stored at {self.pixels['size']} pixels; the training images are stored {wanted}",)
        return ()


def dataset_images(root: str, split: str | None = None) -> list[str]:
    """The names of a dataset's images, as `read_stored` takes them, in the order of the manifest.

    Args:
        split: one of its splits; None: all.

    Raises:
        UserError: it is damaged, or has no such split.
    """
    # A dataset that was made anew in the meantime is read anew.
    _dataset.cache_clear()
    _has_manifest.cache_clear()
    data = _dataset(root).data
    rows = range(len(data)) if split is None else _split_rows(root, data, split)
    shard, image_id = data.column("shard"), data.image_id
    return [storage.join(root, shard[row], image_id[row]) for row in rows]


def is_dataset(address: str) -> bool:
    """Whether a folder or address holds a dataset."""
    return storage.exists(storage.join(address, manifest.NAME))


def read_stored(name: str) -> StoredImage | None:
    """The image of a dataset that a path or address names; None where it names a file.

    Raises:
        UnreadableImageError: its bytes are damaged.
        UserError: the dataset is damaged, or has no such image.
    """
    found = _NAME.fullmatch(name)
    if found is None or not _has_manifest(found["root"]):
        return None
    return _dataset(found["root"]).image(name, found["shard"], found["image_id"])


def read_input(path: str) -> bytes:
    """The bytes of an input: of its file, or of the shard that holds it.

    Raises:
        UnreadableImageError, UserError: as `read_stored` and `storage.read`.
    """
    stored = read_stored(path)
    return storage.read(path) if stored is None else stored.data


def encode_as_stored(image_HW: GrayImage, pixels: Pixels) -> bytes:
    """An image as shards of these settings would hold it: same size and encoding."""
    if pixels["codec"] == "source":
        return encode_png(image_HW)
    resized_HW = resize_image(image_HW, pixels["size"])
    return encode_png(resized_HW) if pixels["codec"] == "png" else encode_jpeg(resized_HW, pixels["quality"])


class _Dataset:
    """An open dataset. Threads take turns at its shards."""

    def __init__(self, root: str) -> None:
        self._root, self.data = root, manifest.load(root)
        pack = self.data.metadata[0]["pack"]
        self._pixels = {name: pack[name] for name in FIELDS}
        self._reader = ShardReader(self.data)
        self._lock = threading.Lock()

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.data.image_id.tolist())}

    def image(self, name: str, shard: str, image_id: str) -> StoredImage:
        """One of its images."""
        with self._lock:
            row = self._row_of.get(image_id, -1)
            if row < 0 or self._value("shard", row) != shard:
                raise UserError(f"{name}: the dataset {self._root} has no such image")
            encoded = self._reader.read(np.array([row]), masks=False)
            if not encoded.valid_B[0]:
                reason = next(bad.reason for bad in self._reader.bad if bad.row == row)
                raise UnreadableImageError(f"{reason}; run `cxrscale verify {self._root}`")
        spacing = self._value("spacing_row_mm", row), self._value("spacing_column_mm", row)
        return StoredImage(
            image_id,
            encoded.images[0].tobytes(),
            self._pixels,
            self._value("height", row),
            self._value("width", row),
            None if None in spacing else spacing,
        )

    def _value(self, column: str, row: int) -> Any:
        return self.data.table[column][row].as_py()


def _split_rows(root: str, data: Manifest, split: str) -> list[int]:
    if split not in data.split_counts():
        available = ", ".join(f"{name} ({count})" for name, count in data.split_counts().items())
        raise UserError(f"--split {split}: {root} has {available}; name one of these")
    rows: list[int] = data.rows(split).tolist()
    return rows


@lru_cache(maxsize=4)
def _dataset(root: str) -> _Dataset:
    return _Dataset(root)


@lru_cache(maxsize=64)
def _has_manifest(root: str) -> bool:
    return is_dataset(root)
