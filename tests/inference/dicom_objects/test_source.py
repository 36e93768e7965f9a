"""The header of the source: what is mended, what is left empty, what is refused, and that no message holds a value."""

from __future__ import annotations

from typing import Any

import pytest
from pydicom.multival import MultiValue

from cxrscale.inference.dicom_objects.source import read_source
from cxrscale.io import encode_png
from cxrscale.types import UnreadableImageError
from tests.dicom_files import gray_image
from tests.inference.dicom_objects.made import PATIENT, source_file

LONG = "x" * 80


def test_a_right_header_is_taken_over_as_it_is() -> None:
    source = read_source(source_file(PatientOrientation=["L", "F"], IssuerOfPatientID="HERE", BurnedInAnnotation="YES"))
    for keyword in set(PATIENT) - {"PixelSpacing"}:
        assert source[keyword].value == PATIENT[keyword], keyword
    assert list(source.PatientOrientation) == ["L", "F"]
    assert (source.IssuerOfPatientID, source.BurnedInAnnotation) == ("HERE", "YES")
    assert (source.Rows, source.Columns, source.SpecificCharacterSet) == (40, 34, "ISO_IR 100")


@pytest.mark.parametrize(
    ("keyword", "given", "mended"),
    [
        ("PatientAge", "61", "061Y"),
        ("PatientAge", "7M", "007M"),
        ("PatientAge", "061Y", "061Y"),
        ("PatientAge", "412", None),
        ("PatientAge", "old", None),
        ("PatientSex", "f", "F"),
        ("PatientSex", "female", ""),
        ("PatientBirthDate", "1970.01.02", "19700102"),
        ("PatientBirthDate", "19701341", ""),
        ("StudyDate", None, ""),
        ("StudyTime", "25:00", ""),
        ("StudyTime", "000000.00", "000000.00"),
        ("AccessionNumber", "A" * 17, ""),
        ("StudyID", None, ""),
        ("PatientName", None, ""),
        ("PatientName", LONG, LONG[:64]),
        ("PatientName", "a^b^c^d^e^f", "a^b^c^d^e"),
        ("PatientID", "", ""),
        ("PatientOrientation", ["X", "F"], ""),
        ("PatientOrientation", None, ""),
        ("PatientWeight", "-3", None),
        ("StudyDescription", LONG, LONG[:64]),
        ("PatientIdentityRemoved", "YES", None),
        ("Modality", "cr!", "OT"),
        ("SpecificCharacterSet", "ISO_IR 999", "ISO_IR 100"),
    ],
)
def test_a_wrong_value_is_mended_or_left_empty(keyword: str, given: Any, mended: str | None) -> None:
    source = read_source(source_file(**{keyword: given}))
    value = source.get(keyword)
    assert (None if value is None else str(value)) == mended


def test_names_of_other_scripts_become_utf_8() -> None:
    name = "Yamada^Tarou=山田^太郎"
    source = read_source(source_file(SpecificCharacterSet="ISO_IR 192", PatientName=name))
    assert (str(source.PatientName), source.SpecificCharacterSet) == (name, "ISO_IR 192")
    source = read_source(source_file(SpecificCharacterSet="ISO_IR 100", PatientName="Müller^Jürgen"))
    assert (str(source.PatientName), source.SpecificCharacterSet) == ("Müller^Jürgen", "ISO_IR 100")


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"StudyInstanceUID": None}, r"StudyInstanceUID \(0020,000D\) is missing"),
        ({"SeriesInstanceUID": "1.2.canary"}, r"SeriesInstanceUID \(0020,000E\) is malformed"),
        ({"SOPInstanceUID": None}, "SOPInstanceUID .* is missing"),
        ({"PatientID": "CANARY" * 20}, r"PatientID \(0010,0020\) is malformed"),
        ({"PatientID": MultiValue(str, ["CANARY", "B"])}, r"PatientID \(0010,0020\) is malformed"),
    ],
)
def test_what_an_object_must_name_is_not_made_up(tags: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnreadableImageError, match=reason) as caught:
        read_source(source_file(**tags))
    assert "canary" not in str(caught.value).lower()


def test_the_storage_class_may_stand_in_the_meta_information() -> None:
    assert read_source(source_file(SOPClassUID=None)).SOPClassUID == "1.2.840.10008.5.1.4.1.1.7"


def test_a_file_without_preamble_is_read() -> None:
    assert read_source(source_file()[132:]).PatientID == PATIENT["PatientID"]


def test_a_png_names_no_patient() -> None:
    with pytest.raises(UnreadableImageError, match="PNG and JPEG files name no patient"):
        read_source(encode_png(gray_image()))
