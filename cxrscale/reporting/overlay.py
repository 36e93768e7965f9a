"""Outlines of masks as SVG paths."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt


def outline(mask_HW: npt.NDArray[np.bool_]) -> str:
    """The mask's border as an SVG path in pixels of its grid; empty for an empty mask."""
    contours, _ = cv2.findContours(mask_HW.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_TC89_L1)
    # A pixel's center lies half a pixel from its corner, from which SVG counts.
    lines = (" ".join(f"{x + 0.5:g},{y + 0.5:g}" for (x, y) in contour[:, 0].tolist()) for contour in contours)
    return " ".join(f"M{line}Z" for line in lines)
