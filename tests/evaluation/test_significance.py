"""Two runs, subgroups, annotators: against written-out definitions, scikit-learn and data without a difference."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest, norm
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from cxrscale.evaluation import metrics

rows = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 6), st.sampled_from([0.0, 1.0])), min_size=6, max_size=40
).filter(lambda drawn: 2 <= sum(label for *_, label in drawn) <= len(drawn) - 2)


def literal_delong(score_KN: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """DeLong et al. 1988, equations 4 to 6: every positive against every negative."""
    win_KPN = np.stack(
        [(s[label == 1][:, None] > s[label == 0]) + 0.5 * (s[label == 1][:, None] == s[label == 0]) for s in score_KN]
    )
    by_positive, by_negative = win_KPN.mean(axis=2), win_KPN.mean(axis=1)
    covariance = np.cov(by_positive) / by_positive.shape[1] + np.cov(by_negative) / by_negative.shape[1]
    return win_KPN.mean(axis=(1, 2)), covariance


@given(drawn=rows)
@settings(deadline=None)
def test_the_fast_delong_is_the_literal_one(drawn: list[tuple[int, int, float]]) -> None:
    first, second, label = (np.array(column, dtype=np.float64) for column in zip(*drawn, strict=True))
    score = np.stack([first, second])
    area, covariance = metrics.delong(score, label)
    expected_area, expected = literal_delong(score, label)
    assert area == pytest.approx(expected_area)
    assert area == pytest.approx([roc_auc_score(label, s) for s in score])
    assert covariance == pytest.approx(expected)
    alone = [f"p{i}" for i in range(len(label))]
    assert metrics.delong(score, label, alone)[1] == pytest.approx(expected)


def literal_obuchowski(score: np.ndarray, label: np.ndarray, patient: np.ndarray) -> float:
    """Obuchowski 1997, equations 3 to 5, for one score."""
    p, n = (label == 1).sum(), (label == 0).sum()
    win = (score[label == 1][:, None] > score[label == 0]) + 0.5 * (score[label == 1][:, None] == score[label == 0])
    area = win.mean()
    up = {name: (win.mean(axis=1)[patient[label == 1] == name] - area).sum() for name in set(patient)}
    down = {name: (win.mean(axis=0)[patient[label == 0] == name] - area).sum() for name in set(patient)}
    ups, downs, both = len(set(patient[label == 1])), len(set(patient[label == 0])), len(set(patient))
    s10 = ups / ((ups - 1) * p) * sum(value**2 for value in up.values())
    s01 = downs / ((downs - 1) * n) * sum(value**2 for value in down.values())
    s11 = both / (both - 1) * sum(up[name] * down[name] for name in up)
    return float(s10 / p + s01 / n + 2 * s11 / (p * n))


@given(drawn=rows, seed=st.integers(0, 9))
@settings(deadline=None)
def test_the_variance_over_patients_is_obuchowskis(drawn: list[tuple[int, int, float]], seed: int) -> None:
    first, second, label = (np.array(column, dtype=np.float64) for column in zip(*drawn, strict=True))
    patient = np.random.default_rng(seed).integers(0, 8, len(label)).astype(str)
    _, covariance = metrics.delong(np.stack([first, second]), label, patient)
    if min(len(set(patient[label == 1])), len(set(patient[label == 0]))) < 2:
        assert np.isnan(covariance).all()
        return
    assert covariance[0, 0] == pytest.approx(literal_obuchowski(first, label, patient))
    assert covariance[1, 1] == pytest.approx(literal_obuchowski(second, label, patient))
    total = metrics.delong(np.stack([first, first]), label, patient)[1]
    assert total == pytest.approx(np.full((2, 2), covariance[0, 0]))


def test_the_p_value_is_uniform_without_a_difference_and_small_with_one() -> None:
    rng = np.random.default_rng(0)
    p = []
    for _ in range(300):
        label = (rng.random(150) < 0.4).astype(float)
        shared = label + rng.normal(size=150)
        p.append(metrics.delong_test(shared + rng.normal(size=150), shared + rng.normal(size=150), label)[0])
    assert kstest(p, "uniform").pvalue > 0.01
    assert metrics.delong_test(label + 0.1 * rng.normal(size=150), rng.normal(size=150), label)[0] < 1e-6


def test_images_of_one_patient_are_not_independent() -> None:
    """Four near copies of each image: taken as independent, chance is called a difference far too often."""
    rng = np.random.default_rng(1)
    naive, honest = [], []
    for _ in range(150):
        label = np.repeat((rng.random(60) < 0.4).astype(float), 4)
        patient = np.repeat(np.arange(60), 4).astype(str)
        a, b = (np.repeat(rng.normal(size=60), 4) + 0.05 * rng.normal(size=240) + label for _ in range(2))
        naive.append(metrics.delong_test(a, b, label)[0])
        honest.append(metrics.delong_test(a, b, label, patient)[0])
    assert np.mean(np.array(naive) < 0.05) > 0.2
    assert np.mean(np.array(honest) < 0.05) < 0.12


def test_delong_and_the_paired_bootstrap_agree() -> None:
    rng = np.random.default_rng(3)
    patient = rng.integers(0, 150, 600).astype(str)
    label = (rng.random(600) < 0.3).astype(float)
    shared = label + rng.normal(size=600)
    a, b = shared + 0.8 * rng.normal(size=600), shared + rng.normal(size=600)
    weights_RN = metrics.bootstrap_weights(patient, 2000, 0)
    gap = metrics.bootstrap_auroc(a, label, weights_RN) - metrics.bootstrap_auroc(b, label, weights_RN)
    covariance = metrics.delong(np.stack([a, b]), label, patient)[1]
    deviation = (covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]) ** 0.5
    assert gap.std() == pytest.approx(deviation, rel=0.1)
    assert metrics.bootstrap_p(gap) == pytest.approx(metrics.delong_test(a, b, label, patient)[0], abs=0.05)


def test_what_cannot_be_tested_says_why() -> None:
    assert metrics.delong_test([1, 2, 3], [3, 2, 1], [0, 0, 0])[1] == "no image with the finding"
    assert metrics.delong_test([1, 2, 3], [3, 1, 2], [0, 1, 0])[1] == "fewer than two images on one side"
    assert metrics.delong_test([1, 2, 3, 4], [3, 1, 2, 4], [0, 1, 0, 1], list("aabb"))[1] == ""
    assert metrics.delong_test([1, 2, 3, 4], [3, 1, 2, 4], [0, 1, 0, 1], list("abcb"))[1].startswith(
        "fewer than two patients"
    )
    score, label = [0.1, 0.4, 0.3, 0.9], [0, 0, 1, 1]
    assert metrics.delong_test(score, score, label) == (1.0, "")
    split = metrics.delong_test([0, 0, 1, 1], [1, 1, 0, 0], label)
    assert np.isnan(split[0])
    assert split[1] == "the difference has no variance"


def test_one_swapped_pair_among_25596_images_has_a_p_value() -> None:
    """Its variance is 1e-16: small beside 1, not beside what it is the variance of."""
    rng = np.random.default_rng(0)
    label = (rng.random(25_596) < 0.1).astype(float)
    score = rng.normal(size=len(label)) + label
    order = np.argsort(score)
    at = int(np.flatnonzero(label[order][:-1] != label[order][1:])[1000])
    swapped = score.copy()
    swapped[order[[at, at + 1]]] = score[order[[at + 1, at]]]
    p, reason = metrics.delong_test(score, swapped, label)
    assert reason == ""
    # One pair differs: the statistic is 1 over the root of 1 + 1, of the positive and of the negative.
    assert p == pytest.approx(2 * norm.sf(0.5**0.5), rel=1e-3)
    assert metrics.delong_test(score, score * 2 + 1, label) == (1.0, "")
    patient = np.arange(len(label)) // 9
    assert metrics.delong_test(score, swapped, label, patient.astype(str))[0] == pytest.approx(p, rel=1e-2)
    assert metrics.delong_test(score, 3 * score, label, patient.astype(str)) == (1.0, "")


def literal_precision(score: np.ndarray, label: np.ndarray) -> float:
    """The mean over positives of the precision when all that score at least as high are called."""
    return float(np.mean([label[score >= threshold].mean() for threshold in score[label == 1]]))


def literal_p(area: np.ndarray, covariance: np.ndarray) -> float:
    """DeLong's test of two AUROCs from their covariance."""
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    return float(2 * norm.sf(abs(area[0] - area[1]) / variance**0.5))


def test_a_thousand_random_cases_agree_with_every_pair_counted() -> None:
    """Ties, both classes of any size, scores near each other and far apart: AUROC, AP, DeLong and its p-value."""
    rng = np.random.default_rng(22)
    for case in range(1000):
        images = int(rng.integers(6, 60))
        label = (rng.random(images) < rng.uniform(0.1, 0.9)).astype(float)
        label[:4] = 0, 0, 1, 1
        first = rng.integers(0, rng.integers(2, 40), images) + rng.choice([0.0, 16.0, -300.0])
        second = first + rng.integers(-1, 2, images) * rng.choice([0, 1, 5])
        area, covariance = literal_delong(np.stack([first, second]), label)
        one = np.ones((1, images), dtype=np.uint8)
        assert abs(metrics.bootstrap_auroc(first, label, one)[0] - area[0]) < 1e-12
        assert abs(metrics.bootstrap_auprc(first, label, one)[0] - literal_precision(first, label)) < 1e-12
        if case % 10 == 0:  # scikit-learn's checks of its arguments cost most of the time
            assert metrics.auroc(first, label).value == pytest.approx(roc_auc_score(label, first), abs=1e-12)
            assert metrics.auprc(first, label).value == pytest.approx(average_precision_score(label, first), abs=1e-12)
        ours = metrics.delong(np.stack([first, second]), label)
        assert np.abs(ours[0] - area).max() < 1e-12
        assert np.abs(ours[1] - covariance).max() < 1e-12
        p, reason = metrics.delong_test(first, second, label)
        if covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1] > 1e-12:
            assert abs(p / literal_p(area, covariance) - 1) < 1e-6, case
            assert reason == ""
        else:
            assert p == 1 or reason == "the difference has no variance"


def test_the_bootstraps_p_value_by_hand() -> None:
    assert metrics.bootstrap_p(np.array([0.1] * 97 + [-0.1] * 2)) == pytest.approx(2 * 3 / 100)
    assert metrics.bootstrap_p(np.full(99, 0.1)) == pytest.approx(2 / 100)
    assert metrics.bootstrap_p(np.zeros(99)) == 1.0
    assert np.isnan(metrics.bootstrap_p(np.array([np.nan, 0.1])))


def test_holm_by_hand() -> None:
    # Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1: 0.04, 0.06, 0.06, 0.04, and none may fall: 0.06 at the end.
    assert metrics.holm([0.04, 0.01, np.nan, 0.03, 0.02]) == pytest.approx(
        [0.06, 0.04, np.nan, 0.06, 0.06], nan_ok=True
    )
    assert metrics.holm([0.9, 0.6]).tolist() == [1.0, 1.0]
    assert metrics.holm([]).tolist() == []


def test_missing_values_are_the_unknown_group() -> None:
    assert metrics.group_names(np.array(["F", None, "M", "", np.nan], dtype=object)).tolist() == [
        "F",
        "unknown",
        "M",
        "unknown",
        "unknown",
    ]


def test_each_group_is_the_metric_of_its_own_images() -> None:
    rng = np.random.default_rng(0)
    label = (rng.random(400) < 0.3).astype(float)
    label[:20] = np.nan
    score = np.clip(0.3 * np.nan_to_num(label) + 0.7 * rng.random(400), 0, 1)
    group = metrics.group_names(rng.choice(["F", "M", "X"], 400, p=[0.6, 0.37, 0.03]))
    group[5:50] = "unknown"
    weights_RN = metrics.bootstrap_weights(rng.integers(0, 120, 400).astype(str), 200, 0)
    result = metrics.by_group(score, label, group, weights_RN, threshold=0.5)
    assert list(result) == ["F", "M", "X", "unknown"]
    for name in ("F", "M"):
        mine = (group == name) & ~np.isnan(label)
        assert result[name].images == mine.sum()
        assert result[name].positives == label[mine].sum()
        area = result[name].estimates["auroc"]
        assert area.value == pytest.approx(roc_auc_score(label[mine], score[mine]))
        expected = metrics.interval(area.value, metrics.bootstrap_auroc(score[mine], label[mine], weights_RN[:, mine]))
        assert (area.low, area.high) == (expected.low, expected.high)
        assert result[name].estimates["f1"].value == pytest.approx(f1_score(label[mine], score[mine] >= 0.5))
    few = result["X"].estimates["auroc"]
    assert np.isnan(few.value)
    assert few.reason == f"{result['X'].positives} images with the finding, fewer than 10"


def test_the_annotators_protocol_is_scikit_learns_f1_averaged() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random(420) < 0.25
    raters = np.stack([truth ^ (rng.random(420) < error) for error in (0.1, 0.2, 0.25, 0.15, 0.3)], axis=1).astype(
        float
    )
    called, annotators = raters[:, 0], raters[:, 1:].copy()
    weights_RN = metrics.bootstrap_weights(np.arange(420).astype(str), 300, 0)
    result = metrics.annotator_f1(called, annotators, weights_RN)
    model = np.mean([f1_score(annotators[:, a], called) for a in range(4)])
    assert result.model.value == pytest.approx(model)
    second = np.mean([f1_score(raters[:, other], raters[:, 2]) for other in (0, 1, 3, 4)])
    assert result.annotators[1].value == pytest.approx(second)
    assert result.annotator_mean.value == pytest.approx(np.mean([one.value for one in result.annotators]))
    assert result.difference.value == pytest.approx(result.model.value - result.annotator_mean.value)
    assert result.difference.low > 0  # the model errs least
    again = [
        np.mean([f1_score(np.repeat(annotators[:, a], weight), np.repeat(called, weight)) for a in range(4)])
        for weight in weights_RN[:20]
    ]
    few = metrics.annotator_f1(called, annotators, weights_RN[:20])
    assert (few.model.low, few.model.high) == pytest.approx(tuple(np.quantile(again, [0.025, 0.975])))
    annotators[7, 2] = np.nan
    kept = np.arange(420) != 7
    without = metrics.annotator_f1(called[kept], annotators[kept], weights_RN[:, kept])
    assert metrics.annotator_f1(called, annotators, weights_RN) == without
