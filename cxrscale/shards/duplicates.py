"""The same image in two archives (or twice in one), found by the pixels alone.

Thumbnails propose and confirm, a difference hash (Krawetz 2013) of 256 bits may object. Copies differ in size, in
JPEG's noise and in their tone curve: brightness, contrast, gamma, a window that clips both ends. Two thumbnails are
held to show one image where one is nearly a function of the other, gray level by gray level. Of 18 million pairs of
different real chest images none comes nearer than 0.039 on that scale; 37 images that were resized, re-encoded at quality
75, or windowed to 60..200 stay below 0.01.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from cxrscale.types import GrayImage

HASH_BITS = 256
MAX_DISTANCE = 64
"""Bits that two copies may differ by: where a window clips, neighbors become equal and their bits fall."""
MIN_CORRELATION = 0.96
"""Correlation of two copies' 16 x 16 cells at least."""
MAX_UNLIKENESS = 0.015
"""Share of a copy's variance that the other's gray level may leave unexplained."""
SLOWEST = 7
"""Half-waves across and down, together, of the waves that sift the pairs before all 256 cells are compared."""
BLOCK = 1024
"""Images of either side that are compared at a time: what 4 MB hold stays in a processor's cache."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What an image is recognized by."""

    dhash: bytes
    """32 bytes: for each of 16 x 16 cells, is it brighter than its right neighbor?"""
    thumbnail: bytes
    """1,024 bytes: 32 x 32 uint8, rows first."""


def fingerprint(image_HW: GrayImage) -> Fingerprint:
    """The fingerprint of an upright gray image."""
    # Halving is the one area average that OpenCV vectorizes: 0.15 ms in all at 1024 pixels, 3.9 ms without it.
    small_HW = image_HW
    while min(small_HW.shape) >= 256:
        height, width = small_HW.shape
        small_HW = cv2.resize(small_HW, (width // 2, height // 2), interpolation=cv2.INTER_AREA)
    cells = cv2.resize(small_HW, (17, 16), interpolation=cv2.INTER_AREA).astype(np.int16)
    bits = cells[:, :-1] > cells[:, 1:]
    thumbnail = cv2.resize(small_HW, (32, 32), interpolation=cv2.INTER_AREA)
    return Fingerprint(np.packbits(bits).tobytes(), thumbnail.tobytes())


def find_between(
    hashes_A: npt.NDArray[np.uint8],
    thumbs_A: npt.NDArray[np.uint8],
    hashes_B: npt.NDArray[np.uint8],
    thumbs_B: npt.NDArray[np.uint8],
) -> npt.NDArray[np.int64]:
    """All pairs (a, b) of rows that show the same image, as (P, 2), ordered by a, then b.

    Args:
        hashes_A, hashes_B: (N, 32) uint8 difference hashes.
        thumbs_A, thumbs_B: (N, 1024) uint8 thumbnails.
    """
    pairs = _proposed(thumbs_A, thumbs_B, itself=False)
    return _confirmed(pairs, hashes_A, thumbs_A, hashes_B, thumbs_B)


def find_within(hashes: npt.NDArray[np.uint8], thumbs: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """All pairs (a, b), a < b, of one archive that show the same image, as (P, 2)."""
    return _confirmed(_proposed(thumbs, thumbs, itself=True), hashes, thumbs, hashes, thumbs)


def merge_patients(patients: Sequence[str], pairs: Iterable[Sequence[int]]) -> list[str]:
    """Patients under one name where a duplicate joins them: whoever an image shows, its copy shows too.

    Joins are followed to their end: where a and b share an image, and b and c do, all three are one.

    Args:
        patients: (N,) patient of each image.
        pairs: (P, 2) rows of images that are the same, as `repeats` finds them. Those of `find` serve where both
            archives' patients stand in one list, the second archive's rows counted on from the first one's end.

    Returns:
        (N,) patients: of those that are one, the name that sorts first, whatever the order of rows and pairs.

    Raises:
        IndexError: a pair names a row that is not there.
    """
    parent = {name: name for name in patients}

    def first(name: str) -> str:
        while parent[name] != name:
            # Halving the way keeps long chains of joins from being walked again and again.
            parent[name] = name = parent[parent[name]]
        return name

    for a, b in pairs:
        if min(a, b) < 0:
            raise IndexError(f"pair ({a}, {b}): rows are counted from 0")
        one, other = sorted((first(patients[a]), first(patients[b])))
        parent[other] = one
    return [first(name) for name in patients]


def _proposed(
    thumbs_A: npt.NDArray[np.uint8], thumbs_B: npt.NDArray[np.uint8], *, itself: bool
) -> npt.NDArray[np.int64]:
    """All pairs whose cells correlate by at least `MIN_CORRELATION`, (P, 2), ordered; with `itself` only a < b.

    Every pair is looked at, first by its slowest waves: with the length of what they leave out as one number more,
    their product is never below the correlation (Cauchy-Schwarz), so nothing is missed.
    """
    cells_A, cells_B = _cells(thumbs_A), _cells(thumbs_B)
    waves = _waves()
    short_A, short_B = _shortened(cells_A, waves), _shortened(cells_B, waves)
    found = [np.empty((0, 2), dtype=np.int64)]
    for from_A in range(0, len(cells_A), BLOCK):
        for from_B in range(from_A if itself else 0, len(cells_B), BLOCK):
            part_B = short_B[from_B : from_B + BLOCK]
            # Rounding must not dismiss what lies on the bound.
            near = np.flatnonzero(short_A[from_A : from_A + BLOCK] @ part_B.T >= MIN_CORRELATION - 1e-4)
            for some in np.array_split(near, 1 + len(near) // 65536):
                a, b = from_A + some // len(part_B), from_B + some % len(part_B)
                alike = np.einsum("pc,pc->p", cells_A[a], cells_B[b]) >= MIN_CORRELATION
                found.append(np.stack([a[alike], b[alike]], axis=1))
    pairs = np.concatenate(found)
    pairs = pairs[pairs[:, 0] < pairs[:, 1]] if itself else pairs
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def _waves() -> npt.NDArray[np.float32]:
    """(256, W) the slowest waves of the cosine transform of 16 x 16 cells, orthonormal; the constant is left out."""
    wave = np.cos(np.pi / 16 * np.outer(np.arange(16) + 0.5, np.arange(16))) * np.sqrt(2 / 16)
    wave[:, 0] /= np.sqrt(2)
    speeds = [(u, v) for u in range(16) for v in range(16) if 0 < u + v <= SLOWEST]
    return np.stack([np.outer(wave[:, u], wave[:, v]).ravel() for u, v in speeds], axis=1).astype(np.float32)


def _shortened(cells: npt.NDArray[np.float32], axes: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """(N, W + 1): the cells along W orthonormal axes, and the length of the rest."""
    along = cells @ axes
    rest = (cells**2).sum(axis=1) - (along**2).sum(axis=1)
    return np.concatenate([along, np.sqrt(np.maximum(rest, 0))[:, None]], axis=1)


def _cells(thumbs: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """(N, 256) means of 2 x 2 pixels, centerd and of length 1: products are correlations. A blank image's are 0."""
    cells = thumbs.reshape(-1, 16, 2, 16, 2).mean(axis=(2, 4), dtype=np.float32).reshape(-1, 256)
    cells -= cells.mean(axis=1, keepdims=True)
    length = np.linalg.norm(cells, axis=1, keepdims=True)
    unit: npt.NDArray[np.float32] = np.divide(cells, length, out=np.zeros_like(cells), where=length > 0)
    return unit


def _confirmed(
    pairs: npt.NDArray[np.int64],
    hashes_A: npt.NDArray[np.uint8],
    thumbs_A: npt.NDArray[np.uint8],
    hashes_B: npt.NDArray[np.uint8],
    thumbs_B: npt.NDArray[np.uint8],
) -> npt.NDArray[np.int64]:
    """Those of the (P, 2) proposed pairs whose hashes are near and whose thumbnails are alike but for their tones."""
    kept = [pairs[:0]]
    for start in range(0, len(pairs), 512):
        part = pairs[start : start + 512]
        distance = np.bitwise_count(hashes_A[part[:, 0]] ^ hashes_B[part[:, 1]]).sum(axis=1)
        part = part[distance <= MAX_DISTANCE]
        one, other = thumbs_A[part[:, 0]], thumbs_B[part[:, 1]]
        # A window that clips can be told from the whole image, but not the other way round.
        unlike = np.minimum(_unexplained(one, other), _unexplained(other, one))
        kept.append(part[unlike <= MAX_UNLIKENESS])
    return np.concatenate(kept)


def _unexplained(by: npt.NDArray[np.uint8], what: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """For P pairs of thumbnails (P, 1024), the share of one's variance that is left among pixels of like gray level in
    the other: 64 groups of 16 pixels, by rank, so that no tone curve matters."""
    order = np.argsort(by, axis=1, kind="stable")
    groups = np.take_along_axis(what, order, axis=1).reshape(len(what), 64, 16).astype(np.float64)
    variance = what.var(axis=1)
    left = groups.var(axis=2).mean(axis=1)
    share: npt.NDArray[np.float64] = np.divide(left, variance, out=np.ones_like(variance), where=variance > 0)
    return share
