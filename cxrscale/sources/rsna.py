"""RSNA Pneumonia Detection Challenge (2018): DICOM files and a table of boxes around possible pneumonia."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from cxrscale.config import ABSENT, PRESENT
from cxrscale.io import storage
from cxrscale.sources.csv_rows import table_rows
from cxrscale.sources.image_files import DICOM, absolute_root, by_name, find_images, image_key, image_name
from cxrscale.sources.ledger import LedgerBook
from cxrscale.sources.registry import Source, SourceContent
from cxrscale.types import Box, ImageRecord, UserError

NAME = "rsna"
FINDING = "Pneumonia"
FOLDERS = ("stage_2_train_images", "stage_2_test_images")
LABEL_TABLE = "stage_2_train_labels.csv"
CLASS_TABLE = "stage_2_detailed_class_info.csv"
PUBLISHED_HW = (1024, 1024)
"""Size of the images as published: what the label table counts its pixels in, whatever the size of a copy."""
CLASSES = {"Lung Opacity": PRESENT, "No Lung Opacity / Not Normal": ABSENT, "Normal": ABSENT}
"""The values of the class table, each with the state of pneumonia that it means."""

_COLUMNS = ("patientId", "x", "y", "width", "height", "Target")


def read(root: str) -> SourceContent:
    """All DICOM files of a complete or partial copy, in the order of their IDs, and their ledger.

    The ID of an image is its patientId in lower case, which is its file name without `.dcm`. A file without a row (all
    of `stage_2_test_images`) is unlabeled; a row without a file is left out. View, sex, age and spacing are only in the
    DICOM headers and are None here. No split is published.

    patientId does not identify patients: every image has its own, although the images are 30,000 of those of
    ChestX-ray14, whose patients have several. A split by patientId can therefore put one patient into two splits. If
    you have a dataset of ChestX-ray14, give it as `--patients-from`: patients and splits are then taken from there.

    Args:
        root: a local folder or an fsspec address. Local paths in the records are absolute.

    Raises:
        UserError: there is no DICOM file or no label table, a table is damaged, lacks a column or names none of the
            images, the rows of a patient contradict each other, or two folders have a file of the same name.
    """
    root, book = absolute_root(root), LedgerBook(NAME)
    images = by_name(find_images(root, (DICOM,), _accept, book), book)
    if not images:
        raise UserError(
            f"{root}: no .dcm file in {' or '.join(FOLDERS)}; give the folder that contains them" + book.hint()
        )
    book.count_images(len(images))
    boxes = _read_labels(root, images, book)
    records = []
    for key, image in images.items():
        records.append(
            ImageRecord(
                image_id=key,
                source=NAME,
                path=image.path,
                patient=key,
                findings={} if key not in boxes else {FINDING: PRESENT if boxes[key] else ABSENT},
                boxes=boxes.get(key, ()),
                tables_HW=PUBLISHED_HW,
            )
        )
    return SourceContent(sorted(records, key=lambda record: record.image_id), book)


def read_table(path: str) -> dict[str, tuple[Box, ...]]:
    """The label table: patientId -> the boxes of all of its rows; () without pneumonia (Target 0).

    Args:
        path: stage_2_train_labels.csv, a local path or an fsspec address.

    Returns:
        Boxes in pixels of the original image (1024 x 1024 as published), in the order of the rows.

    Raises:
        UserError: the file is missing, is not a CSV table, or lacks a column; or a Target is neither 0 nor 1, a box
            is not four numbers with an area, or a patient has two Targets.
    """
    return _boxes(path, table_rows(path, _COLUMNS))


def _boxes(path: str, rows: Iterable[tuple[int, tuple[str, ...]]]) -> dict[str, tuple[Box, ...]]:
    boxes: dict[str, tuple[Box, ...]] = {}
    for line, (name, *numbers, target) in rows:
        patient = image_name(name)
        if target not in ("0", "1"):
            raise UserError(f"{path}, line {line}: Target of {patient} is {target!r}, not 0 or 1; correct the row")
        if patient in boxes and bool(boxes[patient]) != (target == "1"):
            raise UserError(f"{path}, line {line}: patient {patient} has Target 0 and Target 1; keep one of them")
        boxes[patient] = boxes.get(patient, ())
        if target == "1":
            boxes[patient] += (_box(path, line, patient, numbers),)
        elif any(numbers):
            raise UserError(f"{path}, line {line}: patient {patient} has Target 0 and a box; remove one of them")
    return boxes


def read_classes(path: str) -> dict[str, str]:
    """The table that distinguishes healthy images from those with another finding: patientId -> one of CLASSES.

    Args:
        path: stage_2_detailed_class_info.csv, a local path or an fsspec address.

    Raises:
        UserError: the file is missing, is not a CSV table, or lacks a column; or a patient has an unknown class or
            two classes.
    """
    return _classes(path, table_rows(path, ("patientId", "class")))


def _classes(path: str, rows: Iterable[tuple[int, tuple[str, ...]]]) -> dict[str, str]:
    classes: dict[str, str] = {}
    for line, (patient_id, name) in rows:
        patient = image_name(patient_id)
        if name not in CLASSES:
            raise UserError(f"{path}, line {line}: class {name!r} of {patient} is not one of {', '.join(CLASSES)}")
        if classes.setdefault(patient, name) != name:
            raise UserError(
                f"{path}, line {line}: patient {patient} is {classes[patient]!r} and {name!r}; keep one of them"
            )
    return classes


def _accept(folders: tuple[str, ...]) -> str:
    inside = folders and folders[0].casefold() in FOLDERS
    return "" if inside else f"outside of {' and '.join(FOLDERS)}"


def _read_labels(root: str, images: Mapping[str, object], book: LedgerBook) -> dict[str, tuple[Box, ...]]:
    """Key of an image -> its boxes; () without pneumonia."""
    path = storage.join(root, LABEL_TABLE)
    if not storage.exists(path):
        raise UserError(f"{root}: no {LABEL_TABLE}; put the label table beside the image folders")
    rows = list(table_rows(path, _COLUMNS))
    table = _boxes(path, rows)
    boxes = {image_key(name): own for name, own in table.items()}
    if len(boxes) < len(table):
        names = [image_key(name) for name in table]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path}: {twice!r:.80} is there in upper and in lower case; keep one of them")
    book.match(path, len(rows), boxes.keys(), images.keys())
    if storage.exists(classes := storage.join(root, CLASS_TABLE)):
        class_rows = list(table_rows(classes, ("patientId", "class")))
        named = _classes(classes, class_rows)
        keys = {image_key(name) for name in named}
        book.match(classes, len(class_rows), keys, images.keys(), known=boxes.keys(), names_every_image=False)
        _check_classes(classes, named, boxes)
    return boxes


def _check_classes(path: str, classes: Mapping[str, str], boxes: Mapping[str, tuple[Box, ...]]) -> None:
    """Check that the two tables agree on pneumonia; if they do not, they are from different editions."""
    for patient, name in classes.items():
        own = boxes.get(image_key(patient))
        if own is not None and bool(own) != (CLASSES[name] == PRESENT):
            target = int(bool(own))
            raise UserError(
                f"{path}: patient {patient} is {name!r}, but has Target {target} in {LABEL_TABLE}; "
                "use both tables as published"
            )


def _box(path: str, line: int, patient: str, numbers: Iterable[str]) -> Box:
    try:
        x, y, width, height = map(float, numbers)
    except ValueError:
        width = height = math.nan
    if not (width > 0 and height > 0 and math.isfinite(x + y + width + height)):
        raise UserError(
            f"{path}, line {line}: the box of patient {patient} is not four numbers with an area; correct the row"
        )
    return Box(FINDING, x, y, width, height)


SOURCE = Source(NAME, read, reliable_patient_ids=False)
