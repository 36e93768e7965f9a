"""Predictions as JSON for clients: what `predict` writes into its file, under the name that the client gave."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cxrscale.inference.journal import row
from cxrscale.inference.serve.served_model import ServedModel
from cxrscale.inference.serve.service import Answer
from cxrscale.io import encode_jpeg, encode_png, positive_share, resize_image, rle_masks

THUMBNAIL = 96
"""Side of a thumbnail in pixels."""


def predictions_json(model: ServedModel, answers: Sequence[Answer], *, drawn: bool) -> dict[str, Any]:
    """The answer to a request.

    Args:
        drawn: also each image's maps, mask and thumbnail, as a page draws them.
    """
    info = model.info
    about = {"name": info.name, "checkpoint": info.checkpoint, "thresholds": info.thresholds, "gate": info.gate}
    return {"model": about, "predictions": [_one(answer, drawn) for answer in answers]}


def _one(answer: Answer, drawn: bool) -> dict[str, Any]:
    prediction = answer.prediction
    known = row(prediction)
    known.pop("path", None)
    known["name"] = prediction.path
    if drawn and not prediction.error:
        known["maps"] = {name: _map(map_hw) for name, map_hw in prediction.maps.items()}
        if prediction.mask_rle is not None and prediction.height is not None and prediction.width is not None:
            mask_HW = rle_masks.decode(prediction.mask_rle, (prediction.height, prediction.width))
            known["mask_png"] = base64.b64encode(encode_png(mask_HW.astype(np.uint8) * 255)).decode()
        if answer.image is not None:
            # Square like what the models see; whoever shows it knows height and width.
            small_HW = resize_image(answer.image.image_HW, THUMBNAIL)
            known["thumbnail_jpeg"] = base64.b64encode(encode_jpeg(small_HW, 80)).decode()
    return known


def _map(map_hw: npt.NDArray[np.float32]) -> str:
    """The positive part of a map, 255 at its highest value, as a small PNG in base64."""
    share_hw = positive_share(map_hw, float(np.nanmax(map_hw)))
    return base64.b64encode(encode_png((share_hw * 255).astype(np.uint8))).decode()
