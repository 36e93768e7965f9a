"""NIH ChestX-ray14 (Wang et al. 2017): PNG images, one label table, a box table and the official split lists."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from cxrscale.config import NIH14, closed_world
from cxrscale.io import storage
from cxrscale.sources.csv_rows import read_names, table_rows
from cxrscale.sources.image_files import PNG, absolute_root, by_name, find_images, image_key, image_name
from cxrscale.sources.ledger import LedgerBook
from cxrscale.sources.registry import Source, SourceContent
from cxrscale.types import Box, ImageRecord, UserError

NAME = "nih"
EDITIONS = {
    "Data_Entry_2017_v2020.csv": "2020",
    "Data_Entry_2017.csv": "2017",
    "sample_labels.csv": "Kaggle sample",
}
"""Names of the label table -> its edition, in order of preference. They do not mean the same: of the 5,606 rows of
Kaggle's sample, 10 have other findings than in the edition of 2020, and 1,344 another age."""
BOX_TABLE = "BBox_List_2017.csv"
SPLIT_LISTS = {"train_val": "train_val_list.txt", "test": "test_list.txt"}
PUBLISHED_HW = (1024, 1024)
"""Size of the images as published: what the box table counts its pixels in, whatever the size of a copy."""

_OLDEST = 120
# Six digits are enough for any age in days; a number of hundreds of digits must not reach int().
_AGE = re.compile(r"([0-9]{1,6})([YMD]?)")
_PATIENT = re.compile(r"[0-9]+")
_FOLDER = re.compile(r"images?([_-]?\d+)?", re.IGNORECASE)
_IMAGE_NAME = re.compile(r"([0-9]{8})_[0-9]{3}")
_BOX_FINDINGS = {"Infiltrate": "Infiltration"}
# The headers have 'OriginalImage[Width,Height]' and 'Bbox [x,y,w,h]' without quotes; a CSV reader splits them.
_SCAN_COLUMNS = ("OriginalImage[Width", "Height]", "OriginalImagePixelSpacing[x", "y]")
_SCAN_COLUMNS_OF_SAMPLE = (
    *("OriginalImageWidth", "OriginalImageHeight"),
    *("OriginalImagePixelSpacing_x", "OriginalImagePixelSpacing_y"),
)
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


def read(root: str) -> SourceContent:
    """All images of a complete or partial copy of ChestX-ray14, in the order of their IDs, and their ledger.

    Images lie in `images_001/images` to `images_012/images`, in `images`, or directly in the root. The label table
    lies in the root, and so do the box table and the split lists if present. A row without an image is left out; an
    image without a row is unlabeled, and its patient is taken from its file name. The ID of an image is its published
    file name, `00000013_005.png`, however the file is written here.

    Args:
        root: a local folder or an fsspec address. Local paths in the records are absolute.

    Raises:
        UserError: there is no image or no label table, a table lacks a column or has an impossible value, a table or
            list names none of the images, or two folders have an image of the same name.
    """
    root, book = absolute_root(root), LedgerBook(NAME)
    images = by_name(find_images(root, (PNG,), _accept, book), book)
    if not images:
        raise UserError(
            f"{root}: no PNG files there; expected them in images_001/images, in images, or in this folder"
            + book.hint()
        )
    book.count_images(len(images))
    name_of, table = _read_labels(root, images, book)
    boxes = _read_box_table(root, images.keys(), name_of.keys(), book)
    splits = _read_splits(root, images, book)
    records = []
    for key, image in images.items():
        name = _IMAGE_NAME.fullmatch(image.name)
        image_id = name_of.get(key, f"{image.name}.png")
        entry = table.get(image_id) or Entry(patient=name[1] if name else image_id)
        records.append(
            ImageRecord(
                image_id=image_id,
                source=NAME,
                path=image.path,
                patient=entry.patient,
                findings=entry.findings,
                split=splits.get(key),
                view=entry.view,
                sex=entry.sex,
                age=entry.age,
                # NIH resized every scan to the same shape, whatever its own: rows and columns have their own ratios.
                spacing_mm=_published_spacing(entry.scan_mm),
                boxes=boxes.get(key, ()),
                tables_HW=PUBLISHED_HW,
            )
        )
    return SourceContent(sorted(records, key=lambda record: record.image_id), book)


def read_table(path: str) -> dict[str, Entry]:
    """The label table: published file name of an image -> its row.

    Args:
        path: one of the files of EDITIONS, a local path or an fsspec address.

    Raises:
        UserError: the file is missing, is not a CSV table, or lacks a column; or a row has more or fewer values than
            the header, an unknown finding, a patient ID that is not a number, or the image of an earlier row.
    """
    needed = ("Image Index", "Finding Labels", "Patient ID")
    # Some copies of the table have Patient Sex instead of Patient Gender.
    optional = ("View Position", "Patient Gender", "Patient Sex", "Patient Age")
    columns = (*optional, *_SCAN_COLUMNS, *_SCAN_COLUMNS_OF_SAMPLE)
    states: dict[str, dict[str, int]] = {}
    entries: dict[str, Entry] = {}
    for line, (image, labels, patient, view, gender, sex, age, *scan) in table_rows(path, needed, columns):
        image_id = f"{image_name(image)}.png"
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
            scan_mm=_scan_mm(*(of_2017 or of_sample for of_2017, of_sample in zip(scan[:4], scan[4:], strict=True))),
        )
    return entries


def read_boxes(path: str) -> dict[str, tuple[Box, ...]]:
    """Published file name of each image that has boxes -> the boxes, in pixels of the published 1024 x 1024 image.

    Args:
        path: BBox_List_2017.csv, a local path or an fsspec address.

    Raises:
        UserError: the file is missing, is not a CSV table, or lacks a column; or a row has more or fewer values than
            the header, an unknown finding, or a box that is not four numbers.
    """
    boxes: dict[str, tuple[Box, ...]] = {}
    for line, (image, label, *values) in table_rows(path, ("Image Index", "Finding Label", *_BOX_COLUMNS)):
        image_id = f"{image_name(image)}.png"
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


def _accept(folders: tuple[str, ...]) -> str:
    return "" if not folders or _FOLDER.fullmatch(folders[0]) else "outside of images, images_001, images_002, ..."


def _read_labels(root: str, images: Collection[str], book: LedgerBook) -> tuple[dict[str, str], dict[str, Entry]]:
    """(key of an image -> its name in the label table, name -> row)."""
    found = [name for name in EDITIONS if storage.exists(storage.join(root, name))]
    if not found:
        raise UserError(f"{root}: no {' or '.join(EDITIONS)}; put the label table beside the image folders")
    path = storage.join(root, found[0])
    table = read_table(path)
    name_of = {image_key(name): name for name in table}
    if len(name_of) < len(table):
        twice = next(name for name in table if name_of[image_key(name)] != name)
        raise UserError(f"{path}: {twice!r:.80} has two rows, in upper and lower case; keep the correct one")
    book.match(path, len(table), name_of.keys(), images, edition=EDITIONS[found[0]])
    for other in found[1:]:
        book.note(f"{other} is another edition of the labels and is not read, because {found[0]} is there")
    return name_of, table


def _read_box_table(
    root: str, images: Collection[str], known: Collection[str], book: LedgerBook
) -> dict[str, tuple[Box, ...]]:
    """Key of an image -> its boxes; none where there is no table."""
    if not storage.exists(path := storage.join(root, BOX_TABLE)):
        return {}
    boxes: dict[str, tuple[Box, ...]] = {}
    for name, own in read_boxes(path).items():
        boxes[image_key(name)] = (*boxes.get(image_key(name), ()), *own)
    # Only 880 images have boxes: a partial copy may have none of them, but its label table does.
    book.match(path, sum(map(len, boxes.values())), boxes.keys(), images, known=known, names_every_image=False)
    return boxes


def _read_splits(root: str, images: Mapping[str, object], book: LedgerBook) -> dict[str, str]:
    """Key of an image -> train_val or test, from the lists that are there."""
    splits: dict[str, str] = {}
    paths = {split: storage.join(root, file) for split, file in SPLIT_LISTS.items()}
    there = {split: path for split, path in paths.items() if storage.exists(path)}
    if "test" not in there and there:
        raise UserError(
            f"{paths['test']} is missing, and without it no image is a test image; put it beside "
            f"{SPLIT_LISTS['train_val']}, or remove that list and set pack.split=random"
        )
    for split, path in there.items():
        names = read_names(path)
        keys = {image_key(name): name for name in names}
        if both := keys.keys() & splits.keys():
            name, other = keys[min(both)], SPLIT_LISTS[splits[min(both)]]
            raise UserError(f"{path}: {name!r:.80} is also in {other}; keep it in one list")
        book.match(path, len(names), keys.keys(), images.keys(), names_every_image=False)
        splits.update(dict.fromkeys(keys, split))
    unlisted = len(images.keys() - splits.keys())
    if there and unlisted:
        lists = " or ".join(SPLIT_LISTS[split] for split in there)
        book.note(f"{unlisted} images are not in {lists} and count as train_val")
    return splits


def _published_spacing(scan_mm: tuple[float, float] | None) -> tuple[float, float] | None:
    return (scan_mm[0] / PUBLISHED_HW[0], scan_mm[1] / PUBLISHED_HW[1]) if scan_mm else None


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
    """Years; the first edition and Kaggle's sample have 058Y, 013M (months) or 009D (days)."""
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


SOURCE = Source(
    NAME,
    read,
    publishes_split=True,
    editions_differ="of the 5,606 images of Kaggle's sample, 10 have other findings and 1,344 another age than in the "
    "edition of 2020",
)
