"""Lines of text under an image, for overlays and for captures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

Color = npt.NDArray[np.uint8]
"""(H, W, 3) uint8."""
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_MARGIN = 0.02
"""Of the width, on either side."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of text."""

    text: str
    color: tuple[int, int, int]
    """In the channel order of the image."""
    bold: bool = False


def draw_strip(lines: Sequence[Line], width: int) -> Color:
    """Lines of text on black (h, width, 3), none of them cut off; OpenCV's font has ASCII alone."""
    texts = ["".join(char if " " <= char <= "~" else "?" for char in line.text) for line in lines]
    widest = max(cv2.getTextSize(text, _FONT, 1.0, 2)[0][0] for text in texts)
    scale = min(width / 1000, (1 - 2 * _MARGIN) * width / widest)
    step = max(8, round(34 * scale))
    strip_HW3 = np.zeros((step * len(lines) + step // 2, width, 3), np.uint8)
    for number, (text, line) in enumerate(zip(texts, lines, strict=True), start=1):
        weight = max(1, round((2.5 if line.bold else 1.5) * scale))
        origin = (round(_MARGIN * width), number * step)
        cv2.putText(strip_HW3, text, origin, _FONT, scale, line.color, weight, cv2.LINE_AA)
    return strip_HW3
