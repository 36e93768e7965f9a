"""SIIM-ACR Pneumothorax (2019): DICOM files in study/series folders and one table of run-length encoded masks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import PurePosixPath

import fsspec

from cxrscale.config import ABSENT, PRESENT
from cxrscale.io import storage
from cxrscale.sources.csv_rows import read_rows
from cxrscale.types import ImageRecord, UserError

SOURCE = "siim"
FINDING = "Pneumothorax"
MASK_TABLES = ("stage_2_train.csv", "train-rle.csv")
"""The mask table's two names; the first one that is there is read (where both are, train-rle.csv is the older)."""
NO_MASK = "-1"
"""What the table says in place of a mask where there is no pneumothorax."""


def read(root: str) -> list[ImageRecord]:
    """All DICOM files of a whole or partial SIIM-ACR archive, in the order of their ids; none is opened.

    Files lie anywhere under the root: in study/series folders, or flat as `ID_xxx.dcm`. An image's id is its file's
    name without `.dcm`. `rles` holds the masks of all of an image's rows, () where the table says that there is no
    pneumothorax; an image without a row is unlabeled: no finding, and `rles` is None. View, sex, age and spacing
    stand in the DICOM headers only and are None here.

    Args:
        root: a local folder or an fsspec address. Local paths in the records are absolute.

    Raises:
        UserError: there is no DICOM file, no table, the table lacks a column or a value, or two files have one name.
    """
    if not storage.is_remote(root):
        root = str(storage.local_path(root).absolute())
    images = _image_paths(root)
    masks = read_table(_mask_table(root))
    records = []
    for image_id, path in sorted(images.items()):
        rles = masks.get(image_id)
        records.append(
            ImageRecord(
                image_id=image_id,
                source=SOURCE,
                path=path,
                # PatientID is one per file: it says nothing. The NIH duplicate tells the patient later; until then every
                # image is a patient of its own.
                patient=image_id,
                findings={} if rles is None else {FINDING: PRESENT if rles else ABSENT},
                rles=rles,
            )
        )
    return records


def read_table(path: str) -> dict[str, tuple[str, ...]]:
    """The mask table: image -> the run-length encodings whose union is its mask; () where it has none.

    The encodings are as written: `start length` pairs, column-major, each start counted from the end of the run
    before. Annotators who marked one image have a row each.

    Args:
        path: train-rle.csv or stage_2_train.csv, a local path or an fsspec address. Its header may be written
            `ImageId,EncodedPixels` or `ImageId, EncodedPixels`, its values with or without a space before them.

    Raises:
        UserError: the file is absent, is no CSV, lacks a column, or a row has more or fewer values than the header,
            or an empty or damaged one.
    """
    masks: dict[str, tuple[str, ...]] = {}
    for line, image_id, rle in _rows(path):
        # A stray quote swallows the ends of lines, and with them other images' rows.
        if not image_id or not image_id.isprintable():
            raise UserError(f"{path}, line {line}: ImageId {image_id!r:.80} is no image's name; mend the row")
        if not rle:
            raise UserError(
                f"{path}, line {line}: EncodedPixels of {image_id!r:.80} is empty; {NO_MASK} stands for no pneumothorax"
            )
        if not rle.isprintable():
            raise UserError(
                f"{path}, line {line}: EncodedPixels of {image_id!r:.80} is damaged: {rle!r:.80}; mend the row"
            )
        masks[image_id] = masks.get(image_id, ()) if rle == NO_MASK else (*masks.get(image_id, ()), rle)
    return masks


def _rows(path: str) -> Iterator[tuple[int, str, str]]:
    """(line number, ImageId, EncodedPixels) of every row, without spaces around them."""
    rows = read_rows(path)
    if (top := next(rows, None)) is None:
        raise UserError(f"{path} is not a readable CSV table (it is empty); copy it again")
    header = [name.strip() for name in top[1]]
    for name in ("ImageId", "EncodedPixels"):
        if name not in header:
            raise UserError(f"{path}: no column {name!r}; expected the header 'ImageId, EncodedPixels'")
    for line, row in rows:
        # One value more or less shifts those behind it into columns where they mean something else.
        if len(row) != len(header):
            raise UserError(
                f"{path}, line {line}: the row of {row[0]!r:.80} needs {len(header)} values as its header has; "
                "mend the row"
            )
        yield line, row[header.index("ImageId")].strip(), row[header.index("EncodedPixels")].strip()


def _image_paths(root: str) -> dict[str, str]:
    """Image -> path of every .dcm file at any depth."""
    images: dict[str, str] = {}
    for path in sorted(_files(root)):
        if (name := PurePosixPath(path)).suffix.lower() != ".dcm":
            continue
        if name.stem in images:
            raise UserError(f"{name.name} is in two folders, {images[name.stem]} and {path}; remove one of them")
        images[name.stem] = path
    if not images:
        raise UserError(f"{root}: no .dcm file there; expected dicom-images-train with the archive's DICOM files")
    return images


def _files(root: str) -> list[str]:
    if not storage.exists(root):
        return []
    if not storage.is_remote(root):
        return [f"{folder}/{name}" for folder, _, names in os.walk(root) for name in names]
    files, path = fsspec.core.url_to_fs(root)
    return [files.unstrip_protocol(name) for name in files.find(path)]


def _mask_table(root: str) -> str:
    for name in MASK_TABLES:
        if storage.exists(address := storage.join(root, name)):
            return address
    raise UserError(f"{root}: no {' or '.join(MASK_TABLES)}; put the mask table beside the DICOM folder")
