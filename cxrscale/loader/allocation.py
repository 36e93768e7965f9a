"""How many images of each stratum go into each step: integer arithmetic, any step without those before it.

The problem: a batch of G = 10 must hold strata in shares of, say, 0.33 and 0.67. 3.3 images do not exist, so some steps
take 3 and some 4; over many steps the mean must be 3.3, and a resumed run must know step 5,000 without replaying the
4,999 before it.

The method is systematic sampling. Put the strata's intervals end to end on a line of length G: here [0, 3.3) and
[3.3, 10). Lay a comb of G teeth, spaced by 1, over the line; each tooth takes an image of the stratum that it points
at. The first interval gets 3 or 4 teeth, depending on where the comb starts: at offset 0.2 its teeth are 0.2, 1.2, 2.2
and 3.2; at offset 0.5 they are 0.5, 1.5 and 2.5. So in every step a stratum gets its share rounded down or up, and so
do neighboring strata together. The number of teeth below an edge e of the line is ceil(e - offset).

Each step has its own offset, and evenly spread offsets make the mean right. They are 0, 1/2, 1/4, 3/4, 1/8, ...: the
bits of the step number in reverse (a van der Corput sequence), over and over after PERIOD = 1,024 steps. Any stretch of
them is spread evenly, so a stratum's running total stays within a few images of steps x share.

The running total, which says where a resumed run finds each stratum, needs no loop over the steps. One period uses each
of the offsets 0/P, 1/P, ..., (P - 1)/P once, and the sum of ceil(e - i/P) over them is ceil(e P) (Hermite's identity).
So the total is (number of complete periods) x ceil(e P), plus a sum over the steps of the last period.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]

WHOLE = 1 << 30
"""Shares are counted in parts of this: with 2^20 rows per step and PERIOD offsets, products stay below 2^63."""
PERIOD = 1 << 10


@dataclass(frozen=True)
class Allocation:
    """The number of images that each of K strata gets in every step."""

    batch: int
    """G, images per step."""
    steps: int
    """Steps per epoch; shares change between epochs only."""
    edge_EK: Integers
    """(E, K + 1) cumulative shares in parts of WHOLE, from 0 to WHOLE; the last row holds for all later epochs."""

    def before(self, step: int) -> Integers:
        """(K,) images of each stratum in all steps before this one."""
        total = np.zeros(self.edge_EK.shape[1], np.int64)
        for epoch, edge_K in enumerate(self.edge_EK):
            start = epoch * self.steps
            end = step if epoch == len(self.edge_EK) - 1 else min(step, start + self.steps)
            if start >= step:
                break
            total += self._total_below(edge_K, end) - self._total_below(edge_K, start)
        return np.diff(total)

    def counts(self, step_T: Integers) -> Integers:
        """(T, K) images of each stratum in each of T steps."""
        edge_TK = self.edge_EK[np.minimum(step_T // self.steps, len(self.edge_EK) - 1)]
        return np.diff(self._below(edge_TK, _offsets()[step_T % PERIOD][:, None]), axis=1)

    def slots(self, first: int, count: int) -> tuple[Integers, Integers]:
        """Strata of the images in T = count steps from `first` on.

        Returns:
            (T, G) the stratum of each image, and (T, G) which image of its stratum's stream it is, counted from 0.
        """
        shape = count, self.batch
        strata = self.edge_EK.shape[1] - 1
        if strata == 1:
            index_TG = np.arange(first * self.batch, (first + count) * self.batch, dtype=np.int64).reshape(shape)
            return np.zeros(shape, np.int64), index_TG
        count_TK = self.counts(np.arange(first, first + count, dtype=np.int64))
        start_TK = self.before(first) + np.cumsum(count_TK, axis=0) - count_TK
        flat = count_TK.ravel()
        stratum_TG = np.repeat(np.tile(np.arange(strata, dtype=np.int64), count), flat).reshape(shape)
        nth = (np.arange(flat.sum()) - np.repeat(np.cumsum(flat) - flat, flat)).reshape(shape)
        # The i-th of a stratum's n belongs at (i + 1/2) / n of the step: strata alternate as evenly as their counts
        # allow, so that each rank's block of slots has its part of every stratum.
        position_TG = (nth + 0.5) / np.repeat(flat, flat).reshape(shape)
        order = np.argsort(position_TG, axis=1, kind="stable")
        index_TG = np.repeat(start_TK.ravel(), flat).reshape(shape) + nth
        return np.take_along_axis(stratum_TG, order, axis=1), np.take_along_axis(index_TG, order, axis=1)

    def _below(self, edge: Integers, offset: Integers) -> Integers:
        """Teeth below the edge in a step whose comb starts at the offset (in parts of PERIOD): ceil(edge - offset)."""
        return -((offset * WHOLE - edge * (self.batch * PERIOD)) // (WHOLE * PERIOD))

    def _total_below(self, edge_K: Integers, step: int) -> Integers:
        """(K + 1,) teeth below the edges in steps 0 to step - 1, if the shares had always been these."""
        periods, rest = divmod(step, PERIOD)
        per_period = -((-edge_K * (self.batch * PERIOD)) // WHOLE)
        return np.asarray(periods * per_period + self._below(edge_K, _offsets()[:rest, None]).sum(axis=0), np.int64)


def cumulative_shares(share_EK: Sequence[Sequence[float]]) -> Integers:
    """(E, K + 1) cumulative shares for `Allocation`; each row of shares is scaled to a sum of 1."""
    share = np.asarray(share_EK, np.float64)
    summed = np.cumsum(share / share.sum(axis=1, keepdims=True), axis=1)
    edge = np.rint(np.minimum(summed, 1) * WHOLE).astype(np.int64)
    edge[:, -1] = WHOLE
    return np.pad(edge, ((0, 0), (1, 0)))


def longest_epoch(edge_EK: Integers, length_K: Sequence[int]) -> int:
    """The most images that, at any epoch's shares, take no more than its `length` from any stratum."""
    share_EK = np.diff(edge_EK, axis=1)
    return min(
        length * WHOLE // int(share)
        for share_K in share_EK
        for share, length in zip(share_K, length_K, strict=True)
        if share
    )


@lru_cache(maxsize=1)
def _offsets() -> Integers:
    """(PERIOD,) the van der Corput sequence in parts of PERIOD: the bits of 0, 1, 2, ... in reverse."""
    number, reversed_ = np.arange(PERIOD, dtype=np.int64), np.zeros(PERIOD, np.int64)
    for _ in range(PERIOD.bit_length() - 1):
        reversed_, number = 2 * reversed_ + number % 2, number // 2
    return reversed_
