"""Objects made of a header and a mask, without a model, and what the validator says of them."""

from __future__ import annotations

import io
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
import pytest

from cxrscale.inference import Prediction, Provenance, dicom_objects
from cxrscale.inference.objects import write_object
from cxrscale.io import load_image, rle_masks
from tests.conftest import tiny
from tests.dicom_files import dicom_file, gray_image
from tests.tiny import TINY_CLASSIFIER, TINY_SEGMENTER

CHECKPOINT, THRESHOLDS = "ab" * 32, "cd" * 32
PATIENT: dict[str, Any] = {
    "PatientName": "Canary^Name",
    "PatientID": "CANARY-ID",
    "PatientBirthDate": "19700102",
    "PatientSex": "F",
    "PatientAge": "061Y",
    "StudyInstanceUID": "1.2.3.5",
    "SeriesInstanceUID": "1.2.3.6",
    "StudyDate": "20200304",
    "StudyTime": "050607",
    "AccessionNumber": "CANARYACC",
    "StudyID": "CANARYSTUDY",
    "ReferringPhysicianName": "Canary^Referrer",
    "Modality": "CR",
    "PixelSpacing": [0.2, 0.3],
}
"""Tags of a source whose patient is known everywhere."""


def source_file(**tags: Any) -> bytes:
    """A source of 40 x 34 pixels; a keyword sets a tag, None removes it."""
    return dicom_file(gray_image(), **(PATIENT | tags))


def ellipse(height: int, width: int) -> npt.NDArray[np.bool_]:
    """A mask that is no mirror image of itself."""
    row, column = np.mgrid[:height, :width]
    mask: npt.NDArray[np.bool_] = ((row / height - 0.3) / 0.2) ** 2 + ((column / width - 0.7) / 0.15) ** 2 < 1
    return mask


def provenance(*, masks: bool = True) -> Provenance:
    """Of a segmenter or a classifier."""
    recipe = tiny("/data", Path("/runs"), base=TINY_SEGMENTER if masks else TINY_CLASSIFIER)
    return Provenance(
        run="/home/canary/runs/some run",
        checkpoint=CHECKPOINT,
        manifest="",
        thresholds=THRESHOLDS,
        threshold=dict.fromkeys(recipe.data.findings, 0.43),
        recipe=recipe,
    )


def predicted(path: Path, mask_HW: npt.NDArray[np.bool_] | None) -> Prediction:
    """What a segmenter that finds this mask says of a file; None: an empty one."""
    image = load_image(path.read_bytes(), name=path.name)
    height, width = image.image_HW.shape
    mask_HW = np.zeros((height, width), np.bool_) if mask_HW is None else mask_HW
    return Prediction(
        str(path),
        {"Pneumothorax": 0.8123456789},
        {"Pneumothorax": bool(mask_HW.any())},
        mask_rle=rle_masks.encode(mask_HW),
        mask_area=int(mask_HW.sum()),
        mask_area_mm2=12.5,
        height=height,
        width=width,
        spacing_mm=image.spacing_mm,
    )


def make(out: Path, kind: str, prediction: Prediction, about: Provenance | None = None) -> Path:
    """The object of a prediction."""
    about = about or provenance()
    done = write_object(str(out), kind, prediction, dicom_objects.drafter(kind, about))
    assert not done.object_errors
    return out / done.objects[kind]


def read(path: Path) -> Any:
    """The object as pydicom reads it."""
    return pydicom.dcmread(io.BytesIO(path.read_bytes()))


def validator() -> str:
    """The path of dciodvfy."""
    path = shutil.which("dciodvfy")
    if path is None:
        pytest.skip("no dciodvfy here; it is in Debian's dicom3tools")
    return path


def errors(path: Path) -> list[str]:
    """What is wrong with a file by the standard's tables."""
    done = subprocess.run([validator(), str(path)], capture_output=True, text=True, errors="replace")
    return [line for line in (done.stdout + done.stderr).splitlines() if line.startswith(("Error", "Abort"))]
