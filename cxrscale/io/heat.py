"""A map over an image, in color."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

OPACITY = 0.45
"""Of the color where a map is highest."""


def draw_heat(image_HW: npt.NDArray[np.uint8], map_hw: npt.ArrayLike) -> npt.NDArray[np.uint8]:
    """(H, W, 3) the gray image, BGR, under a map's positive part, which is scaled to its highest value and stretched
    over the image.

    A map without a positive part leaves the image as it is: nothing speaks for the finding.
    """
    values_hw = np.asarray(map_hw, np.float32)
    map_HW = cv2.resize(values_hw, image_HW.shape[::-1], interpolation=cv2.INTER_LINEAR)
    share_HW = positive_share(map_HW, float(np.nanmax(values_hw)))
    heat_HW3 = cv2.applyColorMap((share_HW * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)
    opacity_HW1 = OPACITY * share_HW[..., None]
    color_HW3 = cv2.cvtColor(image_HW, cv2.COLOR_GRAY2BGR)
    return np.asarray(color_HW3 * (1 - opacity_HW1) + heat_HW3 * opacity_HW1, dtype=np.uint8)


def positive_share(map_HW: npt.NDArray[np.float32], top: float) -> npt.NDArray[np.float32]:
    """A map's positive part as a share of its highest value, in 0..1; all 0 where that is not positive."""
    if not top > 0:
        return np.zeros_like(map_HW)
    return np.asarray(np.clip(np.nan_to_num(map_HW) / max(top, 1e-6), 0, 1))


def encode_color_png(color_HW3: npt.NDArray[np.uint8]) -> bytes:
    """A BGR image as PNG."""
    done, encoded = cv2.imencode(".png", color_HW3)
    assert done
    return encoded.tobytes()
