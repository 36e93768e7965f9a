"""One record -> the members of its sample in the tar, and what the manifest says of them."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np

from cxrscale import masks, pictures, storage, twins
from cxrscale.config import Pack
from cxrscale.schema import GreyImage, ImageRecord, InputError, Unreadable
from cxrscale.shards.manifest import LABEL


@dataclass(frozen=True, slots=True)
class Sample:
    """An encoded picture with its mask and description."""

    members: dict[str, bytes]
    """Suffix (jpg, png, mask.png, json) -> bytes."""
    crcs: dict[str, int]
    """Suffix -> CRC-32 of those bytes."""
    image_suffix: str
    facts: dict[str, Any]
    """Columns of the manifest that are known only once the picture was read."""

    def without_bytes(self) -> Sample:
        """The same without the members, so that a shard's samples need not stay in memory."""
        return replace(self, members={})

    def row(self, record: ImageRecord, findings: tuple[str, ...]) -> dict[str, Any]:
        """The picture's row of the manifest, without its place in the tar."""
        states = {LABEL + name: record.findings.get(name) for name in findings}
        return {"image_id": record.image_id, "source": record.source, "patient": record.patient, **self.facts, **states}


def encode(record: ImageRecord, split: str, pack: Pack, findings: tuple[str, ...]) -> Sample:
    """Read, decode, resize and encode one picture.

    Raises:
        Unreadable: the picture cannot be used; the message is the reason.
    """
    try:
        data = storage.read(record.path)
    except InputError as error:
        raise Unreadable(str(error)) from None
    picture = pictures.load(data, name=record.path)
    described = _with_header(record, picture)
    stored, suffix, image = _image(picture, data, pack)
    members = {suffix: image}
    facts = _facts(described, picture.grey_HW, stored)
    if pack.masks and record.rles is not None:
        mask = _mask(record.rles, picture.grey_HW, stored)
        members["mask.png"] = pictures.encode_mask(mask)
        facts["mask_pixels"] = int(mask.sum())
    members["json"] = json.dumps(_description(described, split, facts, findings), sort_keys=True).encode()
    return Sample(members, {name: zlib.crc32(value) for name, value in members.items()}, suffix, facts)


def _image(picture: pictures.Picture, data: bytes, pack: Pack) -> tuple[GreyImage, str, bytes]:
    """(the picture as stored, its suffix, its bytes)."""
    if pack.codec == "source":
        if picture.jpeg is not None:
            return picture.grey_HW, "jpg", picture.jpeg
        if data.startswith(b"\x89PNG"):
            return picture.grey_HW, "png", data
        return picture.grey_HW, "png", pictures.encode_png(picture.grey_HW)
    stored = pictures.resize(picture.grey_HW, pack.size)
    if pack.codec == "png":
        return stored, "png", pictures.encode_png(stored)
    return stored, "jpg", pictures.encode_jpeg(stored, pack.quality)


def _mask(rles: tuple[str, ...], grey_HW: GreyImage, stored: GreyImage) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """The union of the runs, drawn at the picture's own size and resized as the picture was."""
    try:
        mask = masks.union(rles, grey_HW.shape)
    except ValueError as error:
        raise Unreadable(f"mask: {error}") from None
    return mask if stored.shape == mask.shape else pictures.resize_mask(mask, stored.shape[0])


def _with_header(record: ImageRecord, picture: pictures.Picture) -> ImageRecord:
    """What the tables left open is taken from the picture's own header."""
    return replace(
        record,
        view=record.view or picture.view,
        sex=record.sex or picture.sex,
        age=record.age if record.age is not None else picture.age,
        spacing_mm=record.spacing_mm or picture.spacing_mm,
    )


def _facts(record: ImageRecord, grey_HW: GreyImage, stored: GreyImage) -> dict[str, Any]:
    mark = twins.fingerprint(grey_HW)
    levels = cv2.calcHist([stored], [0], None, [256], [0, 256]).ravel().astype(np.float64)  # 10 x np.bincount
    spacing = record.spacing_mm or (None, None)
    return {
        "view": record.view,
        "sex": record.sex,
        "age": record.age,
        "height": grey_HW.shape[0],
        "width": grey_HW.shape[1],
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
