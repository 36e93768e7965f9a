"""Run-length encodings in SIIM-ACR's format (`train-rle.csv`) <-> boolean masks.

An encoding is `start length start length ...` in decimal, separated by spaces. Pixels are counted down the columns
(column-major). Each start is relative to the end of the previous run, the first one to pixel 0. `-1` alone is the empty
mask. An image can have several encodings, one per row of the table; its mask is their union.
"""

from __future__ import annotations

from collections.abc import Iterable

import cv2
import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]
"""(H, W) bool, upright, C-contiguous: True inside the finding."""

EMPTY = "-1"
"""The encoding of an empty mask."""


def decode(rle: str, shape: tuple[int, int]) -> Mask:
    """Decode one encoding.

    Args:
        rle: the cell of the table; blanks around it are ignored (SIIM's cells start with one).
        shape: (H, W) of the image in pixels; always 1024 x 1024 in SIIM.

    Returns:
        (H, W) bool.

    Raises:
        ValueError: the string is empty, holds anything but non-negative integers, has an odd number of them, or has a
            run that ends outside the image.
    """
    height, width = _checked(shape)
    mask = np.zeros((height, width), dtype=np.bool_)
    bounds = _bounds(rle, height * width)
    if bounds is None:
        return mask
    # Fill and transpose only the columns that have runs: most findings span a third of the image.
    first, last = int(bounds[0]) // height, -(-int(bounds[-1]) // height)
    offset, span = first * height, (last - first) * height
    gaps_and_runs = np.diff(bounds, prepend=offset, append=offset + span)
    value = np.zeros(len(gaps_and_runs), dtype=np.uint8)
    value[1::2] = 1
    columns = np.repeat(value, gaps_and_runs).reshape(last - first, height)
    mask[:, first:last] = cv2.transpose(columns)
    return mask


def encode(mask: Mask) -> str:
    """Encode a mask. The result is unique: the longest possible runs, single spaces, no blanks around.

    Args:
        mask: (H, W) bool.

    Returns:
        `start length ...`, or `-1` for an empty mask; `decode` with the same shape returns the same mask.

    Raises:
        ValueError: the mask is not bool or not (H, W).
    """
    if mask.dtype != np.bool_ or mask.ndim != 2:
        raise ValueError(f"mask is {mask.dtype} of shape {mask.shape}, not bool (H, W): threshold it first")
    height = mask.shape[0]
    touched = np.flatnonzero(mask.any(axis=0))
    if len(touched) == 0:
        return EMPTY
    first, last = int(touched[0]), int(touched[-1]) + 1
    # Transpose only the columns with pixels, with OpenCV: np.ascontiguousarray(mask.T) takes four times as long.
    columns = cv2.transpose(np.ascontiguousarray(mask[:, first:last]).view(np.uint8))
    padded = np.zeros(columns.size + 2, dtype=np.uint8)
    padded[1:-1] = columns.reshape(-1)
    bounds = np.flatnonzero(padded[1:] != padded[:-1]) + first * height
    return " ".join(map(str, np.diff(bounds, prepend=0).tolist()))


def union(rles: Iterable[str], shape: tuple[int, int]) -> Mask:
    """Decode all encodings of an image into one mask, as SIIM defines several rows; no encoding is an empty mask.

    Args:
        rles: encodings as for `decode`; they may overlap, and `-1` adds nothing.
        shape: (H, W) of the image in pixels.

    Returns:
        (H, W) bool: True inside any of the encodings.

    Raises:
        ValueError: as `decode`.
    """
    mask: Mask | None = None
    for rle in rles:
        part = decode(rle, shape)
        mask = part if mask is None else np.logical_or(mask, part, out=mask)
    return np.zeros(_checked(shape), dtype=np.bool_) if mask is None else mask


def _checked(shape: tuple[int, int]) -> tuple[int, int]:
    height, width = shape
    if height < 1 or width < 1:
        raise ValueError(f"shape is {height} x {width}: give the (H, W) of the image, both at least 1")
    return height, width


def _bounds(rle: str, pixels: int) -> npt.NDArray[np.int64] | None:
    """Column-major pixel indices of run starts (even entries) and run ends (odd entries); None for an empty mask."""
    words = rle.split()
    if words == [EMPTY]:
        return None
    if not words:
        raise ValueError(f"rle is blank: an empty mask is written as {EMPTY!r}")
    # int() alone would accept '+5', '1_000' and digits of other scripts.
    if not all(word.isascii() and word.isdigit() for word in words):
        wrong = next(word for word in words if not (word.isascii() and word.isdigit()))
        raise ValueError(f"rle holds {wrong[:20]!r}: only non-negative integers are allowed, or {EMPTY!r} alone")
    if len(words) % 2:
        raise ValueError(f"rle holds {len(words)} numbers: starts and lengths come in pairs, so it may be truncated")
    numbers = [int(word) for word in words]
    end = sum(numbers)
    if end > pixels:
        raise ValueError(
            f"rle's runs end at pixel {end} of {pixels}: check the shape, and that each start is relative to the end "
            "of the previous run"
        )
    bounds: npt.NDArray[np.int64] = np.cumsum(np.asarray(numbers, dtype=np.int64))
    return None if end == 0 or not any(numbers[1::2]) else bounds
