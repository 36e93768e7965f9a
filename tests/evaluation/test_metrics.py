"""Metrics against scikit-learn and hand-made cases."""

import json
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from cxrscale.evaluation import metrics
from cxrscale.evaluation.metrics import Estimate
from cxrscale.types import ScoreHistograms, Scores, UserError

scores = st.lists(st.tuples(st.integers(0, 5), st.sampled_from([0.0, 1.0])), min_size=2, max_size=60)
Measure = Callable[[np.ndarray, np.ndarray], float]


def arrays(rows: list[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([row[0] / 5 for row in rows]), np.array([row[1] for row in rows])


def brute(score: np.ndarray, label: np.ndarray, weights_RN: np.ndarray, measure: Measure) -> list[float]:
    """The measure of each resample written out, NaN where a class is absent."""
    drawn = [np.repeat(np.arange(len(score)), weight) for weight in weights_RN]
    return [measure(score[d], label[d]) if len(set(label[d])) == 2 else float("nan") for d in drawn]


@given(rows=scores, seed=st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_bootstrap_auroc_and_auprc_equal_scikit_learn_on_every_resample(
    rows: list[tuple[int, float]], seed: int
) -> None:
    score, label = arrays(rows)
    weights_RN = metrics.bootstrap_weights([f"p{i // 2}" for i in range(len(rows))], resamples=5, seed=seed)
    area, average = metrics.bootstrap_auroc(score, label, weights_RN), metrics.bootstrap_auprc(score, label, weights_RN)
    assert area == pytest.approx(brute(score, label, weights_RN, lambda s, y: sk.roc_auc_score(y, s)), nan_ok=True)
    expected = brute(score, label, weights_RN, lambda s, y: sk.average_precision_score(y, s))
    assert average == pytest.approx(expected, nan_ok=True)


@given(rows=scores, seed=st.integers(0, 3), threshold=st.sampled_from([0.0, 0.3, 0.6, 1.1]))
@settings(deadline=None, max_examples=30)
def test_bootstrap_at_a_threshold_equals_scikit_learn_on_every_resample(
    rows: list[tuple[int, float]], seed: int, threshold: float
) -> None:
    score, label = arrays(rows)
    weights_RN = metrics.bootstrap_weights([f"p{i // 2}" for i in range(len(rows))], resamples=4, seed=seed)
    ours = metrics.rates(*metrics.bootstrap_confusion(score, label, threshold, weights_RN).T)
    theirs: dict[str, Measure] = {
        "accuracy": lambda s, y: sk.accuracy_score(y, s >= threshold),
        "recall": lambda s, y: sk.recall_score(y, s >= threshold),
        "specificity": lambda s, y: sk.recall_score(y, s >= threshold, pos_label=0),
        "precision": lambda s, y: sk.precision_score(y, s >= threshold, zero_division=np.nan),
        "f1": lambda s, y: sk.f1_score(y, s >= threshold),
    }
    for name, measure in theirs.items():
        expected = np.array(brute(score, label, weights_RN, measure))
        both = np.isfinite(expected)
        assert ours[name][both] == pytest.approx(expected[both])


@given(rows=scores, seed=st.integers(0, 3), equal_mass=st.booleans())
@settings(deadline=None, max_examples=60)
def test_bootstrap_brier_equals_scikit_learn_and_one_resample_of_all_is_the_ece(
    rows: list[tuple[int, float]], seed: int, equal_mass: bool
) -> None:
    score, label = arrays(rows)
    weights_RN = metrics.bootstrap_weights([f"p{i // 2}" for i in range(len(rows))], resamples=4, seed=seed)
    expected = brute(score, label, weights_RN, lambda s, y: sk.brier_score_loss(y, s))
    both = np.isfinite(expected)
    assert metrics.bootstrap_brier(score, label, weights_RN)[both] == pytest.approx(np.array(expected)[both])
    value = metrics.ece(score, label, 7, equal_mass).value
    assert metrics.bootstrap_ece(score, label, np.full((2, len(rows)), 3), 7, equal_mass) == pytest.approx([value] * 2)
    # Written out: bins fixed by the full sample, gaps of the drawn images.
    even = np.linspace(0, 1, 8)[1:-1]
    inner = np.quantile(score, even) if equal_mass else even
    bin_N = np.array([int((inner < value).sum()) for value in score])
    for weight, ours in zip(weights_RN, metrics.bootstrap_ece(score, label, weights_RN, 7, equal_mass), strict=True):
        gaps = [abs((weight * (score - label))[bin_N == b].sum()) for b in range(7)]
        assert ours == pytest.approx(sum(gaps) / weight.sum())


@given(seed=st.integers(0, 50), strategy=st.sampled_from(["uniform", "quantile"]))
@settings(deadline=None, max_examples=20)
def test_reliability_is_scikit_learns_curve(seed: int, strategy: str) -> None:
    rng = np.random.default_rng(seed)
    score = rng.beta(0.7, 2, 300)
    label = (rng.random(300) < score).astype(float)
    observed, predicted = calibration_curve(label, score, n_bins=15, strategy=strategy)
    result = metrics.reliability(score, label, equal_mass=strategy == "quantile")
    assert result.observed == pytest.approx(observed)
    assert result.predicted == pytest.approx(predicted)
    assert sum(result.count) == 300
    assert all(low <= o <= high for low, o, high in zip(result.low, result.observed, result.high, strict=True))
    gap = np.abs(np.array(result.observed) - result.predicted)
    expected = float((gap * result.count).sum() / 300)
    assert metrics.ece(score, label, equal_mass=strategy == "quantile").value == pytest.approx(expected)


def test_calibration_error_by_hand() -> None:
    # Two bins: (0.1, 0.3: one of two present) and (0.8, 0.8: both present): gaps 0.3 and 0.2, half of the images each.
    score, label = [0.1, 0.3, 0.8, 0.8], [0, 1, 1, 1]
    assert metrics.ece(score, label, bins=2).value == pytest.approx(0.25)
    assert metrics.brier(score, label).value == pytest.approx((0.01 + 0.49 + 0.04 + 0.04) / 4)
    # Wilson's interval of 1 in 2 at 95%: (0.5 +- 1.96 sqrt(1/8 + 1.96^2 / 16)) / (1 + 1.96^2 / 2), centered on 0.5.
    result = metrics.reliability(score, label, bins=2)
    assert result.low[0] == pytest.approx(0.0945, abs=1e-3)
    assert result.high[0] == pytest.approx(0.9055, abs=1e-3)
    assert metrics.reliability([0.5], [np.nan]).count == ()


def test_patients_are_drawn_with_all_their_images() -> None:
    weights_RN = metrics.bootstrap_weights(["a", "b", "a", "c"], resamples=50, seed=1)
    assert (weights_RN[:, 0] == weights_RN[:, 2]).all()
    assert (weights_RN[:, 0].astype(int) + weights_RN[:, 1] + weights_RN[:, 3] == 3).all()
    assert weights_RN[:, 0].std() > 0


def test_an_absent_class_is_nan_with_the_reason_and_not_in_the_mean() -> None:
    assert metrics.auroc([0.1, 0.9], [0, 0]).reason == "no image with the finding"
    assert metrics.auprc([0.1, 0.9], [1, 1]).reason == "no image without the finding"
    assert metrics.auroc([0.1, 0.9], [np.nan, np.nan]).reason == "no labeled image"
    assert metrics.roc_curve([0.1, 0.9], [0, 0]).reason == "no image with the finding"
    assert metrics.pr_curve([], []).reason == "no labeled image"
    assert metrics.brier([0.4], [np.nan]).reason == "no labeled image"
    unlabeled = metrics.probability_metrics([0.4], [np.nan], np.ones((2, 1), dtype=np.uint8))
    assert unlabeled.ece.reason == "no labeled image"
    score = np.array([[0.1, 0.5], [0.9, 0.5]], dtype=np.float32)
    label = np.array([[0, 0], [1, 0]], dtype=np.float32)
    assert metrics.macro_auroc(score, label) == 1.0
    for absent in (label[:, 1], np.full(2, np.nan)):
        for resample in (metrics.bootstrap_auroc, metrics.bootstrap_auprc):
            assert np.isnan(resample(score[:, 1], absent, np.ones((3, 2), dtype=np.uint8))).all()


def test_a_rate_whose_divisor_is_0_has_the_reason() -> None:
    negatives = metrics.at_threshold([0.1, 0.9], [0, 0], 0.5)
    rates = {name: getattr(negatives, name) for name in metrics.RATES}
    assert {name: rate.reason for name, rate in rates.items() if not rate.defined} == {
        "recall": "no image with the finding",
        "f1": "no image with the finding",
    }
    no_calls = metrics.at_threshold([0.1, 0.2], [0, 1], 0.5)
    assert no_calls.precision.reason == "nothing is called present at this threshold"
    assert (no_calls.f1.value, no_calls.recall.value) == (0, 0)
    assert metrics.at_threshold([0.1], [np.nan], 0.5).accuracy.reason == "no labeled image"


def test_unlabeled_images_are_not_counted() -> None:
    assert metrics.auroc([0.1, 0.2, 0.9], [0, 1, np.nan]).value == 1.0
    assert metrics.confusion([0.1, 0.8, 0.9], [0, 1, np.nan], 0.5) == {"tp": 1, "fp": 0, "fn": 0, "tn": 1}
    weights_RN = np.array([[1, 2, 5]], dtype=np.uint8)
    assert metrics.bootstrap_confusion([0.1, 0.8, 0.9], [0, 1, np.nan], 0.5, weights_RN).tolist() == [[2, 0, 0, 1]]
    assert metrics.bootstrap_brier([0.5, 0.5, 0.9], [0, 1, np.nan], weights_RN).tolist() == [0.25]
    assert metrics.weighted_means([1.0, 4.0, np.nan], weights_RN).tolist() == [3.0]


def test_the_published_confusion_matrices_at_two_thresholds() -> None:
    # System C: [[1936, 143], [271, 334]] at 0.5, accuracy 0.846, precision 0.700, recall 0.552;
    # [[1725, 354], [136, 469]] at 0.25.
    middle = {(0, 0.1): 1725, (0, 0.3): 1936 - 1725, (0, 0.7): 143, (1, 0.1): 136, (1, 0.3): 271 - 136, (1, 0.7): 334}
    label, score = np.array([key for key, count in middle.items() for _ in range(count)]).T
    high, low = metrics.at_thresholds(score, label)
    assert (high.threshold, high.confusion) == (0.5, {"tp": 334, "fp": 143, "fn": 271, "tn": 1936})
    assert (low.threshold, low.confusion) == (0.25, {"tp": 469, "fp": 354, "fn": 136, "tn": 1725})
    for name, published in (("accuracy", 0.846), ("precision", 0.700), ("recall", 0.552)):
        assert getattr(high, name).value == pytest.approx(published, abs=5e-4)
    assert low.recall.value > high.recall.value
    assert metrics.f1(high.confusion) == pytest.approx(2 * 0.7002 * 0.5521 / (0.7002 + 0.5521), abs=1e-3)
    assert metrics.ratio(0, 0) != metrics.ratio(0, 0)
    weights_RN = metrics.bootstrap_weights(np.arange(len(label)).astype(str), 100, 0)
    recall = metrics.at_threshold(score, label, 0.5, weights_RN).recall
    # The normal approximation: 1.96 sqrt(0.552 x 0.448 / 605) = 0.040.
    assert recall.high - recall.low == pytest.approx(0.079, abs=0.02)


def test_an_interval_contains_the_true_value_in_about_95_percent_of_samples() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(100):
        value = rng.normal(size=60)
        weights_RN = metrics.bootstrap_weights([str(i) for i in range(60)], resamples=200, seed=trial)
        estimate = metrics.interval(float(value.mean()), metrics.weighted_means(value, weights_RN))
        covered += estimate.low <= 0 <= estimate.high
    assert 86 <= covered <= 100


def test_an_interval_from_some_of_the_resamples_has_their_number() -> None:
    estimate = metrics.interval(0.5, np.array([0.4, np.nan, 0.6, np.nan]))
    assert estimate.reason == "interval from the 2 of 4 resamples that define it"
    assert metrics.interval(0.5, np.array([np.nan, 0.5])).reason == "too few resamples hold both classes"
    as_json = json.loads(TypeAdapter(Estimate).dump_json(Estimate(float("nan"), reason="why")))
    assert as_json == {"value": None, "low": None, "high": None, "reason": "why"}


def test_the_mean_over_findings_leaves_out_what_is_undefined() -> None:
    resampled = np.array([[0.6, 0.8, 0.7], [np.nan, np.nan, np.nan], [0.8, 1.0, np.nan]])
    mean = metrics.macro([0.7, np.nan, 0.9], resampled)
    assert mean.value == pytest.approx(0.8)
    assert (mean.low, mean.high) == pytest.approx(tuple(np.quantile([0.7, 0.9], [0.025, 0.975])))
    assert metrics.macro([np.nan], resampled[1:2]).reason == "no finding has both classes"


@given(rows=scores.filter(lambda rows: len({label for _, label in rows}) == 2))
@settings(deadline=None)
def test_curves_hold_every_vertex_of_a_small_sample(rows: list[tuple[int, float]]) -> None:
    score, label = arrays(rows)
    roc, pr = metrics.roc_curve(score, label), metrics.pr_curve(score, label)
    assert np.trapezoid(roc.y, roc.x) == pytest.approx(sk.roc_auc_score(label, score))
    assert np.sum(np.diff(pr.x) * pr.y[1:]) == pytest.approx(sk.average_precision_score(label, score))
    for curve, first, second in ((roc, "fp", "tp"), (pr, "tp", "fp")):
        assert curve.threshold[0] == np.inf
        for x, threshold in zip(curve.x[1:], curve.threshold[1:], strict=True):
            counts = metrics.confusion(score, label, threshold)
            rest = {"fp": "tn", "tp": "fn"}[first]
            assert x == pytest.approx(metrics.ratio(counts[first], counts[rest]))
        assert second in counts


def test_a_thinned_curve_stays_on_the_curve() -> None:
    rng = np.random.default_rng(0)
    score = rng.random(20_000)
    label = (rng.random(20_000) < score**3).astype(float)
    false_rate, recall, _ = sk.roc_curve(label, score)
    precision, at_recall, _ = sk.precision_recall_curve(label, score)
    stable = at_recall[::-1] > 0.02  # below that, precision jumps with every image
    for curve, x, y in (
        (metrics.roc_curve(score, label, 150), false_rate[::20], recall[::20]),
        (metrics.pr_curve(score, label, 150), at_recall[::-1][stable][::60], precision[::-1][stable][::60]),
    ):
        assert 100 < len(curve.x) <= 150
        assert (curve.x[0], curve.x[-1]) == (0, 1)
        path = np.linspace(0, len(curve.x) - 1, 4000)
        drawn_x, drawn_y = (np.interp(path, np.arange(len(axis)), axis) for axis in (curve.x, curve.y))
        away = np.abs(drawn_x - np.asarray(x)[:, None]) + np.abs(drawn_y - np.asarray(y)[:, None])
        assert away.min(axis=1).max() < 0.02


def literal(map_HW: np.ndarray, mask_HW: np.ndarray, top: float, area: int, bottom: float) -> tuple[float, float]:
    """Dice and intersection over union of masks written out."""
    predicted = map_HW >= bottom
    if (map_HW >= top).sum() < max(1, area):
        predicted = np.zeros_like(predicted)
    both, either = int((predicted & mask_HW).sum()), int((predicted | mask_HW).sum())
    total = predicted.sum() + mask_HW.sum()
    return (1.0 if total == 0 else 2 * both / total), (1.0 if total == 0 else both / either)


def histograms(maps: np.ndarray, masks: np.ndarray) -> ScoreHistograms:
    every = np.stack([np.bincount((m * 8).astype(int).ravel(), minlength=8) for m in maps])
    inside = np.stack([np.bincount((m * 8).astype(int)[k], minlength=8) for m, k in zip(maps, masks, strict=True)])
    return ScoreHistograms(every.astype(np.int32), inside.astype(np.int32))


def test_overlap_from_histograms_equals_overlap_of_maps() -> None:
    rng = np.random.default_rng(0)
    maps = rng.integers(0, 8, (6, 10, 10)) / 8
    masks = rng.random((6, 10, 10)) < 0.3
    masks[0] = False
    counts = histograms(maps, masks)
    for rule in ((0.5, 0, 0.5), (0.875, 15, 0.25), (0.875, 101, 0.25)):
        dice, iou = zip(*[literal(m, k, *rule) for m, k in zip(maps, masks, strict=True)], strict=True)
        assert metrics.map_dice(counts, *rule) == pytest.approx(dice)
        assert metrics.map_iou(counts, *rule) == pytest.approx(iou)
        result = metrics.overlaps(counts, *rule)
        assert result["dice_all"].value == pytest.approx(np.mean(dice))
        assert result["dice_positives"].value == pytest.approx(np.mean(dice[1:]))
        assert result["iou_positives"].value == pytest.approx(np.mean(iou[1:]))
    nothing = metrics.overlaps(counts, 0.875, 101, 0.25)
    assert nothing["dice_all"].value == pytest.approx(1 / 6)
    assert metrics.empty_baseline(counts) == pytest.approx(1 / 6)
    weights_RN = metrics.bootstrap_weights(list("abcdef"), 50, 0)
    estimate = metrics.overlaps(counts, 0.5, 0, 0.5, weights_RN)["dice_positives"]
    assert estimate.low < estimate.value < estimate.high
    empty = metrics.overlaps(histograms(maps, np.zeros_like(masks)), 0.5, 0, 0.5, weights_RN)
    assert empty["dice_positives"].reason == "no image with a mask"


def scores_of(score: list[float], patients: list[str]) -> Scores:
    ids = np.array([f"i{k}" for k in range(len(score))], dtype=object)
    column = np.array(score, dtype=np.float32)[:, None]
    return Scores(ids, np.array(patients, dtype=object), column, np.zeros_like(column), ("Mass",))


def test_scores_without_a_metric_are_refused() -> None:
    metrics.require(scores_of([0.1, 0.2], ["a", "b"]), "run")
    with pytest.raises(UserError, match=r"run: the score of Mass of image i1 is nan \(1 such scores\)"):
        metrics.require(scores_of([0.1, float("nan")], ["a", "b"]), "run")
    with pytest.raises(UserError, match=r"run: all 2 images are of one patient"):
        metrics.require(scores_of([0.1, 0.2], ["a", "a"]), "run")
    with pytest.raises(UserError, match=r"run holds no image"):
        metrics.require(scores_of([], []), "run")


def test_two_thousand_resamples_of_the_official_test_split_take_less_than_twenty_seconds() -> None:
    rng = np.random.default_rng(0)
    began = time.process_time()
    weights_RN = metrics.bootstrap_weights(rng.integers(2797, size=25_596).astype(str), 2000, 0)
    drawn = time.process_time() - began
    score = rng.random(25_596)
    began = time.process_time()
    metrics.bootstrap_auroc(score, (rng.random(25_596) < 0.2 * score).astype(float), weights_RN)
    assert drawn + 14 * (time.process_time() - began) < 20  # 5 s measured
