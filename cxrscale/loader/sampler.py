"""Which images make up which batch: a pure function of (seed, epoch, step, rank, world).

Training reads one infinite stream of images. Its order depends on the images' keys and the seed alone, so neither the
order of the manifest's rows, nor the number of workers, nor where a run was interrupted changes what is trained on. A
step is `sampler.batch_size` consecutive positions of the stream; each rank takes a contiguous block of them. Where a
policy tells kinds of images apart, each kind (stratum) has a stream of its own, and `allocation` says how many of each
step's positions it gets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cxrscale.config import PRESENT, Sampler
from cxrscale.loader.allocation import Allocation, cumulative_shares, longest_epoch
from cxrscale.loader.hashing import SUBSET, Flags, Rows, hash64
from cxrscale.loader.policies import ALL, POLICIES, WITH, WITHOUT, SampleAttributes, Stratum
from cxrscale.loader.streams import Stream
from cxrscale.types import DistContext, UserError

CHUNK = 64
"""Steps that are planned at a time, at most: numpy's fixed costs are shared among them."""


@dataclass(frozen=True)
class BatchIndices:
    """One rank's share of a step. Rows of padding repeat a real row and have valid = False."""

    row_B: Rows
    """Rows of the manifest."""
    stream_pos_B: Rows
    """Positions in the training stream, which the augmentation depends on; 0 in evaluation."""
    valid_B: Flags
    """False for padding."""


def steps_per_epoch(count: int, sampler: Sampler) -> int:
    """Optimizer steps per epoch; `count` is `training_epoch_length` of the training split."""
    return sampler.steps_per_epoch or max(1, count // sampler.batch_size)


@dataclass(frozen=True)
class TrainingStream:
    """One stream per stratum, and the allocation of every step's positions to them."""

    streams: tuple[Stream, ...]
    allocation: Allocation
    epoch_length: int
    """Images that come before the first one can come again, at the least favorable shares of all epochs; for weighted
    and hard the images of one pass."""

    def take(self, first: int, count: int) -> tuple[Rows, Rows]:
        """(row_TG, stream_pos_TG): manifest rows of `count` global steps from `first` on, and their positions."""
        stratum_TG, index_TG = self.allocation.slots(first, count)
        row_TG = np.empty_like(index_TG)
        for stratum, stream in enumerate(self.streams):
            own = stratum_TG == stratum
            row_TG[own] = stream.take(index_TG[own])
        batch = self.allocation.batch
        stream_pos_TG = np.arange(first * batch, (first + count) * batch, dtype=np.int64)
        return row_TG, stream_pos_TG.reshape(row_TG.shape)


def training_stream(
    rows_N: Rows,
    label_NF: npt.NDArray[np.float32],
    key_N: Rows,
    sampler: Sampler,
    attributes: SampleAttributes = SampleAttributes(),
) -> TrainingStream:
    """The training stream of the images in `rows_N`; the other arguments belong to them row by row.

    `sampler.max_images` is applied first, then the policy.

    Raises:
        UserError: a stratum that some epoch samples from would be empty.
    """
    chosen = _subset(key_N, sampler)
    rows_N, label_NF, key_N, attributes = rows_N[chosen], label_NF[chosen], key_N[chosen], attributes.take(chosen)
    policy = POLICIES[sampler.sampling]
    policy.check(attributes, sampler)
    positive_N = (label_NF == PRESENT).any(axis=1)
    # An image without any label is not one without a finding.
    negative_N = ~positive_N & ~np.isnan(label_NF).all(axis=1)
    share_EK, strata = _strata(sampler)
    edge_EK = cumulative_shares(share_EK)
    streams = []
    for k, (dataset, kind) in enumerate(strata):
        member_N = {ALL: np.ones_like(positive_N), WITH: positive_N, WITHOUT: negative_N}[kind]
        if dataset is not None and attributes.dataset_N is not None:
            member_N = member_N & (attributes.dataset_N == dataset)
        if not member_N.any() and (np.diff(edge_EK, axis=1)[:, k] > 0).any():
            raise UserError(_empty_stratum(sampler, dataset, kind, len(rows_N)))
        # A purpose for each kind in each dataset: equal keys in two streams must not meet equal random numbers.
        purpose, index_P = 3 * (dataset or 0) + kind, np.flatnonzero(member_N)
        stratum = Stratum(purpose, rows_N[index_P], key_N[index_P], attributes.take(index_P))
        streams.append(policy.stream(stratum, sampler))
    length = longest_epoch(edge_EK, [len(stream.rows_N) for stream in streams])
    allocation = Allocation(sampler.batch_size, steps_per_epoch(length, sampler), edge_EK)
    return TrainingStream(tuple(streams), allocation, length)


def _subset(key_N: Rows, sampler: Sampler) -> Rows:
    if sampler.max_images is None or sampler.max_images >= len(key_N):
        return np.arange(len(key_N), dtype=np.int64)
    # Ascending hashes, not positions: the subset of n is part of the subset of n + 1.
    return np.argsort(hash64(sampler.seed, SUBSET, key_N))[: sampler.max_images].astype(np.int64)


def _strata(sampler: Sampler) -> tuple[list[list[float]], list[tuple[int | None, int]]]:
    """Each epoch's shares, and what each stratum holds: (index in data.shards or None for all of them, kind)."""
    policy = POLICIES[sampler.sampling]
    kind_shares = policy.shares(sampler)
    strata: list[tuple[int | None, int]] = []
    share_EK: list[list[float]] = [[] for _ in kind_shares]
    for dataset, weight in enumerate(sampler.dataset_weights or (1.0,)):
        # Every other dataset in reverse: the positives of two datasets are then neighbors, and their sum is exact too.
        order = slice(None, None, -1 if dataset % 2 else 1)
        strata += [(dataset if sampler.dataset_weights else None, kind) for kind in policy.kinds[order]]
        for share_K, shares in zip(share_EK, kind_shares, strict=True):
            share_K += [weight * share for share in shares[order]]
    return share_EK, strata


def _empty_stratum(sampler: Sampler, dataset: int | None, kind: int, left: int) -> str:
    problems = {ALL: "no image is left to train on", WITH: "no image has a finding present"}
    problem = problems.get(kind, "no image is labeled as without a finding")
    if dataset is not None:
        problem += f" in data.shards[{dataset}]"
    among = f" among the {left} that sampler.max_images={sampler.max_images} leaves" if sampler.max_images else ""
    remedies = ["raise sampler.max_images"] * bool(sampler.max_images)
    remedies += ["leave sampler.dataset_weights or that entry of data.shards out"] * bool(sampler.dataset_weights)
    remedies += ["use sampling=all"] * (kind != ALL)
    remedy = " or ".join(remedies) or "check data.train_split and data.findings"
    return f"sampler.sampling={sampler.sampling}: {problem}{among}; {remedy}"


def epoch_indices(stream: TrainingStream, epoch: int) -> tuple[Rows, Rows]:
    """(row_TG, stream_pos_TG) of an epoch: the G = sampler.batch_size manifest rows of its T global steps."""
    steps = stream.allocation.steps
    return stream.take(epoch * steps, steps)


def training_indices(
    stream: TrainingStream, dist: DistContext = DistContext(), epoch: int = 0, step: int = 0
) -> Iterator[BatchIndices]:
    """A rank's batches from (epoch, step) on, without end.

    Every rank gets ceil(G / world) rows per step, the last ranks some of them as padding.
    """
    batch = stream.allocation.batch
    share = -(-batch // dist.world)
    slot_B = np.arange(dist.rank * share, (dist.rank + 1) * share, dtype=np.int64)
    valid_B = slot_B < batch
    slot_B = np.minimum(slot_B, batch - 1)
    first, chunk = epoch * stream.allocation.steps + step, 1
    while True:
        row_TG, stream_pos_TG = stream.take(first, chunk)
        for row_G, stream_pos_G in zip(row_TG, stream_pos_TG, strict=True):
            yield BatchIndices(row_G[slot_B], stream_pos_G[slot_B], valid_B)
        first, chunk = first + chunk, min(2 * chunk, CHUNK)


def evaluation_indices(rows_N: Rows, batch_size: int, dist: DistContext = DistContext()) -> Iterator[BatchIndices]:
    """A rank's batches over rows that are each valid exactly once over all ranks; as many batches on every rank.

    Steps of batch_size x world rows are split into contiguous blocks of `batch_size`; the last is filled up with its
    last row.
    """
    total = len(rows_N)
    for start in range(0, total, batch_size * dist.world):
        slot_B = np.arange(batch_size, dtype=np.int64) + start + dist.rank * batch_size
        yield BatchIndices(rows_N[np.minimum(slot_B, total - 1)], np.zeros(batch_size, np.int64), slot_B < total)
