"""Calibrators and prior shift against scikit-learn, brute force, hand computation and data whose truth is known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from cxrscale.evaluation import calibration, metrics
from cxrscale.types import logits_of

KINDS = ("platt", "temperature", "isotonic")
CALIBRATOR: TypeAdapter[calibration.Calibrator] = TypeAdapter(calibration.Calibrator)
drawn = st.lists(st.tuples(st.integers(1, 19), st.booleans()), min_size=4, max_size=60).filter(
    lambda rows: len({present for _, present in rows}) == 2
)


def overconfident(images: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True probabilities, outcomes drawn from them, and scores whose logits are three times too large and shifted."""
    rng = np.random.default_rng(seed)
    truth = expit(rng.normal(-1.5, 1.2, images))
    label = (rng.random(images) < truth).astype(float)
    return truth, label, expit(3 * logit(truth) + 1)


def test_platt_and_temperature_find_what_distorted_the_scores() -> None:
    truth, label, score = overconfident(40_000)
    platt = calibration.fit("platt", logits_of(score), label)
    assert isinstance(platt, calibration.Platt)
    assert platt.slope == pytest.approx(1 / 3, rel=0.03)
    assert platt.offset == pytest.approx(-1 / 3, abs=0.03)
    assert np.abs(platt.apply(logits_of(score)) - truth).max() < 0.02
    hot = calibration.fit("temperature", 3 * logit(truth), label)
    assert isinstance(hot, calibration.Temperature)
    assert hot.temperature == pytest.approx(3, rel=0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_calibration_of_unseen_scores_lowers_brier_and_ece(kind: str) -> None:
    _, label, score = overconfident(40_000, seed=1)
    _, unseen, scores = overconfident(40_000, seed=2)
    before = metrics.probability_metrics(scores, unseen)
    after = metrics.probability_metrics(calibration.fit(kind, logits_of(score), label).apply(logits_of(scores)), unseen)
    for name in ("brier", "ece", "ece_equal_mass"):
        assert getattr(after, name).value < getattr(before, name).value
    assert after.ece.value < (0.05 if kind == "temperature" else 0.02)  # a single parameter corrects no shift


@given(rows=drawn)
@settings(deadline=None, max_examples=30)
def test_platt_is_logistic_regression_on_the_logit_with_platts_targets(rows: list[tuple[int, bool]]) -> None:
    score = np.array([value for value, _ in rows]) / 20
    label = np.array([float(present) for _, present in rows])
    result = calibration.fit("platt", logits_of(score), label)
    assert isinstance(result, calibration.Platt)
    positives, negatives = label.sum(), len(label) - label.sum()
    target = np.where(label == 1, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    twice = np.r_[logit(score), logit(score)][:, None]
    # With a much lower tolerance its line search ends in rounding errors on some of these, with a warning.
    fitted = LogisticRegression(C=1e10, tol=1e-6, max_iter=10_000).fit(
        twice, np.r_[np.ones(len(label)), np.zeros(len(label))], sample_weight=np.r_[target, 1 - target]
    )
    theirs = fitted.predict_proba(logit(score)[:, None])[:, 1]
    if fitted.coef_[0, 0] > 0:
        assert result.apply(logits_of(score)) == pytest.approx(theirs, abs=2e-3)
    else:  # higher scores are not more likely to be positive: then the score has no information
        assert result.slope == pytest.approx(0, abs=1e-9)
        assert result.apply(logits_of(score)) == pytest.approx(np.full(len(score), target.mean()), abs=2e-3)


@given(rows=drawn)
@settings(deadline=None)
def test_no_temperature_has_a_higher_likelihood(rows: list[tuple[int, bool]]) -> None:
    score = np.array([value for value, _ in rows]) / 20
    label = np.array([float(present) for _, present in rows])
    result = calibration.fit("temperature", logit(score), label)
    sign = 2 * label - 1

    def loss(temperature: float) -> float:
        return float(np.logaddexp(0, -sign * logit(score) / temperature).mean())

    losses = [loss(temperature) for temperature in np.geomspace(0.02, 90, 60)]
    assert isinstance(result, calibration.Temperature | calibration.Unchanged)
    if isinstance(result, calibration.Unchanged):
        monotonic = np.diff(losses)
        assert (monotonic >= -1e-12).all() if "the lower" in result.reason else (monotonic <= 1e-12).all()
        return
    assert loss(result.temperature) <= min(losses) + 1e-12


@given(rows=drawn)
@settings(deadline=None, max_examples=30)
def test_isotonic_is_scikit_learns_and_survives_json(rows: list[tuple[int, bool]]) -> None:
    score = np.array([value for value, _ in rows]) / 20
    label = np.array([float(present) for _, present in rows])
    theirs = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(score, label)
    grid = np.linspace(0, 1, 101)
    for kind in KINDS:
        result = calibration.fit(kind, logits_of(score), label)
        again = CALIBRATOR.validate_json(CALIBRATOR.dump_json(result))
        assert again == result
        applied = again.apply(logits_of(grid))
        assert (np.diff(applied) >= -1e-12).all()
        assert ((applied >= 0) & (applied <= 1)).all()
        if kind == "isotonic":
            assert applied == pytest.approx(theirs.predict(expit(logits_of(grid))), abs=1e-6)


def test_scores_that_cannot_be_calibrated_stay_unchanged_with_the_reason() -> None:
    result = calibration.fit("platt", [0.2, 0.7, 0.9], [0, 0, np.nan])
    assert result == calibration.Unchanged("no image with the finding in validation")
    assert result.apply(logit([0.1, 0.9])) == pytest.approx([0.1, 0.9])
    assert calibration.fit("none", [0.2, 0.7], [0, 1]) == calibration.Unchanged()
    assert CALIBRATOR.validate_json(CALIBRATOR.dump_json(result)) == result
    with pytest.raises(ValidationError, match="'spline' found using 'kind' does not match any of the expected tags"):
        CALIBRATOR.validate_python({"kind": "spline"})


def test_scores_of_any_size_stay_finite_and_in_order() -> None:
    label = np.array([0, 0, 1, 0, 1, 1])
    for size in (1e-30, 1.0, 40.0, 1e30):
        logits = size * np.array([-3.0, -2.0, -1.0, 0.5, 1.0, 2.0], dtype=np.float32)
        for kind in KINDS:
            applied = calibration.fit(kind, logits, label).apply(logits)
            assert np.isfinite(applied).all()
            assert (np.diff(applied) >= 0).all()


def test_a_temperature_that_does_not_exist_has_the_reason() -> None:
    logits, label = np.array([-20.0, -3.0, 2.0, 19.0]), np.array([0, 0, 1, 1])
    separable = calibration.fit("temperature", logits, label)
    assert isinstance(separable, calibration.Unchanged)
    assert separable.reason.startswith("the sign of the logit tells the classes apart in validation")
    assert separable.apply(logits).tolist() == expit(logits).tolist()
    reversed_ = calibration.fit("temperature", logits, 1 - label)
    assert isinstance(reversed_, calibration.Unchanged)
    assert reversed_.reason.startswith("in validation higher scores are not more likely to be positive")
    # Separable, but not at 0: one temperature is the most likely.
    shifted = calibration.fit("temperature", logits + 5, label)
    assert isinstance(shifted, calibration.Temperature)
    slopes = np.geomspace(0.01, 100, 2001)
    best = slopes[np.argmin([np.logaddexp(0, -(2 * label - 1) * s * (logits + 5)).mean() for s in slopes])]
    assert 1 / shifted.temperature == pytest.approx(best, rel=0.01)


def test_prior_shift_by_hand() -> None:
    # From 10% to 40%: 0.2 x 4 = 0.8 against 0.8 x 0.6 / 0.9 = 0.5333, so 0.8 / 1.3333 = 0.6.
    shift = calibration.PriorShift(0.1, 0.4)
    assert shift.apply([0.2]) == pytest.approx([0.6])
    assert shift.apply([0.0, 1.0]).tolist() == [0.0, 1.0]
    assert calibration.PriorShift(0.4, 0.1).apply(shift.apply([0.05, 0.5])) == pytest.approx([0.05, 0.5])


def test_the_prior_of_three_scores_by_hand() -> None:
    # Two scores of 0.9 and one of 0.1, calibrated at one half: the likelihood of a prior q is
    # (0.2 + 1.6 q)^2 (1.8 - 1.6 q); its derivative is 0 where 3.6 - 3.2 q = 0.2 + 1.6 q, at q = 3.4 / 4.8.
    assert calibration.estimate_prior([0.9, 0.9, 0.1], 0.5).value == pytest.approx(3.4 / 4.8, abs=1e-6)


@given(seed=st.integers(0, 1000), source=st.sampled_from([0.05, 0.3, 0.5]))
@settings(deadline=None, max_examples=30)
def test_expectation_maximization_ends_at_the_most_likely_prior(seed: int, source: float) -> None:
    score = np.random.default_rng(seed).beta(0.8, 1.5, 300)
    result = calibration.estimate_prior(score, source)

    def loss(prior: float) -> float:
        return -float(np.log(score * prior / source + (1 - score) * (1 - prior) / (1 - source)).sum())

    likeliest = minimize_scalar(loss, bounds=(1e-9, 1 - 1e-9), method="bounded", options={"xatol": 1e-10}).x
    assert result.value == pytest.approx(likeliest, abs=1e-4)


@pytest.mark.parametrize("target", [0.02, 0.1, 0.35])
def test_the_true_prevalence_of_shifted_data_is_estimated(target: float) -> None:
    """Scores that are right at 5%, images of which another share has the finding (NIH's test split: 3% to 10%)."""
    source, rng = 0.05, np.random.default_rng(7)
    label = (rng.random(60_000) < target).astype(float)
    feature = rng.normal(label * 2.0)
    score = expit(logit(source) + 2.0 * feature - 2.0)  # Bayes' rule for unit normals at 0 and 2
    result = calibration.estimate_prior(score, source)
    assert result.value == pytest.approx(target, abs=0.005)
    corrected = calibration.PriorShift(source, result.value).apply(score)
    assert metrics.ece(corrected, label).value < 0.01
    assert metrics.ece(corrected, label).value < metrics.ece(score, label).value
    assert metrics.brier(corrected, label).value < metrics.brier(score, label).value


def test_a_prior_that_cannot_be_estimated_has_the_reason() -> None:
    assert calibration.estimate_prior([], 0.2).reason == "no score"
    assert calibration.estimate_prior([0.2, 0.3], 0.0).reason.startswith("one class only")
    assert calibration.estimate_prior([0.0, 0.0], 0.5).reason == "one class left"
