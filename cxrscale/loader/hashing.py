"""Counter-based random numbers: 64-bit hashes of (seed, purpose, position, image), the same on every machine."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]
Flags = npt.NDArray[np.bool_]

GAMMA = np.uint64(0x9E3779B97F4A7C15)
SUBSET, ORDER, AUGMENT, NOISE, WEIGHT, COPY = 1, 2, 3, 4, 5, 6
"""Purposes of hashes: two purposes never see the same random number."""


def mix64(word: Hashes) -> Hashes:
    """SplitMix64's finalizer: a bijection of 64-bit words in which every output bit depends on every input bit.

    Source: Steele, Lea and Flood, 'Fast splittable pseudorandom number generators', OOPSLA 2014; the constants are
    Stafford's variant 13.
    """
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


def hash64(*parts: int | npt.NDArray[np.int64]) -> Hashes:
    """A 64-bit hash of the integers, broadcast against each other; at least one-dimensional.

    With all other parts fixed it is a bijection of any one part: images with different keys never tie.
    """
    word = np.zeros(1, np.uint64)
    for part in parts:
        # At least one dimension: numpy warns of overflow on scalars, and here the words have to wrap around.
        word = mix64((word ^ np.atleast_1d(np.asarray(part, np.int64)).view(np.uint64)) + GAMMA)
    return word


def uniform(word: Hashes) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1) from the upper 53 bits of a hash."""
    return (word >> np.uint64(11)).astype(np.float64) * 2.0**-53
