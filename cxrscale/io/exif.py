"""The orientation in a file's EXIF metadata, and turning an image upright by it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from cxrscale.types import UnreadableImageError

_ORIENTATION = 0x0112


def orientation(exif: bytes, name: str) -> int:
    """The tag Orientation, 1 (upright) to 8; 1 if there is none.

    Args:
        exif: the metadata, from its TIFF header on.
        name: the file's format.

    Raises:
        UnreadableImageError: the metadata is damaged, so nobody knows which side is up.
    """
    try:
        tags = Image.Exif()
        tags.load(exif)
        found = tags.get(_ORIENTATION, 1)
    except Exception as error:  # damaged metadata can make the parser raise any error
        raise UnreadableImageError(f"{name}'s EXIF metadata is damaged ({type(error).__name__}): remove it") from error
    return int(found) if found in range(1, 9) else 1


def upright(image_HW: npt.NDArray[Any], orientation: int) -> npt.NDArray[Any]:
    """Rotate and mirror a stored image according to its EXIF orientation (Exif 2.3, 4.6.4 A)."""
    if orientation in (5, 6, 7, 8):
        image_HW = image_HW.T
    if orientation in (2, 3, 6, 7):
        image_HW = image_HW[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image_HW = image_HW[::-1]
    return np.ascontiguousarray(image_HW)
