"""Thumbnails and the outlines of masks. Milliseconds."""

from __future__ import annotations

import base64
import re

import cv2
import numpy as np

from cxrscale.reporting.overlay import outline, thumbnail


def test_an_outline_goes_around_the_pixels() -> None:
    mask_HW = np.zeros((8, 8), dtype=bool)
    assert outline(mask_HW) == ""
    mask_HW[2:5, 3:6] = True
    path = outline(mask_HW)
    assert path.startswith("M")
    assert path.endswith("Z")
    assert {"3.5,2.5", "5.5,4.5"} <= set(path.strip("MZ").split())


def test_an_outline_is_on_its_masks_border() -> None:
    mask_HW = np.zeros((20, 30), dtype=bool)
    mask_HW[5:9, 10:20] = True
    numbers = [float(number) for number in re.findall(r"[\d.]+", outline(mask_HW))]
    assert set(numbers[::2]) == {10.5, 19.5}
    assert set(numbers[1::2]) == {5.5, 8.5}


def test_a_thumbnail_is_scaled_down_but_never_up() -> None:
    image_HW = np.full((40, 40), 90, np.uint8)
    for side, expected in ((16, (16, 16)), (64, (40, 40))):
        shown = thumbnail(image_HW, side)
        decoded = cv2.imdecode(np.frombuffer(base64.b64decode(shown.jpeg), np.uint8), cv2.IMREAD_GRAYSCALE)
        assert decoded is not None
        assert decoded.shape == expected
        assert shown.outlines == {}


def test_a_thumbnail_counts_outlines_on_the_masks_grid_and_leaves_empty_masks_out() -> None:
    mask_HW = np.zeros((20, 30), dtype=bool)
    filled_HW = mask_HW.copy()
    filled_HW[4:8, 4:8] = True
    shown = thumbnail(np.zeros((40, 40), np.uint8), 64, {"truth": mask_HW, "predicted": filled_HW})
    assert (shown.width, shown.height) == (30, 20)
    assert set(shown.outlines) == {"predicted"}
