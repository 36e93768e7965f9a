"""Infinite sequences of training images, each a pure function of the seed and the images' keys."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cxrscale.loader.hashing import ORDER, WEIGHT, Rows, hash64, uniform


class ShuffledStream:
    """Pass after pass over the images, each pass a fresh permutation of all of them."""

    def __init__(self, purpose: int, rows_N: Rows, key_N: Rows, seed: int) -> None:
        self.purpose, self.rows_N, self.key_N, self.seed = purpose, rows_N, key_N, seed
        self._pass: int | None = None
        self._order_N = rows_N

    def probabilities(self) -> npt.NDArray[np.float64]:
        """(N,) how likely a position is to hold each of `rows_N`, which lists hard images several times."""
        return np.full(len(self.rows_N), 1 / max(1, len(self.rows_N)))

    def take(self, position_P: Rows) -> Rows:
        """(P,) rows of the manifest at ascending positions of the sequence."""
        taken = np.empty_like(position_P)
        passes, index = np.divmod(position_P, len(self.rows_N))
        for number in range(int(passes[0]), int(passes[-1]) + 1) if len(position_P) else ():
            in_pass = passes == number
            taken[in_pass] = self._order(number)[index[in_pass]]
        return taken

    def _order(self, number: int) -> Rows:
        # Steps come one after the other, so remembering one pass is enough; it is only ever a cache.
        if number != self._pass:
            order = np.argsort(hash64(self.seed, ORDER, self.purpose, number, self.key_N))
            self._pass, self._order_N = number, self.rows_N[order]
        return self._order_N


class WeightedStream:
    """Independent samples with replacement, each image as often as its weight says."""

    def __init__(self, purpose: int, rows_N: Rows, key_N: Rows, weight_N: npt.NDArray[np.float64], seed: int) -> None:
        # By key, so that a position holds the same image whatever the order of the manifest.
        order = np.argsort(key_N)
        order = order[weight_N[order] > 0]
        self.purpose, self.rows_N, self.seed = purpose, rows_N[order], seed
        self._cumulative_N = np.cumsum(weight_N[order])

    def probabilities(self) -> npt.NDArray[np.float64]:
        """(N,) how likely a position is to hold each of `rows_N`; they sum to 1."""
        return np.asarray(np.diff(self._cumulative_N, prepend=0) / self._cumulative_N[-1], np.float64)

    def take(self, position_P: Rows) -> Rows:
        """(P,) rows of the manifest at any positions of the sequence."""
        point_P = uniform(hash64(self.seed, WEIGHT, self.purpose, position_P)) * self._cumulative_N[-1]
        index_P: Rows = np.searchsorted(self._cumulative_N, point_P, side="right")
        return self.rows_N[index_P]


Stream = ShuffledStream | WeightedStream
