"""The same picture in two archives (or twice in one), found by the pixels alone.

A difference hash (Krawetz 2013) of 256 bits proposes, 32 x 32 thumbnails confirm. Among real chest films the
nearest different pictures are 19 bits apart, re-encoded, resized or windowed copies at most 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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
CANDIDATES = 1 << 20
"""Pairs compared at a time: some 100 MB."""


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
    return _confirmed(_proposed(hashes_A, hashes_B, itself=False), thumbs_A, thumbs_B)


def repeats(hashes: npt.NDArray[np.uint8], thumbs: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """All pairs (a, b), a < b, of one archive that show the same picture, as (P, 2)."""
    return _confirmed(_proposed(hashes, hashes, itself=True), thumbs, thumbs)


def united(patients: Sequence[str], pairs: Iterable[Sequence[int]]) -> list[str]:
    """Patients under one name where a twin joins them: whoever a picture shows, its copy shows too.

    Joins are followed to their end: where a and b share a picture, and b and c do, all three are one.

    Args:
        patients: (N,) patient of each picture.
        pairs: (P, 2) rows of pictures that are the same, as `repeats` finds them. Those of `find` serve where both
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
    hashes_A: npt.NDArray[np.uint8], hashes_B: npt.NDArray[np.uint8], *, itself: bool
) -> npt.NDArray[np.int64]:
    """All pairs whose hashes differ by at most `MAX_DISTANCE` bits, (P, 2), ordered; with `itself` only a < b.

    The bits are dealt to one block more than may differ, so two copies agree in at least one whole block (multi-index
    hashing, Norouzi et al. 2012): only pictures that share a block are compared. Dealing them in turn puts bits from
    all over the picture into each block; neighbouring bits agree too often to tell chests apart.
    """
    blocks = MAX_DISTANCE + 1
    bits_A, bits_B = np.unpackbits(hashes_A, axis=1), np.unpackbits(hashes_B, axis=1)
    words_A, words_B = (np.ascontiguousarray(hashes).view(np.uint64) for hashes in (hashes_A, hashes_B))
    found = [np.empty(0, dtype=np.int64)]
    for block in range(blocks):
        keys_A, keys_B = (_numbers(bits[:, block::blocks]) for bits in (bits_A, bits_B))
        for a, b in _agreeing(keys_A, keys_B, itself=itself):
            distance = np.bitwise_count(words_A[a] ^ words_B[b]).sum(axis=1)
            near = distance <= MAX_DISTANCE
            found.append(a[near] * len(hashes_B) + b[near])
    rows_A, rows_B = np.divmod(np.unique(np.concatenate(found)), max(1, len(hashes_B)))
    return np.stack([rows_A, rows_B], axis=1)


def _numbers(bits: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """(N, up to 32) bits as N numbers."""
    packed = np.packbits(bits, axis=1).astype(np.int64)
    return packed @ (256 ** np.arange(packed.shape[1], dtype=np.int64))


def _agreeing(
    keys_A: npt.NDArray[np.int64], keys_B: npt.NDArray[np.int64], *, itself: bool
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Rows (a, b) with equal keys, some `CANDIDATES` at a time, so that memory does not grow with their number."""
    order = np.argsort(keys_B, kind="stable")
    ordered = keys_B[order]
    rows = order if itself else np.arange(len(keys_A))
    # Sorting is stable: the partners after a row in the order are also the later rows.
    low = np.arange(1, len(order) + 1) if itself else np.searchsorted(ordered, keys_A, side="left")
    counts = np.searchsorted(ordered, keys_A[rows], side="right") - low
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.unique([0, *np.searchsorted(ends, np.arange(CANDIDATES, total, CANDIDATES)), len(rows)])
    for start, stop in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
        many = counts[start:stop]
        before = np.repeat(ends[start:stop] - many, many)
        place = np.arange(many.sum()) + (before[0] if len(before) else 0) - before + np.repeat(low[start:stop], many)
        yield np.repeat(rows[start:stop], many), order[place]


def _confirmed(
    pairs: npt.NDArray[np.int64], thumbs_A: npt.NDArray[np.uint8], thumbs_B: npt.NDArray[np.uint8]
) -> npt.NDArray[np.int64]:
    """Those of the (P, 2) proposed pairs whose thumbnails agree too."""
    kept = [
        part[_differences(thumbs_A[part[:, 0]], thumbs_B[part[:, 1]]) < MAX_SQUARED]
        for part in (pairs[start : start + 4096] for start in range(0, len(pairs), 4096))
    ]
    return np.concatenate([pairs[:0], *kept])


def _differences(one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Mean squared differences of P pairs of thumbnails (P, 1024), each after matching brightness and contrast, which
    windowing changes, by least squares; a contrast that would have to be halved or doubled is not matched."""
    a, b = one.astype(np.float64), other.astype(np.float64)
    plain = ((a - b) ** 2).mean(axis=1)
    a -= a.mean(axis=1, keepdims=True)
    b -= b.mean(axis=1, keepdims=True)
    spread = (b**2).mean(axis=1)
    gain = np.divide((a * b).mean(axis=1), spread, out=np.zeros_like(spread), where=spread > 0)
    matched = ((a - gain[:, None] * b) ** 2).mean(axis=1)
    return np.where((gain > 0.5) & (gain < 2), matched, plain)
