"""The objects themselves: valid, in the patient's study, naming the model, with our mask in them."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import highdicom
import numpy as np
import pytest
from pydicom.uid import UID

from cxrscale.inference import Prediction, check_format, dicom_objects
from cxrscale.inference.dicom_objects import KINDS, SC, SEG, SR, codes
from cxrscale.inference.objects import write_object
from cxrscale.io import encode_png
from cxrscale.types import UserError
from tests.dicom_files import dicom_file, gray_image
from tests.inference.dicom_objects.made import (
    CHECKPOINT,
    PATIENT,
    THRESHOLDS,
    ellipse,
    errors,
    make,
    predicted,
    provenance,
    read,
    source_file,
)

PATIENT_AND_STUDY = sorted(set(PATIENT) - {"SeriesInstanceUID", "Modality", "PixelSpacing"})
ODD: dict[str, dict[str, Any]] = {
    "as it should be": {},
    "siim": {"PatientAge": "61", "PatientName": "anon-5", "StudyID": "", "LossyImageCompression": "01"},
    "nothing but UIDs": {name: None for name in PATIENT if not name.endswith("UID")},
    "oriented": {"PatientOrientation": ["L", "F"], "BodyPartExamined": "CHEST", "Laterality": "R"},
    "japanese": {"SpecificCharacterSet": "ISO_IR 192", "PatientName": "Yamada^Tarou=山田^太郎"},
    "wrong everywhere": {
        **{"PatientBirthDate": "2000", "PatientSex": "unknown", "StudyTime": "noon", "AccessionNumber": "A" * 30},
        **{"PatientName": "x" * 100, "StudyDescription": "y\tz" * 40, "PatientOrientation": ["?", "?"]},
    },
    "all that is optional": {
        **{"IssuerOfPatientID": "HERE", "PatientWeight": "70.55", "PatientSize": "1.8", "StudyDescription": "Chest"},
        **{"PatientIdentityRemoved": "YES", "DeidentificationMethod": "by hand", "BurnedInAnnotation": "YES"},
    },
    "computed radiography": {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.1"},
    "digital, for presentation": {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.1.1", "Modality": "DX"},
}
"""Headers of sources."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A source file."""
    return written(tmp_path)


def written(folder: Path, **tags: Any) -> Path:
    path = folder / "image.dcm"
    path.write_bytes(source_file(**tags))
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("header", ODD)
def test_an_object_is_valid_whatever_its_source(header: str, kind: str, tmp_path: Path) -> None:
    path = written(tmp_path, **ODD[header])
    assert errors(make(tmp_path, kind, predicted(path, ellipse(40, 34)))) == []


@pytest.mark.parametrize("kind", KINDS)
def test_patient_and_study_are_those_of_the_source(kind: str, path: Path, tmp_path: Path) -> None:
    made = read(make(tmp_path, kind, predicted(path, ellipse(40, 34))))
    for keyword in PATIENT_AND_STUDY:
        assert made[keyword].value == PATIENT[keyword], keyword
    assert made.SeriesInstanceUID != PATIENT["SeriesInstanceUID"]
    assert made.SeriesDescription
    assert made.Modality == {SEG: "SEG", SR: "SR", SC: "OT"}[kind]
    assert (made.DeviceSerialNumber, made.ManufacturerModelName) == (CHECKPOINT, "cxrscale some run")
    assert "/home/canary" not in str(made)
    assert f"UI: {read(path).SOPInstanceUID}" in str(made)


@pytest.mark.parametrize("spacing", [[0.2, 0.3], None])
def test_a_segmentation_holds_our_mask(spacing: list[float] | None, tmp_path: Path) -> None:
    path, mask_HW = written(tmp_path, PixelSpacing=spacing), ellipse(40, 34)
    file = make(tmp_path, SEG, predicted(path, mask_HW))
    made = read(file)
    assert np.array_equal(made.pixel_array.reshape(40, 34).astype(np.bool_), mask_HW)
    image = highdicom.imread(file)
    assert np.array_equal(image.get_frame(1).astype(np.bool_), mask_HW)
    if spacing is not None:
        segmented = highdicom.seg.segread(file).get_pixels_by_source_instance(["1.2.3.4"])
        assert np.array_equal(segmented.reshape(40, 34).astype(np.bool_), mask_HW)
    (segment,) = made.SegmentSequence
    assert segment.SegmentedPropertyTypeCodeSequence[0].CodeValue == "36118008"
    assert segment.SegmentAlgorithmType == "AUTOMATIC"
    (algorithm,) = segment.SegmentationAlgorithmIdentificationSequence
    assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("cxrscale some run", CHECKPOINT)
    assert THRESHOLDS in algorithm.AlgorithmParameters


def test_a_report_says_probability_threshold_call_and_area(path: Path, tmp_path: Path) -> None:
    file = make(tmp_path, SR, predicted(path, ellipse(40, 34)))
    (group,) = highdicom.sr.srread(file).content.get_image_measurement_groups()
    values = {item.name.meaning: (item.value, item.unit.value) for item in group.get_measurements()}
    assert values == {
        "Certainty of Finding": (pytest.approx(81.234568), "%"),
        "CAD Operating Point": (43, "%"),
        "Area": (12.5, "mm2"),
    }
    assert group.finding_type.meaning == "Pneumothorax"
    (presence,) = group.get_qualitative_evaluations(codes.PRESENCE)
    assert (presence.name.meaning, presence.value.meaning) == ("Presence of property", "Present")
    made = read(file)
    assert (made.CompletionFlag, made.VerificationFlag) == ("COMPLETE", "UNVERIFIED")
    assert CHECKPOINT in str(made)


def test_a_classifier_reports_each_finding(path: Path, tmp_path: Path) -> None:
    names = ("Effusion", "Pleural_Thickening", "Hernia")
    values = dict(zip(names, (0.9, 0.2, 1e-9), strict=True))
    called = {"Effusion": True, "Pleural_Thickening": False}
    prediction = replace(predicted(path, None), probabilities=values, calls=called, mask_rle=None, mask_area_mm2=None)
    for kind in (SR, SC):
        file = make(tmp_path, kind, prediction, provenance(masks=False))
        assert errors(file) == []
    groups = highdicom.sr.srread(make(tmp_path, SR, prediction)).content.get_image_measurement_groups()
    assert [group.finding_type.meaning for group in groups] == [
        "Pleural effusion",
        "Pleural Thickening",
        "Diaphragmatic hernia",
    ]
    said = [[item.value.meaning for item in group.get_qualitative_evaluations(codes.PRESENCE)] for group in groups]
    assert said == [["Present"], ["Absent"], []]
    with pytest.raises(UserError, match=r"dicom-seg is one of masks, and .* is a classifier; give dicom-sr"):
        check_format(SEG, provenance(masks=False))


def test_an_empty_mask_is_a_report_and_no_segmentation(path: Path, tmp_path: Path) -> None:
    file = make(tmp_path, SEG, predicted(path, None))
    made = read(file)
    assert (made.Modality, file.name.endswith(dicom_objects.EMPTY_MASK_SUFFIX)) == ("SR", True)
    assert make(tmp_path, SR, predicted(path, None)) == file


def test_a_capture_shows_the_image_the_outline_and_the_calls(path: Path, tmp_path: Path) -> None:
    prediction, image_HW = predicted(path, ellipse(40, 34)), gray_image()
    made = read(make(tmp_path, SC, prediction))
    pixels = made.pixel_array
    shown = pixels[:40, :34]
    changed_HW = (shown != image_HW[..., None]).any(axis=2)
    near_HW = cv2.dilate(ellipse(40, 34).astype(np.uint8), np.ones((3, 3), np.uint8)).astype(np.bool_)
    assert 10 < changed_HW.sum() < 100
    assert not (changed_HW & ~near_HW).any()
    assert (pixels[40:] > 0).any()
    assert made.SourceImageSequence[0].ReferencedSOPInstanceUID == "1.2.3.4"
    assert list(made.PixelSpacing) == [0.2, 0.3]


@pytest.mark.parametrize("kind", KINDS)
def test_a_repeat_gives_the_same_object(kind: str, path: Path, tmp_path: Path) -> None:
    prediction = predicted(path, ellipse(40, 34))
    one, two = (read(make(tmp_path / name, kind, prediction)) for name in ("one", "two"))
    for made in (one, two):
        for element in made.iterall():
            if element.VR in ("DA", "TM", "DT"):  # when it was made
                element.value = None
            if element.VR == "UI":
                assert UID(element.value).is_valid
    assert one == two
    other = provenance().model_copy(update={"checkpoint": "ef" * 32})
    assert read(make(tmp_path / "one", kind, prediction, other)).SOPInstanceUID != one.SOPInstanceUID
    assert len(list((tmp_path / "one" / "objects").iterdir())) == 2


def test_what_has_no_usable_header_is_a_reason(tmp_path: Path) -> None:
    png, bare = tmp_path / "a.png", tmp_path / "bare.dcm"
    png.write_bytes(encode_png(gray_image()))
    bare.write_bytes(dicom_file(gray_image()))
    unknown = written(tmp_path, SOPClassUID="1.2.3.99")
    cases = {png: "PNG and JPEG", bare: "StudyInstanceUID", unknown: "highdicom's KeyError"}
    draft = dicom_objects.drafter(SEG, provenance())
    for path, reason in cases.items():
        done = write_object(
            str(tmp_path), SEG, predicted(path, ellipse(40, 34)), dicom_objects.drafter(SEG, provenance())
        )
        assert reason in done.object_errors[SEG]
    assert not (tmp_path / "objects").exists()
    moved = Prediction(str(unknown), {"Pneumothorax": 0.5}, mask_rle="-1", height=40, width=40)
    done = write_object(str(tmp_path), SEG, moved, draft)
    assert "another size" in done.object_errors[SEG]


@pytest.mark.parametrize("kind", KINDS)
def test_no_log_and_no_message_holds_a_patient(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """highdicom warns of a name without `^` and prints it; its debug log names instances."""
    caplog.set_level(logging.DEBUG)
    path = written(tmp_path, PatientName="Canary", PatientID="CANARY", PatientSex="canary")
    prediction = predicted(path, ellipse(40, 34))
    caplog.clear()  # of what writing such a file logs
    make(tmp_path, kind, prediction)
    captured = capfd.readouterr()
    assert "canary" not in (caplog.text + captured.out + captured.err).lower()
    assert logging.getLogger("highdicom").level == logging.NOTSET
