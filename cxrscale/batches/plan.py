"""Which pictures make up which step: a pure function of (seed, epoch, step, rank, world).

Training reads one infinite stream of pictures. Its order hangs on the pictures' keys and the seed alone, so neither
the order of the manifest's rows, nor the number of workers, nor where a run was interrupted changes what is trained
on. A step is `plan.batch` consecutive positions of the stream; each rank takes a contiguous block of them. Where a
sampling tells kinds of pictures apart, each kind has a stream of its own, and `deal.py` says whose turn it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cxrscale.batches.deal import Deal, edges, longest
from cxrscale.config import Plan
from cxrscale.labels import PRESENT
from cxrscale.schema import InputError

Rows = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]
Flags = npt.NDArray[np.bool_]

GAMMA = np.uint64(0x9E3779B97F4A7C15)
SUBSET, ORDER, AUGMENT, NOISE, WEIGHT, COPY = 1, 2, 3, 4, 5, 6
"""What a hash is for: two purposes never see the same random number."""
ALL, WITH, WITHOUT = 0, 1, 2
"""The streams of pictures: every one, those with a finding present, those without."""
CHUNK = 64
"""Steps that are planned at a time, at most: numpy's fixed costs are shared among them."""


@dataclass(frozen=True)
class Step:
    """One rank's share of a step. Rows of padding repeat a real row and have valid = False."""

    row_B: Rows
    """Rows of the manifest."""
    draw_B: Rows
    """Positions in the training stream, which the augmentation is drawn from; 0 in evaluation."""
    valid_B: Flags
    """False for padding."""


@dataclass(frozen=True)
class Traits:
    """What some samplings ask of the N pictures beside their labels; `feed.py` finds it out."""

    set_N: Rows | None = None
    """For plan.mix: which entry of data.shards each lies in."""
    weight_N: npt.NDArray[np.float64] | None = None
    """For sampling=weighted: how often each is drawn, relative to the others."""
    hard_N: Flags | None = None
    """For sampling=hard: which are appended."""


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

    def chances(self) -> npt.NDArray[np.float64]:
        """(N,) how likely a draw is to be each of `rows_N`, which names hard pictures several times."""
        return np.full(len(self.rows_N), 1 / max(1, len(self.rows_N)))

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


class WeightedStream:
    """An infinite sequence of independent draws with replacement, each picture as often as its weight says."""

    def __init__(self, purpose: int, rows_N: Rows, key_N: Rows, weight_N: npt.NDArray[np.float64], seed: int) -> None:
        # By key, so that a draw falls on the same picture whatever the order of the manifest.
        order = np.argsort(key_N)
        order = order[weight_N[order] > 0]
        self.purpose, self.rows_N, self.seed = purpose, rows_N[order], seed
        self._summed_N = np.cumsum(weight_N[order])

    def chances(self) -> npt.NDArray[np.float64]:
        """(N,) how likely a draw is to be each of `rows_N`; they sum to 1."""
        return np.asarray(np.diff(self._summed_N, prepend=0) / self._summed_N[-1], np.float64)

    def take(self, position_P: Rows) -> Rows:
        """(P,) rows of the manifest at any positions of the sequence."""
        point_P = uniform(hashed(self.seed, WEIGHT, self.purpose, position_P)) * self._summed_N[-1]
        index_P: Rows = np.searchsorted(self._summed_N, point_P, side="right")
        return self.rows_N[index_P]


@dataclass(frozen=True)
class Sampling:
    """The streams, and the deal that says whose turn it is."""

    streams: tuple[Stream | WeightedStream, ...]
    deal: Deal
    pass_length: int
    """Pictures that are drawn before the first one can come again, at the least favourable shares of all epochs; for
    weighted and hard the pictures of one pass."""

    def take(self, first: int, count: int) -> tuple[Rows, Rows]:
        """(row_TG, draw_TG): manifest rows of `count` global steps from `first` on, and their stream positions."""
        lane_TG, index_TG = self.deal.slots(first, count)
        row_TG = np.empty_like(index_TG)
        for lane, stream in enumerate(self.streams):
            mine = lane_TG == lane
            row_TG[mine] = stream.take(index_TG[mine])
        draw_TG = np.arange(first * self.deal.batch, (first + count) * self.deal.batch, dtype=np.int64)
        return row_TG, draw_TG.reshape(row_TG.shape)


def sampling(
    rows_N: Rows,
    label_NF: npt.NDArray[np.float32],
    key_N: Rows,
    plan: Plan,
    traits: Traits = Traits(),
) -> Sampling:
    """The training stream of the pictures that `rows_N` names; the other columns belong to it row by row.

    `plan.subset` is chosen first, then the sampling.

    Raises:
        InputError: a stream that some epoch draws from would be empty.
    """
    chosen = _subset(key_N, plan)
    rows_N, label_NF, key_N = rows_N[chosen], label_NF[chosen], key_N[chosen]
    set_N = None if traits.set_N is None else traits.set_N[chosen]
    positive_N = (label_NF == PRESENT).any(axis=1)
    if plan.sampling == "hard" and (traits.hard_N is None or not traits.hard_N[chosen].any()):
        raise InputError(f"plan.subset={plan.subset} leaves none of the hard pictures; raise it or use sampling=all")
    share_EL, kinds = _lanes(plan)
    edge_EL = edges(share_EL)
    streams: list[Stream | WeightedStream] = []
    for lane, (number, kind) in enumerate(kinds):
        part_N = {ALL: np.ones_like(positive_N), WITH: positive_N, WITHOUT: ~positive_N}[kind]
        if number is not None and set_N is not None:
            part_N = part_N & (set_N == number)
        if not part_N.any() and (np.diff(edge_EL, axis=1)[:, lane] > 0).any():
            raise InputError(_nobody(plan, number, kind, len(rows_N)))
        # A purpose for each kind of each set: equal keys in two streams must not meet equal random numbers.
        purpose = 3 * (number or 0) + kind
        streams.append(_stream(purpose, np.flatnonzero(part_N), rows_N, key_N, chosen, plan, traits))
    length = longest(edge_EL, [len(stream.rows_N) for stream in streams])
    deal = Deal(plan.batch, steps_per_epoch(length, plan), edge_EL)
    return Sampling(tuple(streams), deal, length)


def _subset(key_N: Rows, plan: Plan) -> Rows:
    if plan.subset is None or plan.subset >= len(key_N):
        return np.arange(len(key_N), dtype=np.int64)
    # Ascending hashes, not positions: the subset of n is part of the subset of n + 1.
    return np.argsort(hashed(plan.seed, SUBSET, key_N))[: plan.subset].astype(np.int64)


def _lanes(plan: Plan) -> tuple[list[list[float]], list[tuple[int | None, int]]]:
    """Each epoch's shares, and what each lane holds: (entry of data.shards or None for all of them, kind)."""
    sides = {"balanced": [(0.5, 0.5)], "ratio": [(share, 1 - share) for share in positive_shares(plan)]}
    side_ES: list[tuple[float, ...]] = list(sides.get(plan.sampling, [(1.0,)]))
    kinds = [WITH, WITHOUT] if plan.sampling in sides else [WITH] if plan.sampling == "positives" else [ALL]
    lanes: list[tuple[int | None, int]] = []
    share_EL: list[list[float]] = [[] for _ in side_ES]
    for number, part in enumerate(plan.mix or (1.0,)):
        # Every other set the other way round: then two sets' positives are neighbours, and their sum is exact as well.
        turn = slice(None, None, -1 if number % 2 else 1)
        lanes += [(number if plan.mix else None, kind) for kind in kinds[turn]]
        for shares, side_S in zip(share_EL, side_ES, strict=True):
            shares += [part * share for share in side_S[turn]]
    return share_EL, lanes


def positive_shares(plan: Plan) -> list[float]:
    """The share of positives in each of the first `plan.share_epochs` epochs; the last one holds from there on."""
    first, last = plan.positive_share
    way = plan.share_epochs - 1
    return [first + (last - first) * epoch / way for epoch in range(way)] + [last]


def _stream(
    purpose: int, part_P: Rows, rows_N: Rows, key_N: Rows, chosen: Rows, plan: Plan, traits: Traits
) -> Stream | WeightedStream:
    """The stream of the pictures `part_P` of those that are left; `chosen` says where the traits of these stand."""
    rows_P, key_P = rows_N[part_P], key_N[part_P]
    if plan.sampling == "weighted" and traits.weight_N is not None:
        weight_P = traits.weight_N[chosen[part_P]]
        if not (weight_P > 0).any():
            raise InputError("plan.weights gives every training picture the weight 0; raise one of them")
        return WeightedStream(purpose, rows_P, key_P, weight_P, plan.seed)
    if plan.sampling == "hard" and traits.hard_N is not None:
        hard_H = np.flatnonzero(traits.hard_N[chosen[part_P]])
        copies = [hashed(COPY, number, key_P[hard_H]).view(np.int64) for number in range(plan.hard_repeats)]
        rows_P = np.concatenate([rows_P, *(rows_P[hard_H] for _ in copies)])
        key_P = np.concatenate([key_P, *copies])
    return Stream(purpose, rows_P, key_P, plan.seed)


def _nobody(plan: Plan, number: int | None, kind: int, left: int) -> str:
    what = {ALL: "no picture is left to train on", WITH: "no picture has a finding present"}
    problem = what.get(kind, "no picture is without a finding")
    if number is not None:
        problem += f" in data.shards[{number}]"
    among = f" among the {left} that plan.subset={plan.subset} leaves" if plan.subset else ""
    remedies = ["raise plan.subset"] * bool(plan.subset)
    remedies += ["leave plan.mix or that entry of data.shards out"] * bool(plan.mix)
    remedies += ["use sampling=all"] * (kind != ALL)
    remedy = " or ".join(remedies) or "check data.train_split and data.findings"
    return f"plan.sampling={plan.sampling}: {problem}{among}; {remedy}"


def epoch_rows(
    rows_N: Rows,
    label_NF: npt.NDArray[np.float32],
    key_N: Rows,
    plan: Plan,
    epoch: int,
    traits: Traits = Traits(),
) -> tuple[Rows, Rows]:
    """(row_SG, draw_SG) of an epoch: its S global steps of G = plan.batch manifest rows, and their stream positions."""
    drawn = sampling(rows_N, label_NF, key_N, plan, traits)
    return drawn.take(epoch * drawn.deal.steps, drawn.deal.steps)


def training(
    rows_N: Rows,
    label_NF: npt.NDArray[np.float32],
    key_N: Rows,
    plan: Plan,
    rank: int = 0,
    world: int = 1,
    epoch: int = 0,
    step: int = 0,
    traits: Traits = Traits(),
) -> Iterator[Step]:
    """A rank's steps from (epoch, step) on, without end.

    Every rank gets ceil(G / world) rows a step, the last ranks some of them as padding.

    Raises:
        InputError: nothing is left to train on; at the call, not at the first step.
    """
    drawn = sampling(rows_N, label_NF, key_N, plan, traits)
    return _steps(drawn, rank, world, epoch * drawn.deal.steps + step)


def _steps(drawn: Sampling, rank: int, world: int, first: int) -> Iterator[Step]:
    batch = drawn.deal.batch
    share = -(-batch // world)
    slot_B = np.arange(rank * share, (rank + 1) * share, dtype=np.int64)
    valid_B = slot_B < batch
    slot_B = np.minimum(slot_B, batch - 1)
    chunk = 1
    while True:
        row_TG, draw_TG = drawn.take(first, chunk)
        for row_G, draw_G in zip(row_TG, draw_TG, strict=True):
            yield Step(row_G[slot_B], draw_G[slot_B], valid_B)
        first, chunk = first + chunk, min(2 * chunk, CHUNK)


def evaluation(rows_N: Rows, batch: int, rank: int = 0, world: int = 1) -> Iterator[Step]:
    """A rank's steps over rows that are each valid exactly once over all ranks; as many steps on every rank.

    Steps of batch x world rows are dealt as contiguous blocks of `batch`; the last is filled up with its last row.
    """
    total = len(rows_N)
    for start in range(0, total, batch * world):
        slot_B = np.arange(batch, dtype=np.int64) + start + rank * batch
        yield Step(rows_N[np.minimum(slot_B, total - 1)], np.zeros(batch, np.int64), slot_B < total)
