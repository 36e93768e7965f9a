"""Threshold searches against brute force."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxrscale import metrics, thresholds
from cxrscale.schema import MapCounts

rows = st.lists(st.tuples(st.integers(0, 20), st.sampled_from([0.0, 1.0])), min_size=1, max_size=80)


@given(drawn=rows)
def test_no_threshold_has_a_better_f1(drawn: list[tuple[int, float]]) -> None:
    score = np.array([row[0] for row in drawn]) / 20
    label = np.array([row[1] for row in drawn])
    found = thresholds.best_f1(score, label)
    if not label.any():
        assert "no picture" in found.reason
        return
    best = max(metrics.f1(metrics.confusion(score, label, cut)) for cut in score)
    assert metrics.f1(metrics.confusion(score, label, found.value)) == pytest.approx(best)


@given(seed=st.integers(0, 50))
def test_no_triplet_has_a_better_dice(seed: int) -> None:
    rng = np.random.default_rng(seed)
    every = rng.integers(0, 6, (5, 8)).astype(np.int32)
    every[:, 0] += 60 - every.sum(axis=1)  # maps of one size
    inside = np.minimum(every, rng.integers(0, 4, (5, 8))).astype(np.int32)
    inside[:2] = 0
    maps = MapCounts(every, inside)
    areas = (0, 3, 9)
    found = thresholds.best_triplet(maps, areas)
    best = max(
        metrics.map_dice(maps, top / 8, area, bottom / 8).mean()
        for area in areas
        for top in range(8)
        for bottom in range(top + 1)
    )
    assert found.dice == pytest.approx(best)
    assert metrics.map_dice(maps, found.top, found.min_area, found.bottom).mean() == pytest.approx(best)
