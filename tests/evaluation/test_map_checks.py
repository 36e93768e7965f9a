"""Rank correlations of maps, and places beside boxes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from cxrscale.evaluation import localization, map_checks, metrics


@given(st.integers(0, 10_000), st.booleans())
def test_the_rank_correlation_is_spearmans(seed: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, 5, 4))
    if ties:
        a, b = a.round(), b.round()
        a[0, 0], b[0, 0] = 7, 9  # not constant
    assert map_checks.rank_correlation(a, b) == pytest.approx(spearmanr(a.ravel(), b.ravel()).statistic)


def test_maps_without_ranks_have_no_correlation() -> None:
    varied = np.arange(4.0).reshape(2, 2)
    for other in (np.ones((2, 2)), np.full((2, 2), np.nan), np.ones((1, 1))):
        assert math.isnan(map_checks.rank_correlation(varied, other))
    assert map_checks.rank_correlation(varied, -varied) == pytest.approx(-1)


@given(st.floats(0.02, 0.3), st.floats(0.02, 0.3), st.integers(0, 1000))
def test_other_places_are_as_large_and_touch_no_box(width: float, height: float, seed: int) -> None:
    truth_K4 = np.array([[0.1, 0.1, 0.1 + width, 0.1 + height], [0.6, 0.5, 0.6 + width / 2, 0.5 + height]])
    places = map_checks.other_places(truth_K4, 4, seed)
    assert len(places) == 4
    for place_K4 in places:
        np.testing.assert_allclose(place_K4[:, 2:] - place_K4[:, :2], truth_K4[:, 2:] - truth_K4[:, :2])
        assert ((place_K4 >= 0) & (place_K4 <= 1)).all()
        assert localization.overlaps(place_K4, truth_K4)[0].max() == 0
        assert localization.overlaps(place_K4[:1], place_K4[1:])[0].max() == 0
    again = map_checks.other_places(truth_K4, 4, seed)
    np.testing.assert_array_equal(places[0], again[0])


def test_boxes_without_room_beside_them_have_no_other_place() -> None:
    assert map_checks.other_places(np.array([[0.1, 0.1, 0.9, 0.9]]), 4, 0) == []


def test_a_mean_leaves_out_what_is_undefined() -> None:
    weights_RN = metrics.bootstrap_weights(list("abcd"), 100, seed=0)
    found = map_checks.mean_over_patients([1.0, np.nan, 3.0, 2.0], weights_RN, "none")
    assert found.value == 2
    assert 1 <= found.low <= 2 <= found.high <= 3
    assert map_checks.mean_over_patients([np.nan] * 4, weights_RN, "none").reason == "none"
