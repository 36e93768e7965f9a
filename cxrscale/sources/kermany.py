"""Pediatric pneumonia (Kermany et al. 2018): JPEG files in class folders; their names carry the patient.

Whom a name means was settled on the 5,840 published files of train and test. "Alike" is the area under the ROC curve by
which the likeness of two thumbnails tells images of one name from images of random ones; 0.5 is chance.

- `person12_bacteria_46` and `person12_virus_40` are two people: each type has a numbering of its own, 1 up to 1,945 and
  1 up to 1,685. Of the 808 numbers that train has in both types, bacteria and virus are not alike (0.51, standard error
  0.01); images of one number and type are (0.78 in train and in test).
- The numberings run on through the parts instead of restarting: of bacteria, 78 to 175 are the test part and all others
  train's; of virus, 1 to 79, 1,608 and 1,610 to 1,685 are. With the type, a number is in one part only; of the bare
  numbers 170 are in both: taken bare they would join strangers and pull them across the test list.
- The healthy are named in two series, `IM-0115-0001` and `NORMAL2-IM-0115-0001`, again each cut into parts (the test
  part has 1 to 111 of the first and 7 to 381 of the second). Numbers that both series have are not alike (0.52 in
  train, 0.50 across the parts), though that proves less: even one number of one series is little alike (0.57).
- 32 files repeat another to the byte (28 pairs, 2 triples), none across the parts, and all but one under one patient:
  NORMAL2-IM-0095 and NORMAL2-IM-0096, both in the test part. `duplicates.repeats` finds them, `duplicates.united` joins the two.

So the patient is person + type, or series + number, without the part: `person12_bacteria`, `NORMAL2-IM-0115`. The later
edition's `BACTERIA-7422-0001` (type, patient, image) gives the patient as `7422`, whatever the type.
"""

from __future__ import annotations

import re

from cxrscale.config import ABSENT, PRESENT
from cxrscale.io import storage
from cxrscale.types import ImageRecord, UserError

SOURCE = "kermany"
FINDING = "Pneumonia"
PARTS = {"train": "train_val", "val": "train_val", "test": "test"}
"""Folder -> the archive's own split. Its 16 images of `val` judge nothing: they join train, and validation is carved
out of both by patient."""
CLASSES = {"NORMAL": ABSENT, "PNEUMONIA": PRESENT}

_SUFFIXES = (".jpeg", ".jpg")
_PATIENTS = (
    re.compile(r"(?P<patient>person\d+_(?:bacteria|virus))_\d+(?:_\d+)?"),
    re.compile(r"(?P<patient>(?:NORMAL\d+-)?IM-\d+)-\d+(?:-\d+)?"),
    re.compile(r"(?:NORMAL|BACTERIA|VIRUS)-(?P<patient>\d+)-\d+"),
)


def read(root: str) -> list[ImageRecord]:
    """All images of a whole or partial archive, in the order of their ids; none is opened.

    Images lie in `train`, `val` and `test`, in `NORMAL` and `PNEUMONIA` there. An id is `part-CLASS-name`, such as
    `train-PNEUMONIA-person1000_bacteria_2931`: unique whatever names two folders share, and a name for a file as well.
    View, sex, age and spacing are unknown.

    Args:
        root: the folder that holds the parts, local or an fsspec address. Local paths in the records are absolute.

    Raises:
        UserError: there is no image, a part has a folder besides the two classes, a file's name does not tell the
            patient, or two files of a folder differ in their suffix alone.
    """
    if not storage.is_remote(root):
        root = str(storage.local_path(root).absolute())
    records = [record for part in PARTS for name in CLASSES for record in _folder(root, part, name)]
    for part in PARTS:
        _check_classes(storage.join(root, part))
    if not records:
        raise UserError(f"{root}: no .jpeg in {' or '.join(PARTS)}/{' or '.join(CLASSES)}; give the folder above them")
    return sorted(records, key=lambda record: record.image_id)


def patient_id(name: str) -> str | None:
    """Whom an image shows, by its file's name without suffix (see above); None where it does not say."""
    for pattern in _PATIENTS:
        if found := pattern.fullmatch(name):
            return found["patient"]
    return None


def _folder(root: str, part: str, state: str) -> list[ImageRecord]:
    """The images of a part and class."""
    folder = storage.join(root, part, state)
    records: dict[str, ImageRecord] = {}
    for file in storage.listing(folder):
        name, dot, suffix = file.rpartition(".")
        # '._IM-0115-0001.jpeg' is what macOS leaves beside a file, and no image.
        if file.startswith(".") or dot + suffix.lower() not in _SUFFIXES:
            continue
        path, who = storage.join(folder, file), patient_id(name)
        if who is None:
            raise UserError(
                f"{path}: the name does not tell the patient, as person1_virus_6.jpeg or IM-0115-0001.jpeg do; "
                "take the files under their published names"
            )
        image_id = f"{part}-{state}-{name}"
        if image_id in records:
            raise UserError(f"{path} has the same name as {records[image_id].path}; remove one of them")
        records[image_id] = ImageRecord(
            image_id=image_id,
            source=SOURCE,
            path=path,
            patient=who,
            findings={FINDING: CLASSES[state]},
            split=PARTS[part],
        )
    return list(records.values())


def _check_classes(folder: str) -> None:
    """A class under another name would be left out without a word."""
    for name in storage.listing(folder):
        if name not in CLASSES and "." not in name:
            raise UserError(f"{folder}: {name!r} is neither {' nor '.join(CLASSES)}; rename or remove it")
