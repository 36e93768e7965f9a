"""One record -> the members of its sample in the tar, and what the manifest says of them."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np

from cxrscale.config import Pack
from cxrscale.io import (
    LoadedImage,
    encode_jpeg,
    encode_mask,
    encode_png,
    load_image,
    resize_image,
    resize_mask,
    rle_masks,
    storage,
)
from cxrscale.shards import duplicates
from cxrscale.shards.manifest import LABEL
from cxrscale.types import GrayImage, ImageRecord, UnreadableImageError, UserError


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """An encoded image with its mask and description."""

    members: dict[str, bytes]
    """Suffix (jpg, png, mask.png, json) -> bytes."""
    crcs: dict[str, int]
    """Suffix -> CRC-32 of those bytes."""
    image_suffix: str
    facts: dict[str, Any]
    """Columns of the manifest that are known only once the image was read."""

    def without_bytes(self) -> EncodedSample:
        """The same without the members, so that a shard's samples need not stay in memory."""
        return replace(self, members={})

    def row(self, record: ImageRecord, findings: tuple[str, ...]) -> dict[str, Any]:
        """The image's row of the manifest, without its place in the tar."""
        states = {LABEL + name: record.findings.get(name) for name in findings}
        return {"image_id": record.image_id, "source": record.source, "patient": record.patient, **self.facts, **states}


def encode_sample(record: ImageRecord, split: str, pack: Pack, findings: tuple[str, ...]) -> EncodedSample:
    """Read, decode, resize and encode one image.

    Raises:
        UnreadableImageError: the image cannot be used; the message is the reason.
    """
    try:
        data = storage.read(record.path)
    except UserError as error:
        raise UnreadableImageError(str(error)) from None
    loaded = load_image(data, name=record.path)
    described = _with_header(record, loaded)
    stored, suffix, image = _image(loaded, data, pack)
    members = {suffix: image}
    facts = _facts(described, loaded.image_HW, stored)
    if pack.masks and record.rles is not None:
        mask = _mask(record.rles, loaded.image_HW, stored)
        members["mask.png"] = encode_mask(mask)
        facts["mask_pixels"] = int(mask.sum())
    members["json"] = json.dumps(_description(described, split, facts, findings), sort_keys=True).encode()
    return EncodedSample(members, {name: zlib.crc32(value) for name, value in members.items()}, suffix, facts)


def _image(image: LoadedImage, data: bytes, pack: Pack) -> tuple[GrayImage, str, bytes]:
    """(the image as stored, its suffix, its bytes)."""
    if pack.codec == "source":
        if image.jpeg is not None:
            return image.image_HW, "jpg", image.jpeg
        if data.startswith(b"\x89PNG"):
            return image.image_HW, "png", data
        return image.image_HW, "png", encode_png(image.image_HW)
    stored = resize_image(image.image_HW, pack.size)
    if pack.codec == "png":
        return stored, "png", encode_png(stored)
    return stored, "jpg", encode_jpeg(stored, pack.quality)


def _mask(rles: tuple[str, ...], image_HW: GrayImage, stored: GrayImage) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """The union of the runs, drawn at the image's own size and resized as the image was."""
    try:
        mask = rle_masks.union(rles, image_HW.shape)
    except ValueError as error:
        raise UnreadableImageError(f"mask: {error}") from None
    return mask if stored.shape == mask.shape else resize_mask(mask, stored.shape[0])


def _with_header(record: ImageRecord, image: LoadedImage) -> ImageRecord:
    """What the tables left open is taken from the image's own header."""
    return replace(
        record,
        view=record.view or image.view,
        sex=record.sex or image.sex,
        age=record.age if record.age is not None else image.age,
        spacing_mm=record.spacing_mm or image.spacing_mm,
    )


def _facts(record: ImageRecord, image_HW: GrayImage, stored: GrayImage) -> dict[str, Any]:
    mark = duplicates.fingerprint(image_HW)
    levels = cv2.calcHist([stored], [0], None, [256], [0, 256]).ravel().astype(np.float64)  # 10 x np.bincount
    spacing = record.spacing_mm or (None, None)
    return {
        "view": record.view,
        "sex": record.sex,
        "age": record.age,
        "height": image_HW.shape[0],
        "width": image_HW.shape[1],
        "spacing_row_mm": spacing[0],
        "spacing_column_mm": spacing[1],
        "mask_pixels": None,
        "dhash": mark.dhash,
        "thumbnail": mark.thumbnail,
        "pixel_sum": float(levels @ np.arange(256)),
        "pixel_squares": float(levels @ np.arange(256) ** 2),
        "pixels": int(stored.size),
    }


def _description(record: ImageRecord, split: str, facts: dict[str, Any], findings: tuple[str, ...]) -> dict[str, Any]:
    """The sample's own json, for readers that do not know the manifest."""
    return {
        "image_id": record.image_id,
        "source": record.source,
        "patient": record.patient,
        "split": split,
        "labels": {name: record.findings[name] for name in findings if name in record.findings},
        "view": record.view,
        "sex": record.sex,
        "age": record.age,
        "spacing_mm": list(record.spacing_mm) if record.spacing_mm else None,
        "original_size": [facts["height"], facts["width"]],
        "boxes": [[box.finding, box.x, box.y, box.width, box.height] for box in record.boxes],
    }
