"""Pediatric pneumonia (Kermany et al. 2018): JPEG files in class folders; the file names contain the patient.

Which patient a name means was decided on the 5,840 published files of train and test. "Similarity" is the AUROC with
which the distance between two thumbnails separates pairs of the same name from random pairs; 0.5 is chance.

- `person12_bacteria_46` and `person12_virus_40` are two patients: each type has its own numbering, 1 to 1,945 and 1 to
  1,685. For the 808 numbers that train has in both types, the bacteria and the virus images are not similar (0.51,
  standard error 0.01); images of the same number and type are (0.78 in train and in test).
- The numbering continues across the parts instead of restarting. For bacteria, 78 to 175 are in the test part and all
  others in train; for virus, 1 to 79, 1,608 and 1,610 to 1,685 are in the test part. With the type, each number is in
  one part only. Without it, 170 numbers are in both parts: they would merge unrelated patients across the test list.
- Healthy children are named in two series, `IM-0115-0001` and `NORMAL2-IM-0115-0001`, and each series is divided into
  parts as well (the test part has 1 to 111 of the first and 7 to 381 of the second). Numbers that both series have are
  not similar (0.52 in train, 0.50 across the parts). This is weaker evidence: even images of the same number and series
  are only a little similar (0.57).
- 32 files are copies of another file, byte by byte (28 pairs, 2 triples). None crosses the parts, and all but one pair
  belong to the same patient; the exception is NORMAL2-IM-0095 and NORMAL2-IM-0096, both in the test part.
  `duplicates.find_within` finds them, `duplicates.merge_patients` merges the two.

So the patient is person + type, or series + number, without the part: `person12_bacteria`, `NORMAL2-IM-0115`. In the
later edition, the patient of `BACTERIA-7422-0001` (type, patient, image) is `7422`, whatever the type.
"""

from __future__ import annotations

import re

from cxrscale.config import ABSENT, PRESENT
from cxrscale.sources.image_files import JPEG, PNG, ImageFile, absolute_root, find_images, refuse_second
from cxrscale.sources.ledger import LedgerBook
from cxrscale.sources.registry import Source, SourceContent
from cxrscale.types import ImageRecord, UserError

NAME = "kermany"
FINDING = "Pneumonia"
PARTS = {"train": "train_val", "val": "train_val", "test": "test"}
"""Folder -> the published split. The 16 images of `val` are too few to select a model: they are added to train, and
the validation split is drawn from both, by patient."""
CLASSES = {"NORMAL": ABSENT, "PNEUMONIA": PRESENT}

_PATIENTS = (
    re.compile(r"(?P<patient>person\d+_(?:bacteria|virus))_\d+(?:_\d+)?"),
    re.compile(r"(?P<patient>(?:NORMAL\d+-)?IM-\d+)-\d+(?:-\d+)?"),
    re.compile(r"(?:NORMAL|BACTERIA|VIRUS)-(?P<patient>\d+)-\d+"),
)


def read(root: str) -> SourceContent:
    """All images of a complete or partial copy, in the order of their IDs, and their ledger.

    Images lie in `NORMAL` and `PNEUMONIA` in each of `train`, `val` and `test`. An ID is `part-CLASS-name`, such as
    `train-PNEUMONIA-person1000_bacteria_2931`: it is unique even if two folders have files of the same name, and it
    can be a file name. View, sex, age and spacing are unknown.

    Args:
        root: the folder that holds the parts, local or an fsspec address. Local paths in the records are absolute.

    Raises:
        UserError: there is no image, a part has images in a folder other than the two classes, a file's name does not
            contain the patient, or two files in a folder differ only in their suffix.
    """
    root, book = absolute_root(root), LedgerBook(NAME)
    images: dict[str, ImageFile] = {}
    records = []
    for image in find_images(root, (JPEG, PNG), _accept, book):
        part, state = image.folders[0].lower(), _state(image)
        name = _published_case(image.name)
        patient = patient_id(name)
        if patient is None:
            raise UserError(
                f"{image.path}: the file name does not contain the patient, as person1_virus_6.jpeg or "
                "IM-0115-0001.jpeg do; use the published file names"
            )
        image_id = f"{part}-{state}-{name}"
        if images.setdefault(image_id, image) is not image:
            refuse_second(images[image_id], image, book)
            continue
        records.append(
            ImageRecord(
                image_id=image_id,
                source=NAME,
                path=image.path,
                patient=patient,
                findings={FINDING: CLASSES[state]},
                split=PARTS[part],
            )
        )
    if not records:
        raise UserError(
            f"{root}: no .jpeg in {' or '.join(PARTS)}/{' or '.join(CLASSES)}; give the folder above them" + book.hint()
        )
    book.count_images(len(records))
    return SourceContent(sorted(records, key=lambda record: record.image_id), book)


def patient_id(name: str) -> str | None:
    """The patient in a file name without suffix (see above), or None where there is none."""
    for pattern in _PATIENTS:
        if match := pattern.fullmatch(name):
            return match["patient"]
    return None


def _accept(folders: tuple[str, ...]) -> str:
    return "" if folders and folders[0].lower() in PARTS else f"outside of {', '.join(PARTS)}"


def _state(image: ImageFile) -> str:
    """The class folder of an image in one of the parts; others are refused, or their labels would be lost."""
    state = image.folders[1].upper() if len(image.folders) == 2 else ""
    if state not in CLASSES:
        found = "/".join(image.folders[1:]) or "no folder"
        raise UserError(f"{image.path}: {found!r} is neither {' nor '.join(CLASSES)}; rename or remove it")
    return state


def _published_case(name: str) -> str:
    """A file name as it was published: person1_virus_6 in lower case, IM-0115-0001 in upper case."""
    return name.lower() if name.lower().startswith("person") else name.upper()


SOURCE = Source(NAME, read, pack_defaults={"duplicates": "merge"}, publishes_split=True)
