"""Gray levels of deep images: how many bits their values really use, and looking values up in a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt

from cxrscale.types import GrayImage

_BLOCK = 1 << 18
"""Values that are looked up at once: NumPy makes an 8-byte index of each."""


@dataclass(frozen=True, slots=True, eq=False)
class StoredImage:
    """An image of more than 8 bits, upright, with the window of its file: what a viewer needs to choose another one.

    A pixel's value is `slope * level + intercept`, in the units of the window. `function` says how the window makes a
    gray value in 0..1 of it (PS3.3 C.11.2.1.2 and C.11.2.1.3); where `inverted`, that is then taken from 1.
    """

    level_HW: npt.NDArray[np.uint16]
    slope: float
    intercept: float
    center: float
    width: float
    function: Literal["LINEAR", "LINEAR_EXACT", "SIGMOID"]
    inverted: bool
    """Whether the smallest value is white."""


def used_bits(low: int, high: int) -> int:
    """The fewest bits, at least 8, that hold the values `low` to `high`; signed ones if `low` is negative.

    Writers that do not know the number of bits declare 16: with 16 declared bits, the range of these bits is that of
    the image. Its own minimum and maximum would be a bad range: on ChestX-ray14 they would move the gray values by 4
    levels on average and by up to 59.
    """
    if low < 0:
        return max(8, high.bit_length() + 1, (-low - 1).bit_length() + 1)
    return max(8, high.bit_length())


def look_up(gray_C: GrayImage, code_HW: npt.NDArray[Any]) -> GrayImage:
    """The gray value of each code.

    Args:
        gray_C: (C,) uint8, C = 256 or 65,536.
        code_HW: (H, W) or any other shape, uint8 where C is 256, else uint16.

    Returns:
        uint8 of the shape of the codes.
    """
    if len(gray_C) == 256 and code_HW.ndim == 2:
        table_HW: GrayImage = cv2.LUT(np.ascontiguousarray(code_HW), gray_C)
        return table_HW
    code_P = np.ascontiguousarray(code_HW).reshape(-1)
    gray_P = np.empty(code_P.size, dtype=np.uint8)
    for start in range(0, code_P.size, _BLOCK):
        # No code is outside the table; mode="clip" only avoids the slow bounds check.
        np.take(gray_C, code_P[start : start + _BLOCK], mode="clip", out=gray_P[start : start + _BLOCK])
    return gray_P.reshape(code_HW.shape)
