"""SIIM-ACR Pneumothorax (2019): DICOM files in study/series folders and one table of run-length encoded masks."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from cxrscale.config import ABSENT, PRESENT
from cxrscale.io import storage
from cxrscale.sources.csv_rows import table_rows
from cxrscale.sources.image_files import DICOM, absolute_root, by_name, find_images, image_key, image_name
from cxrscale.sources.ledger import LedgerBook
from cxrscale.sources.registry import Source, SourceContent
from cxrscale.types import ImageRecord, UserError

NAME = "siim"
FINDING = "Pneumothorax"
MASK_TABLES = ("stage_2_train.csv", "train-rle.csv")
"""The two names of the mask table, in order of preference: where both exist, train-rle.csv is the older one."""
NO_MASK = "-1"
"""The table's value for images without pneumothorax."""


def read(root: str) -> SourceContent:
    """All DICOM files of a complete or partial copy, in the order of their IDs, and their ledger.

    Files may lie anywhere under the root: in study/series folders, or flat as `ID_xxx.dcm`. The ID of an image is its
    file name without `.dcm`. `rles` holds the masks of all rows of an image, or () if the table says that there is no
    pneumothorax. An image without a row is unlabeled: no finding, and `rles` is None. View, sex, age and spacing are
    only in the DICOM headers and are None here.

    Args:
        root: a local folder or an fsspec address. Local paths in the records are absolute.

    Raises:
        UserError: there is no DICOM file or no table, the table lacks a column or a value or names none of the images,
            or two files have the same name.
    """
    root, book = absolute_root(root), LedgerBook(NAME)
    images = by_name(find_images(root, (DICOM,), lambda _: "", book), book)
    if not images:
        raise UserError(f"{root}: no .dcm file there; expected dicom-images-train with the DICOM files" + book.hint())
    book.count_images(len(images))
    masks, name_of = _read_masks(root, images, book)
    records = []
    for key, image in images.items():
        image_id, rles = name_of.get(key, image.name), masks.get(key)
        records.append(
            ImageRecord(
                image_id=image_id,
                source=NAME,
                path=image.path,
                # The DICOM PatientID is different in every file and so identifies nobody. The true patient can be
                # taken from the NIH duplicate later; until then every image counts as a patient.
                patient=image_id,
                findings={} if rles is None else {FINDING: PRESENT if rles else ABSENT},
                rles=rles,
            )
        )
    return SourceContent(sorted(records, key=lambda record: record.image_id), book)


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
    return _masks(path, table_rows(path, ("ImageId", "EncodedPixels")))


def _masks(path: str, rows: Iterable[tuple[int, tuple[str, ...]]]) -> dict[str, tuple[str, ...]]:
    masks: dict[str, tuple[str, ...]] = {}
    for line, (image, rle) in rows:
        image_id = image_name(image)
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


def _read_masks(
    root: str, images: Collection[str], book: LedgerBook
) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """(key of an image -> the masks of all of its rows, key -> the image's name in the table)."""
    found = [name for name in MASK_TABLES if storage.exists(storage.join(root, name))]
    if not found:
        raise UserError(f"{root}: no {' or '.join(MASK_TABLES)}; put the mask table beside the DICOM folder")
    path = storage.join(root, found[0])
    rows = list(table_rows(path, ("ImageId", "EncodedPixels")))
    masks: dict[str, tuple[str, ...]] = {}
    name_of: dict[str, str] = {}
    for name, rles in _masks(path, rows).items():
        masks[image_key(name)] = (*masks.get(image_key(name), ()), *rles)
        name_of.setdefault(image_key(name), name)
    book.match(path, len(rows), masks.keys(), images)
    for other in found[1:]:
        book.note(f"{other} is not read, because {found[0]} is there")
    return masks, name_of


SOURCE = Source(NAME, read, pack_defaults={"masks": True}, reliable_patient_ids=False)
