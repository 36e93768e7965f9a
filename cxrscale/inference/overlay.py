"""One drawing per image for whoever would rather look than read: mask outline, heat map, calls."""

from __future__ import annotations

import re
from collections.abc import Mapping

import cv2
import numpy as np
import numpy.typing as npt

from cxrscale.inference.objects import Draft, Drafter
from cxrscale.inference.prediction import Prediction, Provenance
from cxrscale.inference.stored_images import read_input
from cxrscale.inference.text_strip import Line, draw_strip
from cxrscale.io import Strictness, draw_heat, encode_color_png, load_image, rle_masks, storage
from cxrscale.types import GrayImage

KIND = "overlay"
SUFFIX = ".overlay.png"
SHOWN = 8
"""Findings whose probabilities stand below an image, the likeliest first."""
OUTLINE, PRESENT, ABSENT, PLAIN = (0, 215, 255), (110, 160, 255), (200, 200, 200), (235, 235, 235)
"""Colors, BGR."""
Color = npt.NDArray[np.uint8]


def overlay_drafter(provenance: Provenance, finding: str | None = None) -> Drafter:
    """What draws the overlay of an image; a prediction without `maps` gets no heat map.

    Args:
        finding: whose map is drawn, one overlay per finding; None: as `draw_overlay` chooses.
    """
    thresholds = provenance.threshold
    identity = (
        provenance.checkpoint,
        provenance.thresholds,
        provenance.gate.model_dump_json() if provenance.gate else "",
        *(() if finding is None else (finding,)),
    )

    suffix = SUFFIX if finding is None else f".{_plain(finding)}{SUFFIX}"

    def draft(prediction: Prediction) -> Draft:
        content = read_input(prediction.path)

        def encode() -> bytes:
            image_HW = load_image(content, name=prediction.path, strictness=Strictness.LENIENT).image_HW
            if prediction.image_id and prediction.height and prediction.width:
                # A dataset has the image smaller than the mask.
                image_HW = cv2.resize(image_HW, (prediction.width, prediction.height)).astype(np.uint8)
            return encode_color_png(draw_overlay(image_HW, prediction, thresholds, finding))

        return Draft(suffix, (*identity, storage.digest(content)), encode)

    return draft


def draw_overlay(
    image_HW: GrayImage, prediction: Prediction, thresholds: Mapping[str, float], finding: str | None = None
) -> Color:
    """The image in color (H + strip, W, 3), BGR, at its own size: heat map and mask outline over it, calls below it.

    The map says where the score comes from, not where the disease is.

    Args:
        thresholds: finding -> threshold.
        finding: whose map is drawn; None: that of the finding that lies highest above its threshold (without
            thresholds: of the likeliest).
    """
    finding = finding or _mapped_finding(prediction, thresholds)
    if finding is None:
        color_HW3: Color = np.asarray(cv2.cvtColor(image_HW, cv2.COLOR_GRAY2BGR), dtype=np.uint8)
    else:
        color_HW3 = draw_heat(image_HW, prediction.maps[finding])
    if prediction.mask_rle is not None:
        mask_HW = rle_masks.decode(prediction.mask_rle, image_HW.shape).astype(np.uint8)
        contours, _ = cv2.findContours(mask_HW, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(color_HW3, contours, -1, OUTLINE, max(1, round(max(image_HW.shape) / 400)))
    strip = draw_strip([Line(*one) for one in _lines(prediction, thresholds, finding)], color_HW3.shape[1])
    return np.concatenate([color_HW3, strip]).astype(np.uint8)


def _plain(finding: str) -> str:
    """A finding's name in the characters of file names."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", finding)


def _mapped_finding(prediction: Prediction, thresholds: Mapping[str, float]) -> str | None:
    def above(name: str) -> float:
        return prediction.probabilities[name] - thresholds.get(name, 0.5 if not thresholds else 1.0)

    return max(prediction.maps, key=above, default=None)


def _lines(
    prediction: Prediction, thresholds: Mapping[str, float], mapped: str | None
) -> list[tuple[str, tuple[int, int, int]]]:
    """What stands below the image, with its color."""
    lines: list[tuple[str, tuple[int, int, int]]] = []
    for name, value in prediction.gate.items():
        words = "passed on" if prediction.gate_call else "not passed on"
        lines.append((f"{name} {value:.3f} by the classifier: {words}", PRESENT if prediction.gate_call else ABSENT))
    # False before True: what is called present comes first.
    likeliest = sorted(
        prediction.probabilities, key=lambda name: (not prediction.calls.get(name), -prediction.probabilities[name])
    )
    for name in likeliest[:SHOWN]:
        called, heat = prediction.calls.get(name), "  [heat map]" if name == mapped else ""
        word = {None: "", True: "  present", False: "  absent"}[called]
        at = f" (threshold {thresholds[name]:.3f})" if name in thresholds else ""
        lines.append((f"{name} {prediction.probabilities[name]:.3f}{word}{at}{heat}", PRESENT if called else ABSENT))
    if prediction.mask_area is not None:
        size = f"{prediction.mask_area} pixels" if prediction.mask_area else "empty"
        if prediction.mask_area_mm2:
            size += f", {prediction.mask_area_mm2 / 100:.1f} cm2"
        lines.append((f"mask: {size}", OUTLINE if prediction.mask_area else ABSENT))
    return [*lines, ("Not a medical device.", PLAIN)]
