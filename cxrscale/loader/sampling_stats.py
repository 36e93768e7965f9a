"""An epoch's sampling, counted, against what the plan promised."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cxrscale.config import PRESENT, Data, Sampler
from cxrscale.loader.allocation import WHOLE
from cxrscale.loader.hashing import Flags, Rows
from cxrscale.loader.loader import open_training_stream
from cxrscale.loader.sampler import TrainingStream, WeightedStream
from cxrscale.shards import Manifest


@dataclass(frozen=True, slots=True)
class SamplingCheck:
    """One promise."""

    what: str
    promised: str
    drawn: str
    kept: bool | None
    """None where chance decides and the promise is only an expectation."""


@dataclass(frozen=True, slots=True)
class Prevalence:
    """A finding among the images that can be drawn, and among those that were."""

    finding: str
    pool: int
    """Images with it."""
    pool_share: float
    drawn: int
    """Draws of an image with it."""
    drawn_share: float


@dataclass(frozen=True, slots=True)
class SamplingStats:
    """The first epoch."""

    steps: int
    batch: int
    pool: int
    """Different images that can be drawn."""
    different: int
    """Different images that were."""
    lines: tuple[SamplingCheck, ...]
    findings: tuple[Prevalence, ...]
    positives: Mapping[int, int]
    """Images with a finding in a step -> steps."""
    positives_promised: float
    times: Mapping[int, int]
    """Draws -> images of the pool that were drawn so often."""


def count_sampling(manifest: Manifest, data: Data, sampler: Sampler) -> SamplingStats:
    """Count the first epoch.

    Raises:
        UserError: as `feed.training`.
    """
    sampling = open_training_stream(manifest, data, sampler)
    row_SG, _ = sampling.take(0, sampling.deal.steps)
    present_NF = manifest.labels(data.findings) == PRESENT
    positive_N = present_NF.any(axis=1)
    pool = np.unique(np.concatenate([stream.rows_N for stream in sampling.streams]))
    count_N = np.bincount(row_SG.ravel(), minlength=len(manifest))
    positive_S = positive_N[row_SG].sum(axis=1)
    # Lanes of one kind lie side by side two sets at a time, and each group of neighbors is rounded once.
    lines = [
        _share_line(
            "images with a finding in a step",
            sampling,
            positive_N,
            row_SG,
            -(-len(sampler.dataset_weights) // 2) or 1,
        )
    ]
    if sampler.dataset_weights:
        root_N = manifest.column("root")
        lines += [
            _share_line(f"images of {root} in a step", sampling, root_N == root, row_SG, 1)
            for root in dict.fromkeys(root_N.tolist())
        ]
    lines += [_different_line(sampling, count_N), _times_line(sampling, count_N)]
    return SamplingStats(
        len(row_SG),
        sampler.batch_size,
        len(pool),
        int((count_N > 0).sum()),
        tuple(lines),
        tuple(
            Prevalence(
                name,
                int(present_NF[pool, f].sum()),
                float(present_NF[pool, f].mean()),
                int(count_N[present_NF[:, f]].sum()),
                float(count_N[present_NF[:, f]].sum() / row_SG.size),
            )
            for f, name in enumerate(data.findings)
        ),
        _histogram(positive_S),
        _expected(sampling, positive_N)[0],
        _histogram(count_N[pool]),
    )


def _histogram(values: Rows) -> dict[int, int]:
    found, counts = np.unique(values, return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


def _expected(sampling: TrainingStream, flag_N: Flags) -> tuple[float, bool]:
    """How many flagged images a step of the first epoch should hold, and whether that is exact."""
    share_L = np.diff(sampling.deal.edge_EL[0]) / WHOLE
    part_L = [float(stream.chances()[flag_N[stream.rows_N]].sum()) for stream in sampling.streams]
    exact = all(flag_N[stream.rows_N].all() or not flag_N[stream.rows_N].any() for stream in sampling.streams)
    return sampling.deal.batch * float(np.dot(share_L, part_L)), exact


def _share_line(what: str, sampling: TrainingStream, flag_N: Flags, row_SG: Rows, slack: int) -> SamplingCheck:
    expected, exact = _expected(sampling, flag_N)
    count_S = flag_N[row_SG].sum(axis=1)
    low, high, mean = int(count_S.min()), int(count_S.max()), float(count_S.mean())
    drawn = f"{low} to {high}, {mean:.2f} on average" if low < high else f"{low} in every step"
    if not exact:
        return SamplingCheck(what, f"about {expected:.2f} on average", drawn, None)
    floor, ceiling = math.floor(expected + 1e-6) - slack + 1, math.ceil(expected - 1e-6) + slack - 1
    promised = f"{floor} to {ceiling}" if floor < ceiling else f"{floor} in every step"
    return SamplingCheck(what, promised, drawn, floor <= low and high <= ceiling)


def _lane_counts(sampling: TrainingStream) -> list[int]:
    deal = sampling.deal
    return [int(count) for count in deal.before(deal.steps)]


def _different_line(sampling: TrainingStream, count_N: npt.NDArray[np.intp]) -> SamplingCheck:
    least, most, expected = 0, 0, 0.0
    for stream, drawn in zip(sampling.streams, _lane_counts(sampling), strict=True):
        different = len(np.unique(stream.rows_N))
        copies = len(stream.rows_N) - different
        if isinstance(stream, WeightedStream):
            expected += float((1 - (1 - stream.chances()) ** drawn).sum())
        # Copies of hard images may come before the last of the others.
        least += max(0, min(different, drawn - copies))
        most += min(different, drawn)
    found = int((count_N > 0).sum())
    if expected:
        return SamplingCheck("different images", f"about {expected:,.0f}", f"{found:,}", None)
    promised = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    return SamplingCheck("different images", promised, f"{found:,}", least <= found <= most)


def _times_line(sampling: TrainingStream, count_N: npt.NDArray[np.intp]) -> SamplingCheck:
    limit, free = 0, False
    for stream, drawn in zip(sampling.streams, _lane_counts(sampling), strict=True):
        if len(stream.rows_N):
            _, times = np.unique(stream.rows_N, return_counts=True)
            limit = max(limit, int(times.max()) * -(-drawn // len(stream.rows_N)))
            free = free or isinstance(stream, WeightedStream)
    found = int(count_N.max())
    return SamplingCheck(
        "times one image comes", "no limit" if free else f"at most {limit}", f"up to {found}", free or found <= limit
    )
