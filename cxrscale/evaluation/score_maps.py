"""Maps of probabilities: the steps of their thresholds, and their size."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

BINS = 256
"""Bins of the score histograms: thresholds on maps come in steps of 1/256."""


def enlarged(score_HW: npt.NDArray[np.float32], shape: tuple[int, int]) -> npt.NDArray[np.float32]:
    """A score map at another size (H, W): bilinear between pixel centers, as image viewers and PyTorch without
    `align_corners` do."""
    if score_HW.shape == shape:
        return score_HW
    resized: npt.NDArray[np.float32] = cv2.resize(score_HW, shape[::-1], interpolation=cv2.INTER_LINEAR)
    return resized
