"""Who gets which image when: properties, over any number of images, workers and restarts."""

from __future__ import annotations

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
from cxrscale.loader import sampler as planning
from cxrscale.loader.allocation import PERIOD, WHOLE, Allocation, cumulative_shares
from cxrscale.loader.hashing import GAMMA, hash64, mix64, uniform
from cxrscale.loader.sampler import SampleAttributes
from cxrscale.types import UserError

Table = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.int64]]

counts = st.integers(1, 40)
worlds = st.integers(1, 5)
samplings = st.sampled_from(["all", "positives", "balanced", "ratio", "weighted", "hard"])


def table(count: int, seed: int = 0) -> Table:
    """Rows that do not begin at 0, labels with NaN, distinct keys of both signs; both states occur from 2 rows on."""
    rng = np.random.default_rng(seed)
    label_NF = rng.choice([0.0, 0.0, 1.0, np.nan], (count, 2)).astype(np.float32)
    label_NF[0], label_NF[-1] = 0, 1
    key_N = np.unique(rng.integers(-(2**63), 2**63 - 1, count + 5))[:count]
    return np.arange(count, dtype=np.int64) + 7, label_NF, rng.permutation(key_N)


def traits(data: Table) -> SampleAttributes:
    """Sets, weights and hardness that hang on the keys, so that shuffling the table shuffles them along."""
    order = np.argsort(np.argsort(data[2]))
    return SampleAttributes(order % 2, (order % 3).astype(np.float64) + (len(order) == 1), order % 4 == 0)


def settled(sampling: str, **fields: Any) -> Sampler:
    """A plan of one sampling, with what that sampling cannot do without."""
    needed: dict[str, dict[str, Any]] = {"weighted": {"weights": {"Mass": 2}}, "hard": {"hard_scores": "given.parquet"}}
    return Sampler.model_validate({"sampling": sampling, **needed.get(sampling, {}), **fields})


def stream(
    data: Table,
    sampler: Sampler,
    steps: int,
    world: int = 1,
    epoch: int = 0,
    step: int = 0,
    given: SampleAttributes | None = None,
) -> list[list[tuple[int, int]]]:
    """The valid (row, draw) of each global step, flattened in the order of the ranks."""
    given = given or traits(data)
    ranks = [
        list(islice(planning.training_indices(*data, sampler, rank, world, epoch, step, given), steps))
        for rank in range(world)
    ]
    pairs = []
    for shares in zip(*ranks, strict=True):
        assert len({len(share.row_B) for share in shares}) == 1
        assert all(np.isin(share.row_B, data[0]).all() for share in shares)
        row = np.concatenate([share.row_B[share.valid_B] for share in shares])
        drawn = np.concatenate([share.draw_B[share.valid_B] for share in shares])
        pairs.append(list(zip(row.tolist(), drawn.tolist(), strict=True)))
    return pairs


@given(counts, st.integers(1, 9), worlds)
def test_evaluation_has_each_row_once_and_equal_steps(count: int, batch: int, world: int) -> None:
    rows = np.arange(count, dtype=np.int64) * 3 + 1
    ranks = [list(planning.evaluation_indices(rows, batch, rank, world)) for rank in range(world)]
    assert len({len(steps) for steps in ranks}) == 1
    steps = [step for rank in ranks for step in rank]
    assert all(step.row_B.shape == step.draw_B.shape == step.valid_B.shape == (batch,) for step in steps)
    assert all(np.isin(step.row_B, rows).all() for step in steps)
    assert sorted(np.concatenate([step.row_B[step.valid_B] for step in steps])) == rows.tolist()


@given(counts, st.integers(1, 13), st.integers(0, 3))
def test_each_pass_has_each_row_once(count: int, batch: int, seed: int) -> None:
    data = table(count)
    sampler = Sampler(seed=seed, batch_size=batch)
    pairs = [pair for step in stream(data, sampler, -(-3 * count // batch)) for pair in step]
    assert [drawn for _, drawn in pairs] == list(range(len(pairs)))
    passes = [sorted(row for row, _ in pairs[i * count : (i + 1) * count]) for i in range(3)]
    assert passes == [data[0].tolist()] * 3


def test_passes_and_seeds_have_orders_of_their_own() -> None:
    data = table(50)
    orders = [
        planning.epoch_indices(*data, Sampler(seed=seed, batch_size=50), epoch)[0]
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert len({order.tobytes() for order in orders}) == 4
    assert all(sorted(order.ravel()) == data[0].tolist() for order in orders)


@given(st.integers(2, 40), st.integers(1, 13), worlds, samplings)
def test_the_union_over_ranks_is_the_same_at_any_world(count: int, batch: int, world: int, sampling: str) -> None:
    data, sampler = table(count), settled(sampling, batch=batch)
    assert stream(data, sampler, 5, world) == stream(data, sampler, 5)


@given(st.integers(2, 40), st.integers(1, 13), samplings, st.integers(0, 3), st.integers(0, 12))
def test_a_restart_gives_the_same_suffix(count: int, batch: int, sampling: str, epoch: int, step: int) -> None:
    data, sampler = table(count), settled(sampling, batch=batch)
    steps = planning.training_stream(*data, sampler, traits(data)).deal.steps
    done = epoch * steps + step
    assert stream(data, sampler, 3, epoch=epoch, step=step) == stream(data, sampler, done + 3)[done:]


@given(st.integers(2, 40), samplings, st.integers(0, 1 << 30))
def test_the_order_of_the_table_does_not_matter(count: int, sampling: str, shuffle: int) -> None:
    rows, label_NF, key_N = table(count)
    sampler = settled(sampling, batch=4)
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
        for step in islice(planning.training_indices(*data, sampler, rank, world), 4):
            states = [positive[row] for row in step.row_B[step.valid_B].tolist()]
            assert abs(2 * sum(states) - len(states)) <= 1


def test_positives_only() -> None:
    data = table(40)
    rows = {row for step in stream(data, Sampler(batch_size=4, sampling="positives"), 30) for row, _ in step}
    assert rows == set(data[0][(data[1] == 1).any(axis=1)].tolist())


@pytest.mark.parametrize(("sampling", "length"), [("all", 30), ("positives", 6), ("balanced", 12)])
def test_an_epoch_is_a_pass(sampling: str, length: int) -> None:
    rows, label_NF, key_N = table(30)
    label_NF[:] = 0
    label_NF[:6, 0] = 1
    sampler = Sampler.model_validate({"batch": 4, "sampling": sampling})
    assert planning.training_stream(rows, label_NF, key_N, sampler).pass_length == length
    assert planning.epoch_indices(rows, label_NF, key_N, sampler, 0)[0].shape == (max(1, length // 4), 4)


def test_epoch_rows_are_what_training_yields() -> None:
    data, sampler = table(23), Sampler(batch_size=5, steps_per_epoch=7)
    steps = list(islice(planning.training_indices(*data, sampler, epoch=2), 7))
    row_SG, draw_SG = planning.epoch_indices(*data, sampler, 2)
    assert np.array_equal(row_SG, np.stack([step.row_B for step in steps]))
    assert np.array_equal(draw_SG, np.stack([step.draw_B for step in steps]))
    assert all(step.valid_B.all() for step in steps)


def test_more_workers_than_images_a_step() -> None:
    data = table(9)
    ranks = [next(planning.training_indices(*data, Sampler(batch_size=2), rank, 4)) for rank in range(4)]
    assert [step.valid_B.tolist() for step in ranks] == [[True], [True], [False], [False]]


def test_an_empty_stream_is_refused_at_once() -> None:
    rows, label_NF, key_N = table(9)
    none, every = (rows, label_NF * 0, key_N), (rows, label_NF * 0 + 1, key_N)
    here = SampleAttributes(set_N=np.zeros(9, np.int64))
    cases: list[tuple[Table, Sampler, SampleAttributes, str]] = [
        (
            none,
            settled("positives"),
            SampleAttributes(),
            r"sampling=positives: no image has a finding present; use sampling=all",
        ),
        (
            every,
            settled("balanced", subset=3),
            SampleAttributes(),
            r"no image is without a finding among the 3 that sampler.max_images=3 leaves; raise sampler.max_images or use",
        ),
        (
            (rows[:0], label_NF[:0], key_N[:0]),
            Sampler(),
            SampleAttributes(),
            r"no image is left to train on; check data.train",
        ),
        (none, settled("ratio"), SampleAttributes(), r"sampling=ratio: no image has a finding present"),
        (
            none,
            Sampler(dataset_weights=(1, 1)),
            here,
            r"left to train on in data.shards\[1\]; leave sampler.dataset_weights or that entry",
        ),
        (
            none,
            settled("weighted"),
            SampleAttributes(weight_N=np.zeros(9)),
            r"sampler.weights gives every .* raise one",
        ),
        (
            none,
            settled("hard", subset=2),
            SampleAttributes(hard_N=np.zeros(9, np.bool_)),
            r"sampler.max_images=2 leaves none .* raise",
        ),
    ]
    for data, sampler, known, message in cases:
        with pytest.raises(UserError, match=message) as error:
            planning.training_indices(*data, sampler, traits=known)
        assert "\n" not in str(error.value)


def test_a_side_that_is_never_drawn_from_may_be_empty() -> None:
    rows, label_NF, key_N = table(9)
    sampler = settled("ratio", batch=4, positive_share=(0, 0))
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


# All samplings and mixtures at once


@dataclass(frozen=True)
class Case:
    """A plan over a table, and a place in its stream."""

    data: Table
    sampler: Sampler
    world: int
    epoch: int
    step: int

    @property
    def sampling(self) -> planning.TrainingStream:
        return planning.training_stream(*self.data, self.sampler, traits(self.data))


shares = st.floats(0, 1).map(lambda share: round(share, 3))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any plan of up to two sets; both states occur in both."""
    data = table(draw(st.integers(8, 40)), draw(st.integers(0, 9)))
    set_N = traits(data).set_N
    assert set_N is not None
    for number in (0, 1):
        members = np.flatnonzero(set_N == number)
        data[1][members[0]], data[1][members[-1]] = 0, 1
    sampler = settled(
        draw(samplings),
        seed=draw(st.integers(0, 3)),
        batch=draw(st.integers(1, 17)),
        mix=draw(st.sampled_from([(), (1, 1), (3, 1), (0.45, 0.21)])),
        steps_per_epoch=draw(st.sampled_from([None, 1, 4])),
        positive_share=draw(st.tuples(shares, shares)),
        share_epochs=draw(st.integers(1, 4)),
        hard_repeats=draw(st.integers(1, 3)),
    )
    return Case(data, sampler, draw(worlds), draw(st.integers(0, 6)), draw(st.integers(0, 6)))


def check_worlds(case: Case) -> None:
    """The same images in the same global step, in the same order, at any number of workers."""
    at = case.epoch, case.step
    assert stream(case.data, case.sampler, 3, case.world, *at) == stream(case.data, case.sampler, 3, 1, *at)


def check_restart(case: Case) -> None:
    """Going on at (epoch, step) gives what going through to it would have given."""
    done = case.epoch * case.sampling.deal.steps + case.step
    whole, whole_draw = case.sampling.take(0, done + 3)
    suffix = stream(case.data, case.sampler, 3, epoch=case.epoch, step=case.step)
    expected = [
        list(zip(row_G.tolist(), draw_G.tolist(), strict=True))
        for row_G, draw_G in zip(whole[done:], whole_draw[done:], strict=True)
    ]
    assert suffix == expected


def check_shares(case: Case) -> None:
    """Each set, and with one or two sets the positives, have their share of every step, up to less than a row."""
    given, sampler, sampling = traits(case.data), case.sampler, case.sampling
    assert given.set_N is not None
    order = np.argsort(case.data[0])
    positive = (case.data[1] == 1).any(axis=1)
    first = case.epoch * sampling.deal.steps + case.step
    row_TG, draw_TG = sampling.take(first, 6)
    place_TG = order[np.searchsorted(case.data[0][order], row_TG)]
    assert draw_TG.ravel().tolist() == list(range(first * sampler.batch_size, (first + 6) * sampler.batch_size))
    for step, place_G in enumerate(place_TG, first):
        epoch = min(step // sampling.deal.steps, sampler.positive_share_epochs - 1)
        share = {"balanced": 0.5, "ratio": planning.positive_shares(sampler)[epoch], "positives": 1.0}.get(
            sampler.sampling
        )
        if share is not None:
            assert abs(int(positive[place_G].sum()) - share * sampler.batch_size) < 1 + 1e-6
        for number, part in enumerate(sampler.dataset_weights):
            here = int((given.set_N[place_G] == number).sum())
            assert abs(here - part / sum(sampler.dataset_weights) * sampler.batch_size) < 1 + 1e-6


def check_passes(case: Case) -> None:
    """Each stream gives every one of its images as often as it should before any of them comes again."""
    sampling, sampler = case.sampling, case.sampler
    if sampler.sampling == "weighted":
        return
    longest = max(len(stream.rows_N) for stream in sampling.streams)
    lane_TG, index_TG = sampling.deal.slots(0, 2 * longest + case.step)
    row_TG, _ = sampling.take(0, 2 * longest + case.step)
    for lane, part in enumerate(sampling.streams):
        drawn = row_TG[lane_TG == lane]
        assert index_TG[lane_TG == lane].tolist() == list(range(len(drawn)))
        for start in range(0, len(drawn) - len(part.rows_N) + 1, len(part.rows_N)):
            assert sorted(drawn[start : start + len(part.rows_N)]) == sorted(part.rows_N)


def check_an_epoch_has_no_repeats(case: Case) -> None:
    """With steps_per_epoch left open, no image comes twice within an epoch's length from the start of a pass."""
    sampling, sampler = case.sampling, case.sampler
    if sampler.sampling in ("weighted", "hard") or sampler.steps_per_epoch or sampler.batch_size > sampling.pass_length:
        return
    # The first epoch: in later ones streams of different lengths are in the midst of their passes.
    row_TG, _ = sampling.take(0, sampling.deal.steps)
    # A step's share is rounded up to a row for each stream.
    repeats = row_TG.size - len(np.unique(row_TG))
    assert repeats <= 2 * len(sampling.streams)
    assert len(sampling.streams) > 1 or repeats == 0


CHECKS = [check_worlds, check_restart, check_shares, check_passes, check_an_epoch_has_no_repeats]


@pytest.mark.parametrize("check", CHECKS)
@settings(max_examples=50, deadline=None)
@given(case=cases())
def test_of_any_plan(check: Callable[[Case], None], case: Case) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_ten_thousand_plans(case: Case) -> None:
    for check in CHECKS:
        check(case)


@given(
    st.integers(1, 100),
    st.integers(1, 50),
    st.lists(st.lists(st.integers(0, 1000), min_size=3, max_size=3).filter(any), min_size=1, max_size=4),
    st.integers(0, 5000),
)
def test_a_deal_is_exact_in_every_step_and_close_in_sum(
    batch: int, steps: int, parts: list[list[int]], step: int
) -> None:
    deal = Allocation(batch, steps, cumulative_shares(parts))
    share_EL = np.diff(deal.edge_EL, axis=1) / WHOLE
    assert np.allclose(share_EL, np.array(parts) / np.sum(parts, axis=1, keepdims=True), atol=1e-8)
    lane_TG, index_TG = deal.slots(step, 9)
    for number, lane_G in enumerate(lane_TG, step):
        want = batch * share_EL[min(number // steps, len(parts) - 1)]
        for lanes in ([0], [1], [2], [0, 1], [1, 2], [2, 0]):
            assert abs(np.isin(lane_G, lanes).sum() - want[lanes].sum()) < 1
        assert (deal.before(number + 1) - deal.before(number)).tolist() == np.bincount(lane_G, minlength=3).tolist()
    for lane in range(3):
        held = index_TG[lane_TG == lane]
        assert held.tolist() == list(range(deal.before(step)[lane], deal.before(step)[lane] + len(held)))
    epoch_T = np.minimum(np.arange(step) // steps, len(parts) - 1)
    # Each change of shares may add the few rows by which a van der Corput sequence strays.
    strayed = np.abs(deal.before(step) - batch * share_EL[epoch_T].sum(axis=0)).max()
    assert strayed <= 6 * len(parts) + step / PERIOD


def test_the_positive_share_slides_and_stays() -> None:
    data = table(200)
    sampler = Sampler(
        sampling="ratio", batch_size=10, steps_per_epoch=7, positive_share=(0.8, 0.4), positive_share_epochs=5
    )
    positive = dict(zip(data[0].tolist(), (data[1] == 1).any(axis=1).tolist(), strict=True))
    seen = [sum(positive[row] for row, _ in step) for step in stream(data, sampler, 7 * 7)]
    assert seen == [8] * 7 + [7] * 7 + [6] * 7 + [5] * 7 + [4] * 21
    assert planning.positive_shares(Sampler(positive_share=(0.8, 0.4), positive_share_epochs=1)) == [0.4]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_lanes_alternate_within_a_rank(world: int) -> None:
    """Each rank's block has its part of the positives, to within a row."""
    data = table(60)
    sampler = Sampler(sampling="ratio", batch_size=32, positive_share=(0.25, 0.25))
    positive = dict(zip(data[0].tolist(), (data[1] == 1).any(axis=1).tolist(), strict=True))
    for rank in range(world):
        for step in islice(planning.training_indices(*data, sampler, rank, world), 5):
            assert abs(sum(positive[row] for row in step.row_B.tolist()) - 8 / world) <= 1


def test_weights_are_frequencies() -> None:
    data = table(30)
    given = SampleAttributes(weight_N=np.arange(30, dtype=np.float64) % 4)
    row_TG, _ = planning.training_stream(*data, settled("weighted", batch=500), given).take(0, 200)
    count_N = np.bincount(row_TG.ravel() - 7, minlength=30)
    assert given.weight_N is not None
    expected = row_TG.size * given.weight_N / given.weight_N.sum()
    assert (count_N[expected == 0] == 0).all()
    # Five standard errors of a multinomial's counts.
    assert (np.abs(count_N - expected) <= 5 * np.sqrt(expected)).all()


def test_hard_images_are_appended() -> None:
    data = table(20)
    hard_N = np.arange(20) % 7 == 0
    sampling = planning.training_stream(
        *data, settled("hard", batch=2, hard_repeats=3), SampleAttributes(hard_N=hard_N)
    )
    assert sampling.pass_length == 20 + 3 * 3
    row_TG, _ = sampling.take(0, 29)
    count_N = np.bincount(row_TG.ravel() - 7, minlength=20)
    assert count_N.tolist() == [8 if hard else 2 for hard in hard_N]
    halves = row_TG.ravel()[:29], row_TG.ravel()[29:]
    assert sorted(halves[0]) == sorted(halves[1])
    assert halves[0].tolist() != halves[1].tolist()


def test_an_epoch_of_a_ratio_or_mix_ends_before_a_stream_repeats() -> None:
    rows, label_NF, key_N = table(100)
    label_NF[:] = 0
    label_NF[:24, 0] = 1
    ratio = Sampler(sampling="ratio", batch_size=1, positive_share=(0.8, 0.4))
    assert planning.training_stream(rows, label_NF, key_N, ratio).pass_length == 30
    given = SampleAttributes(set_N=(np.arange(100) < 10).astype(np.int64))
    assert planning.training_stream(rows, label_NF, key_N, Sampler(dataset_weights=(3, 1)), given).pass_length == 40


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("count", [112_120, 10_000_000])
def test_planning_takes_seconds(count: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Prints what a stream costs to begin, and a step in its midst (batch 256, median), over NIH and 10 million."""
    rng = np.random.default_rng(0)
    rows = np.arange(count, dtype=np.int64)
    label_NF = (rng.random((count, 14)) < 0.04).astype(np.float32)
    key_N = rng.integers(-(2**63), 2**63 - 1, count)
    given = SampleAttributes(rows % 3, 1 + rng.random(count), rng.random(count) < 0.1)
    plans = {name: settled(name, batch=256) for name in ("all", "positives", "balanced", "ratio", "weighted", "hard")}
    plans["ratio of 3 sets"] = settled("ratio", batch=256, mix=(5, 3, 2))
    for name, sampler in plans.items():
        began = time.perf_counter()
        steps = planning.training_indices(rows, label_NF, key_N, sampler, epoch=7, step=3, traits=given)
        next(steps)
        first = time.perf_counter() - began
        later = []
        for _ in range(200):
            began = time.perf_counter()
            next(steps)
            later.append(time.perf_counter() - began)
        with capsys.disabled():
            mean = 1e6 * sum(sorted(later)[:-3]) / 197
            print(f"\n{count:>10,} {name:16} first step {first:6.3f} s, then {mean:6.0f} us a step", end="")
        assert first < 60
