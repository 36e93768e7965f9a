"""One image's result as a file: an overlay, or a DICOM object in the study of the image."""

from __future__ import annotations

import asyncio

from cxrscale.inference import dicom_objects
from cxrscale.inference.overlay import draw_overlay
from cxrscale.inference.serve.problems import ProblemError
from cxrscale.inference.serve.served_model import ServedModel
from cxrscale.inference.serve.service import Answer
from cxrscale.io import encode_color_png
from cxrscale.types import UserError

OVERLAY = "overlay"
DICOM, PNG = "application/dicom", "image/png"


async def result_file(model: ServedModel, answer: Answer, kind: str) -> tuple[str, bytes]:
    """(media type, content) of a result.

    Args:
        kind: `OVERLAY`, or one of `dicom_objects.KINDS`.

    Raises:
        ProblemError: the model makes no such result.
        UnreadableImageError: the file names no patient and no study.
    """
    return await asyncio.to_thread(_result, model, answer, kind)


def _result(model: ServedModel, answer: Answer, kind: str) -> tuple[str, bytes]:
    about = model.predictor.provenance
    if kind == OVERLAY:
        assert answer.image is not None
        return PNG, encode_color_png(draw_overlay(answer.image.image_HW, answer.prediction, about.threshold))
    try:
        dicom_objects.check_kind(kind, about)
    except UserError:
        raise ProblemError(
            422, f"the model {model.info.name} makes no {kind}: {dicom_objects.SEG} is one of masks"
        ) from None
    return DICOM, dicom_objects.encode_object(kind, about, answer.prediction, answer.upload.data)
