"""An image for viewers without segmentations: mask outline and calls in a secondary capture (PS3.3 A.8)."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from highdicom.sc import SCImage
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from cxrscale.inference.dicom_objects.origin import MANUFACTURER, Origin, plain
from cxrscale.inference.dicom_objects.source import OPTIONAL
from cxrscale.inference.prediction import Prediction
from cxrscale.io import rle_masks
from cxrscale.types import GrayImage

SERIES_NUMBER = 9803
Color = npt.NDArray[np.uint8]
"""(H, W, 3) uint8, RGB."""
_OUTLINE, _CALLED, _TEXT = (255, 190, 0), (255, 190, 0), (220, 220, 220)
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_SHORTEST = 640
"""Pixels that a line of text needs; a narrower image gets black beside it."""


def encode_capture(
    source: Dataset, origin: Origin, prediction: Prediction, image_HW: GrayImage, mask_HW: rle_masks.Mask | None
) -> Dataset:
    """The capture of an image: RGB, uncompressed, with the text below the image and not on it.

    Args:
        source: by `source.read_source`.
        image_HW: (H, W) uint8, upright.
        mask_HW: (H, W) bool; None where the model gives none.
    """
    uid = source.SOPInstanceUID
    pixels_HW3 = draw(image_HW, mask_HW, lines(origin, prediction))
    result = SCImage.from_ref_dataset(
        ref_dataset=source,
        pixel_array=pixels_HW3,
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        patient_orientation=source.PatientOrientation or ("L", "F"),
        series_instance_uid=origin.uid(uid, "sc", "series"),
        series_number=SERIES_NUMBER,
        sop_instance_uid=origin.uid(uid, "sc"),
        instance_number=1,
        manufacturer=MANUFACTURER,
        manufacturer_model_name=origin.algorithm,
        software_versions=origin.version,
        device_serial_number=origin.checkpoint,
        series_description="Findings, automatic, not for diagnosis",
        pixel_spacing=prediction.spacing_mm,
        transfer_syntax_uid=ExplicitVRLittleEndian,
    )
    _mend(result, source)
    return result


def _mend(result: Any, source: Dataset) -> None:
    """What highdicom leaves out, or cannot leave empty."""
    # It wants two directions; where the source has none, none are known (type 2C, PS3.3 C.7.6.1).
    result.PatientOrientation = source.PatientOrientation
    # An unpaired body part has no Laterality (type 2C, PS3.3 C.7.3.1); without either the validator misses one.
    result.BodyPartExamined = "CHEST"
    result.ConversionType = "WSD"
    result.DerivationDescription = "Outline of a mask and calls of a model, drawn on and below the image"
    reference = Dataset()
    reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = source.SOPClassUID, source.SOPInstanceUID
    result.SourceImageSequence = [reference]
    # Other objects get the optional ones from highdicom.
    for keyword in (*OPTIONAL, "LossyImageCompression"):
        if keyword in source:
            result[keyword] = source[keyword]


def lines(origin: Origin, prediction: Prediction) -> list[tuple[str, bool]]:
    """(text, whether it is a positive call), one line per finding and one of the model."""
    result = [(f"{origin.algorithm}  weights {origin.checkpoint[:12]}  not for diagnosis", False)]
    for name, value in prediction.probabilities.items():
        called, threshold = prediction.calls.get(name), origin.threshold.get(name)
        text = f"{plain(name).replace('_', ' ')}  {value:.3f}"
        if called is not None:
            text += f"  {'PRESENT' if called else 'absent'}"
            text += "" if threshold is None else f" (from {threshold:.3f})"
        result.append((text, bool(called)))
    return result


def draw(image_HW: GrayImage, mask_HW: rle_masks.Mask | None, text: list[tuple[str, bool]]) -> Color:
    """The image with the mask's outline, and lines of text in a strip below."""
    height, width = image_HW.shape
    canvas = np.repeat(image_HW[..., None], 3, axis=2)
    if mask_HW is not None:
        contours, _ = cv2.findContours(mask_HW.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(canvas, contours, -1, _OUTLINE, max(1, max(height, width) // 512))
    total = max(width, _SHORTEST)
    scale = total / 1400
    step = round(44 * scale)
    strip = np.zeros((step * len(text) + step // 2, total, 3), np.uint8)
    for row, (line, called) in enumerate(text, start=1):
        color, weight = (_CALLED, 2) if called else (_TEXT, 1)
        cv2.putText(strip, line, (step // 2, step * row), _FONT, scale, color, weight, cv2.LINE_AA)
    image = np.zeros((height, total, 3), np.uint8)
    image[:, :width] = canvas
    return np.concatenate([image, strip])
