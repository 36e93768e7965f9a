"""Each coded concept with its meaning: a check digit can be right and the meaning wrong."""

from __future__ import annotations

import pytest
from pydicom.sr.codedict import codes as known
from pydicom.sr.coding import Code

from cxrscale.config import NIH14
from cxrscale.inference.dicom_objects import codes

PS3_16 = "PS3.16, as pydicom.sr.codedict holds it"
EVIDENCE = {
    ("46621007", "SCT"): ("Atelectasis", "concept maps of MedDRA 10003598 (Atelectasis) to SNOMED CT"),
    ("287272002", "SCT"): ("Cardiomegaly", PS3_16),
    ("60046008", "SCT"): ("Pleural effusion", PS3_16),
    ("112121", "DCM"): ("Infiltrate", PS3_16),
    ("4147007", "SCT"): ("Mass", PS3_16),
    ("27925004", "SCT"): ("Nodule", PS3_16),
    ("233604007", "SCT"): ("Pneumonia", "Synthea's modules and records: 'Pneumonia (disorder)'"),
    ("36118008", "SCT"): ("Pneumothorax", PS3_16),
    ("95436008", "SCT"): ("Lung consolidation", "OMOP vocabulary, concept 4318404"),
    ("19242006", "SCT"): ("Pulmonary edema", PS3_16),
    ("87433001", "SCT"): ("Pulmonary emphysema", "HL7 Lithuania, lung cancer guide, value set of incidental findings"),
    ("51615001", "SCT"): ("Fibrosis of lung", "concept maps of MedDRA 10037383 (Pulmonary fibrosis) to SNOMED CT"),
    ("39839004", "SCT"): ("Diaphragmatic hernia", "HL7 FHIR, example of FamilyMemberHistory"),
    ("111012", "DCM"): ("Certainty of Finding", PS3_16),
    ("111071", "DCM"): ("CAD Operating Point", PS3_16),
    ("42798000", "SCT"): ("Area", PS3_16),
    ("121052", "DCM"): ("Presence of property", PS3_16),
    ("52101004", "SCT"): ("Present", PS3_16),
    ("272519000", "SCT"): ("Absent", PS3_16),
    ("%", "UCUM"): ("Percent", PS3_16),
    ("mm2", "UCUM"): ("square millimeter", PS3_16),
    ("399208008", "SCT"): ("Plain chest X-ray", "public lists of procedures: 'Plain chest X-ray (procedure)'"),
    ("816094009", "SCT"): ("Thorax", PS3_16),
    ("49755003", "SCT"): ("Morphologically Abnormal Structure", PS3_16),
    ("123110", "DCM"): ("Artificial Intelligence", PS3_16),
    ("126000", "DCM"): ("Imaging Measurement Report", PS3_16),
    ("121007", "DCM"): ("Device", PS3_16),
}
"""Code -> its meaning, written down again, and where the two were found together. SNOMED CT itself is not to be
had here: what PS3.16 does not have was found in what others publish from it, in more than one place."""
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
    found = {(code.value, code.scheme_designator): code.meaning for code in OURS}
    assert found == {code: meaning for code, (meaning, _) in EVIDENCE.items()}


def meanings(code: tuple[str, str]) -> set[str]:
    """What pydicom's dictionary of PS3.16 calls a code."""
    value, designator = code
    scheme = getattr(known, designator)
    return {one.meaning for one in (getattr(scheme, name) for name in scheme.dir()) if one.value == value}


def test_codes_are_those_of_the_standard_where_it_has_them() -> None:
    for code, (meaning, where) in EVIDENCE.items():
        assert (meaning in meanings(code)) == (where == PS3_16), code
    # Another code of the same meaning would be passed over by who asks for the standard's.
    schemes = [getattr(known, designator) for designator in ("SCT", "DCM", "UCUM")]
    named = {one.meaning.casefold() for scheme in schemes for one in (getattr(scheme, name) for name in scheme.dir())}
    for meaning, where in EVIDENCE.values():
        assert meaning.casefold() in named or where != PS3_16
        assert meaning.casefold() not in named or where == PS3_16


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
