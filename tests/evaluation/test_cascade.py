"""A classifier before a segmenter, against brute force."""

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrscale.evaluation import cascade, metrics
from cxrscale.evaluation.metrics import Floats
from cxrscale.evaluation.thresholds import MaskRule, best_mask_rule, rule_areas
from cxrscale.types import ScoreHistograms


def random_maps(rng: np.random.Generator, count: int, bins: int = 8, pixels: int = 400) -> ScoreHistograms:
    """Histograms of maps whose true pixels score higher; a third of the images has no mask."""
    all_NT = rng.multinomial(pixels, np.geomspace(8, 1, bins) / np.geomspace(8, 1, bins).sum(), count)
    share_NT = np.linspace(0, 1, bins) ** 2 * rng.random((count, 1)) * (rng.random((count, 1)) > 1 / 3)
    return ScoreHistograms(all_NT.astype(np.int32), rng.binomial(all_NT, share_NT).astype(np.int32), own_size=True)


def dice_of(maps: ScoreHistograms, rule: MaskRule, passed_N: npt.NDArray[np.bool_]) -> Floats:
    """(N,) Dice image by image, in plain Python."""
    bins, values = maps.all_NT.shape[1], []
    for all_T, true_T, passed in zip(maps.all_NT.tolist(), maps.true_NT.tolist(), passed_N, strict=True):
        top, bottom = round(rule.top * bins), round(rule.bottom * bins)
        drawn = bool(passed) and sum(all_T[top:]) >= max(1, rule.min_area)
        predicted = sum(all_T[bottom:]) if drawn else 0
        overlap = sum(true_T[bottom:]) if drawn else 0
        total = predicted + sum(true_T)
        values.append(1.0 if total == 0 else 2 * overlap / total)
    return np.array(values)


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(2, 9), ties=st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_search_finds_what_brute_force_finds(seed: int, count: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    maps = random_maps(rng, count)
    gate_N = rng.integers(1, 4, count) / 4 if ties else rng.random(count)
    threshold, rule = cascade.search_cascade(maps, gate_N, steps=8)
    best = max(
        dice_of(maps, MaskRule(top / 8, area, bottom / 8), gate_N >= at).mean()
        for at, area in itertools.product(np.unique(gate_N), rule_areas(maps))
        for top in range(8)
        for bottom in range(top + 1)
    )
    assert dice_of(maps, rule, gate_N >= threshold).mean() == pytest.approx(best)
    assert rule.dice == pytest.approx(best)


def test_a_gate_that_knows_the_truth_removes_all_false_masks() -> None:
    rng = np.random.default_rng(1)
    maps = random_maps(rng, 60)
    positive_N = metrics.has_mask(maps)
    gate_N = np.where(positive_N, 0.9, 0.1)
    threshold, rule = cascade.search_cascade(maps, gate_N, steps=8)
    assert threshold == pytest.approx(0.5)
    alone = best_mask_rule(maps)
    weights_RN = metrics.bootstrap_weights([str(n) for n in range(60)], 50, seed=0)
    found = cascade.evaluate_cascade(maps, rule, alone, gate_N >= threshold, weights_RN)
    assert found.cascade.false_masks.value == 0
    assert found.passed.value == pytest.approx(positive_N.mean())
    assert found.cascade.dice_all.value == pytest.approx(dice_of(maps, rule, positive_N).mean())
    assert found.segmenter.dice_all.value == pytest.approx(dice_of(maps, alone, np.ones(60, bool)).mean())
    difference = found.difference.dice_all
    assert difference.value == pytest.approx(found.cascade.dice_all.value - found.segmenter.dice_all.value)
    assert difference.low <= difference.value <= difference.high
    assert difference.low > 0


def test_a_closed_gate_leaves_the_masks_empty() -> None:
    maps = random_maps(np.random.default_rng(2), 30)
    weights_RN = metrics.bootstrap_weights([str(n) for n in range(30)], 20, seed=0)
    rule = MaskRule(0.5, 0, 0.5)
    found = cascade.evaluate_cascade(maps, rule, rule, np.zeros(30, bool), weights_RN)
    assert found.cascade.dice_all.value == pytest.approx(metrics.empty_baseline(maps))
    assert (found.cascade.sensitivity.value, found.cascade.false_masks.value) == (0, 0)
    open_gate = cascade.evaluate_cascade(maps, rule, rule, np.ones(30, bool), weights_RN)
    for name in ("dice_all", "dice_on_positives", "sensitivity", "false_masks"):
        assert getattr(open_gate.difference, name).value == 0


def test_without_an_image_with_a_mask_its_metrics_are_undefined() -> None:
    maps = ScoreHistograms(np.full((3, 8), 5, np.int32), np.zeros((3, 8), np.int32), own_size=True)
    weights_RN = metrics.bootstrap_weights(["a", "b", "c"], 20, seed=0)
    rule = MaskRule(0.5, 0, 0.5)
    found = cascade.evaluate_cascade(maps, rule, rule, np.ones(3, bool), weights_RN).cascade
    assert found.dice_on_positives.reason == "no such image"
    assert found.false_masks.value == 1
