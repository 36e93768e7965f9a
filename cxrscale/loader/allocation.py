"""Shares -> who sits where in a step: pure integer arithmetic, any step computed without those before it.

A step's G slots are dealt to L lanes by systematic sampling: the lanes' shares lie end to end on a line of length G,
and every whole number plus the step's offset in [0, 1) on that line is a slot. So a lane holds its share rounded up or
down in every step, and so do neighboring lanes taken together (the first and the last are neighbors too). Offsets run
through a van der Corput sequence of period 1,024, by which each lane's total strays from its share by a few rows, and
by less than one more in every 1,024 steps; the period makes the totals a closed form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]

WHOLE = 1 << 30
"""Shares are counted in parts of this: with 2^20 rows a step and PERIOD offsets, products stay below 2^63."""
PERIOD = 1 << 10


@dataclass(frozen=True)
class Allocation:
    """How the slots of every step are dealt."""

    batch: int
    """G, slots a step."""
    steps: int
    """Steps an epoch; shares change between epochs only."""
    edge_EL: Integers
    """(E, L + 1) cumulated shares in parts of WHOLE, from 0 to WHOLE; the last row holds for all later epochs."""

    def before(self, step: int) -> Integers:
        """(L,) slots that each lane has got in all steps before this one."""
        total = np.zeros(self.edge_EL.shape[1], np.int64)
        for epoch, edge_L in enumerate(self.edge_EL):
            start = epoch * self.steps
            end = step if epoch == len(self.edge_EL) - 1 else min(step, start + self.steps)
            if start >= step:
                break
            total += self._reached(edge_L, end) - self._reached(edge_L, start)
        return np.diff(total)

    def counts(self, step_T: Integers) -> Integers:
        """(T, L) slots of each lane in each of T steps."""
        edge_TL = self.edge_EL[np.minimum(step_T // self.steps, len(self.edge_EL) - 1)]
        return np.diff(self._reach(edge_TL, _offsets()[step_T % PERIOD][:, None]), axis=1)

    def slots(self, first: int, count: int) -> tuple[Integers, Integers]:
        """(T, G) lanes of the slots of T = count steps, and which of its lane's images each is, counted from 0."""
        shape = count, self.batch
        lanes = self.edge_EL.shape[1] - 1
        if lanes == 1:
            index_TG = np.arange(first * self.batch, (first + count) * self.batch, dtype=np.int64).reshape(shape)
            return np.zeros(shape, np.int64), index_TG
        count_TL = self.counts(np.arange(first, first + count, dtype=np.int64))
        start_TL = self.before(first) + np.cumsum(count_TL, axis=0) - count_TL
        flat = count_TL.ravel()
        lane_TG = np.repeat(np.tile(np.arange(lanes, dtype=np.int64), count), flat).reshape(shape)
        nth = (np.arange(flat.sum()) - np.repeat(np.cumsum(flat) - flat, flat)).reshape(shape)
        # The k-th of a lane's n belongs at (k + 1/2) / n of the step: lanes alternate as evenly as their counts allow,
        # so that each rank's block of slots has its part of every lane.
        place_TG = (nth + 0.5) / np.repeat(flat, flat).reshape(shape)
        order = np.argsort(place_TG, axis=1, kind="stable")
        index_TG = np.repeat(start_TL.ravel(), flat).reshape(shape) + nth
        return np.take_along_axis(lane_TG, order, axis=1), np.take_along_axis(index_TG, order, axis=1)

    def _reach(self, edge: Integers, offset: Integers) -> Integers:
        """How many slots of a step with the offset (in parts of PERIOD) lie below the edge: a rounded-up quotient."""
        return -((offset * WHOLE - edge * (self.batch * PERIOD)) // (WHOLE * PERIOD))

    def _reached(self, edge_L: Integers, step: int) -> Integers:
        """(L + 1,) slots below the edges in steps 0 to step - 1, had the shares always been these."""
        rounds, rest = divmod(step, PERIOD)
        # Hermite's identity: over all offsets the rounded-up quotients add up to one rounded-up quotient.
        whole = -((-edge_L * (self.batch * PERIOD)) // WHOLE)
        return np.asarray(rounds * whole + self._reach(edge_L, _offsets()[:rest, None]).sum(axis=0), np.int64)


def cumulative_shares(share_EL: Sequence[Sequence[float]]) -> Integers:
    """(E, L + 1) cumulated shares for `Deal`; each row of shares is scaled to a sum of 1."""
    share = np.asarray(share_EL, np.float64)
    summed = np.cumsum(share / share.sum(axis=1, keepdims=True), axis=1)
    edge = np.rint(np.minimum(summed, 1) * WHOLE).astype(np.int64)
    edge[:, -1] = WHOLE
    return np.pad(edge, ((0, 0), (1, 0)))


def longest_epoch(edge_EL: Integers, length_L: Sequence[int]) -> int:
    """The most slots that, dealt at any epoch's shares, give no lane more than its `length`."""
    share_EL = np.diff(edge_EL, axis=1)
    return min(
        length * WHOLE // int(share)
        for share_L in share_EL
        for share, length in zip(share_L, length_L, strict=True)
        if share
    )


@lru_cache(maxsize=1)
def _offsets() -> Integers:
    """(PERIOD,) the van der Corput sequence in parts of PERIOD: the bits of 0, 1, 2, ... in reverse."""
    number, reversed_ = np.arange(PERIOD, dtype=np.int64), np.zeros(PERIOD, np.int64)
    for _ in range(PERIOD.bit_length() - 1):
        reversed_, number = 2 * reversed_ + number % 2, number // 2
    return reversed_
