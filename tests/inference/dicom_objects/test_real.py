"""Objects of all real DICOM files beside the checkout: none has an error, each holds our mask."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cxrscale.inference.dicom_objects import KINDS, SEG
from tests.inference.dicom_objects.made import ellipse, errors, make, predicted, read

COUNTS = {"siim/dicom-images-train": 37, "siim_more": 14, "rsna": 183, "siim/original": 2}
"""Folder of real files -> DICOM files in it."""
SAMPLE = 3
"""Of each folder in the fast test."""


def files(real: Path, folder: str) -> list[Path]:
    """The DICOM files of a folder, checked for their number."""
    found = sorted((real / folder).rglob("*.dcm"))
    assert len(found) == COUNTS[folder]
    return found


@pytest.mark.parametrize("folder", COUNTS)
def test_objects_of_some_real_files_are_valid(real: Path, folder: str, tmp_path: Path) -> None:
    check(files(real, folder)[:SAMPLE], tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("folder", COUNTS)
def test_objects_of_all_real_files_are_valid(real: Path, folder: str, tmp_path: Path) -> None:
    check(files(real, folder), tmp_path)


def check(paths: list[Path], out: Path) -> None:
    for path in paths:
        source = read(path)
        mask_HW = ellipse(source.Rows, source.Columns)
        prediction = predicted(path, mask_HW)
        for kind in KINDS:
            object_path = make(out, kind, prediction)
            assert errors(object_path) == [], (path.name, kind)
            made = read(object_path)
            assert (made.PatientID, made.StudyInstanceUID) == (source.PatientID, source.StudyInstanceUID)
            if kind == SEG:
                assert np.array_equal(made.pixel_array.reshape(mask_HW.shape).astype(np.bool_), mask_HW)
            object_path.unlink()
