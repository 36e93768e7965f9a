"""RSNA Pneumonia Detection Challenge (2018): DICOM files and a table of boxes around possible pneumonia."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping

from cxrscale.config import ABSENT, PRESENT
from cxrscale.io import storage
from cxrscale.sources.registry import Source
from cxrscale.types import Box, ImageRecord, UserError

NAME = "rsna"
FINDING = "Pneumonia"
FOLDERS = ("stage_2_train_images", "stage_2_test_images")
LABEL_TABLE = "stage_2_train_labels.csv"
CLASS_TABLE = "stage_2_detailed_class_info.csv"
CLASSES = {"Lung Opacity": PRESENT, "No Lung Opacity / Not Normal": ABSENT, "Normal": ABSENT}
"""The values of the class table, each with the state of pneumonia that it means."""


def read(root: str) -> list[ImageRecord]:
    """All DICOM files of a complete or partial copy, in the order of their IDs; none is opened.

    The ID of an image is its patientId, which is its file name without `.dcm`. A file without a row (all of
    `stage_2_test_images`) is unlabeled; a row without a file is left out. View, sex, age and spacing are only in the
    DICOM headers and are None here. No split is published.

    patientId does not identify patients: every image has its own, although the images are 30,000 of those of
    ChestX-ray14, whose patients have several. A split by patientId can therefore put one patient into two splits. If
    you have a dataset of ChestX-ray14, give it as `--patients-from`: patients and splits are then taken from there.

    Args:
        root: a local folder or an fsspec address. Local paths in the records are absolute.

    Raises:
        UserError: there is no DICOM file or no label table, a table is damaged or lacks a column, the rows of a
            patient contradict each other, or two folders have a file of the same name.
    """
    if not storage.is_remote(root):
        root = str(storage.local_path(root).absolute())
    images = _image_paths(root)
    table = storage.join(root, LABEL_TABLE)
    if not storage.exists(table):
        raise UserError(f"{root}: no {LABEL_TABLE}; put the label table beside the image folders")
    boxes = read_table(table)
    if storage.exists(classes := storage.join(root, CLASS_TABLE)):
        _check_classes(classes, read_classes(classes), boxes)
    return [
        ImageRecord(
            image_id=image_id,
            source=NAME,
            path=path,
            patient=image_id,
            findings=_findings(boxes, image_id),
            boxes=boxes.get(image_id, ()),
        )
        for image_id, path in sorted(images.items())
    ]


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
    boxes: dict[str, tuple[Box, ...]] = {}
    for line, row in _rows(path, ("patientId", "x", "y", "width", "height", "Target")):
        patient, target = row["patientId"], row["Target"]
        if target not in ("0", "1"):
            raise UserError(f"{path}, line {line}: Target of {patient} is {target!r}, not 0 or 1; correct the row")
        if patient in boxes and bool(boxes[patient]) != (target == "1"):
            raise UserError(f"{path}, line {line}: patient {patient} has Target 0 and Target 1; keep one of them")
        boxes[patient] = boxes.get(patient, ())
        if target == "1":
            boxes[patient] += (_box(path, line, row),)
        elif any(row[name] for name in ("x", "y", "width", "height")):
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
    classes: dict[str, str] = {}
    for line, row in _rows(path, ("patientId", "class")):
        patient, name = row["patientId"], row["class"]
        if name not in CLASSES:
            raise UserError(f"{path}, line {line}: class {name!r} of {patient} is not one of {', '.join(CLASSES)}")
        if classes.setdefault(patient, name) != name:
            raise UserError(
                f"{path}, line {line}: patient {patient} is {classes[patient]!r} and {name!r}; keep one of them"
            )
    return classes


def _findings(boxes: Mapping[str, tuple[Box, ...]], image_id: str) -> dict[str, int]:
    if image_id not in boxes:
        return {}
    return {FINDING: PRESENT if boxes[image_id] else ABSENT}


def _check_classes(path: str, classes: Mapping[str, str], boxes: Mapping[str, tuple[Box, ...]]) -> None:
    """Check that the two tables agree on pneumonia; if they do not, they are from different editions."""
    for patient, name in classes.items():
        if patient in boxes and bool(boxes[patient]) != (CLASSES[name] == PRESENT):
            target = int(bool(boxes[patient]))
            raise UserError(
                f"{path}: patient {patient} is {name!r}, but has Target {target} in {LABEL_TABLE}; "
                "use both tables as published"
            )


def _box(path: str, line: int, row: Mapping[str, str]) -> Box:
    try:
        x, y, width, height = (float(row[name]) for name in ("x", "y", "width", "height"))
    except ValueError:
        width = height = math.nan
    if not (width > 0 and height > 0 and math.isfinite(x + y + width + height)):
        raise UserError(
            f"{path}, line {line}: the box of patient {row['patientId']} is not four numbers with an area; "
            "correct the row"
        )
    return Box(FINDING, x, y, width, height)


def _rows(path: str, needed: tuple[str, ...]) -> list[tuple[int, dict[str, str]]]:
    """(line number, column -> value without surrounding spaces) of every row; each has a patientId."""
    try:
        table = csv.DictReader(io.StringIO(storage.read(path).decode("utf-8-sig")), strict=True, skipinitialspace=True)
        header = [name.strip() for name in table.fieldnames or ()]
        if missing := [name for name in needed if name not in header]:
            raise UserError(f"{path}: no column {missing[0]!r}; use the table with the published header")
        table.fieldnames = header
        rows = [(table.line_num, row) for row in table]
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a readable CSV table ({error}); copy it again") from None
    for line, row in rows:
        # DictReader fills missing values with None and puts surplus values under the key None.
        if None in row or None in row.values() or not row["patientId"].strip():
            raise UserError(f"{path}, line {line}: a row needs {len(header)} values, patientId among them; correct it")
        if not row["patientId"].isprintable():  # an unclosed quote swallows line ends
            raise UserError(f"{path}, line {line}: patientId {row['patientId'][:80]!r} is damaged; correct the row")
    return [(line, {name: text.strip() for name, text in row.items()}) for line, row in rows]


def _image_paths(root: str) -> dict[str, str]:
    """patientId -> path of every DICOM file of both folders."""
    images: dict[str, str] = {}
    for folder in FOLDERS:
        for name in storage.listing(storage.join(root, folder), ".dcm"):
            image_id, path = name.removesuffix(".dcm"), storage.join(root, folder, name)
            if image_id in images:
                raise UserError(f"{name} is in two folders, {images[image_id]} and {path}; remove one of them")
            images[image_id] = path
    if not images:
        raise UserError(f"{root}: no .dcm file in {' or '.join(FOLDERS)}; give the folder that contains them")
    return images


SOURCE = Source(NAME, read, reliable_patient_ids=False)
