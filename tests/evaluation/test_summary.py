"""Synthetic scores through everything that is chosen and said of them, against scikit-learn and counting. Some 5 s."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, brier_score_loss, f1_score, roc_auc_score

from cxrscale.config import Threshold
from cxrscale.evaluation import calibration, metrics, summary
from cxrscale.evaluation.calibration import PriorShift
from cxrscale.evaluation.thresholds import MaskRule
from cxrscale.types import ScoreHistograms, Scores

FINDINGS = ("Mass", "Nodule", "Hernia")
"""Hernia: no image has it."""


def made(images: int, seed: int, prevalence: float = 0.3) -> Scores:
    """Scores that know something; three images a patient, some labels unknown."""
    rng = np.random.default_rng(seed)
    label = (rng.random((images, 3)) < [prevalence, prevalence / 2, 0.0]).astype(np.float32)
    score = 1 / (1 + np.exp(-(1.5 * label + rng.normal(size=(images, 3)) - 1)))
    label[::17, 0] = np.nan
    names = np.array([f"p{n}" for n in range(images)], dtype=object)
    patient = np.array([f"who{n // 3}" for n in range(images)], dtype=object)
    return Scores(names, patient, score.astype(np.float32), label, FINDINGS)


def both(rule: Threshold, prevalence: float = 0.3) -> tuple[Scores, dict[str, Any], Scores, dict[str, Any]]:
    """(validation, what is chosen on it, test, the findings' entries)."""
    val, test = made(300, 1), made(400, 2, prevalence)
    chosen = summary.choose_thresholds(val, rule, metrics.bootstrap_weights(val.patient, 50, 0))
    sex = np.array(["F", "M"] * 200, dtype=object)
    found = summary.evaluate_scores(test, chosen, metrics.bootstrap_weights(test.patient, 50, 0), {"sex": sex})
    json.dumps([chosen, found], allow_nan=False)
    return val, chosen, test, found["findings"]


def test_metrics_are_those_of_scikit_learn() -> None:
    _, chosen, test, rows = both(Threshold(report_at=(0.5, 0.25)))
    for f, name in enumerate(FINDINGS[:2]):
        known = ~np.isnan(test.label_NF[:, f])
        label, score = test.label_NF[known, f], test.score_NF[known, f].astype(np.float64)
        row = rows[name]
        assert row["auroc"]["value"] == pytest.approx(roc_auc_score(label, score))
        assert row["auprc"]["value"] == pytest.approx(average_precision_score(label, score))
        assert row["brier"]["value"] == pytest.approx(brier_score_loss(label, score))
        cut = chosen["thresholds"][name]["value"]
        assert row["f1"]["value"] == pytest.approx(f1_score(label, score >= cut))
        assert [also["threshold"] for also in row["report_at"]] == [0.5, 0.25]
        assert row["report_at"][1]["f1"]["value"] == pytest.approx(f1_score(label, score >= 0.25))
        for metric in ("auroc", "auprc", "brier", "ece", "f1", "precision", "recall", "specificity", "accuracy"):
            assert row[metric]["low"] <= row[metric]["value"] <= row[metric]["high"] or metric == "ece"
    women = np.arange(400) % 2 == 0
    label, score = test.label_NF[women, 1], test.score_NF[women, 1]
    assert rows["Nodule"]["subgroups"]["sex"]["F"]["auroc"]["value"] == pytest.approx(roc_auc_score(label, score))


def test_a_finding_without_positives_says_so_and_leaves_the_mean() -> None:
    val, chosen, test, rows = both(Threshold(calibration="platt"))
    assert chosen["thresholds"]["Hernia"]["value"] is None
    assert chosen["thresholds"]["Hernia"]["reason"] == "no image with the finding in validation"
    assert rows["Hernia"]["auroc"] == {
        "value": None,
        "low": None,
        "high": None,
        "reason": "no image with the finding",
    }
    assert "confusion" not in rows["Hernia"]
    assert rows["Hernia"]["threshold_reason"]
    draws = metrics.bootstrap_weights(test.patient, 20, 0)
    found = summary.evaluate_scores(test, chosen, draws, {})
    assert found["findings_in_mean"] == 2
    areas = [rows[name]["auroc"]["value"] for name in FINDINGS[:2]]
    assert found["mean_auroc"]["value"] == pytest.approx(np.mean(areas))
    assert val.findings == test.findings


@pytest.mark.parametrize("kind", ["platt", "temperature", "isotonic"])
def test_calls_and_brier_are_of_calibrated_probabilities(kind: str) -> None:
    val, chosen, test, rows = both(Threshold.model_validate({"calibration": kind}))
    fitted = chosen["calibration"]["Nodule"]
    own = calibration.fit(kind, val.score_NF[:, 1], val.label_NF[:, 1])
    assert calibration.read(fitted["calibrator"]) == own
    assert fitted["after"]["brier"]["value"] < fitted["before"]["brier"]["value"]
    label, final = test.label_NF[:, 1], own.apply(test.score_NF[:, 1])
    row = rows["Nodule"]
    assert row["brier"]["value"] == pytest.approx(brier_score_loss(label, final))
    assert row["calibration"]["calibrated"]["brier"]["value"] == row["brier"]["value"]
    assert row["calibration"]["raw"]["brier"]["value"] == pytest.approx(
        brier_score_loss(label, test.score_NF[:, 1].astype(np.float64))
    )
    assert row["f1"]["value"] == pytest.approx(f1_score(label, final >= row["threshold"]))


def test_recall_asked_for_is_had_on_validation() -> None:
    _, chosen, _, _ = both(Threshold(goal="recall", min_rate=0.9))
    for name in FINDINGS[:2]:
        cut = chosen["thresholds"][name]
        assert cut["at"]["recall"]["value"] >= 0.9
        assert cut["low"] <= cut["value"] <= cut["high"]


def test_a_known_prevalence_moves_probabilities_and_threshold_together() -> None:
    rule = Threshold(prior_shift="known", priors={"Mass": 0.6}, calibration="platt")
    val, chosen, test, rows = both(rule, prevalence=0.6)
    fitted = chosen["calibration"]["Mass"]
    own = calibration.fit("platt", val.score_NF[:, 0], val.label_NF[:, 0])
    shift = PriorShift(fitted["prevalence"], 0.6)
    known = ~np.isnan(test.label_NF[:, 0])
    label, final = test.label_NF[known, 0], shift.apply(own.apply(test.score_NF[known, 0]))
    row = rows["Mass"]
    assert row["brier"]["value"] == pytest.approx(brier_score_loss(label, final))
    assert row["f1"]["value"] == pytest.approx(f1_score(label, final >= row["threshold"]))
    assert row["calibration"]["corrected"]["brier"]["value"] < row["calibration"]["calibrated"]["brier"]["value"]
    before = row["prior"]["without"]
    plain = chosen["thresholds"]["Mass"]["uncorrected"]["value"]
    assert before["threshold"] == plain
    uncorrected = own.apply(test.score_NF[known, 0])
    assert before["f1"]["value"] == pytest.approx(f1_score(label, uncorrected >= plain))
    assert "does not name it" in rows["Nodule"]["prior"]["reason"]


def test_a_prevalence_estimated_from_scores_alone_comes_near_the_true_one() -> None:
    _, chosen, test, rows = both(Threshold(prior_shift="em", calibration="platt"), prevalence=0.7)
    prior = rows["Mass"]["prior"]
    known = ~np.isnan(test.label_NF[:, 0])
    assert prior["test"] == pytest.approx(float(test.label_NF[known, 0].mean()))
    assert abs(prior["assumed"] - prior["test"]) < abs(prior["validation"] - prior["test"]) / 2
    assert chosen["thresholds"]["Mass"].keys() >= {"value", "low", "high"}
    # What is chosen knows nothing of the test split: the same as without the correction.
    plain = both(Threshold(calibration="platt"), prevalence=0.7)[1]
    assert chosen["thresholds"] == plain["thresholds"]


def test_maps_are_said_with_their_floor() -> None:
    scores = made(40, 3)
    rng = np.random.default_rng(0)
    everything = rng.integers(0, 20, (40, 16)).astype(np.int32)
    inside = np.where((np.arange(40) % 2 == 0)[:, None], everything // 2, 0).astype(np.int32)
    scores = Scores(
        scores.image_id,
        scores.patient,
        scores.score_NF[:, :1],
        scores.label_NF[:, :1],
        FINDINGS[:1],
        ScoreHistograms(everything, inside),
    )
    draws = metrics.bootstrap_weights(scores.patient, 20, 0)
    chosen = summary.choose_thresholds(scores, Threshold(), draws)
    rule = MaskRule(**chosen["triplet"])
    assert set(chosen["triplet_intervals"]) == {"top", "min_area", "bottom"}
    dice = summary.evaluate_scores(scores, chosen, draws, {})["dice"]
    assert scores.maps is not None
    own = metrics.map_dice(scores.maps, rule.top, rule.min_area, rule.bottom)
    assert dice["all"]["value"] == pytest.approx(own.mean())
    assert dice["on_positives"]["value"] == pytest.approx(own[::2].mean())
    assert dice["all_empty_floor"] == 0.5
    swept = summary.mask_threshold_curve(scores, rule)
    assert len(swept["threshold"]) == len(swept["all"]) == 16
    assert max(swept["all"]) <= rule.dice + 1e-9
