"""Images for the pages: a small JPEG as base64, with the outlines of masks over it as SVG paths."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import cv2
import numpy as np
import numpy.typing as npt

from cxrscale.io import draw_heat, encode_jpeg, resize_image

QUALITY = 85
"""JPEG quality of a thumbnail."""


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """One image on a page; the macro `image` of macros.html.jinja draws it."""

    jpeg: str = ""
    """Base64; empty where the image cannot be read."""
    width: int = 1
    """Of the grid that the outlines are counted in."""
    height: int = 1
    heat: str = ""
    """A JPEG as base64: the same image under a map, which hides under the pointer; empty without one."""
    outlines: Mapping[str, str] = field(default_factory=dict)
    """CSS class (mask, truth, predicted) -> SVG path; masks without pixels are left out."""


def thumbnail(
    image_HW: npt.NDArray[np.uint8], side: int, masks: Mapping[str, npt.NDArray[np.bool_]] | None = None
) -> Thumbnail:
    """A gray image for a page, scaled down to (side, side) if it is larger.

    Args:
        side: height and width in pixels.
        masks: CSS class -> mask over the image, all on one grid. The grid may differ from the image's: both are
            stretched over the same square.
    """
    small_HW = resize_image(image_HW, side) if max(image_HW.shape) > side else image_HW
    paths = {name: outline(mask_HW) for name, mask_HW in (masks or {}).items()}
    height, width = next((mask_HW.shape for mask_HW in (masks or {}).values()), image_HW.shape)
    return Thumbnail(
        base64.b64encode(encode_jpeg(small_HW, QUALITY)).decode(),
        width,
        height,
        outlines={name: path for name, path in paths.items() if path},
    )


def with_heat(shown: Thumbnail, image_HW: npt.NDArray[np.uint8], side: int, map_hw: npt.ArrayLike) -> Thumbnail:
    """A thumbnail of the image with a map over it.

    Args:
        side: as for `thumbnail`.
    """
    small_HW = resize_image(image_HW, side) if max(image_HW.shape) > side else image_HW
    done, jpeg = cv2.imencode(".jpg", draw_heat(small_HW, map_hw), [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    assert done
    return replace(shown, heat=base64.b64encode(jpeg.tobytes()).decode())


def box_path(box_D4: npt.NDArray[np.float64], side: int) -> str:
    """Boxes (left, top, right, bottom), shares of the image, as an SVG path on a grid of (side, side)."""
    corners = (box_D4 * side).round(1).tolist()
    return " ".join(f"M{left:g},{top:g}H{right:g}V{bottom:g}H{left:g}Z" for left, top, right, bottom in corners)


def outline(mask_HW: npt.NDArray[np.bool_]) -> str:
    """The mask's border as an SVG path in pixels of its grid; empty for an empty mask."""
    contours, _ = cv2.findContours(mask_HW.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_TC89_L1)
    # SVG counts from a pixel's corner, half a pixel from its center.
    lines = (" ".join(f"{x + 0.5:g},{y + 0.5:g}" for (x, y) in contour[:, 0].tolist()) for contour in contours)
    return " ".join(f"M{line}Z" for line in lines)
