"""The sampling policies: one table entry per value of `sampler.sampling`.

To add a policy, add its name to the Literal of `config.Sampler.sampling` and an entry to POLICIES; this module refuses
to be imported while the two differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
import numpy.typing as npt

from cxrscale.config import Data, Sampler
from cxrscale.loader.hashing import COPY, Flags, Rows, hash64
from cxrscale.loader.sample_weights import finding_weights, hard_images
from cxrscale.loader.streams import ShuffledStream, Stream, WeightedStream
from cxrscale.shards import Manifest
from cxrscale.types import UserError

ALL, WITH, WITHOUT = 0, 1, 2
"""Kinds of images that a stratum can hold: every one, those with a finding present, those without any but labeled."""


@dataclass(frozen=True)
class SampleAttributes:
    """What some policies have to know of N images beside their labels."""

    dataset_N: Rows | None = None
    """For sampler.dataset_weights: index of each image's dataset in data.shards."""
    weight_N: npt.NDArray[np.float64] | None = None
    """For sampling=weighted: how often each is sampled, relative to the others."""
    hard_N: Flags | None = None
    """For sampling=hard: which are appended to each pass."""

    def take(self, index_P: Rows) -> SampleAttributes:
        """The attributes of some of the images."""
        return SampleAttributes(
            None if self.dataset_N is None else self.dataset_N[index_P],
            None if self.weight_N is None else self.weight_N[index_P],
            None if self.hard_N is None else self.hard_N[index_P],
        )


@dataclass(frozen=True)
class Stratum:
    """P images that are sampled as one stream."""

    purpose: int
    """Keeps the random numbers of strata apart (see `hashing`)."""
    rows_P: Rows
    """Rows of the manifest."""
    key_P: Rows
    attributes: SampleAttributes


def shuffled(stratum: Stratum, sampler: Sampler) -> Stream:
    """Each image once per pass."""
    return ShuffledStream(stratum.purpose, stratum.rows_P, stratum.key_P, sampler.seed)


def _constant_share(_: Sampler) -> list[tuple[float, ...]]:
    return [(1.0,)]


def _no_attributes(_manifest: Manifest, _rows: Rows, _data: Data, _sampler: Sampler) -> SampleAttributes:
    return SampleAttributes()


def _accept(_attributes: SampleAttributes, _sampler: Sampler) -> None:
    pass


@dataclass(frozen=True)
class Policy:
    """How training images are chosen."""

    description: str
    """One sentence for the preview page."""
    kinds: tuple[int, ...] = (ALL,)
    """The kind of images in each stratum."""
    shares: Callable[[Sampler], list[tuple[float, ...]]] = _constant_share
    """Each epoch's share of every kind in a batch; the last entry holds for all later epochs."""
    attributes: Callable[[Manifest, Rows, Data, Sampler], SampleAttributes] = _no_attributes
    """What the policy has to know of the manifest's rows that can be trained on."""
    check: Callable[[SampleAttributes, Sampler], None] = _accept
    """Raises a UserError where the images that `sampler.max_images` leaves are not enough."""
    stream: Callable[[Stratum, Sampler], Stream] = shuffled
    """The sequence in which a stratum's images come."""


def positive_shares(sampler: Sampler) -> list[float]:
    """Share of positives in each of the first `sampler.positive_share_epochs` epochs; the last one stays."""
    first, last = sampler.positive_share
    steps = sampler.positive_share_epochs - 1
    return [first + (last - first) * epoch / steps for epoch in range(steps)] + [last]


def _sliding_shares(sampler: Sampler) -> list[tuple[float, ...]]:
    return [(share, 1 - share) for share in positive_shares(sampler)]


def _weights(manifest: Manifest, rows: Rows, _data: Data, sampler: Sampler) -> SampleAttributes:
    return SampleAttributes(weight_N=finding_weights(manifest, sampler)[rows])


def _weighted(stratum: Stratum, sampler: Sampler) -> Stream:
    weight_P = stratum.attributes.weight_N
    assert weight_P is not None
    if not (weight_P > 0).any():
        raise UserError("sampler.weights gives every training image the weight 0; raise one of them")
    return WeightedStream(stratum.purpose, stratum.rows_P, stratum.key_P, weight_P, sampler.seed)


def _hardness(manifest: Manifest, rows: Rows, data: Data, sampler: Sampler) -> SampleAttributes:
    return SampleAttributes(hard_N=hard_images(manifest, rows, data, sampler))


def _check_hard(attributes: SampleAttributes, sampler: Sampler) -> None:
    if attributes.hard_N is None or not attributes.hard_N.any():
        raise UserError(
            f"sampler.max_images={sampler.max_images} leaves none of the hard images; raise it or use sampling=all"
        )


def _with_copies(stratum: Stratum, sampler: Sampler) -> Stream:
    """Each image once per pass, and the hard ones `sampler.hard_repeats` times more, under keys of their own."""
    assert stratum.attributes.hard_N is not None
    hard_H = np.flatnonzero(stratum.attributes.hard_N)
    copies = [hash64(COPY, number, stratum.key_P[hard_H]).view(np.int64) for number in range(sampler.hard_repeats)]
    rows_P = np.concatenate([stratum.rows_P, *(stratum.rows_P[hard_H] for _ in copies)])
    return shuffled(replace(stratum, rows_P=rows_P, key_P=np.concatenate([stratum.key_P, *copies])), sampler)


POLICIES: dict[str, Policy] = {
    "all": Policy("Every image once per pass, in a new order each time."),
    "positives": Policy("Only images with a finding present, each once per pass.", kinds=(WITH,)),
    "balanced": Policy(
        "As many images with a finding present as without in every step.",
        kinds=(WITH, WITHOUT),
        shares=lambda _: [(0.5, 0.5)],
    ),
    "ratio": Policy(
        "A set share of images with a finding present in every step, sliding over the epochs.",
        kinds=(WITH, WITHOUT),
        shares=_sliding_shares,
    ),
    "weighted": Policy(
        "Each image as often as its findings' weight says, sampled with replacement.",
        attributes=_weights,
        stream=_weighted,
    ),
    "hard": Policy(
        "Every image once per pass, and those that a model got most wrong several times.",
        attributes=_hardness,
        check=_check_hard,
        stream=_with_copies,
    ),
}
"""The policies by their name in `sampler.sampling`."""


def check_policies(names: Iterable[str], policies: Iterable[str]) -> None:
    """Compare the names that the configuration allows with those that have a policy.

    Raises:
        RuntimeError: they differ; names those on one side only.
    """
    missing, unknown = sorted(set(names) - set(policies)), sorted(set(policies) - set(names))
    if missing or unknown:
        raise RuntimeError(
            f"config.Sampler.sampling and loader.policies.POLICIES differ: without a policy {missing}, "
            f"not in the configuration {unknown}"
        )


check_policies(get_args(Sampler.model_fields["sampling"].annotation), POLICIES)
