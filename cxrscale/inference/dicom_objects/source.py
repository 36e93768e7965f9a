"""The header of the image that an object belongs to: its patient and study, mended where they break the standard.

Only what is listed here is taken over, value by value; what is not as PS3.5 6.2 wants it is mended, or left empty where
the standard allows that. So an object is valid even where its source is not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

from cxrscale.io import dicom
from cxrscale.types import UnreadableImageError

tags = dicom.tags
_IMAGE = (b"\x89PNG", b"\xff\xd8\xff")
_GROUP, _LONG, _SHORT = 64, 64, 16
"""Characters of a group of a PN, of an LO and of an SH (PS3.5 table 6.2-1)."""


def read_source(data: bytes) -> Dataset:
    """Patient, study and identity of an image, as the objects made of it carry them.

    Returns:
        A dataset without pixels: the attributes of `_IDENTITY`, `_REQUIRED` and `_OPTIONAL`, Modality, Rows,
        Columns, PatientOrientation and what is said of lossy compression. Those of type 2 (PS3.5 7.4.3) are there,
        empty or not.

    Raises:
        UnreadableImageError: a PNG or JPEG, which names no patient; or the header lacks what an object must name.
            Messages hold no value of the header.
    """
    if data.startswith(_IMAGE):
        raise UnreadableImageError("no DICOM source: PNG and JPEG files name no patient and no study")
    given, mended = dicom.read_tags(data), Dataset()
    with tags.silence_pydicom():
        for keyword in _IDENTITY:
            setattr(mended, keyword, _uid(given, keyword))
        mended.PatientID = _patient_id(given)
        for keyword, mend in _REQUIRED.items():
            setattr(mended, keyword, mend(_text(given, keyword)))
        for keyword, mend in _OPTIONAL.items():
            if value := mend(_text(given, keyword)):
                setattr(mended, keyword, value)
        # Type 1C: one without the other is no information (PS3.3 C.7.1.1).
        if "DeidentificationMethod" not in mended:
            mended.pop("PatientIdentityRemoved", None)
        mended.Rows, mended.Columns = int(tags.number(given, "Rows")), int(tags.number(given, "Columns"))
        # Not copied: highdicom refuses reports of reports.
        modality = _text(given, "Modality")
        mended.Modality = modality if re.fullmatch("[A-Z0-9_ ]{1,16}", modality) else "OT"
        mended.PatientOrientation = _orientation(given)
        _copy_lossy(given, mended)
        mended.SpecificCharacterSet = "ISO_IR 100" if _is_latin(mended) else "ISO_IR 192"
    return mended


def _text(given: Any, keyword: str) -> str:
    """A tag as text, its values joined by backslashes; "" if absent, empty or malformed."""
    try:
        value = tags.value(given, keyword)
    except UnreadableImageError:
        return ""
    values = value if isinstance(value, MultiValue) else [] if value is None else [value]
    return "\\".join(str(one).strip(" \0") for one in values)


def _uid(given: Any, keyword: str) -> str:
    """A UID that an object must repeat to belong to its image."""
    text = _text(given, keyword)
    if not text and keyword == "SOPClassUID":
        text = _text(getattr(given, "file_meta", {}), "MediaStorageSOPClassUID")
    if not re.fullmatch(r"[0-9.]{1,64}", text):
        state = "is malformed" if text else "is missing"
        raise UnreadableImageError(f"{tags.label(keyword)} {state}: an object of this image could not name it")
    return text


def _patient_id(given: Any) -> str:
    """PatientID as it is; it may be empty, but one that is cut would be another patient."""
    text = _text(given, "PatientID")
    if text != _line(text, _LONG):
        raise UnreadableImageError(f"{tags.label('PatientID')} is malformed: an object could not name the patient")
    return text


def _line(text: str, limit: int) -> str:
    """Text of one value: no backslash, no control character, not longer than `limit`."""
    return "".join(char if char.isprintable() and char != "\\" else " " for char in text)[:limit].strip()


def _whole(text: str) -> str:
    """A short identifier (SH) or nothing: a part of one would name something else."""
    return text if text == _line(text, _SHORT) else ""


def _name(text: str) -> str:
    """A person's name (PN): at most three groups of five components."""
    groups = [_line(group, _GROUP) for group in text.split("=")[:3]]
    return "=".join("^".join(group.split("^")[:5]) for group in groups).rstrip("=")


def _date(text: str) -> str:
    """A date (DA), also from the form of ACR-NEMA, 1901.01.01."""
    digits = text.replace(".", "") if re.fullmatch(r"\d{4}\.\d{2}\.\d{2}", text) else text
    try:
        valid = datetime.strptime(digits, "%Y%m%d").strftime("%Y%m%d") == digits
    except ValueError:
        valid = False
    return digits if valid else ""


def _time(text: str) -> str:
    """A time of day (TM): HH, HHMM, HHMMSS, HHMMSS.FFFFFF."""
    match = re.fullmatch(r"([01]\d|2[0-3])([0-5]\d([0-5]\d(\.\d{1,6})?)?)?", text)
    return text if match else ""


def _age(text: str) -> str:
    """An age (AS); a plain number means years, as SIIM and RSNA write it."""
    if re.fullmatch(r"\d{3}[DWMY]", text):
        return text
    match = re.fullmatch(r"(\d{1,3})([DWMY]?)", text.upper())
    if match is None or (not match[2] and int(match[1]) > dicom.MAX_AGE):
        return ""
    return f"{int(match[1]):03}{match[2] or 'Y'}"


def _decimal(text: str) -> str:
    """A positive decimal string (DS)."""
    try:
        number = float(text)
    except ValueError:
        return ""
    return f"{number:.6g}" if 0 < number < math.inf else ""


def _one_of(*allowed: str) -> Callable[[str], str]:
    return lambda text: text.upper() if text.upper() in allowed else ""


_IDENTITY = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
_REQUIRED: Mapping[str, Callable[[str], str]] = {
    "PatientName": _name,
    "PatientBirthDate": _date,
    "PatientSex": _one_of("M", "F", "O"),
    "StudyDate": _date,
    "StudyTime": _time,
    "AccessionNumber": _whole,
    "StudyID": _whole,
    "ReferringPhysicianName": _name,
}
"""Type 2 of the Patient and General Study modules (PS3.3 C.7.1.1, C.7.2.1) beside PatientID and StudyInstanceUID."""
_OPTIONAL: Mapping[str, Callable[[str], str]] = {
    "IssuerOfPatientID": lambda text: text if text == _line(text, _LONG) else "",
    "PatientAge": _age,
    "PatientSize": _decimal,
    "PatientWeight": _decimal,
    "PatientIdentityRemoved": _one_of("YES", "NO"),
    "DeidentificationMethod": lambda text: _line(text, _LONG),
    "StudyDescription": lambda text: _line(text, _LONG),
    "BurnedInAnnotation": _one_of("YES", "NO"),
}
"""Type 3 of these modules, of Patient Study (PS3.3 C.7.2.2) and of General Image."""
OPTIONAL = tuple(_OPTIONAL)
"""Attributes that `read_source` gives where the source has them."""


def _orientation(given: Any) -> list[str] | str:
    """PatientOrientation (PS3.3 C.7.6.1.1.1): the directions of rows and columns, or empty."""
    try:
        value = tags.value(given, "PatientOrientation")
    except UnreadableImageError:
        return ""
    directions = [] if value is None or isinstance(value, str) else [str(one) for one in value]
    return directions if len(directions) == 2 and all(re.fullmatch("[APRLHF]{1,3}", d) for d in directions) else ""


def _copy_lossy(given: Any, mended: Dataset) -> None:
    """What is derived from a lossy image is lossy too (PS3.3 C.7.6.1.1.5)."""
    if tags.text(given, "LossyImageCompression") == "01":
        mended.LossyImageCompression = "01"


def _is_latin(mended: Dataset) -> bool:
    """Whether ISO_IR 100 holds all text; UTF-8 holds any."""
    try:
        for element in mended:
            str(element.value).encode("latin-1")
    except UnicodeEncodeError:
        return False
    return True
