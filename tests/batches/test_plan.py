"""Who gets which picture when: properties, over any number of pictures, workers and restarts."""

from __future__ import annotations

from itertools import islice

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrscale.batches import plan as planning
from cxrscale.config import Plan
from cxrscale.schema import InputError

Table = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.int64]]

counts = st.integers(1, 40)
worlds = st.integers(1, 5)
samplings = st.sampled_from(["all", "positives", "balanced"])


def table(count: int, seed: int = 0) -> Table:
    """Rows that do not begin at 0, labels with NaN, distinct keys of both signs; both states occur from 2 rows on."""
    rng = np.random.default_rng(seed)
    label_NF = rng.choice([0.0, 0.0, 1.0, np.nan], (count, 2)).astype(np.float32)
    label_NF[0], label_NF[-1] = 0, 1
    key_N = np.unique(rng.integers(-(2**63), 2**63 - 1, count + 5))[:count]
    return np.arange(count, dtype=np.int64) + 7, label_NF, rng.permutation(key_N)


def stream(
    data: Table, plan: Plan, steps: int, world: int = 1, epoch: int = 0, step: int = 0
) -> list[list[tuple[int, int]]]:
    """The valid (row, draw) of each global step, flattened in the order of the ranks."""
    ranks = [list(islice(planning.training(*data, plan, rank, world, epoch, step), steps)) for rank in range(world)]
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
    ranks = [list(planning.evaluation(rows, batch, rank, world)) for rank in range(world)]
    assert len({len(steps) for steps in ranks}) == 1
    steps = [step for rank in ranks for step in rank]
    assert all(step.row_B.shape == step.draw_B.shape == step.valid_B.shape == (batch,) for step in steps)
    assert all(np.isin(step.row_B, rows).all() for step in steps)
    assert sorted(np.concatenate([step.row_B[step.valid_B] for step in steps])) == rows.tolist()


@given(counts, st.integers(1, 13), st.integers(0, 3))
def test_each_pass_has_each_row_once(count: int, batch: int, seed: int) -> None:
    data = table(count)
    plan = Plan(seed=seed, batch=batch)
    pairs = [pair for step in stream(data, plan, -(-3 * count // batch)) for pair in step]
    assert [drawn for _, drawn in pairs] == list(range(len(pairs)))
    passes = [sorted(row for row, _ in pairs[i * count : (i + 1) * count]) for i in range(3)]
    assert passes == [data[0].tolist()] * 3


def test_passes_and_seeds_have_orders_of_their_own() -> None:
    data = table(50)
    orders = [planning.epoch_rows(*data, Plan(seed=seed, batch=50), epoch)[0] for seed in (0, 1) for epoch in (0, 1)]
    assert len({order.tobytes() for order in orders}) == 4
    assert all(sorted(order.ravel()) == data[0].tolist() for order in orders)


@given(st.integers(2, 40), st.integers(1, 13), worlds, samplings)
def test_the_union_over_ranks_is_the_same_at_any_world(count: int, batch: int, world: int, sampling: str) -> None:
    data, plan = table(count), Plan.model_validate({"batch": batch, "sampling": sampling})
    assert stream(data, plan, 5, world) == stream(data, plan, 5)


@given(st.integers(2, 40), st.integers(1, 13), samplings, st.integers(0, 3), st.integers(0, 12))
def test_a_restart_gives_the_same_suffix(count: int, batch: int, sampling: str, epoch: int, step: int) -> None:
    data, plan = table(count), Plan.model_validate({"batch": batch, "sampling": sampling})
    steps = planning.steps_per_epoch(planning.pass_length(planning.streams(*data, plan)), plan)
    done = epoch * steps + step
    assert stream(data, plan, 3, epoch=epoch, step=step) == stream(data, plan, done + 3)[done:]


@given(st.integers(2, 40), samplings, st.integers(0, 1 << 30))
def test_the_order_of_the_table_does_not_matter(count: int, sampling: str, shuffle: int) -> None:
    rows, label_NF, key_N = table(count)
    plan = Plan.model_validate({"batch": 4, "sampling": sampling})
    mixed = np.random.default_rng(shuffle).permutation(count)
    ours = stream((rows, label_NF, key_N), plan, 6)
    theirs = stream((rows[mixed], label_NF[mixed], key_N[mixed]), plan, 6)
    assert ours == theirs


def test_a_subset_is_fixed_nested_and_seeded() -> None:
    data = table(60)

    def chosen(subset: int, seed: int = 0, order: npt.NDArray[np.int64] | None = None) -> set[int]:
        rows = data if order is None else (data[0][order], data[1][order], data[2][order])
        plan = Plan(seed=seed, batch=5, subset=subset)
        return {row for step in stream(rows, plan, 60) for row, _ in step}

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
    plan = Plan(batch=batch, sampling="balanced")
    for rank in range(world):
        for step in islice(planning.training(*data, plan, rank, world), 4):
            states = [positive[row] for row in step.row_B[step.valid_B].tolist()]
            assert abs(2 * sum(states) - len(states)) <= 1


def test_positives_only() -> None:
    data = table(40)
    rows = {row for step in stream(data, Plan(batch=4, sampling="positives"), 30) for row, _ in step}
    assert rows == set(data[0][(data[1] == 1).any(axis=1)].tolist())


@pytest.mark.parametrize(("sampling", "length"), [("all", 30), ("positives", 6), ("balanced", 12)])
def test_an_epoch_is_a_pass(sampling: str, length: int) -> None:
    rows, label_NF, key_N = table(30)
    label_NF[:] = 0
    label_NF[:6, 0] = 1
    plan = Plan.model_validate({"batch": 4, "sampling": sampling})
    assert planning.pass_length(planning.streams(rows, label_NF, key_N, plan)) == length
    assert planning.epoch_rows(rows, label_NF, key_N, plan, 0)[0].shape == (max(1, length // 4), 4)


def test_epoch_rows_are_what_training_yields() -> None:
    data, plan = table(23), Plan(batch=5, steps_per_epoch=7)
    steps = list(islice(planning.training(*data, plan, epoch=2), 7))
    row_SG, draw_SG = planning.epoch_rows(*data, plan, 2)
    assert np.array_equal(row_SG, np.stack([step.row_B for step in steps]))
    assert np.array_equal(draw_SG, np.stack([step.draw_B for step in steps]))
    assert all(step.valid_B.all() for step in steps)


def test_more_workers_than_pictures_a_step() -> None:
    data = table(9)
    ranks = [next(planning.training(*data, Plan(batch=2), rank, 4)) for rank in range(4)]
    assert [step.valid_B.tolist() for step in ranks] == [[True], [True], [False], [False]]


def test_an_empty_stream_is_refused_at_once() -> None:
    rows, label_NF, key_N = table(9)
    with pytest.raises(InputError, match=r"plan.sampling=positives: no picture has a finding present"):
        planning.training(rows, label_NF * 0, key_N, Plan(sampling="positives"))
    with pytest.raises(InputError, match=r"no picture is without a finding among the 3 that plan.subset=3 leaves"):
        planning.training(rows, label_NF * 0 + 1, key_N, Plan(sampling="balanced", subset=3))
    with pytest.raises(InputError, match="no picture is left"):
        planning.training(rows[:0], label_NF[:0], key_N[:0], Plan())


def test_hashes_are_splitmix64_and_bijective() -> None:
    # The first outputs of SplitMix64 from state 0, as published with the algorithm.
    state = planning.GAMMA * np.arange(1, 4, dtype=np.uint64)
    assert [hex(word) for word in planning.mixed(state)] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]
    assert len(np.unique(planning.hashed(3, np.arange(100_000)))) == 100_000


def test_uniform_numbers_are_uniform() -> None:
    value = planning.uniform(planning.hashed(1, np.arange(200_000)))
    assert value.min() >= 0
    assert value.max() < 1
    # Standard error of a bin of 10,000: 100.
    assert np.abs(np.histogram(value, 20, (0, 1))[0] - 10_000).max() < 500
    assert abs(np.corrcoef(value[:-1], value[1:])[0, 1]) < 0.01
