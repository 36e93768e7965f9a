"""Everything that is computed from synthetic scores, against scikit-learn and counting. Some 5 s."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, brier_score_loss, f1_score, roc_auc_score

from cxrscale.config import Threshold
from cxrscale.evaluation import calibration, metrics, summary
from cxrscale.evaluation.artifacts import ChosenThresholds, FindingMetrics, SplitMetrics
from cxrscale.evaluation.calibration import PriorShift
from cxrscale.types import ScoreHistograms, Scores

FINDINGS = ("Mass", "Nodule", "Hernia")
"""No image has Hernia."""


def make_scores(images: int, seed: int, prevalence: float = 0.3) -> Scores:
    """Scores that are better than chance; three images per patient, some labels unknown."""
    rng = np.random.default_rng(seed)
    label = (rng.random((images, 3)) < [prevalence, prevalence / 2, 0.0]).astype(np.float32)
    logit = 1.5 * label + rng.normal(size=(images, 3)) - 1
    label[::17, 0] = np.nan
    names = np.array([f"p{n}" for n in range(images)], dtype=object)
    patient = np.array([f"patient{n // 3}" for n in range(images)], dtype=object)
    return Scores(names, patient, logit.astype(np.float32), label, FINDINGS)


def evaluate(
    rule: Threshold, prevalence: float = 0.3
) -> tuple[Scores, ChosenThresholds, Scores, dict[str, FindingMetrics]]:
    """(validation scores, what is chosen on them, test scores, the findings' metrics)."""
    val, test = make_scores(300, 1), make_scores(400, 2, prevalence)
    chosen = summary.choose_thresholds(val, rule, metrics.bootstrap_weights(val.patient, 50, 0))
    sex = np.array(["F", "M"] * 200, dtype=object)
    result = summary.evaluate_scores(test, chosen, metrics.bootstrap_weights(test.patient, 50, 0), {"sex": sex})
    for part in (chosen, result):  # JSON, which has no NaN, and back
        text = part.model_dump_json()
        assert type(part).model_validate(json.loads(text, parse_constant=pytest.fail)).model_dump_json() == text
    return val, chosen, test, dict(result.findings)


def test_metrics_are_those_of_scikit_learn() -> None:
    _, chosen, test, rows = evaluate(Threshold(report_at=(0.5, 0.25)))
    for f, name in enumerate(FINDINGS[:2]):
        known = ~np.isnan(test.label_NF[:, f])
        label, score = test.label_NF[known, f], test.probability_NF[known, f]
        row, at = rows[name], rows[name].at_threshold
        assert at is not None
        assert row.auroc.value == pytest.approx(roc_auc_score(label, score))
        assert row.auprc.value == pytest.approx(average_precision_score(label, score))
        assert row.brier.value == pytest.approx(brier_score_loss(label, score))
        assert at.threshold == chosen.thresholds[name].threshold.value
        assert at.f1.value == pytest.approx(f1_score(label, score >= at.threshold))
        assert [point.threshold for point in row.report_at] == [0.5, 0.25]
        assert row.report_at[1].f1.value == pytest.approx(f1_score(label, score >= 0.25))
        rates = [getattr(at, rate) for rate in metrics.RATES]
        for estimate in (row.auroc, row.auprc, row.brier, *rates):
            assert estimate.low <= estimate.value <= estimate.high
    women = np.arange(400) % 2 == 0
    label, score = test.label_NF[women, 1], test.probability_NF[women, 1]
    assert rows["Nodule"].subgroups["sex"]["F"].auroc.value == pytest.approx(roc_auc_score(label, score))


def test_a_finding_without_positives_has_the_reason_and_is_not_in_the_mean() -> None:
    _, chosen, test, rows = evaluate(Threshold(calibration="platt"))
    hernia = chosen.thresholds["Hernia"]
    assert not hernia.threshold.defined
    assert hernia.threshold.reason == "no image with the finding in validation"
    assert hernia.on_validation is None
    assert not rows["Hernia"].auroc.defined
    assert rows["Hernia"].auroc.reason == "no image with the finding"
    assert rows["Hernia"].at_threshold is None
    assert rows["Hernia"].threshold_reason == hernia.threshold.reason
    result = summary.evaluate_scores(test, chosen, metrics.bootstrap_weights(test.patient, 20, 0), {})
    assert result.findings_in_mean == 2
    assert result.mean_auroc.value == pytest.approx(np.mean([rows[name].auroc.value for name in FINDINGS[:2]]))


@pytest.mark.parametrize("kind", ["platt", "temperature", "isotonic"])
def test_calls_and_brier_are_of_calibrated_probabilities(kind: str) -> None:
    val, chosen, test, rows = evaluate(Threshold.model_validate({"calibration": kind}))
    fitted = chosen.calibration["Nodule"]
    own = calibration.fit(kind, val.logit_NF[:, 1], val.label_NF[:, 1])
    assert fitted.calibrator == own
    assert fitted.after is not None
    assert fitted.after.brier.value < fitted.before.brier.value
    label, final = test.label_NF[:, 1], own.apply(test.logit_NF[:, 1])
    row, at = rows["Nodule"], rows["Nodule"].at_threshold
    assert row.brier.value == pytest.approx(brier_score_loss(label, final))
    assert list(row.calibration) == ["raw", "calibrated"]
    assert row.calibration["calibrated"].brier.value == row.brier.value
    raw = brier_score_loss(label, test.probability_NF[:, 1])
    assert row.calibration["raw"].brier.value == pytest.approx(raw)
    assert at is not None
    assert at.f1.value == pytest.approx(f1_score(label, final >= at.threshold))


def test_the_required_recall_is_reached_on_validation() -> None:
    _, chosen, _, _ = evaluate(Threshold(goal="recall", min_rate=0.9))
    for name in FINDINGS[:2]:
        threshold, at = chosen.thresholds[name].threshold, chosen.thresholds[name].on_validation
        assert at is not None
        assert at.recall.value >= 0.9
        assert threshold.low <= threshold.value <= threshold.high


def test_a_known_prevalence_moves_probabilities_and_threshold_together() -> None:
    rule = Threshold(prior_shift="known", priors={"Mass": 0.6}, calibration="platt")
    val, chosen, test, rows = evaluate(rule, prevalence=0.6)
    own = calibration.fit("platt", val.logit_NF[:, 0], val.label_NF[:, 0])
    shift = PriorShift(chosen.calibration["Mass"].prevalence, 0.6)
    known = ~np.isnan(test.label_NF[:, 0])
    label, final = test.label_NF[known, 0], shift.apply(own.apply(test.logit_NF[known, 0]))
    row, at = rows["Mass"], rows["Mass"].at_threshold
    assert row.brier.value == pytest.approx(brier_score_loss(label, final))
    assert at is not None
    assert at.f1.value == pytest.approx(f1_score(label, final >= at.threshold))
    assert row.calibration["corrected"].brier.value < row.calibration["calibrated"].brier.value
    assert row.prior_shift is not None
    without, uncorrected = row.prior_shift.uncorrected, chosen.thresholds["Mass"].uncorrected
    assert without is not None
    assert uncorrected is not None
    assert without.threshold == uncorrected.value
    calibrated = own.apply(test.logit_NF[known, 0])
    assert without.f1.value == pytest.approx(f1_score(label, calibrated >= uncorrected.value))
    nodule = rows["Nodule"].prior_shift
    assert nodule is not None
    assert "does not name it" in nodule.reason
    assert np.isnan(nodule.assumed)


def test_a_prevalence_estimated_from_scores_alone_is_near_the_true_one() -> None:
    _, chosen, test, rows = evaluate(Threshold(prior_shift="em", calibration="platt"), prevalence=0.7)
    shift = rows["Mass"].prior_shift
    assert shift is not None
    known = ~np.isnan(test.label_NF[:, 0])
    assert shift.test == pytest.approx(float(test.label_NF[known, 0].mean()))
    assert abs(shift.assumed - shift.test) < abs(shift.validation - shift.test) / 2
    # The thresholds do not depend on the test split: they are the same without the correction.
    without = evaluate(Threshold(calibration="platt"), prevalence=0.7)[1]
    assert chosen.model_dump(mode="json")["thresholds"] == without.model_dump(mode="json")["thresholds"]


def test_dice_is_reported_with_its_baseline() -> None:
    scores = make_scores(40, 3)
    rng = np.random.default_rng(0)
    every = rng.integers(0, 20, (40, 16)).astype(np.int32)
    inside = np.where((np.arange(40) % 2 == 0)[:, None], every // 2, 0).astype(np.int32)
    scores = Scores(
        scores.image_id,
        scores.patient,
        scores.logit_NF[:, :1],
        scores.label_NF[:, :1],
        FINDINGS[:1],
        ScoreHistograms(every, inside),
    )
    weights_RN = metrics.bootstrap_weights(scores.patient, 20, 0)
    chosen = summary.choose_thresholds(scores, Threshold(), weights_RN)
    rule, intervals = chosen.mask_rule, chosen.mask_rule_intervals
    assert rule is not None
    assert intervals is not None
    assert intervals.top.value == rule.top
    result = SplitMetrics.model_validate_json(summary.evaluate_scores(scores, chosen, weights_RN, {}).model_dump_json())
    dice = result.dice
    assert dice is not None
    assert dice.mask_rule == rule
    assert scores.maps is not None
    own = metrics.map_dice(scores.maps, rule.top, rule.min_area, rule.bottom)
    assert dice.all.value == pytest.approx(own.mean())
    assert dice.on_positives.value == pytest.approx(own[::2].mean())
    assert dice.empty_baseline == 0.5
    curve = summary.mask_threshold_curve(scores, rule)
    assert len(curve.threshold) == len(curve.all) == 16
    assert max(curve.all) <= rule.dice + 1e-9
