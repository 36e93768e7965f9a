"""The random parameters of every image's augmentation, as hashes of (seed, position in the stream, image, purpose).

The backends hold no random state: they get these parameters as data. So the same image at the same position of the
stream is augmented alike by every backend, on every device and rank, and after any resume.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from cxrscale.config import Augment
from cxrscale.loader.hashing import AUGMENT, NOISE, Hashes, Rows, hash64, uniform

Floats = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]

(APPLY, FLIP, ANGLE, SHIFT_X, SHIFT_Y, ZOOM, AREA, CROP_X, CROP_Y, BRIGHTNESS, CONTRAST, BLUR, CLAHE, OFFSET) = range(
    14
)

HALF = 0.498
"""Threshold for interpolated values, a little off one half. Plain resizing by simple ratios meets the half
exactly and often, and there two libraries (or DALI's CPU and GPU, which round halves differently) would decide
differently. A mask is 1 where it is above 255 * HALF; a level becomes an integer for CLAHE as floor(level + HALF)."""

NOISE_STARTS = 1 << 20
"""Positions in the noise bank at which an image's noise may begin."""


@dataclass(frozen=True, slots=True)
class AugmentParams:
    """How each of B images is changed between decoding and the model."""

    matrix_B23: Floats
    """Takes OUTPUT to SOURCE coordinates, (x, y, 1) -> (x, y) in pixels. (0, 0) is the outer corner of the upper left
    pixel, whose center is therefore (0.5, 0.5). DALI's `warp_affine` takes it as it is; OpenCV, which puts (0, 0) into
    that pixel's center, takes `to_pixel_centers(matrix)`. The identity leaves an image of the output's size untouched.
    Resizing, crop, rotation, zoom, shift and flip are all in it."""
    brightness_B: Floats
    """Added to the gray level, as a share of the full range."""
    contrast_B: Floats
    """Factor about mid-gray (127.5)."""
    blur_B: Flags
    """Whether the image is blurred."""
    clahe_B: Flags
    """Whether its contrast is equalized."""
    noise_on_B: Flags
    """Whether noise is added."""
    noise_offset_B: Rows
    """Position in `noise_bank` at which its noise begins, in 0..NOISE_STARTS - 1."""


def sample_params(
    augment: Augment,
    seed: int,
    key_B: Rows,
    stream_pos_B: Rows,
    size_B: tuple[Rows, Rows],
    training: bool,
) -> AugmentParams:
    """The parameters of B images; without training only the resize, and CLAHE where the recipe always wants it.

    Args:
        augment: what may happen; `augment.size` is the output's side.
        seed: sampler.seed.
        key_B: the manifest's numbers of the images.
        stream_pos_B: positions in the training stream: an image that comes again is augmented anew.
        size_B: (height_B, width_B) of the stored images in pixels.
        training: whether to augment.
    """
    count = len(key_B)
    height_B, width_B = size_B
    chance = uniform(hash64(seed, AUGMENT, stream_pos_B, key_B, np.arange(14)[:, None]))
    on_B = (chance[APPLY] < augment.probability) & training
    matrix_B33 = _resize(augment.size, height_B, width_B)
    if on_B.any():
        matrix_B33 = np.where(on_B[:, None, None], _augmented(augment, chance, height_B, width_B), matrix_B33)
    always = augment.clahe == "always"
    return AugmentParams(
        matrix_B33[:, :2].astype(np.float32),
        np.where(on_B, _between(chance[BRIGHTNESS], augment.brightness), 0).astype(np.float32),
        np.where(on_B, 1 + _between(chance[CONTRAST], augment.contrast), 1).astype(np.float32),
        on_B & (chance[BLUR] < augment.blur),
        np.full(count, always) | (on_B & (chance[CLAHE] < 0.5) & (augment.clahe == "random")),
        on_B & (augment.noise > 0),
        (chance[OFFSET] * NOISE_STARTS).astype(np.int64),
    )


def to_pixel_centers(matrix_B23: Floats) -> npt.NDArray[np.float64]:
    """The same maps in coordinates whose (0, 0) is the center of the upper left pixel, as OpenCV counts."""
    moved = matrix_B23.astype(np.float64)
    moved[:, :, 2] += 0.5 * moved[:, :, :2].sum(axis=2) - 0.5
    return moved


def fits_inside(matrix_B23: Floats, size: int, height_B: Rows, width_B: Rows) -> Flags:
    """(B,) whether every sample of a (size, size) output lies between centers of the source's pixels.

    A bilinear sample then needs no pixel outside the border. Up to a thousandth of a pixel outside counts as inside:
    the matrix is float32.
    """
    end = size - 0.5
    corner_3C = np.array([[0.5, end, 0.5, end], [0.5, 0.5, end, end], [1, 1, 1, 1]])
    point_B2C = matrix_B23.astype(np.float64) @ corner_3C
    last_B2 = np.stack([width_B, height_B], 1) - 0.5
    return np.asarray(((point_B2C > 0.499) & (point_B2C < last_B2[:, :, None] + 0.001)).all(axis=(1, 2)), np.bool_)


def blur_window(sigma: float) -> int:
    """The width in pixels of a Gaussian blur's window, which reaches to three standard deviations."""
    return 2 * math.ceil(3 * sigma) + 1


@lru_cache(maxsize=2)
def noise_bank(size: int) -> Floats:
    """(NOISE_STARTS + size * size,) standard normal numbers; an image's noise is size * size consecutive ones.

    A bank, because sampling 50,000 normal numbers per image costs more than decoding it; the same for every seed, since
    the position at which an image begins is random. Box and Muller's transform (1958) of hashes, so that it depends on
    no library's generator.
    """
    half = -(-(NOISE_STARTS + size * size) // 2)
    word: Hashes = hash64(NOISE, np.arange(2 * half))
    radius = np.sqrt(-2 * np.log1p(-uniform(word[:half])))
    angle = 2 * np.pi * uniform(word[half:])
    bank = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)]).astype(np.float32)
    bank.flags.writeable = False
    return bank[: NOISE_STARTS + size * size]


def _between(chance_B: npt.NDArray[np.float64], bound: float) -> npt.NDArray[np.float64]:
    return (2 * chance_B - 1) * bound


def _resize(size: int, height_B: Rows, width_B: Rows) -> npt.NDArray[np.float64]:
    """(B, 3, 3) maps of the output's square onto the full source."""
    matrix = np.zeros((len(height_B), 3, 3))
    matrix[:, 0, 0], matrix[:, 1, 1], matrix[:, 2, 2] = width_B / size, height_B / size, 1
    return matrix


def _augmented(
    augment: Augment, chance: npt.NDArray[np.float64], height_B: Rows, width_B: Rows
) -> npt.NDArray[np.float64]:
    """(B, 3, 3) maps of output to source pixels.

    The image is cropped to a square share of itself, flipped, rotated and zoomed about its center, and shifted, in this
    order. The map undoes these one by one, from the output backwards, in units of the image's side with the center at
    (0, 0).
    """
    angle = np.deg2rad(_between(chance[ANGLE], augment.rotation))
    low, high = augment.scale
    # Zooms are uniform in the logarithm: 0.8 and 1.25 are equally far from 1.
    zoom = np.exp(np.log(low) + chance[ZOOM] * (np.log(high) - np.log(low)))
    smallest, largest = augment.crop_area
    side = np.sqrt(smallest + chance[AREA] * (largest - smallest))
    sign = np.where(chance[FLIP] < augment.hflip, -1.0, 1.0)
    cos, sin = np.cos(angle) / zoom * side, np.sin(angle) / zoom * side
    linear = np.stack([np.stack([sign * cos, sign * sin], 1), np.stack([-sin, cos], 1)], 1)
    shift = np.stack(
        [_between(chance[SHIFT_X], augment.translation), _between(chance[SHIFT_Y], augment.translation)], 1
    )
    center = (np.stack([chance[CROP_X], chance[CROP_Y]], 1) - 0.5) * (1 - side)[:, None]
    source = np.stack([width_B, height_B], 1).astype(np.float64)
    # source = (linear @ (output / size - 0.5 - shift) + center + 0.5) * source side
    matrix = np.zeros((len(angle), 3, 3))
    matrix[:, :2, :2] = linear / augment.size * source[:, :, None]
    matrix[:, :2, 2] = (center + 0.5 - np.einsum("bij,bj->bi", linear, shift + 0.5)) * source
    matrix[:, 2, 2] = 1
    return matrix
