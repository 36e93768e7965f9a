"""Which pictures make up which step: a pure function of (seed, epoch, step, rank, world).

Training reads one infinite stream of pictures. Its order hangs on the pictures' keys and the seed alone, so neither
the order of the manifest's rows, nor the number of workers, nor where a run was interrupted changes what is trained
on. A step is `plan.batch` consecutive positions of the stream; each rank takes a contiguous block of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cxrscale.config import Plan
from cxrscale.labels import PRESENT
from cxrscale.schema import InputError

Rows = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]

GAMMA = np.uint64(0x9E3779B97F4A7C15)
SUBSET, ORDER, AUGMENT, NOISE = 1, 2, 3, 4
"""What a hash is for: two purposes never see the same random number."""
ALL, WITH, WITHOUT = 0, 1, 2
"""The streams of pictures: every one, those with a finding present, those without."""


@dataclass(frozen=True)
class Step:
    """One rank's share of a step. Rows of padding repeat a real row and have valid = False."""

    row_B: Rows
    """Rows of the manifest."""
    draw_B: Rows
    """Positions in the training stream, which the augmentation is drawn from; 0 in evaluation."""
    valid_B: npt.NDArray[np.bool_]
    """False for padding."""


def mixed(word: Hashes) -> Hashes:
    """SplitMix64's finaliser: a bijection of 64-bit words whose every output bit hangs on every input bit.

    Source: Steele, Lea and Flood, 'Fast splittable pseudorandom number generators', OOPSLA 2014; the constants are
    Stafford's variant 13.
    """
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


def hashed(*parts: int | npt.NDArray[np.int64]) -> Hashes:
    """A 64-bit hash of the integers, broadcast against each other; at least one-dimensional.

    With all other parts fixed it is a bijection of any one part: pictures with different keys never tie.
    """
    word = np.zeros(1, np.uint64)
    for part in parts:
        # At least one dimension: numpy warns of overflow on scalars, and wrapping round is what is wanted here.
        word = mixed((word ^ np.atleast_1d(np.asarray(part, np.int64)).view(np.uint64)) + GAMMA)
    return word


def uniform(word: Hashes) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1) from the upper 53 bits of a hash."""
    return (word >> np.uint64(11)).astype(np.float64) * 2.0**-53


def steps_per_epoch(count: int, plan: Plan) -> int:
    """Optimizer steps an epoch; `count` is what `pass_length` says of the training split (`feed.training_rows`)."""
    return plan.steps_per_epoch or max(1, count // plan.batch)


class Stream:
    """An infinite sequence of one stream's pictures: pass after pass, each a fresh permutation of all of them."""

    def __init__(self, purpose: int, rows_N: Rows, key_N: Rows, seed: int) -> None:
        self.purpose, self.rows_N, self.key_N, self.seed = purpose, rows_N, key_N, seed
        self._pass: int | None = None
        self._order_N = rows_N

    def take(self, position_P: Rows) -> Rows:
        """(P,) rows of the manifest at ascending positions of the sequence."""
        taken = np.empty_like(position_P)
        passes, index = np.divmod(position_P, len(self.rows_N))
        for number in range(int(passes[0]), int(passes[-1]) + 1) if len(position_P) else ():
            here = passes == number
            taken[here] = self._order(number)[index[here]]
        return taken

    def _order(self, number: int) -> Rows:
        # Steps come one after the other, so remembering one pass is enough; it is only ever a cache.
        if number != self._pass:
            order = np.argsort(hashed(self.seed, ORDER, self.purpose, number, self.key_N))
            self._pass, self._order_N = number, self.rows_N[order]
        return self._order_N


def streams(rows_N: Rows, label_NF: npt.NDArray[np.float32], key_N: Rows, plan: Plan) -> tuple[Stream, ...]:
    """The streams that `plan.sampling` takes pictures from in turn, each of at least one row.

    `label_NF` and `key_N` belong to `rows_N`, row by row. `plan.subset` is chosen first, then the sampling.

    Raises:
        InputError: a stream would be empty.
    """
    if plan.subset is not None and plan.subset < len(rows_N):
        # Ascending hashes, not positions: the subset of n is part of the subset of n + 1.
        chosen = np.argsort(hashed(plan.seed, SUBSET, key_N))[: plan.subset]
        rows_N, label_NF, key_N = rows_N[chosen], label_NF[chosen], key_N[chosen]
    positive_N = (label_NF == PRESENT).any(axis=1)
    parts = {
        "all": ((ALL, np.ones_like(positive_N), "no picture is left to train on"),),
        "positives": ((WITH, positive_N, "no picture has a finding present"),),
        "balanced": (
            (WITH, positive_N, "no picture has a finding present"),
            (WITHOUT, ~positive_N, "no picture is without a finding"),
        ),
    }[plan.sampling]
    for _, part_N, problem in parts:
        if not part_N.any():
            among = f"among the {len(rows_N)} that plan.subset={plan.subset} leaves" if plan.subset else "to train on"
            raise InputError(f"plan.sampling={plan.sampling}: {problem} {among}; raise plan.subset or use sampling=all")
    return tuple(Stream(purpose, rows_N[part_N], key_N[part_N], plan.seed) for purpose, part_N, _ in parts)


def pass_length(sources: tuple[Stream, ...]) -> int:
    """Pictures in one pass: every one of the only stream, or each of the shortest with one of every other stream."""
    return len(sources) * min(len(source.rows_N) for source in sources)


def positions(sources: tuple[Stream, ...], draw_P: Rows) -> Rows:
    """(P,) rows of the manifest at ascending positions of the training stream.

    Several streams take turns, position by position: so any step of G rows, and any rank's block of it, has as many
    of each as of the other up to one.
    """
    taken = np.empty_like(draw_P)
    for turn, stream in enumerate(sources):
        mine = draw_P % len(sources) == turn
        taken[mine] = stream.take(draw_P[mine] // len(sources))
    return taken


def epoch_rows(
    rows_N: Rows, label_NF: npt.NDArray[np.float32], key_N: Rows, plan: Plan, epoch: int
) -> tuple[Rows, Rows]:
    """(row_SG, draw_SG) of an epoch: its S global steps of G = plan.batch manifest rows, and their stream positions."""
    sources = streams(rows_N, label_NF, key_N, plan)
    shape = steps_per_epoch(pass_length(sources), plan), plan.batch
    count = shape[0] * shape[1]
    draw = np.arange(epoch * count, (epoch + 1) * count, dtype=np.int64)
    return positions(sources, draw).reshape(shape), draw.reshape(shape)


def training(
    rows_N: Rows,
    label_NF: npt.NDArray[np.float32],
    key_N: Rows,
    plan: Plan,
    rank: int = 0,
    world: int = 1,
    epoch: int = 0,
    step: int = 0,
) -> Iterator[Step]:
    """A rank's steps from (epoch, step) on, without end.

    Every rank gets ceil(G / world) rows a step, the last ranks some of them as padding.

    Raises:
        InputError: nothing is left to train on; at the call, not at the first step.
    """
    sources = streams(rows_N, label_NF, key_N, plan)
    first = epoch * steps_per_epoch(pass_length(sources), plan) + step
    return _steps(sources, plan.batch, rank, world, first)


def _steps(sources: tuple[Stream, ...], batch: int, rank: int, world: int, first: int) -> Iterator[Step]:
    share = -(-batch // world)
    slot_B = np.arange(rank * share, (rank + 1) * share, dtype=np.int64)
    valid_B = slot_B < batch
    slot_B = np.minimum(slot_B, batch - 1)
    while True:
        draw_B = first * batch + slot_B
        yield Step(positions(sources, draw_B), draw_B, valid_B)
        first += 1


def evaluation(rows_N: Rows, batch: int, rank: int = 0, world: int = 1) -> Iterator[Step]:
    """A rank's steps over rows that are each valid exactly once over all ranks; as many steps on every rank.

    Steps of batch x world rows are dealt as contiguous blocks of `batch`; the last is filled up with its last row.
    """
    total = len(rows_N)
    for start in range(0, total, batch * world):
        slot_B = np.arange(batch, dtype=np.int64) + start + rank * batch
        yield Step(rows_N[np.minimum(slot_B, total - 1)], np.zeros(batch, np.int64), slot_B < total)
