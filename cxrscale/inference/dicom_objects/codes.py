"""The coded concepts of the objects: findings, their presence, what is measured.

A code whose check digit is right can still mean something else, so tests hold each one with its meaning and where that
was found. Where PS3.16 has a code for a concept, it is that one, also where SNOMED CT has several.
"""

from __future__ import annotations

from highdicom.sr import CodedConcept
from pydicom.sr.coding import Code

from cxrscale.inference.dicom_objects.origin import plain
from cxrscale.io import storage

SCT, DCM, UCUM = "SCT", "DCM", "UCUM"
PRIVATE = "99CXRSCALE"
"""Coding scheme of findings without a verified code (PS3.3 8.2: private designators start with 99)."""

FINDINGS = {
    "Atelectasis": Code("46621007", SCT, "Atelectasis"),
    "Cardiomegaly": Code("287272002", SCT, "Cardiomegaly"),
    "Effusion": Code("60046008", SCT, "Pleural effusion"),
    "Infiltration": Code("112121", DCM, "Infiltrate"),
    "Mass": Code("4147007", SCT, "Mass"),
    "Nodule": Code("27925004", SCT, "Nodule"),
    "Pneumonia": Code("233604007", SCT, "Pneumonia"),
    "Pneumothorax": Code("36118008", SCT, "Pneumothorax"),
    "Consolidation": Code("95436008", SCT, "Lung consolidation"),
    "Edema": Code("19242006", SCT, "Pulmonary edema"),
    "Emphysema": Code("87433001", SCT, "Pulmonary emphysema"),
    "Fibrosis": Code("51615001", SCT, "Fibrosis of lung"),
    "Hernia": Code("39839004", SCT, "Diaphragmatic hernia"),
}
"""Finding -> its code; `finding` gives the others, such as Pleural_Thickening, a private one."""

CERTAINTY = Code("111012", DCM, "Certainty of Finding")
OPERATING_POINT = Code("111071", DCM, "CAD Operating Point")
AREA = Code("42798000", SCT, "Area")
PRESENCE = Code("121052", DCM, "Presence of property")
PRESENT = Code("52101004", SCT, "Present")
ABSENT = Code("272519000", SCT, "Absent")
PERCENT = Code("%", UCUM, "Percent")
SQUARE_MILLIMETER = Code("mm2", UCUM, "square millimeter")
CHEST_X_RAY = Code("399208008", SCT, "Plain chest X-ray")
THORAX = Code("816094009", SCT, "Thorax")
ABNORMALITY = Code("49755003", SCT, "Morphologically Abnormal Structure")
ARTIFICIAL_INTELLIGENCE = Code("123110", DCM, "Artificial Intelligence")
REPORT = Code("126000", DCM, "Imaging Measurement Report")
DEVICE = Code("121007", DCM, "Device")
_CODE_VALUE = 16
"""Characters of a CodeValue (PS3.3 table 8.8-1)."""


def finding(name: str) -> CodedConcept:
    """The concept of a finding; one that is not in `FINDINGS` is its own name in a private scheme."""
    code = FINDINGS.get(name) or Code(_private_value(name), PRIVATE, plain(name).replace("_", " ")[:64])
    return CodedConcept(code.value, code.scheme_designator, code.meaning)


def _private_value(name: str) -> str:
    """Letters and digits of a name, with a digest where they are too many or do not say all of it."""
    letters = "".join(char for char in name if char.isascii() and char.isalnum())
    if letters == name.replace("_", "") and 0 < len(letters) <= _CODE_VALUE:
        return letters
    return letters[: _CODE_VALUE - 6] + storage.digest(name.encode())[:6]
