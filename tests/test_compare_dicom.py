"""The script that compares our DICOM reader with others counts what it should."""

from pathlib import Path

import pydicom
import pytest
from pydicom import uid

from tests import compare_dicom
from tests.dicom_files import Stored, dicom_file, encoded, gray_image

SHIPPED = Path(pydicom.__file__).parent / "data" / "test_files"


def outcomes(folder: Path, judge: str) -> list[str]:
    return [one.outcome for one in compare_dicom.compare_folders([folder]) if one.judge == judge]


def test_the_comparison_counts_equal_different_and_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gdcm")
    gray = gray_image()
    lossless = dicom_file(gray, syntax=uid.JPEGLSLossless, frames=[encoded(gray, uid.JPEGLSLossless)])
    files = {
        "a": dicom_file(gray),
        "b": lossless,
        "c": dicom_file(gray, NumberOfFrames=2),
        "d": dicom_file(gray)[:-900],
        "e": b"other",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    expected = [compare_dicom.EQUAL, compare_dicom.EQUAL, compare_dicom.NOT_GRAY, compare_dicom.BOTH_REFUSE]
    assert outcomes(tmp_path, "values, GDCM") == expected
    found = []
    for shift in (0, 1, 2):
        shifted = gray.astype(int) + shift

        def theirs(_: Path, shifted: Stored = shifted) -> Stored:
            return shifted

        found.append(compare_dicom.compare(tmp_path / "a", "x", theirs, lambda _: gray).outcome)
    assert found == [compare_dicom.EQUAL, compare_dicom.WITHIN_1, compare_dicom.DIFFERENT]
    monkeypatch.setattr("sys.argv", ["compare_dicom", str(tmp_path)])
    assert compare_dicom.main() == 0


@pytest.mark.slow
def test_the_test_files_of_pydicom_are_read_as_by_others() -> None:
    """8 s, most of it DCMTK's processes; what only we refuse are other kinds of object."""
    found = compare_dicom.compare_folders([SHIPPED])
    assert [one for one in found if one.outcome in (compare_dicom.WITHIN_1, compare_dicom.DIFFERENT)] == []
    assert sum(one.outcome == compare_dicom.EQUAL for one in found) >= 90
    refused = [one.detail for one in found if one.outcome == compare_dicom.WE_REFUSE]
    assert all("BitsAllocated" in reason or "FunctionalGroups" in reason for reason in refused)
