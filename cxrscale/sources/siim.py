"""SIIM-ACR Pneumothorax (2019): DICOM files in study/series folders and one table of run-length encoded masks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import PurePosixPath

import fsspec

from cxrscale.config import ABSENT, PRESENT
from cxrscale.io import storage
from cxrscale.sources.csv_rows import read_rows
from cxrscale.sources.registry import Source
from cxrscale.types import ImageRecord, UserError

NAME = "siim"
FINDING = "Pneumothorax"
MASK_TABLES = ("stage_2_train.csv", "train-rle.csv")
"""The two names of the mask table, in order of preference: where both exist, train-rle.csv is the older one."""
NO_MASK = "-1"
"""The table's value for images without pneumothorax."""


def read(root: str) -> list[ImageRecord]:
    """All DICOM files of a complete or partial copy, in the order of their IDs; none is opened.

    Files may lie anywhere under the root: in study/series folders, or flat as `ID_xxx.dcm`. The ID of an image is its
    file name without `.dcm`. `rles` holds the masks of all rows of an image, or () if the table says that there is no
    pneumothorax. An image without a row is unlabeled: no finding, and `rles` is None. View, sex, age and spacing are
    only in the DICOM headers and are None here.

    Args:
        root: a local folder or an fsspec address. Local paths in the records are absolute.

    Raises:
        UserError: there is no DICOM file or no table, the table lacks a column or a value, or two files have the same
            name.
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
                source=NAME,
                path=path,
                # The DICOM PatientID is different in every file and so identifies nobody. The true patient can be
                # taken from the NIH duplicate later; until then every image counts as a patient.
                patient=image_id,
                findings={} if rles is None else {FINDING: PRESENT if rles else ABSENT},
                rles=rles,
            )
        )
    return records


def read_table(path: str) -> dict[str, tuple[str, ...]]:
    """The mask table: image -> the run-length encodings whose union is its mask; () if it has none.

    The encodings are returned as written: `start length` pairs, column-major, each start relative to the end of the
    run before. Every annotator of an image has a row.

    Args:
        path: train-rle.csv or stage_2_train.csv, a local path or an fsspec address. Its header may be written
            `ImageId,EncodedPixels` or `ImageId, EncodedPixels`, and values may have a space before them.

    Raises:
        UserError: the file is missing, is not a CSV table, or lacks a column; or a row has more or fewer values than
            the header, or one that is empty or damaged.
    """
    masks: dict[str, tuple[str, ...]] = {}
    for line, image_id, rle in _rows(path):
        # An unclosed quote swallows line ends, and with them the rows of other images.
        if not image_id or not image_id.isprintable():
            raise UserError(f"{path}, line {line}: ImageId {image_id!r:.80} is not an image name; correct the row")
        if not rle:
            raise UserError(
                f"{path}, line {line}: EncodedPixels of {image_id!r:.80} is empty; write {NO_MASK} for no pneumothorax"
            )
        if not rle.isprintable():
            raise UserError(
                f"{path}, line {line}: EncodedPixels of {image_id!r:.80} is damaged: {rle!r:.80}; correct the row"
            )
        masks[image_id] = masks.get(image_id, ()) if rle == NO_MASK else (*masks.get(image_id, ()), rle)
    return masks


def _rows(path: str) -> Iterator[tuple[int, str, str]]:
    """(line number, ImageId, EncodedPixels) of every row, without surrounding spaces."""
    rows = read_rows(path)
    if (top := next(rows, None)) is None:
        raise UserError(f"{path} is not a readable CSV table (it is empty); copy it again")
    header = [name.strip() for name in top[1]]
    for name in ("ImageId", "EncodedPixels"):
        if name not in header:
            raise UserError(f"{path}: no column {name!r}; expected the header 'ImageId, EncodedPixels'")
    for line, row in rows:
        # One value too many or too few moves the values after it to other columns, where they mean something else.
        if len(row) != len(header):
            raise UserError(
                f"{path}, line {line}: the row of {row[0]!r:.80} needs {len(header)} values, as many as the header; "
                "correct the row"
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
        raise UserError(f"{root}: no .dcm file there; expected dicom-images-train with the DICOM files")
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


SOURCE = Source(NAME, read, pack_defaults={"masks": True}, reliable_patient_ids=False)
