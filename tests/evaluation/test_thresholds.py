"""Threshold searches against brute force. Some 10 s, of which hypothesis takes most."""

import time
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrscale.config import Threshold
from cxrscale.evaluation import metrics, thresholds
from cxrscale.types import ScoreHistograms

rows = st.lists(st.tuples(st.integers(0, 20), st.sampled_from([0.0, 1.0])), min_size=1, max_size=80)
both = rows.filter(lambda drawn: len({label for _, label in drawn}) == 2)
GOALS = ("f1", "youden", "recall", "precision", "cost")


def merit(score: np.ndarray, label: np.ndarray, threshold: float, rule: Threshold) -> float:
    """What the rule maximizes at a threshold, by counting; -inf where it forbids it."""
    counts = metrics.confusion(score, label, threshold)
    rates = metrics.rates(*counts.values())
    if rule.goal == "cost":
        return -(rule.fn_cost * counts["fn"] + rule.fp_cost * counts["fp"])
    if rule.goal == "recall":
        return threshold if rates["recall"] >= rule.min_rate else -np.inf
    if rule.goal == "precision":
        return float(rates["recall"]) if rates["precision"] >= rule.min_rate else -np.inf
    return float(rates["f1"]) if rule.goal == "f1" else float(rates["recall"] + rates["specificity"] - 1)


def arrays(drawn: list[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([row[0] for row in drawn]) / 20, np.array([row[1] for row in drawn])


@given(drawn=rows)
def test_no_threshold_has_a_better_f1(drawn: list[tuple[int, float]]) -> None:
    score, label = arrays(drawn)
    result = thresholds.best_f1_threshold(score, label)
    if not label.any():
        assert "no image" in result.reason
        return
    best = max(metrics.f1(metrics.confusion(score, label, threshold)) for threshold in score)
    assert metrics.f1(metrics.confusion(score, label, result.value)) == pytest.approx(best)


@given(
    drawn=both,
    goal=st.sampled_from(GOALS),
    min_rate=st.sampled_from([0.3, 0.5, 0.75, 0.9, 1.0]),
    costs=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
@settings(deadline=None, max_examples=300)
def test_no_candidate_fulfills_a_rule_better(
    drawn: list[tuple[int, float]], goal: str, min_rate: float, costs: tuple[int, int]
) -> None:
    score, label = arrays(drawn)
    rule = Threshold.model_validate({"goal": goal, "min_rate": min_rate, "fn_cost": costs[0], "fp_cost": costs[1]})
    candidates = [*sorted(set(score.tolist()), reverse=True), *([1.5] if goal == "cost" else [])]
    merits = [merit(score, label, threshold, rule) for threshold in candidates]
    result = thresholds.choose_threshold(score, label, rule)
    if max(merits) == -np.inf:
        assert np.isnan(result.value)
        assert goal == "precision"
        assert "no threshold reaches precision" in result.reason
        return
    called = [score >= threshold for threshold in candidates]
    chosen = next(m for m, calls in zip(merits, called, strict=True) if (calls == (score >= result.value)).all())
    assert chosen == pytest.approx(max(merits))
    equal = sum(m == pytest.approx(chosen, abs=1e-12) for m in merits)
    if goal in ("f1", "youden", "cost"):
        highest = max(
            threshold for threshold, m in zip(candidates, merits, strict=True) if m == pytest.approx(chosen, abs=1e-12)
        )
        assert ((score >= highest) == (score >= result.value)).all()
        if result.reason != "calling nothing costs least":
            assert result.reason == (f"{equal} thresholds are equally good; this is the highest" if equal > 1 else "")
    assert result.value not in score or result.value == 0  # midway between scores, or at the very bottom


@given(drawn=both, goal=st.sampled_from(GOALS), prior=st.sampled_from([None, 0.2]), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=150)
def test_the_interval_is_that_of_the_same_search_on_each_resample(
    drawn: list[tuple[int, float]], goal: str, prior: float | None, seed: int
) -> None:
    score, label = arrays(drawn)
    rule = Threshold.model_validate({"goal": goal, "min_rate": 0.6, "fn_cost": 3})
    weights_RN = metrics.bootstrap_weights([f"p{i // 3}" for i in range(len(score))], 8, seed)
    result = thresholds.choose_threshold(score, label, rule, weights_RN, prior)
    if np.isnan(result.value):
        return
    again = [
        thresholds.choose_threshold(np.repeat(score, weight), np.repeat(label, weight), rule, prior=prior).value
        if np.repeat(label, weight).any()
        else np.nan
        for weight in weights_RN
    ]
    expected = metrics.interval(result.value, np.array(again))
    assert (result.low, result.high) == pytest.approx((expected.low, expected.high), nan_ok=True)


@given(drawn=both, goal=st.sampled_from(GOALS), times=st.tuples(st.integers(1, 4), st.integers(1, 4)))
@settings(deadline=None)
def test_another_prior_is_the_same_as_more_images_of_one_class(
    drawn: list[tuple[int, float]], goal: str, times: tuple[int, int]
) -> None:
    score, label = arrays(drawn)
    rule = Threshold.model_validate({"goal": goal, "min_rate": 0.618034, "fn_cost": 2.5})
    repeat = np.where(label == 1, *times)
    many, labels = np.repeat(score, repeat), np.repeat(label, repeat)
    result = thresholds.choose_threshold(score, label, rule, prior=float(labels.mean()))
    expected = thresholds.choose_threshold(many, labels, rule)
    if np.isnan(expected.value):
        assert np.isnan(result.value)
    else:  # equal merits may differ by a rounding error: the merit counts, not the threshold
        wanted = merit(many, labels, expected.value, rule)
        assert merit(many, labels, result.value, rule) == pytest.approx(wanted)


def test_a_finding_without_a_threshold_has_the_reason() -> None:
    score = np.array([0.2, 0.4, 0.6, 0.8])
    never = thresholds.choose_threshold(score, [0, 1, 0, 0], Threshold(goal="precision", min_rate=0.9))
    assert np.isnan(never.value)
    assert never.reason == "no threshold reaches precision 0.9 in validation; the highest is 0.333"
    for goal in ("f1", "youden", "recall", "precision", "cost"):
        result = thresholds.choose_threshold(score, [0, 0, 0, 0], Threshold.model_validate({"goal": goal}))
        assert np.isnan(result.value)
        assert result.reason == "no image with the finding in validation"
    assert thresholds.choose_threshold(score, [1] * 4, Threshold(goal="youden")).reason.startswith("no image without")
    assert thresholds.choose_threshold([], [], Threshold()).reason == "no labeled image in validation"


def test_hand_made_thresholds() -> None:
    score, label = [0.9, 0.8, 0.6, 0.4, 0.1], [1, 0, 1, 0, 0]
    chosen = {
        goal: thresholds.choose_threshold(
            score, label, Threshold.model_validate({"goal": goal, "min_rate": 0.6, "value": 0.3})
        )
        for goal in get_args(Threshold.model_fields["goal"].annotation)
    }
    assert chosen["f1"].value == pytest.approx(0.5)  # TP 2, FP 1: 4 / 5
    assert chosen["youden"].value == pytest.approx(0.5)  # recall 1, specificity 2 / 3
    assert chosen["recall"].value == pytest.approx(0.5)  # at 0.9 recall is 1 / 2
    assert chosen["precision"].value == pytest.approx(0.5)  # 2 of 3 are right, the 4th image would make it 1 / 2
    assert chosen["cost"].value == pytest.approx(0.85)  # FN 1, as good as FP 1 at 0.5
    assert chosen["cost"].reason == "2 thresholds are equally good; this is the highest"
    assert chosen["fixed"].value == 0.3
    expensive = thresholds.choose_threshold(score, [0, 0, 0, 1, 0], Threshold(goal="cost", fp_cost=10))
    assert expensive.value == pytest.approx(0.95)
    assert expensive.reason == "calling nothing costs least"


def test_neighboring_scores_keep_their_sides() -> None:
    high = np.float64(0.3)
    low = np.nextafter(high, 0)
    result = thresholds.choose_threshold(np.array([high, low]), np.array([1, 0]), Threshold())
    assert low < result.value <= high


def test_fourteen_findings_of_all_images_take_less_than_a_second_of_work() -> None:
    rng = np.random.default_rng(0)
    score_NF = rng.random((112_120, 14), dtype=np.float32)
    label_NF = (rng.random((112_120, 14)) < score_NF**4).astype(np.float32)
    began = time.process_time()
    for f in range(14):
        thresholds.choose_threshold(score_NF[:, f], label_NF[:, f], Threshold())
    assert time.process_time() - began < 1.0  # 0.2 s measured


def random_counts(seed: int) -> ScoreHistograms:
    rng = np.random.default_rng(seed)
    every = rng.integers(0, 6, (5, 8)).astype(np.int32)
    every[:, 0] += 60 - every.sum(axis=1)  # maps of one size
    inside = np.minimum(every, rng.integers(0, 4, (5, 8))).astype(np.int32)
    inside[:2] = 0
    return ScoreHistograms(every, inside)


@given(seed=st.integers(0, 50))
@settings(deadline=None)
def test_no_mask_rule_has_a_better_dice(seed: int) -> None:
    maps = random_counts(seed)
    areas = (0, 3, 9)
    result = thresholds.best_mask_rule(maps, areas)
    best = max(
        metrics.map_dice(maps, top / 8, area, bottom / 8).mean()
        for area in areas
        for top in range(8)
        for bottom in range(top + 1)
    )
    assert result.dice == pytest.approx(best)
    assert metrics.map_dice(maps, result.top, result.min_area, result.bottom).mean() == pytest.approx(best)


def literal_dice(map_HW: np.ndarray, mask_HW: np.ndarray, top: float, area: int, bottom: float) -> float:
    predicted = map_HW >= bottom
    if (map_HW >= top).sum() < max(1, area):
        predicted = np.zeros_like(predicted)
    total = predicted.sum() + mask_HW.sum()
    return 1.0 if total == 0 else float(2 * (predicted & mask_HW).sum() / total)


@given(seed=st.integers(0, 10_000))
@settings(deadline=None, max_examples=25)
def test_the_mask_rule_is_the_best_of_masks_made_pixel_by_pixel(seed: int) -> None:
    rng = np.random.default_rng(seed)
    masks = rng.random((6, 7, 7)) < 0.25
    masks[rng.random(6) < 0.5] = False
    maps = np.clip(rng.normal(0.3, 0.2, masks.shape) + 0.3 * masks, 0, 0.999)
    bins = (maps * 8).astype(int)
    every = np.stack([np.bincount(p.ravel(), minlength=8) for p in bins]).astype(np.int32)
    inside = np.stack([np.bincount(p[m], minlength=8) for p, m in zip(bins, masks, strict=True)]).astype(np.int32)
    areas = (0, 2, 5, 12)
    result = thresholds.best_mask_rule(ScoreHistograms(every, inside), areas)
    scored = {
        (top / 8, area, bottom / 8): np.mean(
            [literal_dice(m, k, top / 8, area, bottom / 8) for m, k in zip(maps, masks, strict=True)]
        )
        for area in areas
        for top in range(8)
        for bottom in range(top + 1)
    }
    assert result.dice == pytest.approx(max(scored.values()))
    assert scored[result.top, result.min_area, result.bottom] == pytest.approx(result.dice)


@given(seed=st.integers(0, 50))
@settings(deadline=None, max_examples=20)
def test_the_mask_rules_interval_is_that_of_the_same_search_on_each_resample(seed: int) -> None:
    maps, areas = random_counts(seed), (0, 3, 9)
    weights_RN = metrics.bootstrap_weights([str(i) for i in range(5)], 6, seed)
    result = thresholds.best_mask_rule(maps, areas)
    intervals = thresholds.mask_rule_intervals(maps, result, weights_RN[:1].repeat(2, axis=0), areas)
    # Both resamples are the same one: low and high are its mask rule.
    again = thresholds.best_mask_rule(
        ScoreHistograms(maps.all_NT.repeat(weights_RN[0], axis=0), maps.true_NT.repeat(weights_RN[0], axis=0)), areas
    )
    drawn = metrics.weighted_means(
        metrics.map_dice(maps, intervals.top.low, round(intervals.min_area.low), intervals.bottom.low),
        weights_RN[:1],
    )
    assert drawn[0] == pytest.approx(again.dice, abs=1e-3)


def test_the_mask_rule_of_two_thousand_maps_takes_less_than_ten_seconds() -> None:
    rng = np.random.default_rng(0)
    every = rng.multinomial(512 * 512 - 200_000, np.full(256, 1 / 256), size=2000).astype(np.int32)
    every[:, 0] += 200_000
    inside = np.minimum(every, rng.integers(0, 200, every.shape)).astype(np.int32)
    inside[:1550] = 0
    began = time.process_time()
    thresholds.best_mask_rule(ScoreHistograms(every, inside))
    assert time.process_time() - began < 10  # 1 s of work measured
