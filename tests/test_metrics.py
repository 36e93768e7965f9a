"""Metrics against scikit-learn and hand-made cases."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from cxrscale import metrics
from cxrscale.schema import MapCounts

scores = st.lists(st.tuples(st.integers(0, 5), st.sampled_from([0.0, 1.0])), min_size=2, max_size=60)


@given(rows=scores, seed=st.integers(0, 3))
def test_bootstrap_auroc_equals_scikit_learn_on_every_resample(rows: list[tuple[int, float]], seed: int) -> None:
    score = np.array([row[0] for row in rows], dtype=np.float64)
    label = np.array([row[1] for row in rows])
    draws = metrics.patient_draws([f"p{i // 2}" for i in range(len(rows))], resamples=5, seed=seed)
    ours = metrics.auroc_draws(score, label, draws)
    for value, weight in zip(ours, draws, strict=True):
        drawn = np.repeat(np.arange(len(rows)), weight)
        if len(set(label[drawn])) == 2:
            assert value == pytest.approx(roc_auc_score(label[drawn], score[drawn]), abs=1e-6)
        else:
            assert np.isnan(value)


def test_whole_patients_are_drawn() -> None:
    draws = metrics.patient_draws(["a", "b", "a", "c"], resamples=50, seed=1)
    assert (draws[:, 0] == draws[:, 2]).all()
    assert (draws[:, 0] + draws[:, 1] + draws[:, 3] == 3).all()


def test_an_absent_class_is_nan_with_the_reason_and_leaves_the_mean() -> None:
    assert metrics.auroc([0.1, 0.9], [0, 0]).reason == "no picture with the finding"
    assert metrics.auroc([0.1, 0.9], [1, 1]).reason == "no picture without the finding"
    assert metrics.auroc([0.1, 0.9], [np.nan, np.nan]).reason == "no labelled picture"
    score = np.array([[0.1, 0.5], [0.9, 0.5]], dtype=np.float32)
    label = np.array([[0, 0], [1, 0]], dtype=np.float32)
    assert metrics.macro_auroc(score, label) == 1.0


def test_unlabelled_pictures_count_nowhere() -> None:
    assert metrics.auroc([0.1, 0.2, 0.9], [0, 1, np.nan]).value == 1.0
    assert metrics.confusion([0.1, 0.8, 0.9], [0, 1, np.nan], 0.5) == {"tp": 1, "fp": 0, "fn": 0, "tn": 1}


def test_f1_of_the_published_confusion_matrix() -> None:
    # System C's matrix at 0.5: [[1936, 143], [271, 334]]; its precision 0.700 and recall 0.552 are published.
    counts = {"tp": 334, "fp": 143, "fn": 271, "tn": 1936}
    assert metrics.ratio(counts["tp"], counts["fp"]) == pytest.approx(0.700, abs=5e-4)
    assert metrics.ratio(counts["tp"], counts["fn"]) == pytest.approx(0.552, abs=5e-4)
    assert metrics.f1(counts) == pytest.approx(2 * 0.7002 * 0.5521 / (0.7002 + 0.5521), abs=1e-3)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(100):
        value = rng.normal(size=60)
        draws = metrics.patient_draws([str(i) for i in range(60)], resamples=200, seed=trial)
        estimate = metrics.interval(float(value.mean()), metrics.mean_draws(value, draws))
        hits += estimate.low <= 0 <= estimate.high
    assert 86 <= hits <= 100


def brute_dice(map_HW: np.ndarray, mask_HW: np.ndarray, top: float, area: int, bottom: float) -> float:
    predicted = map_HW >= bottom
    if (map_HW >= top).sum() < max(1, area):
        predicted = np.zeros_like(predicted)
    total = predicted.sum() + mask_HW.sum()
    return 1.0 if total == 0 else 2 * (predicted & mask_HW).sum() / total


def test_dice_from_histograms_equals_dice_from_maps() -> None:
    rng = np.random.default_rng(0)
    maps = rng.integers(0, 8, (6, 10, 10)) / 8
    masks = rng.random((6, 10, 10)) < 0.3
    masks[0] = False
    every = np.stack([np.bincount((m * 8).astype(int).ravel(), minlength=8) for m in maps])
    inside = np.stack([np.bincount((m * 8).astype(int)[k], minlength=8) for m, k in zip(maps, masks, strict=True)])
    counts = MapCounts(every.astype(np.int32), inside.astype(np.int32))
    for top, area, bottom in ((0.5, 0, 0.5), (0.875, 15, 0.25), (0.875, 101, 0.25)):
        ours = metrics.map_dice(counts, top, area, bottom)
        expected = [brute_dice(m, k, top, area, bottom) for m, k in zip(maps, masks, strict=True)]
        assert ours == pytest.approx(expected)
