"""The same picture in two archives (or twice in one), found by the pixels alone.

A difference hash (Krawetz 2013) of 256 bits proposes, 32 x 32 thumbnails confirm. Among real chest films the
nearest different pictures are 19 bits apart, re-encoded, resized or windowed copies at most 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from cxrscale.schema import GreyImage

HASH_BITS = 256
MAX_DISTANCE = 10
"""Bits that two copies may differ by."""
MAX_SQUARED = 5.0
"""Mean squared difference that two copies' thumbnails may have, once their contrast is matched (grey levels^2)."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What a picture is recognised by."""

    dhash: bytes
    """32 bytes: for each of 16 x 16 cells, is it brighter than its right neighbour?"""
    thumbnail: bytes
    """1,024 bytes: 32 x 32 uint8, rows first."""


def fingerprint(grey_HW: GreyImage) -> Fingerprint:
    """The fingerprint of an upright grey picture."""
    # Two area averages: the second is integer-exact whatever size the first had to start from.
    cells = cv2.resize(grey_HW, (17, 16), interpolation=cv2.INTER_AREA).astype(np.int16)
    bits = cells[:, :-1] > cells[:, 1:]
    thumbnail = cv2.resize(grey_HW, (32, 32), interpolation=cv2.INTER_AREA)
    return Fingerprint(np.packbits(bits).tobytes(), thumbnail.tobytes())


def find(
    hashes_A: npt.NDArray[np.uint8],
    thumbs_A: npt.NDArray[np.uint8],
    hashes_B: npt.NDArray[np.uint8],
    thumbs_B: npt.NDArray[np.uint8],
) -> npt.NDArray[np.int64]:
    """All pairs (a, b) of rows that show the same picture, as (P, 2), ordered by a, then b.

    Args:
        hashes_A, hashes_B: (N, 32) uint8 difference hashes.
        thumbs_A, thumbs_B: (N, 1024) uint8 thumbnails.
    """
    pairs = [
        (a, b)
        for a in range(len(hashes_A))
        for b in _near(hashes_A[a], hashes_B)
        if _difference(thumbs_A[a], thumbs_B[b]) < MAX_SQUARED
    ]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def repeats(hashes: npt.NDArray[np.uint8], thumbs: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """All pairs (a, b), a < b, of one archive that show the same picture, as (P, 2)."""
    pairs = find(hashes, thumbs, hashes, thumbs)
    return pairs[pairs[:, 0] < pairs[:, 1]]


def _near(one: npt.NDArray[np.uint8], many: npt.NDArray[np.uint8]) -> list[int]:
    words = np.bitwise_xor(np.ascontiguousarray(many).view(np.uint64), one.view(np.uint64))
    distance = np.bitwise_count(words).sum(axis=1)
    return [int(row) for row in np.flatnonzero(distance <= MAX_DISTANCE)]


def _difference(one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> float:
    """Mean squared difference after matching brightness and contrast, which windowing changes, by least squares."""
    a, b = one.astype(np.float64), other.astype(np.float64)
    spread = b.var()
    if spread == 0 or a.var() == 0:
        return float(((a - b) ** 2).mean())
    gain = ((a - a.mean()) * (b - b.mean())).mean() / spread
    if not 0.5 < gain < 2:
        return float(((a - b) ** 2).mean())
    return float(((a - a.mean() - gain * (b - b.mean())) ** 2).mean())
