"""NIH ChestX-ray14 (Wang et al. 2017): PNG pictures, one label table, a box table and the official split lists."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import pandas as pd

from cxrscale import labels, storage
from cxrscale.schema import Box, ImageRecord, InputError

SOURCE = "nih"
LABEL_TABLES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
"""The label table's two editions, same meaning; the first one that is there is read (its ages are corrected)."""
BOX_TABLE = "BBox_List_2017.csv"
SPLIT_LISTS = {"train_val": "train_val_list.txt", "test": "test_list.txt"}

_PUBLISHED_SIDE = 1024
_OLDEST = 120
_AGE = re.compile(r"(\d+)([YMD]?)")
_FOLDER = re.compile(r"images(_\d{3})?")
_PICTURE_NAME = re.compile(r"(\d{8})_\d{3}\.png")
_BOX_FINDINGS = {"Infiltrate": "Infiltration"}
# The headers hold 'OriginalImage[Width,Height]' and 'Bbox [x,y,w,h]' without quotes: a CSV reader sees these columns.
_SCAN_COLUMNS = ("OriginalImage[Width", "Height]", "OriginalImagePixelSpacing[x", "y]")
_BOX_COLUMNS = ("Bbox [x", "y", "w", "h]")


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of the label table."""

    patient: str
    """Patient ID, 8 digits, as the pictures' names have it."""
    findings: Mapping[str, int] = field(default_factory=dict)
    """Each of the 14 findings -> labels.PRESENT or labels.ABSENT. Rows that say the same share one mapping."""
    view: str | None = None
    """PA or AP."""
    sex: str | None = None
    """F or M."""
    age: int | None = None
    """Years; None where unknown or above 120."""
    scan_mm: tuple[float, float] | None = None
    """Height and width of what the scan shows, in millimetres."""


def read(root: str) -> list[ImageRecord]:
    """All pictures of a whole or partial ChestX-ray14 archive, in the order of their ids.

    Pictures lie in `images_001/images` to `images_012/images`, in `images`, or directly in the root. The label table
    lies in the root, as do the box table and the split lists where they are given. A row without a picture is left
    out; a picture without a row is unlabelled, and its patient is told by its file name.

    Args:
        root: a local folder or an fsspec address. Local paths in the records are absolute.

    Raises:
        InputError: there is no picture, no table, a table lacks a column or says what cannot be, or two folders hold
            a picture of the same name.
    """
    if not storage.is_remote(root):
        root = str(storage.local_path(root).absolute())
    pictures = _pictures(root)
    table = read_table(_label_table(root))
    boxes = read_boxes(address) if storage.exists(address := storage.join(root, BOX_TABLE)) else {}
    splits = _splits(root)
    height, width = _png_size(next(iter(pictures.values())))
    records = []
    for image_id, path in sorted(pictures.items()):
        name = _PICTURE_NAME.fullmatch(image_id)
        entry = table.get(image_id) or Entry(patient=name[1] if name else image_id)
        records.append(
            ImageRecord(
                image_id=image_id,
                source=SOURCE,
                path=path,
                patient=entry.patient,
                findings=entry.findings,
                split=splits.get(image_id),
                view=entry.view,
                sex=entry.sex,
                age=entry.age,
                # Whatever the scan's shape was, NIH squeezed it into the picture's: its pixels grew by that ratio.
                spacing_mm=(entry.scan_mm[0] / height, entry.scan_mm[1] / width) if entry.scan_mm else None,
                boxes=boxes.get(image_id, ()),
            )
        )
    return records


def read_table(path: str) -> dict[str, Entry]:
    """The label table: a picture's file name -> what its row says.

    Args:
        path: Data_Entry_2017.csv or Data_Entry_2017_v2020.csv, a local path or an fsspec address.

    Raises:
        InputError: the file is absent, is no CSV, lacks a column, or a row has an unknown finding, a patient that is
            not a number, or a picture that another row has too.
    """
    table = _csv(path, ("Image Index", "Finding Labels", "Patient ID"))
    findings = _findings(path, table["Finding Labels"].tolist())
    columns = (
        table["Image Index"].tolist(),
        table["Patient ID"].tolist(),
        table["Finding Labels"].tolist(),
        _column(table, "View Position"),
        # Some copies of the table call it Patient Sex.
        _column(table, "Patient Gender" if "Patient Gender" in table else "Patient Sex"),
        _column(table, "Patient Age"),
        *(_column(table, name) for name in _SCAN_COLUMNS),
    )
    entries: dict[str, Entry] = {}
    for image_id, patient, found, view, sex, age, width, height, x_mm, y_mm in zip(*columns, strict=True):
        if image_id in entries:
            raise InputError(f"{path}: two rows for {image_id}; keep the right one")
        if not patient.isdecimal():
            raise InputError(
                f"{path}: Patient ID {patient!r} of {image_id} is not a number; take the table as published"
            )
        entries[image_id] = Entry(
            patient=patient.zfill(8),
            findings=findings[found],
            view=view if view in ("PA", "AP") else None,
            sex=sex if sex in ("F", "M") else None,
            age=_age(age),
            scan_mm=_scan_mm(width, height, x_mm, y_mm),
        )
    return entries


def read_boxes(path: str) -> dict[str, tuple[Box, ...]]:
    """The boxes of each picture that has any, in pixels of the published 1024 x 1024 picture.

    Args:
        path: BBox_List_2017.csv, a local path or an fsspec address.

    Raises:
        InputError: the file is absent, is no CSV, lacks a column, or a row has an unknown finding or no number.
    """
    raw = _csv(path, ("Image Index", "Finding Label", *_BOX_COLUMNS))
    boxes: dict[str, tuple[Box, ...]] = {}
    for image_id, label, *values in raw[["Image Index", "Finding Label", *_BOX_COLUMNS]].itertuples(index=False):
        finding = _BOX_FINDINGS.get(label, label)
        if finding not in labels.NIH14:
            raise InputError(f"{path}: unknown finding {label!r} of {image_id}; take the table as published")
        try:
            x, y, width, height = (float(value) for value in values)
        except ValueError:
            raise InputError(
                f"{path}: the box of {image_id} is not four numbers; take the table as published"
            ) from None
        boxes[image_id] = (*boxes.get(image_id, ()), Box(finding, x, y, width, height))
    return boxes


def _pictures(root: str) -> dict[str, str]:
    """Picture name -> path, over all folders in which the archive's editions keep their pictures."""
    folders = [root]
    for name in storage.listing(root):
        if _FOLDER.fullmatch(name):
            folders += [storage.join(root, name), storage.join(root, name, "images")]
    pictures: dict[str, str] = {}
    for folder in folders:
        for name in storage.listing(folder, ".png"):
            path = storage.join(folder, name)
            if name in pictures:
                raise InputError(f"{name} is in two folders, {pictures[name]} and {path}; remove one of them")
            pictures[name] = path
    if not pictures:
        raise InputError(f"{root}: no PNG there; expected them in images_001/images, in images, or in this folder")
    return pictures


def _label_table(root: str) -> str:
    for name in LABEL_TABLES:
        if storage.exists(address := storage.join(root, name)):
            return address
    raise InputError(f"{root}: no {' or '.join(LABEL_TABLES)}; put the label table beside the image folders")


def _splits(root: str) -> dict[str, str]:
    """Picture name -> train_val or test; what no list names is not in it."""
    splits: dict[str, str] = {}
    for split, file in SPLIT_LISTS.items():
        if not storage.exists(address := storage.join(root, file)):
            continue
        names = set(storage.read(address).decode("utf-8", errors="replace").split())
        if both := names & splits.keys():
            raise InputError(f"{address}: {min(both)} is in {SPLIT_LISTS[splits[min(both)]]} too; keep it in one list")
        splits.update(dict.fromkeys(names, split))
    return splits


def _png_size(path: str) -> tuple[int, int]:
    """(height, width) of a picture; all of an archive's are alike, and one damaged file must not stop the reading."""
    head = storage.read(path)[:24]
    if head[:8] != b"\x89PNG\r\n\x1a\n" or len(head) < 24:
        return _PUBLISHED_SIDE, _PUBLISHED_SIDE
    width, height = (int.from_bytes(head[at : at + 4], "big") for at in (16, 20))
    return (height, width) if width and height else (_PUBLISHED_SIDE, _PUBLISHED_SIDE)


def _csv(path: str, needed: tuple[str, ...]) -> pd.DataFrame:
    """A table of strings; what a short row lacks is an empty string."""
    try:
        # index_col=False: the older table ends its header, but not always its rows, with a comma.
        table = pd.read_csv(io.BytesIO(storage.read(path)), dtype=object, na_filter=False, index_col=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} is not a readable CSV table ({reason}); copy it again") from None
    if missing := [name for name in needed if name not in table.columns]:
        raise InputError(f"{path}: no column {missing[0]!r}; take the table with the header that NIH published")
    return table


def _column(table: pd.DataFrame, name: str) -> list[str]:
    """A column's texts, empty ones where the table lacks it."""
    return table[name].tolist() if name in table.columns else [""] * len(table)


def _findings(path: str, texts: Iterable[str]) -> dict[str, dict[str, int]]:
    """The states that each distinct 'A|B' stands for: some 800 in all of the archive's rows."""
    states: dict[str, dict[str, int]] = {}
    for text in set(texts):
        try:
            states[text] = labels.closed_world((part.strip() for part in text.split("|")), labels.NIH14)
        except ValueError as error:
            raise InputError(f"{path}: Finding Labels {text!r}: {error}; take the table as published") from None
    return states


@lru_cache(maxsize=1024)
def _age(text: str) -> int | None:
    """Years; the earliest table wrote 058Y, 013M (months) or 009D (days)."""
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
