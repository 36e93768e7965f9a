"""Which rank gets which image when: properties, over any number of images, workers and restarts."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cxrscale.config import Sampler
from cxrscale.loader.allocation import PERIOD, WHOLE, Allocation, cumulative_shares
from cxrscale.loader.hashing import GAMMA, hash64, mix64, uniform
from cxrscale.loader.policies import POLICIES, SampleAttributes, check_policies, positive_shares
from cxrscale.loader.sampler import (
    TrainingStream,
    epoch_indices,
    evaluation_indices,
    training_indices,
    training_stream,
)
from cxrscale.types import DistContext, UserError

Table = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.int64]]

counts = st.integers(1, 40)
worlds = st.integers(1, 5)
policy_names = st.sampled_from(sorted(POLICIES))
PINNED = {
    "all": "327841cff258d7d9",
    "positives": "756e06bb025cc2ec",
    "balanced": "e298e25667399255",
    "ratio": "4aff99cd6dbabd0d",
    "weighted": "6c5e1b4391464e89",
    "hard": "6d3dd91474671b02",
    "ratio, 2 datasets": "74d6790b1d5fcad7",
}


def table(count: int, seed: int = 0) -> Table:
    """Rows that do not begin at 0, labels with NaN, distinct keys of both signs; both states occur from 2 rows on."""
    rng = np.random.default_rng(seed)
    label_NF = rng.choice([0.0, 0.0, 1.0, np.nan], (count, 2)).astype(np.float32)
    label_NF[0], label_NF[-1] = 0, 1
    key_N = np.unique(rng.integers(-(2**63), 2**63 - 1, count + 5))[:count]
    return np.arange(count, dtype=np.int64) + 7, label_NF, rng.permutation(key_N)


def attributes(data: Table) -> SampleAttributes:
    """Datasets, weights and hardness that depend on the keys, so that shuffling the table shuffles them too."""
    order = np.argsort(np.argsort(data[2]))
    return SampleAttributes(order % 2, (order % 3).astype(np.float64) + (len(order) == 1), order % 4 == 0)


def settings_of(policy: str, **fields: Any) -> Sampler:
    """A sampler section with one policy, and the fields that this policy requires."""
    needed: dict[str, dict[str, Any]] = {
        "weighted": {"weights": {"Mass": 2}},
        "hard": {"hard_predictions": "given.parquet"},
    }
    return Sampler.model_validate({"sampling": policy, **needed.get(policy, {}), **fields})


def stream(
    data: Table, sampler: Sampler, steps: int, world: int = 1, epoch: int = 0, step: int = 0
) -> list[list[tuple[int, int]]]:
    """The valid (row, stream position) pairs of each global step, flattened in the order of the ranks."""
    opened = training_stream(*data, sampler, attributes(data))
    ranks = [
        list(islice(training_indices(opened, DistContext(rank, world), epoch, step), steps)) for rank in range(world)
    ]
    pairs = []
    for shares in zip(*ranks, strict=True):
        assert len({len(share.row_B) for share in shares}) == 1
        assert all(np.isin(share.row_B, data[0]).all() for share in shares)
        row = np.concatenate([share.row_B[share.valid_B] for share in shares])
        position = np.concatenate([share.stream_pos_B[share.valid_B] for share in shares])
        pairs.append(list(zip(row.tolist(), position.tolist(), strict=True)))
    return pairs


@given(counts, st.integers(1, 9), worlds)
def test_evaluation_has_each_row_once_and_equal_steps(count: int, batch: int, world: int) -> None:
    rows = np.arange(count, dtype=np.int64) * 3 + 1
    ranks = [list(evaluation_indices(rows, batch, DistContext(rank, world))) for rank in range(world)]
    assert len({len(steps) for steps in ranks}) == 1
    steps = [step for rank in ranks for step in rank]
    assert all(step.row_B.shape == step.stream_pos_B.shape == step.valid_B.shape == (batch,) for step in steps)
    assert all(np.isin(step.row_B, rows).all() for step in steps)
    assert sorted(np.concatenate([step.row_B[step.valid_B] for step in steps])) == rows.tolist()


@given(counts, st.integers(1, 13), st.integers(0, 3))
def test_each_pass_has_each_row_once(count: int, batch: int, seed: int) -> None:
    data = table(count)
    sampler = Sampler(seed=seed, batch_size=batch)
    pairs = [pair for step in stream(data, sampler, -(-3 * count // batch)) for pair in step]
    assert [position for _, position in pairs] == list(range(len(pairs)))
    passes = [sorted(row for row, _ in pairs[i * count : (i + 1) * count]) for i in range(3)]
    assert passes == [data[0].tolist()] * 3


def test_passes_and_seeds_have_orders_of_their_own() -> None:
    data = table(50)
    orders = [
        epoch_indices(training_stream(*data, Sampler(seed=seed, batch_size=50)), epoch)[0]
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert len({order.tobytes() for order in orders}) == 4
    assert all(sorted(order.ravel()) == data[0].tolist() for order in orders)


@given(st.integers(2, 40), st.integers(1, 13), worlds, policy_names)
def test_the_union_over_ranks_is_the_same_at_any_world(count: int, batch: int, world: int, policy: str) -> None:
    data, sampler = table(count), settings_of(policy, batch_size=batch)
    assert stream(data, sampler, 5, world) == stream(data, sampler, 5)


@given(st.integers(2, 40), st.integers(1, 13), policy_names, st.integers(0, 3), st.integers(0, 12))
def test_a_restart_gives_the_same_suffix(count: int, batch: int, policy: str, epoch: int, step: int) -> None:
    data, sampler = table(count), settings_of(policy, batch_size=batch)
    steps = training_stream(*data, sampler, attributes(data)).allocation.steps
    done = epoch * steps + step
    assert stream(data, sampler, 3, epoch=epoch, step=step) == stream(data, sampler, done + 3)[done:]


@given(st.integers(2, 40), policy_names, st.integers(0, 1 << 30))
def test_the_order_of_the_table_does_not_matter(count: int, policy: str, shuffle: int) -> None:
    rows, label_NF, key_N = table(count)
    sampler = settings_of(policy, batch_size=4)
    mixed = np.random.default_rng(shuffle).permutation(count)
    ours = stream((rows, label_NF, key_N), sampler, 6)
    theirs = stream((rows[mixed], label_NF[mixed], key_N[mixed]), sampler, 6)
    assert ours == theirs


def test_a_subset_is_fixed_nested_and_seeded() -> None:
    data = table(60)

    def chosen(subset: int, seed: int = 0, order: npt.NDArray[np.int64] | None = None) -> set[int]:
        rows = data if order is None else (data[0][order], data[1][order], data[2][order])
        sampler = Sampler(seed=seed, batch_size=5, max_images=subset)
        return {row for step in stream(rows, sampler, 60) for row, _ in step}

    assert len(chosen(10)) == 10
    assert chosen(10) < chosen(20)
    assert chosen(10) == chosen(10, order=np.arange(60)[::-1].copy())
    assert chosen(10) != chosen(10, seed=1)
    assert chosen(600) == set(data[0].tolist())


@settings(max_examples=40)
@given(st.integers(2, 40), st.integers(2, 13), worlds)
def test_balanced_steps_are_balanced_on_every_rank(count: int, batch: int, world: int) -> None:
    data = table(count)
    positive = dict(zip(data[0].tolist(), (data[1] == 1).any(axis=1).tolist(), strict=True))
    sampler = Sampler(batch_size=batch, sampling="balanced")
    for rank in range(world):
        for step in islice(training_indices(training_stream(*data, sampler), DistContext(rank, world)), 4):
            states = [positive[row] for row in step.row_B[step.valid_B].tolist()]
            assert abs(2 * sum(states) - len(states)) <= 1


@pytest.mark.parametrize("policy", ["balanced", "ratio"])
def test_an_unlabeled_image_is_not_one_without_a_finding(policy: str) -> None:
    # Two datasets, the second without the finding's labels: none of its images is sampled as a negative.
    rows, label_NF, key_N = table(40)
    label_NF[::3] = 0
    label_NF[20:] = np.nan
    sampler = settings_of(policy, batch_size=8)
    rows_seen = epoch_indices(training_stream(rows, label_NF, key_N, sampler), 0)[0]
    assert rows_seen.max() < rows[20]
    present_TG = (label_NF == 1).any(axis=1)[rows_seen - rows[0]]
    share = 0.5 if policy == "balanced" else 0.8
    assert np.abs(present_TG.sum(axis=1) - 8 * share).max() < 1
    partly = label_NF.copy()
    partly[20:, 1] = 0
    assert epoch_indices(training_stream(rows, partly, key_N, sampler), 0)[0].max() >= rows[20]


def test_positives_only() -> None:
    data = table(40)
    rows = {row for step in stream(data, Sampler(batch_size=4, sampling="positives"), 30) for row, _ in step}
    assert rows == set(data[0][(data[1] == 1).any(axis=1)].tolist())


@pytest.mark.parametrize(("policy", "length"), [("all", 30), ("positives", 6), ("balanced", 12)])
def test_an_epoch_is_a_pass(policy: str, length: int) -> None:
    rows, label_NF, key_N = table(30)
    label_NF[:] = 0
    label_NF[:6, 0] = 1
    opened = training_stream(rows, label_NF, key_N, settings_of(policy, batch_size=4))
    assert opened.epoch_length == length
    assert epoch_indices(opened, 0)[0].shape == (max(1, length // 4), 4)


def test_epoch_rows_are_what_training_yields() -> None:
    opened = training_stream(*table(23), Sampler(batch_size=5, steps_per_epoch=7))
    steps = list(islice(training_indices(opened, epoch=2), 7))
    row_TG, stream_pos_TG = epoch_indices(opened, 2)
    assert np.array_equal(row_TG, np.stack([step.row_B for step in steps]))
    assert np.array_equal(stream_pos_TG, np.stack([step.stream_pos_B for step in steps]))
    assert all(step.valid_B.all() for step in steps)


def test_more_workers_than_images_per_step() -> None:
    opened = training_stream(*table(9), Sampler(batch_size=2))
    ranks = [next(training_indices(opened, DistContext(rank, 4))) for rank in range(4)]
    assert [step.valid_B.tolist() for step in ranks] == [[True], [True], [False], [False]]


def test_an_empty_stream_is_refused_at_once() -> None:
    rows, label_NF, key_N = table(9)
    none, every = (rows, label_NF * 0, key_N), (rows, label_NF * 0 + 1, key_N)
    all_in_first = SampleAttributes(dataset_N=np.zeros(9, np.int64))
    cases: list[tuple[Table, Sampler, SampleAttributes, str]] = [
        (
            none,
            settings_of("positives"),
            SampleAttributes(),
            r"sampling=positives: no image has a finding present; use sampling=all",
        ),
        (
            every,
            settings_of("balanced", max_images=3),
            SampleAttributes(),
            r"no image is labeled as without a finding among the 3 that sampler.max_images=3 leaves; raise sam",
        ),
        (
            (rows[:0], label_NF[:0], key_N[:0]),
            Sampler(),
            SampleAttributes(),
            r"no image is left to train on; check data.train",
        ),
        (none, settings_of("ratio"), SampleAttributes(), r"sampling=ratio: no image has a finding present"),
        (
            none,
            Sampler(dataset_weights=(1, 1)),
            all_in_first,
            r"left to train on in data.shards\[1\]; leave sampler.dataset_weights or that entry",
        ),
        (
            none,
            settings_of("weighted"),
            SampleAttributes(weight_N=np.zeros(9)),
            r"sampler.weights gives every .* raise one",
        ),
        (
            none,
            settings_of("hard", max_images=2),
            SampleAttributes(hard_N=np.zeros(9, np.bool_)),
            r"sampler.max_images=2 leaves none .* raise",
        ),
    ]
    for data, sampler, known, message in cases:
        with pytest.raises(UserError, match=message) as error:
            training_stream(*data, sampler, known)
        assert "\n" not in str(error.value)


def test_a_stratum_with_a_share_of_0_may_be_empty() -> None:
    rows, label_NF, key_N = table(9)
    sampler = settings_of("ratio", batch_size=4, positive_share=(0, 0))
    assert stream((rows, label_NF * 0, key_N), sampler, 3)


def test_hashes_are_splitmix64_and_bijective() -> None:
    # The first outputs of SplitMix64 from state 0, as published with the algorithm.
    state = GAMMA * np.arange(1, 4, dtype=np.uint64)
    assert [hex(word) for word in mix64(state)] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]
    assert len(np.unique(hash64(3, np.arange(100_000)))) == 100_000


def test_uniform_numbers_are_uniform() -> None:
    value = uniform(hash64(1, np.arange(200_000)))
    assert value.min() >= 0
    assert value.max() < 1
    # Standard error of a bin of 10,000: 100.
    assert np.abs(np.histogram(value, 20, (0, 1))[0] - 10_000).max() < 500
    assert abs(np.corrcoef(value[:-1], value[1:])[0, 1]) < 0.01


# All policy_names and mixtures at once


@dataclass(frozen=True)
class Case:
    """A sampler section over a table, and a position in the training stream."""

    data: Table
    sampler: Sampler
    world: int
    epoch: int
    step: int

    @property
    def opened(self) -> TrainingStream:
        return training_stream(*self.data, self.sampler, attributes(self.data))


shares = st.floats(0, 1).map(lambda share: round(share, 3))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any settings with up to two datasets; both states occur in both."""
    data = table(draw(st.integers(8, 40)), draw(st.integers(0, 9)))
    dataset_N = attributes(data).dataset_N
    assert dataset_N is not None
    for number in (0, 1):
        members = np.flatnonzero(dataset_N == number)
        data[1][members[0]], data[1][members[-1]] = 0, 1
    sampler = settings_of(
        draw(policy_names),
        seed=draw(st.integers(0, 3)),
        batch_size=draw(st.integers(1, 17)),
        dataset_weights=draw(st.sampled_from([(), (1, 1), (3, 1), (0.45, 0.21)])),
        steps_per_epoch=draw(st.sampled_from([None, 1, 4])),
        positive_share=draw(st.tuples(shares, shares)),
        positive_share_epochs=draw(st.integers(1, 4)),
        hard_repeats=draw(st.integers(1, 3)),
    )
    return Case(data, sampler, draw(worlds), draw(st.integers(0, 6)), draw(st.integers(0, 6)))


def check_worlds(case: Case) -> None:
    """The same images in the same global step, in the same order, at any number of workers."""
    at = case.epoch, case.step
    assert stream(case.data, case.sampler, 3, case.world, *at) == stream(case.data, case.sampler, 3, 1, *at)


def check_restart(case: Case) -> None:
    """Resuming at (epoch, step) gives what an uninterrupted run would have given."""
    done = case.epoch * case.opened.allocation.steps + case.step
    row_TG, stream_pos_TG = case.opened.take(0, done + 3)
    suffix = stream(case.data, case.sampler, 3, epoch=case.epoch, step=case.step)
    expected = [
        list(zip(row_G.tolist(), stream_pos_G.tolist(), strict=True))
        for row_G, stream_pos_G in zip(row_TG[done:], stream_pos_TG[done:], strict=True)
    ]
    assert suffix == expected


def check_shares(case: Case) -> None:
    """Each dataset, and with one or two of them the positives, has its share of every step, to within a row."""
    known, sampler, opened = attributes(case.data), case.sampler, case.opened
    assert known.dataset_N is not None
    order = np.argsort(case.data[0])
    positive = (case.data[1] == 1).any(axis=1)
    first = case.epoch * opened.allocation.steps + case.step
    row_TG, stream_pos_TG = opened.take(first, 6)
    index_TG = order[np.searchsorted(case.data[0][order], row_TG)]
    assert stream_pos_TG.ravel().tolist() == list(range(first * sampler.batch_size, (first + 6) * sampler.batch_size))
    for step, index_G in enumerate(index_TG, first):
        epoch = min(step // opened.allocation.steps, sampler.positive_share_epochs - 1)
        share = {"balanced": 0.5, "ratio": positive_shares(sampler)[epoch], "positives": 1.0}.get(sampler.sampling)
        if share is not None:
            assert abs(int(positive[index_G].sum()) - share * sampler.batch_size) < 1 + 1e-6
        for number, part in enumerate(sampler.dataset_weights):
            count = int((known.dataset_N[index_G] == number).sum())
            assert abs(count - part / sum(sampler.dataset_weights) * sampler.batch_size) < 1 + 1e-6


def check_passes(case: Case) -> None:
    """Each stream gives every one of its images as often as it should before any of them comes again."""
    opened, sampler = case.opened, case.sampler
    if sampler.sampling == "weighted":
        return
    longest = max(len(stream.rows_N) for stream in opened.streams)
    stratum_TG, index_TG = opened.allocation.slots(0, 2 * longest + case.step)
    row_TG, _ = opened.take(0, 2 * longest + case.step)
    for stratum, part in enumerate(opened.streams):
        sampled = row_TG[stratum_TG == stratum]
        assert index_TG[stratum_TG == stratum].tolist() == list(range(len(sampled)))
        for start in range(0, len(sampled) - len(part.rows_N) + 1, len(part.rows_N)):
            assert sorted(sampled[start : start + len(part.rows_N)]) == sorted(part.rows_N)


def check_an_epoch_has_no_repeats(case: Case) -> None:
    """With steps_per_epoch left open, no image comes twice within an epoch's length from the start of a pass."""
    opened, sampler = case.opened, case.sampler
    if sampler.sampling in ("weighted", "hard") or sampler.steps_per_epoch or sampler.batch_size > opened.epoch_length:
        return
    # The first epoch: in later ones streams of different lengths are in the midst of their passes.
    row_TG, _ = opened.take(0, opened.allocation.steps)
    # A step's share is rounded up to a row for each stream.
    repeats = row_TG.size - len(np.unique(row_TG))
    assert repeats <= 2 * len(opened.streams)
    assert len(opened.streams) > 1 or repeats == 0


CHECKS = [check_worlds, check_restart, check_shares, check_passes, check_an_epoch_has_no_repeats]


@pytest.mark.parametrize("check", CHECKS)
@settings(max_examples=50, deadline=None)
@given(case=cases())
def test_of_any_settings(check: Callable[[Case], None], case: Case) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_ten_thousand_settings(case: Case) -> None:
    for check in CHECKS:
        check(case)


@given(
    st.integers(1, 100),
    st.integers(1, 50),
    st.lists(st.lists(st.integers(0, 1000), min_size=3, max_size=3).filter(any), min_size=1, max_size=4),
    st.integers(0, 5000),
)
def test_an_allocation_is_exact_in_every_step_and_close_in_sum(
    batch: int, steps: int, parts: list[list[int]], step: int
) -> None:
    allocation = Allocation(batch, steps, cumulative_shares(parts))
    share_EK = np.diff(allocation.edge_EK, axis=1) / WHOLE
    assert np.allclose(share_EK, np.array(parts) / np.sum(parts, axis=1, keepdims=True), atol=1e-8)
    stratum_TG, index_TG = allocation.slots(step, 9)
    for number, stratum_G in enumerate(stratum_TG, step):
        want = batch * share_EK[min(number // steps, len(parts) - 1)]
        for strata in ([0], [1], [2], [0, 1], [1, 2], [2, 0]):
            assert abs(np.isin(stratum_G, strata).sum() - want[strata].sum()) < 1
        assert (allocation.before(number + 1) - allocation.before(number)).tolist() == np.bincount(
            stratum_G, minlength=3
        ).tolist()
    for stratum in range(3):
        held = index_TG[stratum_TG == stratum]
        assert held.tolist() == list(
            range(allocation.before(step)[stratum], allocation.before(step)[stratum] + len(held))
        )
    epoch_T = np.minimum(np.arange(step) // steps, len(parts) - 1)
    # Each change of shares may add the few rows by which a van der Corput sequence deviates.
    deviation = np.abs(allocation.before(step) - batch * share_EK[epoch_T].sum(axis=0)).max()
    assert deviation <= 6 * len(parts) + step / PERIOD


def test_the_positive_share_slides_and_stays() -> None:
    data = table(200)
    sampler = Sampler(
        sampling="ratio", batch_size=10, steps_per_epoch=7, positive_share=(0.8, 0.4), positive_share_epochs=5
    )
    positive = dict(zip(data[0].tolist(), (data[1] == 1).any(axis=1).tolist(), strict=True))
    seen = [sum(positive[row] for row, _ in step) for step in stream(data, sampler, 7 * 7)]
    assert seen == [8] * 7 + [7] * 7 + [6] * 7 + [5] * 7 + [4] * 21
    assert positive_shares(Sampler(positive_share=(0.8, 0.4), positive_share_epochs=1)) == [0.4]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_strata_alternate_within_a_rank(world: int) -> None:
    """Each rank's block has its part of the positives, to within a row."""
    data = table(60)
    sampler = Sampler(sampling="ratio", batch_size=32, positive_share=(0.25, 0.25))
    positive = dict(zip(data[0].tolist(), (data[1] == 1).any(axis=1).tolist(), strict=True))
    for rank in range(world):
        for step in islice(training_indices(training_stream(*data, sampler), DistContext(rank, world)), 5):
            assert abs(sum(positive[row] for row in step.row_B.tolist()) - 8 / world) <= 1


def test_weights_are_frequencies() -> None:
    data = table(30)
    known = SampleAttributes(weight_N=np.arange(30, dtype=np.float64) % 4)
    row_TG, _ = training_stream(*data, settings_of("weighted", batch_size=500), known).take(0, 200)
    count_N = np.bincount(row_TG.ravel() - 7, minlength=30)
    assert known.weight_N is not None
    expected = row_TG.size * known.weight_N / known.weight_N.sum()
    assert (count_N[expected == 0] == 0).all()
    # Five standard errors of a multinomial's counts.
    assert (np.abs(count_N - expected) <= 5 * np.sqrt(expected)).all()


def test_hard_images_are_appended() -> None:
    data = table(20)
    hard_N = np.arange(20) % 7 == 0
    opened = training_stream(*data, settings_of("hard", batch_size=2, hard_repeats=3), SampleAttributes(hard_N=hard_N))
    assert opened.epoch_length == 20 + 3 * 3
    row_TG, _ = opened.take(0, 29)
    count_N = np.bincount(row_TG.ravel() - 7, minlength=20)
    assert count_N.tolist() == [8 if hard else 2 for hard in hard_N]
    halves = row_TG.ravel()[:29], row_TG.ravel()[29:]
    assert sorted(halves[0]) == sorted(halves[1])
    assert halves[0].tolist() != halves[1].tolist()


def test_an_epoch_of_a_ratio_or_of_weighted_datasets_ends_before_a_stream_repeats() -> None:
    rows, label_NF, key_N = table(100)
    label_NF[:] = 0
    label_NF[:24, 0] = 1
    ratio = Sampler(sampling="ratio", batch_size=1, positive_share=(0.8, 0.4))
    assert training_stream(rows, label_NF, key_N, ratio).epoch_length == 30
    known = SampleAttributes(dataset_N=(np.arange(100) < 10).astype(np.int64))
    assert training_stream(rows, label_NF, key_N, Sampler(dataset_weights=(3, 1)), known).epoch_length == 40


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("count", [112_120, 10_000_000])
def test_planning_takes_seconds(count: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Prints the time of a stream's first step and of later ones (batch 256, mean), for NIH and for 10 million."""
    rng = np.random.default_rng(0)
    rows = np.arange(count, dtype=np.int64)
    label_NF = (rng.random((count, 14)) < 0.04).astype(np.float32)
    key_N = rng.integers(-(2**63), 2**63 - 1, count)
    known = SampleAttributes(rows % 3, 1 + rng.random(count), rng.random(count) < 0.1)
    plans = {name: settings_of(name, batch_size=256) for name in POLICIES}
    plans["ratio of 3 datasets"] = settings_of("ratio", batch_size=256, dataset_weights=(5, 3, 2))
    for name, sampler in plans.items():
        began = time.perf_counter()
        steps = training_indices(training_stream(rows, label_NF, key_N, sampler, known), epoch=7, step=3)
        next(steps)
        first = time.perf_counter() - began
        later = []
        for _ in range(200):
            began = time.perf_counter()
            next(steps)
            later.append(time.perf_counter() - began)
        with capsys.disabled():
            mean = 1e6 * sum(sorted(later)[:-3]) / 197
            print(f"\n{count:>10,} {name:19} first step {first:6.3f} s, then {mean:6.0f} us per step", end="")
        assert first < 60


def test_each_policy_of_the_configuration_is_in_the_table_and_described() -> None:
    for policy in POLICIES.values():
        assert policy.description.endswith(".")
    check_policies(["all", "hard"], ["hard", "all"])
    with pytest.raises(RuntimeError, match=r"without a policy \['curriculum'\], not in the configuration \[\]"):
        check_policies([*POLICIES, "curriculum"], POLICIES)
    with pytest.raises(RuntimeError, match=r"without a policy \[\], not in the configuration \['hard'\]"):
        check_policies(set(POLICIES) - {"hard"}, POLICIES)


def test_the_order_of_the_batches_is_pinned() -> None:
    """Digests of two epochs: a change of the order makes old runs irreproducible, so it must never be an accident."""
    data = table(200)
    cases = {name: settings_of(name, batch_size=16, seed=3) for name in POLICIES}
    cases["ratio, 2 datasets"] = settings_of("ratio", batch_size=16, dataset_weights=(3, 1), max_images=150)
    digests = {}
    for name, sampler in cases.items():
        opened = training_stream(*data, sampler, attributes(data))
        epochs = [array.tobytes() for epoch in (0, 1) for array in epoch_indices(opened, epoch)]
        digests[name] = hashlib.sha256(b"".join(epochs)).hexdigest()[:16]
    assert digests == PINNED
