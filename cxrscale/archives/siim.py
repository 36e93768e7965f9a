"""SIIM-ACR Pneumothorax (2019): DICOM files in study/series folders and one table of run-length encoded masks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import PurePosixPath

import fsspec

from cxrscale import labels, storage
from cxrscale.archives.tables import lines
from cxrscale.schema import ImageRecord, InputError

SOURCE = "siim"
FINDING = "Pneumothorax"
MASK_TABLES = ("stage_2_train.csv", "train-rle.csv")
"""The mask table's two names; the first one that is there is read (where both are, train-rle.csv is the older)."""
NO_MASK = "-1"
"""What the table says in place of a mask where there is no pneumothorax."""


def read(root: str) -> list[ImageRecord]:
    """All DICOM files of a whole or partial SIIM-ACR archive, in the order of their ids; none is opened.

    Files lie anywhere under the root: in study/series folders, or flat as `ID_xxx.dcm`. A picture's id is its file's
    name without `.dcm`. `rles` holds the masks of all of a picture's rows, () where the table says that there is no
    pneumothorax; a picture without a row is unlabelled: no finding, and `rles` is None. View, sex, age and spacing
    stand in the DICOM headers only and are None here.

    Args:
        root: a local folder or an fsspec address. Local paths in the records are absolute.

    Raises:
        InputError: there is no DICOM file, no table, the table lacks a column or a value, or two files have one name.
    """
    if not storage.is_remote(root):
        root = str(storage.local_path(root).absolute())
    pictures = _pictures(root)
    masks = read_table(_mask_table(root))
    records = []
    for image_id, path in sorted(pictures.items()):
        rles = masks.get(image_id)
        records.append(
            ImageRecord(
                image_id=image_id,
                source=SOURCE,
                path=path,
                # PatientID is one per file: it says nothing. The NIH twin tells the patient later; until then every
                # picture is a patient of its own.
                patient=image_id,
                findings={} if rles is None else {FINDING: labels.PRESENT if rles else labels.ABSENT},
                rles=rles,
            )
        )
    return records


def read_table(path: str) -> dict[str, tuple[str, ...]]:
    """The mask table: picture -> the run-length encodings whose union is its mask; () where it has none.

    The encodings are as written: `start length` pairs, column-major, each start counted from the end of the run
    before. Annotators who marked one picture have a row each.

    Args:
        path: train-rle.csv or stage_2_train.csv, a local path or an fsspec address. Its header may be written
            `ImageId,EncodedPixels` or `ImageId, EncodedPixels`, its values with or without a space before them.

    Raises:
        InputError: the file is absent, is no CSV, lacks a column, or a row has more or fewer values than the header,
            or an empty or damaged one.
    """
    masks: dict[str, tuple[str, ...]] = {}
    for line, image_id, rle in _rows(path):
        # A stray quote swallows the ends of lines, and with them other pictures' rows.
        if not image_id or not image_id.isprintable():
            raise InputError(f"{path}, line {line}: ImageId {image_id!r:.80} is no picture's name; mend the row")
        if not rle:
            raise InputError(
                f"{path}, line {line}: EncodedPixels of {image_id!r:.80} is empty; {NO_MASK} stands for no pneumothorax"
            )
        if not rle.isprintable():
            raise InputError(
                f"{path}, line {line}: EncodedPixels of {image_id!r:.80} is damaged: {rle!r:.80}; mend the row"
            )
        masks[image_id] = masks.get(image_id, ()) if rle == NO_MASK else (*masks.get(image_id, ()), rle)
    return masks


def _rows(path: str) -> Iterator[tuple[int, str, str]]:
    """(line number, ImageId, EncodedPixels) of every row, without spaces around them."""
    rows = lines(path)
    if (top := next(rows, None)) is None:
        raise InputError(f"{path} is not a readable CSV table (it is empty); copy it again")
    header = [name.strip() for name in top[1]]
    for name in ("ImageId", "EncodedPixels"):
        if name not in header:
            raise InputError(f"{path}: no column {name!r}; expected the header 'ImageId, EncodedPixels'")
    for line, row in rows:
        # One value more or less shifts those behind it into columns where they mean something else.
        if len(row) != len(header):
            raise InputError(
                f"{path}, line {line}: the row of {row[0]!r:.80} needs {len(header)} values as its header has; "
                "mend the row"
            )
        yield line, row[header.index("ImageId")].strip(), row[header.index("EncodedPixels")].strip()


def _pictures(root: str) -> dict[str, str]:
    """Picture -> path of every .dcm file at any depth."""
    pictures: dict[str, str] = {}
    for path in sorted(_files(root)):
        if (name := PurePosixPath(path)).suffix.lower() != ".dcm":
            continue
        if name.stem in pictures:
            raise InputError(f"{name.name} is in two folders, {pictures[name.stem]} and {path}; remove one of them")
        pictures[name.stem] = path
    if not pictures:
        raise InputError(f"{root}: no .dcm file there; expected dicom-images-train with the archive's DICOM files")
    return pictures


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
    raise InputError(f"{root}: no {' or '.join(MASK_TABLES)}; put the mask table beside the DICOM folder")
