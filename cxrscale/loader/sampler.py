"""Which images make up which step: a pure function of (seed, epoch, step, rank, world).

Training reads one infinite stream of images. Its order hangs on the images' keys and the seed alone, so neither
the order of the manifest's rows, nor the number of workers, nor where a run was interrupted changes what is trained
on. A step is `sampler.batch_size` consecutive positions of the stream; each rank takes a contiguous block of them. Where a
sampling tells kinds of images apart, each kind has a stream of its own, and `deal.py` says whose turn it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cxrscale.config import PRESENT, Sampler
from cxrscale.loader.allocation import Allocation, cumulative_shares, longest_epoch
from cxrscale.loader.hashing import COPY, ORDER, SUBSET, WEIGHT, Flags, Rows, hash64, uniform
from cxrscale.types import UserError

ALL, WITH, WITHOUT = 0, 1, 2
"""The streams of images: every one, those with a finding present, those without."""
CHUNK = 64
"""Steps that are planned at a time, at most: numpy's fixed costs are shared among them."""


@dataclass(frozen=True)
class BatchIndices:
    """One rank's share of a step. Rows of padding repeat a real row and have valid = False."""

    row_B: Rows
    """Rows of the manifest."""
    draw_B: Rows
    """Positions in the training stream, which the augmentation is drawn from; 0 in evaluation."""
    valid_B: Flags
    """False for padding."""


@dataclass(frozen=True)
class SampleAttributes:
    """What some samplings ask of the N images beside their labels; `feed.py` finds it out."""

    set_N: Rows | None = None
    """For sampler.dataset_weights: which entry of data.shards each lies in."""
    weight_N: npt.NDArray[np.float64] | None = None
    """For sampling=weighted: how often each is drawn, relative to the others."""
    hard_N: Flags | None = None
    """For sampling=hard: which are appended."""


def steps_per_epoch(count: int, sampler: Sampler) -> int:
    """Optimizer steps an epoch; `count` is what `pass_length` says of the training split (`feed.training_rows`)."""
    return sampler.steps_per_epoch or max(1, count // sampler.batch_size)


class ShuffledStream:
    """An infinite sequence of one stream's images: pass after pass, each a fresh permutation of all of them."""

    def __init__(self, purpose: int, rows_N: Rows, key_N: Rows, seed: int) -> None:
        self.purpose, self.rows_N, self.key_N, self.seed = purpose, rows_N, key_N, seed
        self._pass: int | None = None
        self._order_N = rows_N

    def chances(self) -> npt.NDArray[np.float64]:
        """(N,) how likely a draw is to be each of `rows_N`, which names hard images several times."""
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
            order = np.argsort(hash64(self.seed, ORDER, self.purpose, number, self.key_N))
            self._pass, self._order_N = number, self.rows_N[order]
        return self._order_N


class WeightedStream:
    """An infinite sequence of independent draws with replacement, each image as often as its weight says."""

    def __init__(self, purpose: int, rows_N: Rows, key_N: Rows, weight_N: npt.NDArray[np.float64], seed: int) -> None:
        # By key, so that a draw falls on the same image whatever the order of the manifest.
        order = np.argsort(key_N)
        order = order[weight_N[order] > 0]
        self.purpose, self.rows_N, self.seed = purpose, rows_N[order], seed
        self._summed_N = np.cumsum(weight_N[order])

    def chances(self) -> npt.NDArray[np.float64]:
        """(N,) how likely a draw is to be each of `rows_N`; they sum to 1."""
        return np.asarray(np.diff(self._summed_N, prepend=0) / self._summed_N[-1], np.float64)

    def take(self, position_P: Rows) -> Rows:
        """(P,) rows of the manifest at any positions of the sequence."""
        point_P = uniform(hash64(self.seed, WEIGHT, self.purpose, position_P)) * self._summed_N[-1]
        index_P: Rows = np.searchsorted(self._summed_N, point_P, side="right")
        return self.rows_N[index_P]


@dataclass(frozen=True)
class TrainingStream:
    """The streams, and the deal that says whose turn it is."""

    streams: tuple[ShuffledStream | WeightedStream, ...]
    deal: Allocation
    pass_length: int
    """Images that are drawn before the first one can come again, at the least favorable shares of all epochs; for
    weighted and hard the images of one pass."""

    def take(self, first: int, count: int) -> tuple[Rows, Rows]:
        """(row_TG, draw_TG): manifest rows of `count` global steps from `first` on, and their stream positions."""
        lane_TG, index_TG = self.deal.slots(first, count)
        row_TG = np.empty_like(index_TG)
        for lane, stream in enumerate(self.streams):
            mine = lane_TG == lane
            row_TG[mine] = stream.take(index_TG[mine])
        draw_TG = np.arange(first * self.deal.batch, (first + count) * self.deal.batch, dtype=np.int64)
        return row_TG, draw_TG.reshape(row_TG.shape)


def training_stream(
    rows_N: Rows,
    label_NF: npt.NDArray[np.float32],
    key_N: Rows,
    sampler: Sampler,
    traits: SampleAttributes = SampleAttributes(),
) -> TrainingStream:
    """The training stream of the images that `rows_N` names; the other columns belong to it row by row.

    `sampler.max_images` is chosen first, then the sampling.

    Raises:
        UserError: a stream that some epoch draws from would be empty.
    """
    chosen = _subset(key_N, sampler)
    rows_N, label_NF, key_N = rows_N[chosen], label_NF[chosen], key_N[chosen]
    set_N = None if traits.set_N is None else traits.set_N[chosen]
    positive_N = (label_NF == PRESENT).any(axis=1)
    if sampler.sampling == "hard" and (traits.hard_N is None or not traits.hard_N[chosen].any()):
        raise UserError(
            f"sampler.max_images={sampler.max_images} leaves none of the hard images; raise it or use sampling=all"
        )
    share_EL, kinds = _strata(sampler)
    edge_EL = cumulative_shares(share_EL)
    streams: list[ShuffledStream | WeightedStream] = []
    for lane, (number, kind) in enumerate(kinds):
        part_N = {ALL: np.ones_like(positive_N), WITH: positive_N, WITHOUT: ~positive_N}[kind]
        if number is not None and set_N is not None:
            part_N = part_N & (set_N == number)
        if not part_N.any() and (np.diff(edge_EL, axis=1)[:, lane] > 0).any():
            raise UserError(_empty_stratum(sampler, number, kind, len(rows_N)))
        # A purpose for each kind of each set: equal keys in two streams must not meet equal random numbers.
        purpose = 3 * (number or 0) + kind
        streams.append(_stream(purpose, np.flatnonzero(part_N), rows_N, key_N, chosen, sampler, traits))
    length = longest_epoch(edge_EL, [len(stream.rows_N) for stream in streams])
    deal = Allocation(sampler.batch_size, steps_per_epoch(length, sampler), edge_EL)
    return TrainingStream(tuple(streams), deal, length)


def _subset(key_N: Rows, sampler: Sampler) -> Rows:
    if sampler.max_images is None or sampler.max_images >= len(key_N):
        return np.arange(len(key_N), dtype=np.int64)
    # Ascending hashes, not positions: the subset of n is part of the subset of n + 1.
    return np.argsort(hash64(sampler.seed, SUBSET, key_N))[: sampler.max_images].astype(np.int64)


def _strata(sampler: Sampler) -> tuple[list[list[float]], list[tuple[int | None, int]]]:
    """Each epoch's shares, and what each lane holds: (entry of data.shards or None for all of them, kind)."""
    sides = {"balanced": [(0.5, 0.5)], "ratio": [(share, 1 - share) for share in positive_shares(sampler)]}
    side_ES: list[tuple[float, ...]] = list(sides.get(sampler.sampling, [(1.0,)]))
    kinds = [WITH, WITHOUT] if sampler.sampling in sides else [WITH] if sampler.sampling == "positives" else [ALL]
    lanes: list[tuple[int | None, int]] = []
    share_EL: list[list[float]] = [[] for _ in side_ES]
    for number, part in enumerate(sampler.dataset_weights or (1.0,)):
        # Every other set the other way round: then two sets' positives are neighbors, and their sum is exact as well.
        turn = slice(None, None, -1 if number % 2 else 1)
        lanes += [(number if sampler.dataset_weights else None, kind) for kind in kinds[turn]]
        for shares, side_S in zip(share_EL, side_ES, strict=True):
            shares += [part * share for share in side_S[turn]]
    return share_EL, lanes


def positive_shares(sampler: Sampler) -> list[float]:
    """The share of positives in each of the first `sampler.positive_share_epochs` epochs; the last one holds from there on."""
    first, last = sampler.positive_share
    way = sampler.positive_share_epochs - 1
    return [first + (last - first) * epoch / way for epoch in range(way)] + [last]


def _stream(
    purpose: int, part_P: Rows, rows_N: Rows, key_N: Rows, chosen: Rows, sampler: Sampler, traits: SampleAttributes
) -> ShuffledStream | WeightedStream:
    """The stream of the images `part_P` of those that are left; `chosen` says where the traits of these stand."""
    rows_P, key_P = rows_N[part_P], key_N[part_P]
    if sampler.sampling == "weighted" and traits.weight_N is not None:
        weight_P = traits.weight_N[chosen[part_P]]
        if not (weight_P > 0).any():
            raise UserError("sampler.weights gives every training image the weight 0; raise one of them")
        return WeightedStream(purpose, rows_P, key_P, weight_P, sampler.seed)
    if sampler.sampling == "hard" and traits.hard_N is not None:
        hard_H = np.flatnonzero(traits.hard_N[chosen[part_P]])
        copies = [hash64(COPY, number, key_P[hard_H]).view(np.int64) for number in range(sampler.hard_repeats)]
        rows_P = np.concatenate([rows_P, *(rows_P[hard_H] for _ in copies)])
        key_P = np.concatenate([key_P, *copies])
    return ShuffledStream(purpose, rows_P, key_P, sampler.seed)


def _empty_stratum(sampler: Sampler, number: int | None, kind: int, left: int) -> str:
    what = {ALL: "no image is left to train on", WITH: "no image has a finding present"}
    problem = what.get(kind, "no image is without a finding")
    if number is not None:
        problem += f" in data.shards[{number}]"
    among = f" among the {left} that sampler.max_images={sampler.max_images} leaves" if sampler.max_images else ""
    remedies = ["raise sampler.max_images"] * bool(sampler.max_images)
    remedies += ["leave sampler.dataset_weights or that entry of data.shards out"] * bool(sampler.dataset_weights)
    remedies += ["use sampling=all"] * (kind != ALL)
    remedy = " or ".join(remedies) or "check data.train_split and data.findings"
    return f"sampler.sampling={sampler.sampling}: {problem}{among}; {remedy}"


def epoch_indices(
    rows_N: Rows,
    label_NF: npt.NDArray[np.float32],
    key_N: Rows,
    sampler: Sampler,
    epoch: int,
    traits: SampleAttributes = SampleAttributes(),
) -> tuple[Rows, Rows]:
    """(row_SG, draw_SG) of an epoch: its S global steps of G = sampler.batch_size manifest rows, and their stream positions."""
    drawn = training_stream(rows_N, label_NF, key_N, sampler, traits)
    return drawn.take(epoch * drawn.deal.steps, drawn.deal.steps)


def training_indices(
    rows_N: Rows,
    label_NF: npt.NDArray[np.float32],
    key_N: Rows,
    sampler: Sampler,
    rank: int = 0,
    world: int = 1,
    epoch: int = 0,
    step: int = 0,
    traits: SampleAttributes = SampleAttributes(),
) -> Iterator[BatchIndices]:
    """A rank's steps from (epoch, step) on, without end.

    Every rank gets ceil(G / world) rows a step, the last ranks some of them as padding.

    Raises:
        UserError: nothing is left to train on; at the call, not at the first step.
    """
    drawn = training_stream(rows_N, label_NF, key_N, sampler, traits)
    return _steps(drawn, rank, world, epoch * drawn.deal.steps + step)


def _steps(drawn: TrainingStream, rank: int, world: int, first: int) -> Iterator[BatchIndices]:
    batch = drawn.deal.batch
    share = -(-batch // world)
    slot_B = np.arange(rank * share, (rank + 1) * share, dtype=np.int64)
    valid_B = slot_B < batch
    slot_B = np.minimum(slot_B, batch - 1)
    chunk = 1
    while True:
        row_TG, draw_TG = drawn.take(first, chunk)
        for row_G, draw_G in zip(row_TG, draw_TG, strict=True):
            yield BatchIndices(row_G[slot_B], draw_G[slot_B], valid_B)
        first, chunk = first + chunk, min(2 * chunk, CHUNK)


def evaluation_indices(rows_N: Rows, batch: int, rank: int = 0, world: int = 1) -> Iterator[BatchIndices]:
    """A rank's steps over rows that are each valid exactly once over all ranks; as many steps on every rank.

    Steps of batch x world rows are dealt as contiguous blocks of `batch`; the last is filled up with its last row.
    """
    total = len(rows_N)
    for start in range(0, total, batch * world):
        slot_B = np.arange(batch, dtype=np.int64) + start + rank * batch
        yield BatchIndices(rows_N[np.minimum(slot_B, total - 1)], np.zeros(batch, np.int64), slot_B < total)
