"""NIH ChestX-ray14 (Wang et al. 2017): PNG images, one label table, a box table and the official split lists."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from operator import itemgetter

from cxrscale.config import NIH14, closed_world
from cxrscale.io import storage
from cxrscale.sources.csv_rows import read_rows
from cxrscale.sources.registry import Source
from cxrscale.types import Box, ImageRecord, UserError

NAME = "nih"
LABEL_TABLES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
"""The two editions of the label table, in order of preference: the first corrects ages, the rest is the same."""
BOX_TABLE = "BBox_List_2017.csv"
SPLIT_LISTS = {"train_val": "train_val_list.txt", "test": "test_list.txt"}

_PUBLISHED_SIDE = 1024
_OLDEST = 120
# Six digits are enough for any age in days; a number of hundreds of digits must not reach int().
_AGE = re.compile(r"([0-9]{1,6})([YMD]?)")
_PATIENT = re.compile(r"[0-9]+")
_FOLDER = re.compile(r"images(_\d{3})?")
_IMAGE_NAME = re.compile(r"([0-9]{8})_[0-9]{3}\.png")
_BOX_FINDINGS = {"Infiltrate": "Infiltration"}
# The headers have 'OriginalImage[Width,Height]' and 'Bbox [x,y,w,h]' without quotes; a CSV reader splits them.
_SCAN_COLUMNS = ("OriginalImage[Width", "Height]", "OriginalImagePixelSpacing[x", "y]")
_BOX_COLUMNS = ("Bbox [x", "y", "w", "h]")


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of the label table."""

    patient: str
    """Patient ID, 8 digits, as in the image file names."""
    findings: Mapping[str, int] = field(default_factory=dict)
    """Each of the 14 findings -> config.PRESENT or config.ABSENT. Rows with the same findings share one mapping."""
    view: str | None = None
    """PA or AP."""
    sex: str | None = None
    """F or M."""
    age: int | None = None
    """Years; None where unknown or above 120."""
    scan_mm: tuple[float, float] | None = None
    """Height and width of the scanned area, in millimeters."""


def read(root: str) -> list[ImageRecord]:
    """All images of a complete or partial copy of ChestX-ray14, in the order of their IDs.

    Images lie in `images_001/images` to `images_012/images`, in `images`, or directly in the root. The label table
    lies in the root, and so do the box table and the split lists if present. A row without an image is left out; an
    image without a row is unlabeled, and its patient is taken from its file name.

    Args:
        root: a local folder or an fsspec address. Local paths in the records are absolute.

    Raises:
        UserError: there is no image or no label table, a table lacks a column or has an impossible value, or two
            folders have an image of the same name.
    """
    if not storage.is_remote(root):
        root = str(storage.local_path(root).absolute())
    images = _image_paths(root)
    table = read_table(_label_table(root))
    boxes = read_boxes(address) if storage.exists(address := storage.join(root, BOX_TABLE)) else {}
    splits = _splits(root)
    height, width = _png_size(next(iter(images.values())))
    records = []
    for image_id, path in sorted(images.items()):
        name = _IMAGE_NAME.fullmatch(image_id)
        entry = table.get(image_id) or Entry(patient=name[1] if name else image_id)
        records.append(
            ImageRecord(
                image_id=image_id,
                source=NAME,
                path=path,
                patient=entry.patient,
                findings=entry.findings,
                split=splits.get(image_id),
                view=entry.view,
                sex=entry.sex,
                age=entry.age,
                # NIH resized every scan to the same shape, whatever its own: rows and columns have their own ratios.
                spacing_mm=(entry.scan_mm[0] / height, entry.scan_mm[1] / width) if entry.scan_mm else None,
                boxes=boxes.get(image_id, ()),
            )
        )
    return records


def read_table(path: str) -> dict[str, Entry]:
    """The label table: file name of an image -> its row.

    Args:
        path: Data_Entry_2017.csv or Data_Entry_2017_v2020.csv, a local path or an fsspec address.

    Raises:
        UserError: the file is missing, is not a CSV table, or lacks a column; or a row has more or fewer values than
            the header, an unknown finding, a patient ID that is not a number, or the image of an earlier row.
    """
    needed = ("Image Index", "Finding Labels", "Patient ID")
    # Some copies of the table have Patient Sex instead of Patient Gender.
    optional = ("View Position", "Patient Gender", "Patient Sex", "Patient Age", *_SCAN_COLUMNS)
    states: dict[str, dict[str, int]] = {}
    entries: dict[str, Entry] = {}
    for line, (image_id, labels, patient, view, gender, sex, age, *scan) in _rows(path, needed, optional):
        if image_id in entries:
            raise UserError(f"{path}, line {line}: second row for {image_id!r:.80}; keep the correct one")
        if not _PATIENT.fullmatch(patient):
            raise UserError(
                f"{path}, line {line}: Patient ID {patient!r:.80} of {image_id!r:.80} is not a number; "
                "use the table as published"
            )
        if labels not in states:  # there are only some 800 different ones
            states[labels] = _states(path, line, labels)
        entries[image_id] = Entry(
            patient=patient.zfill(8),
            findings=states[labels],
            view=view if view in ("PA", "AP") else None,
            sex=(gender or sex) if (gender or sex) in ("F", "M") else None,
            age=_age(age),
            scan_mm=_scan_mm(*scan),
        )
    return entries


def read_boxes(path: str) -> dict[str, tuple[Box, ...]]:
    """The boxes of each image that has some, in pixels of the published 1024 x 1024 image.

    Args:
        path: BBox_List_2017.csv, a local path or an fsspec address.

    Raises:
        UserError: the file is missing, is not a CSV table, or lacks a column; or a row has more or fewer values than
            the header, an unknown finding, or a box that is not four numbers.
    """
    boxes: dict[str, tuple[Box, ...]] = {}
    for line, (image_id, label, *values) in _rows(path, ("Image Index", "Finding Label", *_BOX_COLUMNS)):
        finding = _BOX_FINDINGS.get(label, label)
        if finding not in NIH14:
            raise UserError(
                f"{path}, line {line}: unknown finding {label!r:.80} of {image_id!r:.80}; use the table as published"
            )
        try:
            x, y, width, height = (float(value) for value in values)
        except ValueError:
            raise UserError(
                f"{path}, line {line}: the box of {image_id!r:.80} is not four numbers; use the table as published"
            ) from None
        boxes[image_id] = (*boxes.get(image_id, ()), Box(finding, x, y, width, height))
    return boxes


def _image_paths(root: str) -> dict[str, str]:
    """Image name -> path, from all folders in which the published editions keep their images."""
    folders = [root]
    for name in storage.listing(root):
        if _FOLDER.fullmatch(name):
            folders += [storage.join(root, name), storage.join(root, name, "images")]
    images: dict[str, str] = {}
    for folder in folders:
        for name in storage.listing(folder, ".png"):
            path = storage.join(folder, name)
            if name in images:
                raise UserError(f"{name} is in two folders, {images[name]} and {path}; remove one of them")
            images[name] = path
    if not images:
        raise UserError(f"{root}: no PNG files there; expected them in images_001/images, in images, or in this folder")
    return images


def _label_table(root: str) -> str:
    for name in LABEL_TABLES:
        if storage.exists(address := storage.join(root, name)):
            return address
    raise UserError(f"{root}: no {' or '.join(LABEL_TABLES)}; put the label table beside the image folders")


def _splits(root: str) -> dict[str, str]:
    """Image name -> train_val or test; images that are in neither list are left out."""
    splits: dict[str, str] = {}
    for split, file in SPLIT_LISTS.items():
        if not storage.exists(address := storage.join(root, file)):
            continue
        names = set(storage.read(address).decode("utf-8", errors="replace").split())
        if both := names & splits.keys():
            raise UserError(f"{address}: {min(both)} is also in {SPLIT_LISTS[splits[min(both)]]}; keep it in one list")
        splits.update(dict.fromkeys(names, split))
    return splits


def _png_size(path: str) -> tuple[int, int]:
    """(height, width) of an image; all images have the same size, and a damaged file must not stop reading."""
    head = storage.read(path, listed=True)[:24]
    if head[:8] != b"\x89PNG\r\n\x1a\n" or len(head) < 24:
        return _PUBLISHED_SIDE, _PUBLISHED_SIDE
    width, height = (int.from_bytes(head[at : at + 4], "big") for at in (16, 20))
    return (height, width) if width and height else (_PUBLISHED_SIDE, _PUBLISHED_SIDE)


def _rows(path: str, needed: tuple[str, ...], optional: tuple[str, ...] = ()) -> Iterator[tuple[int, list[str]]]:
    """(line number, values of the needed and optional columns) of every row; '' for missing optional columns."""
    rows = read_rows(path)
    if (top := next(rows, None)) is None:
        raise UserError(f"{path} is not a readable CSV table (it is empty); copy it again")
    header = top[1]
    if missing := [name for name in needed if name not in header]:
        raise UserError(f"{path}: no column {missing[0]!r}; use the table with the published header")
    # The headers of the box table and of the older label table end with commas that some rows do not repeat.
    named = max(at for at, name in enumerate(header, 1) if name)
    # Missing optional columns have index -1: an empty string that is appended to each row.
    chosen = itemgetter(*(header.index(name) if name in header else -1 for name in (*needed, *optional)))
    for line, row in rows:
        # One value too many or too few moves the values after it to other columns, where they mean something else.
        # Trailing commas can hide a missing value, but then the last column is empty.
        ends_early = len(row) < named or (len(row) < len(header) and not row[named - 1])
        if ends_early or len(row) > len(header) or any(row[named:]):
            raise UserError(
                f"{path}, line {line}: the row of {row[0]!r:.80} needs {named} values, as many as the header; "
                "use the table as published"
            )
        values = list(chosen([*row, ""]))
        if not values[0] or not values[0].isprintable():  # an unclosed quote swallows line ends
            raise UserError(
                f"{path}, line {line}: {needed[0]} {values[0]!r:.80} is not a file name; use the table as published"
            )
        yield line, values


def _states(path: str, line: int, text: str) -> dict[str, int]:
    """The state of each finding for a cell such as 'Mass|Nodule'."""
    try:
        return closed_world((part.strip() for part in text.split("|")), NIH14)
    except ValueError:
        raise UserError(
            f"{path}, line {line}: Finding Labels {text!r:.80} is not 'No Finding' or names of "
            f"{', '.join(NIH14)} with | between them; use the table as published"
        ) from None


@lru_cache(maxsize=1024)
def _age(text: str) -> int | None:
    """Years; the first edition of the table has 058Y, 013M (months) or 009D (days)."""
    parts = _AGE.fullmatch(text)
    if parts is None:
        return None
    years = int(int(parts[1]) / {"Y": 1, "M": 12, "D": 365.25, "": 1}[parts[2]])
    return years if years <= _OLDEST else None


@lru_cache(maxsize=4096)
def _scan_mm(width: str, height: str, x_mm: str, y_mm: str) -> tuple[float, float] | None:
    try:
        height_mm, width_mm = float(height) * float(y_mm), float(width) * float(x_mm)
    except ValueError:
        return None
    return (height_mm, width_mm) if 0 < height_mm < math.inf and 0 < width_mm < math.inf else None


SOURCE = Source(NAME, read)
