"""The first epoch's sampling, counted, beside what the policy should give."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cxrscale.config import PRESENT, Recipe
from cxrscale.loader.allocation import WHOLE
from cxrscale.loader.hashing import Flags, Rows
from cxrscale.loader.loader import open_training_stream
from cxrscale.loader.sampler import TrainingStream, epoch_indices
from cxrscale.loader.streams import WeightedStream
from cxrscale.shards import Manifest


@dataclass(frozen=True, slots=True)
class SamplingCheck:
    """One quantity of the epoch: what the policy should give, and what it gave."""

    quantity: str
    expected: str
    observed: str
    ok: bool | None
    """None where the sampling is random and `expected` is only a mean."""


@dataclass(frozen=True, slots=True)
class Prevalence:
    """A finding among the images that can be sampled, and among those that were."""

    finding: str
    pool: int
    """Images with it."""
    pool_share: float
    sampled: int
    """Positions of the epoch that hold an image with it."""
    sampled_share: float


@dataclass(frozen=True, slots=True)
class SamplingStats:
    """The first epoch."""

    steps: int
    batch: int
    pool: int
    """Different images that can be sampled."""
    unique: int
    """Different images that were."""
    checks: tuple[SamplingCheck, ...]
    findings: tuple[Prevalence, ...]
    positives: Mapping[int, int]
    """Images with a finding in a step -> number of such steps."""
    positives_expected: float
    """Mean number of images with a finding per step."""
    times: Mapping[int, int]
    """Times sampled -> images of the pool that were sampled so often."""


def count_sampling(manifest: Manifest, recipe: Recipe) -> SamplingStats:
    """Count the first epoch.

    Raises:
        UserError: as `training_batches`.
    """
    stream = open_training_stream(manifest, recipe)
    row_TG, _ = epoch_indices(stream, 0)
    present_NF = manifest.labels(recipe.data.findings) == PRESENT
    positive_N = present_NF.any(axis=1)
    pool = np.unique(np.concatenate([part.rows_N for part in stream.streams]))
    count_N = np.bincount(row_TG.ravel(), minlength=len(manifest))
    weights = recipe.sampler.dataset_weights
    # Strata of one kind are neighbors for two datasets at a time, and each group of neighbors is rounded once.
    slack = -(-len(weights) // 2) or 1
    checks = [_share_check("images with a finding per step", stream, positive_N, row_TG, slack)]
    if weights:
        root_N = manifest.column("root")
        checks += [
            _share_check(f"images of {root} per step", stream, root_N == root, row_TG, 1)
            for root in dict.fromkeys(root_N.tolist())
        ]
    checks += [_unique_check(stream, count_N), _times_check(stream, count_N)]
    return SamplingStats(
        steps=len(row_TG),
        batch=recipe.sampler.batch_size,
        pool=len(pool),
        unique=int((count_N > 0).sum()),
        checks=tuple(checks),
        findings=tuple(
            Prevalence(
                name,
                int(present_NF[pool, f].sum()),
                float(present_NF[pool, f].mean()),
                int(count_N[present_NF[:, f]].sum()),
                float(count_N[present_NF[:, f]].sum() / row_TG.size),
            )
            for f, name in enumerate(recipe.data.findings)
        ),
        positives=_histogram(positive_N[row_TG].sum(axis=1)),
        positives_expected=_expected(stream, positive_N)[0],
        times=_histogram(count_N[pool]),
    )


def expected_prevalence(manifest: Manifest, recipe: Recipe) -> npt.NDArray[np.float64]:
    """(F,) the share of each finding among the labels that the first epoch is expected to sample; NaN without any.

    Raises:
        UserError: as `training_batches`.
    """
    stream = open_training_stream(manifest, recipe)
    label_NF = manifest.labels(recipe.data.findings)
    shares = []
    for label_N in label_NF.T:
        labeled, _ = _expected(stream, ~np.isnan(label_N))
        present, _ = _expected(stream, label_N == PRESENT)
        shares.append(present / labeled if labeled else math.nan)
    return np.array(shares)


def _histogram(values: Rows) -> dict[int, int]:
    unique, counts = np.unique(values, return_counts=True)
    return dict(zip(unique.tolist(), counts.tolist(), strict=True))


def _expected(stream: TrainingStream, flag_N: Flags) -> tuple[float, bool]:
    """Mean number of flagged images in a step of the first epoch, and whether every step has it (up to rounding)."""
    share_K = np.diff(stream.allocation.edge_EK[0]) / WHOLE
    part_K = [float(part.probabilities()[flag_N[part.rows_N]].sum()) for part in stream.streams]
    exact = all(flag_N[part.rows_N].all() or not flag_N[part.rows_N].any() for part in stream.streams)
    return stream.allocation.batch * float(np.dot(share_K, part_K)), exact


def _share_check(quantity: str, stream: TrainingStream, flag_N: Flags, row_TG: Rows, slack: int) -> SamplingCheck:
    expected, exact = _expected(stream, flag_N)
    count_T = flag_N[row_TG].sum(axis=1)
    low, high, mean = int(count_T.min()), int(count_T.max()), float(count_T.mean())
    observed = f"{low} to {high}, {mean:.2f} on average" if low < high else f"{low} in every step"
    if not exact:
        return SamplingCheck(quantity, f"about {expected:.2f} on average", observed, None)
    floor, ceiling = math.floor(expected + 1e-6) - slack + 1, math.ceil(expected - 1e-6) + slack - 1
    bounds = f"{floor} to {ceiling}" if floor < ceiling else f"{floor} in every step"
    return SamplingCheck(quantity, bounds, observed, floor <= low and high <= ceiling)


def _stratum_counts(stream: TrainingStream) -> list[int]:
    return [int(count) for count in stream.allocation.before(stream.allocation.steps)]


def _unique_check(stream: TrainingStream, count_N: npt.NDArray[np.intp]) -> SamplingCheck:
    least, most, mean = 0, 0, 0.0
    for part, sampled in zip(stream.streams, _stratum_counts(stream), strict=True):
        unique = len(np.unique(part.rows_N))
        copies = len(part.rows_N) - unique
        if isinstance(part, WeightedStream):
            mean += float((1 - (1 - part.probabilities()) ** sampled).sum())
        # Copies of hard images may come before the last of the others.
        least += max(0, min(unique, sampled - copies))
        most += min(unique, sampled)
    observed = int((count_N > 0).sum())
    if mean:
        return SamplingCheck("different images", f"about {mean:,.0f}", f"{observed:,}", None)
    expected = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    return SamplingCheck("different images", expected, f"{observed:,}", least <= observed <= most)


def _times_check(stream: TrainingStream, count_N: npt.NDArray[np.intp]) -> SamplingCheck:
    limit, unbounded = 0, False
    for part, sampled in zip(stream.streams, _stratum_counts(stream), strict=True):
        if len(part.rows_N):
            _, times = np.unique(part.rows_N, return_counts=True)
            limit = max(limit, int(times.max()) * -(-sampled // len(part.rows_N)))
            unbounded = unbounded or isinstance(part, WeightedStream)
    observed = int(count_N.max())
    expected = "no limit" if unbounded else f"at most {limit}"
    return SamplingCheck("times one image comes", expected, f"up to {observed}", unbounded or observed <= limit)
