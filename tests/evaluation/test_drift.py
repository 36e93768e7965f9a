"""Population stability: hand-computed values, and false alarms as rare as they are said to be."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxrscale.evaluation import drift


def test_the_index_is_that_of_the_formula() -> None:
    reference = drift.Reference((0.0,), (0.5, 0.5), 100)
    found = drift.measure(reference, np.array([-1.0] * 75 + [1.0] * 25))
    assert found.index == pytest.approx(0.25 * math.log(1.5) - 0.25 * math.log(0.5))
    assert found.count == 100


def test_few_values_and_equal_values_say_nothing() -> None:
    assert drift.fit_reference(np.arange(drift.FEWEST - 1.0)) is None
    assert drift.fit_reference(np.ones(100)) is None
    reference = drift.fit_reference(np.arange(100.0))
    assert reference is not None
    found = drift.measure(reference, np.zeros(99))
    assert math.isnan(found.index)
    assert not found.alarm


def test_an_empty_bin_keeps_the_index_finite() -> None:
    reference = drift.fit_reference(np.arange(1000.0))
    assert reference is not None
    found = drift.measure(reference, np.full(200, 2000.0))
    assert math.isfinite(found.index)
    assert found.alarm


@pytest.mark.parametrize(("of_reference", "of_window"), [(60, 60), (100, 300), (500, 200), (500, 500)])
def test_samples_of_one_distribution_rarely_alarm(of_reference: int, of_window: int) -> None:
    rng = np.random.default_rng(5)
    alarms = 0
    for _ in range(2000):
        reference = drift.fit_reference(rng.normal(size=of_reference))
        assert reference is not None
        alarms += drift.measure(reference, rng.normal(size=of_window)).alarm
    assert alarms <= 2000 * 0.005  # five times as often as for large samples


def test_false_alarms_are_rare_on_images_like_the_reference_and_certain_on_others() -> None:
    rng = np.random.default_rng(6)
    reference = drift.fit_reference(rng.normal(size=800))
    assert reference is not None
    assert drift.false_alarms(reference, rng.normal(size=600), 300) <= 0.02
    assert drift.false_alarms(reference, rng.normal(1, size=600), 300) == 1.0
    assert drift.false_alarms(reference, rng.normal(1, size=250), 300) == 1.0
    assert math.isnan(drift.false_alarms(reference, rng.normal(size=30), 300))


@pytest.mark.parametrize("shift", [1.0, -1.0])
def test_a_shift_of_a_standard_deviation_alarms(shift: float) -> None:
    rng = np.random.default_rng(5)
    reference = drift.fit_reference(rng.normal(size=500))
    assert reference is not None
    assert all(drift.measure(reference, rng.normal(shift, size=200)).alarm for _ in range(200))


@given(st.lists(st.floats(-1e6, 1e6), min_size=drift.FEWEST, max_size=200), st.floats(0.5, 4))
def test_units_do_not_matter(values: list[float], factor: float) -> None:
    value_N = np.round(np.array(values), 3)
    reference, scaled = drift.fit_reference(value_N), drift.fit_reference(value_N * 2.0 ** round(factor))
    assert (reference is None) == (scaled is None)
    if reference is not None and scaled is not None:
        assert sum(reference.expected) == pytest.approx(1)
        assert drift.measure(reference, value_N).index == pytest.approx(0, abs=1e-12)
        assert scaled.expected == reference.expected
