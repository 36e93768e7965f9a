"""Each coded concept with its meaning: a check digit can be right and the meaning wrong."""

from __future__ import annotations

import pytest
from pydicom.sr.codedict import codes as known
from pydicom.sr.coding import Code

from cxrscale.config import NIH14
from cxrscale.inference.dicom_objects import codes

MEANINGS = {
    ("46621007", "SCT"): "Atelectasis",
    ("8186001", "SCT"): "Cardiomegaly",
    ("60046008", "SCT"): "Pleural effusion",
    ("112121", "DCM"): "Infiltrate",
    ("4147007", "SCT"): "Mass",
    ("27925004", "SCT"): "Nodule",
    ("233604007", "SCT"): "Pneumonia",
    ("36118008", "SCT"): "Pneumothorax",
    ("95436008", "SCT"): "Lung consolidation",
    ("19242006", "SCT"): "Pulmonary edema",
    ("87433001", "SCT"): "Pulmonary emphysema",
    ("51615001", "SCT"): "Fibrosis of lung",
    ("39839004", "SCT"): "Diaphragmatic hernia",
    ("111012", "DCM"): "Certainty of Finding",
    ("111071", "DCM"): "CAD Operating Point",
    ("42798000", "SCT"): "Area",
    ("705057003", "SCT"): "Presence",
    ("52101004", "SCT"): "Present",
    ("2667000", "SCT"): "Absent",
    ("%", "UCUM"): "Percent",
    ("mm2", "UCUM"): "square millimeter",
    ("399208008", "SCT"): "Plain chest X-ray",
    ("816094009", "SCT"): "Thorax",
    ("49755003", "SCT"): "Morphologically Abnormal Structure",
    ("123110", "DCM"): "Artificial Intelligence",
    ("126000", "DCM"): "Imaging Measurement Report",
    ("121007", "DCM"): "Device",
}
"""Written down again, from SNOMED CT, PS3.16 annex D and UCUM."""
OURS = [*codes.FINDINGS.values(), *(value for value in vars(codes).values() if isinstance(value, Code))]
D5 = (
    *("0123456789", "1234067895", "2340178956", "3401289567", "4012395678"),
    *("5987604321", "6598710432", "7659821043", "8765932104", "9876543210"),
)
"""Products in the group that Verhoeff's check is computed in."""
PERMUTED = (
    *("0123456789", "1576283094", "5803796142", "8916043527"),
    *("9453126870", "4286573901", "2793806415", "7046913258"),
)


def test_each_code_has_its_meaning() -> None:
    assert {(code.value, code.scheme_designator): code.meaning for code in OURS} == MEANINGS


def test_codes_are_what_pydicom_knows_them_as() -> None:
    checked = 0
    for code in OURS:
        scheme = getattr(known, code.scheme_designator)
        meanings = {one.meaning for one in (getattr(scheme, name) for name in scheme.dir()) if one.value == code.value}
        assert not meanings or code.meaning in meanings
        checked += bool(meanings)
    assert checked >= 15  # pydicom's dictionary holds the concepts of PS3.16 alone


@pytest.mark.parametrize(
    "code", [code for code in OURS if code.scheme_designator == "SCT"], ids=lambda code: code.value
)
def test_the_check_digit_of_snomed_is_right(code: Code) -> None:
    check = 0
    for position, digit in enumerate(reversed(code.value)):
        check = int(D5[check][int(PERMUTED[position % 8][int(digit)])])
    assert check == 0


def test_every_finding_has_a_concept_of_its_own() -> None:
    others = (
        "Lung Opacity",
        "Pleural Other",
        "Enlarged Cardiomediastinum",
        "Enlarged Cardiomediastinum 2",
        "Épanchement",
    )
    concepts = [codes.finding(name) for name in (*NIH14, *others)]
    assert len({(concept.value, concept.scheme_designator) for concept in concepts}) == len(concepts)
    assert {concept.scheme_designator for concept in concepts[:14]} == {"SCT", "DCM", codes.PRIVATE}
    for concept in concepts:
        assert 0 < len(concept.value) <= 16
        assert 0 < len(concept.meaning) <= 64
    (thickening,) = (concept for concept in concepts[:14] if concept.scheme_designator == codes.PRIVATE)
    assert thickening.meaning == "Pleural Thickening"
