"""Scores -> what is chosen on validation, and what is said of the test split: plain data for JSON, no files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from cxrscale.config import Threshold
from cxrscale.evaluation import calibration, metrics, thresholds
from cxrscale.evaluation.calibration import Calibrator, PriorShift, Unchanged
from cxrscale.evaluation.metrics import BootstrapWeights, Curve, Estimate, Floats
from cxrscale.evaluation.thresholds import MaskRule
from cxrscale.shards import Manifest
from cxrscale.types import Scores

MOST_THREADS = 8
"""Findings worked on at once: each takes some 200 MB of temporary arrays on 25,596 images."""

Groups = Mapping[str, npt.NDArray[np.object_]]
"""sex, age, view -> (N,) names of the group that each image is in."""


def choose_thresholds(scores: Scores, rule: Threshold, draws: BootstrapWeights) -> dict[str, Any]:
    """What thresholds.json says of validation scores: goal, rule, thresholds, calibration and, with maps, the triplet.

    A threshold is of the final probability: calibrated, and corrected for a known prior where the rule asks for it.
    """

    def one(f: int) -> tuple[dict[str, Any], dict[str, Any]]:
        return _chosen(scores.score_NF[:, f], scores.label_NF[:, f], rule, draws, rule.priors.get(scores.findings[f]))

    rows = dict(zip(scores.findings, _each(one, len(scores.findings)), strict=True))
    found: dict[str, Any] = {
        "goal": rule.goal,
        "rule": rule.model_dump(mode="json"),
        "thresholds": {name: cut for name, (cut, _) in rows.items()},
        "calibration": {name: fitted for name, (_, fitted) in rows.items()},
    }
    if scores.maps is not None:
        triplet = thresholds.best_mask_rule(scores.maps)
        found["triplet"] = asdict(triplet)
        spread = thresholds.mask_rule_intervals(scores.maps, triplet, draws)
        found["triplet_intervals"] = {name: estimate.plain() for name, estimate in spread.items()}
    return found


def evaluate_scores(
    scores: Scores, chosen: Mapping[str, Any], draws: BootstrapWeights, group_of: Groups
) -> dict[str, Any]:
    """Every metric of test scores, as JSON has it; what is undefined is null, with the reason.

    Args:
        chosen: what `choose` said of the validation split.
        draws: (R, N) resamples of the patients.
        group_of: sex, age, view: (N,) names of the group that each image is in.

    AUROC and AUPRC are of the model's own scores; Brier, calibration errors and calls of the final probabilities.
    """

    def one(f: int) -> tuple[dict[str, Any], Floats, Floats]:
        return _finding(scores, f, chosen, draws, group_of)

    rows, area_FR, precision_FR = zip(*_each(one, len(scores.findings)), strict=True)
    table = dict(zip(scores.findings, rows, strict=True))
    found: dict[str, Any] = {
        "images": len(scores.image_id),
        "patients": len(set(scores.patient.tolist())),
        "resamples": len(draws),
    }
    for name, resampled in (("auroc", area_FR), ("auprc", precision_FR)):
        values = [np.nan if row[name]["value"] is None else row[name]["value"] for row in rows]
        found[f"mean_{name}"] = metrics.macro(values, np.stack(resampled)).plain()
    found["findings_in_mean"] = sum(row["auroc"]["value"] is not None for row in rows)
    found["findings"] = table
    if scores.maps is not None:
        found["dice"] = _dice(scores, MaskRule(**chosen["triplet"]), draws)
    return found


def subgroups_of(scores: Scores, data: Manifest) -> dict[str, npt.NDArray[np.object_]]:
    """(N,) the sex, age band and view of each image, from the manifest's columns."""
    row_of = {image: row for row, image in enumerate(data.image_id.tolist())}
    row_N = np.array([row_of[image] for image in scores.image_id.tolist()], dtype=np.intp)
    return {
        "sex": metrics.group_names(data.column("sex")[row_N]),
        "age": metrics.age_band(data.column("age")[row_N]),
        "view": metrics.group_names(data.column("view")[row_N]),
    }


def final_probabilities(
    score_N: npt.ArrayLike, fitted: Mapping[str, Any], rule: Threshold, prior: float | None
) -> tuple[Floats, Floats, PriorShift | None, str]:
    """Calibrated and final probabilities of a finding, the prior shift between them, and a reservation about it.

    Args:
        fitted: the finding's entry of `calibration` in thresholds.json.
        prior: its prevalence where the model is used, for prior_shift=known.
    """
    calibrator = calibration.read(fitted["calibrator"])
    calibrated = calibrator.apply(score_N)
    shift, reservation = _shift(calibrator, calibrated, fitted["prevalence"], rule, prior)
    return calibrated, calibrated if shift is None else shift.apply(calibrated), shift, reservation


def threshold_curves(scores: Scores, found: Mapping[str, Any]) -> dict[str, Curve]:
    """Recall (x) and precision (y) of each finding at every threshold (cut) of its final validation probabilities."""
    rule = Threshold.model_validate(found["rule"])
    curves = {}
    for f, name in enumerate(scores.findings):
        known = found["rule"]["priors"].get(name)
        fitted = found["calibration"][name]
        # What EM estimates, it estimates on the test split: thresholds are chosen as if nothing had shifted.
        before = rule if rule.prior_shift == "known" else rule.model_copy(update={"prior_shift": "none"})
        final = final_probabilities(scores.score_NF[:, f], fitted, before, known)[1]
        curves[name] = metrics.pr_curve(final, scores.label_NF[:, f])
    return curves


def mask_threshold_curve(scores: Scores, rule: MaskRule) -> dict[str, list[float]]:
    """Mean Dice over all images and on positives at each threshold of the pixels, with the triplet's minimum area."""
    assert scores.maps is not None
    bins, positive = scores.maps.all_NT.shape[1], metrics.has_mask(scores.maps)
    found: dict[str, list[float]] = {"threshold": [], "all": [], "positives": []}
    for place in range(0, bins, max(1, bins // 64)):
        dice = metrics.map_dice(scores.maps, place / bins, rule.min_area, place / bins)
        found["threshold"].append(place / bins)
        found["all"].append(float(dice.mean()))
        found["positives"].append(float(dice[positive].mean()) if positive.any() else float("nan"))
    return found


def _chosen(
    score: npt.NDArray[np.float32],
    label: npt.NDArray[np.float32],
    rule: Threshold,
    draws: BootstrapWeights,
    prior: float | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One finding's threshold and calibration."""
    calibrator = calibration.fit(rule.calibration, score, label)
    labeled = int(np.isfinite(label).sum())
    prevalence = float((label == 1).sum() / labeled) if labeled else None
    fitted: dict[str, Any] = {"calibrator": calibration.plain(calibrator), "prevalence": prevalence}
    calibrated = calibrator.apply(score)
    steps: dict[str, npt.NDArray[Any]] = {"before": score}
    if not isinstance(calibrator, Unchanged):
        steps["after"] = calibrated
    fitted |= {when: _plain(metrics.probability_metrics(values, label, draws)) for when, values in steps.items()}
    shift = None
    if rule.prior_shift == "known":
        shift, _ = _shift(calibrator, calibrated, prevalence, rule, prior)
    plain = thresholds.choose_threshold(calibrated, label, rule, draws)
    if shift is None:
        return {**plain.plain(), **_on_validation(calibrated, label, plain)}, fitted
    found = thresholds.choose_threshold(calibrated, label, rule, draws, shift.target)
    if rule.goal != "fixed":
        found = _moved(found, shift)
    return {
        **found.plain(),
        **_on_validation(shift.apply(calibrated), label, found),
        "uncorrected": plain.plain(),
    }, fitted


def _moved(cut: Estimate, shift: PriorShift) -> Estimate:
    """The threshold on the scale of corrected probabilities; the correction keeps their order."""
    value, low, high = (float(shift.apply(each)) for each in (cut.value, cut.low, cut.high))
    return Estimate(value, low, high, cut.reason)


def _on_validation(probability: Floats, label: npt.NDArray[np.float32], cut: Estimate) -> dict[str, Any]:
    return {"at": metrics.at_threshold(probability, label, cut.value).plain()} if np.isfinite(cut.value) else {}


def _shift(
    calibrator: Calibrator, calibrated: Floats, prevalence: float | None, rule: Threshold, prior: float | None
) -> tuple[PriorShift | None, str]:
    """The correction that the rule asks for, and a reservation; none where there is nothing to correct from or to."""
    if rule.prior_shift == "none":
        return None, ""
    if prevalence is None or not 0 < prevalence < 1:
        return None, "not corrected: one class only in validation"
    if rule.prior_shift == "known":
        return (
            (None, "not corrected: threshold.priors does not name it")
            if prior is None
            else (
                PriorShift(prevalence, prior),
                "",
            )
        )
    target = calibration.estimated_prior(calibrated, prevalence)
    if not 0 < target.value < 1:
        return None, f"not corrected: {target.reason}"
    doubt = "of scores that are not calibrated" if isinstance(calibrator, Unchanged) else ""
    return PriorShift(prevalence, target.value), "; ".join(filter(None, (target.reason, doubt)))


def _finding(
    scores: Scores, f: int, chosen: Mapping[str, Any], draws: BootstrapWeights, group_of: Groups
) -> tuple[dict[str, Any], Floats, Floats]:
    """A finding's entry of metrics.json, and its AUROC and AUPRC in each resample."""
    name, score, label = scores.findings[f], scores.score_NF[:, f], scores.label_NF[:, f]
    rule, cut = Threshold.model_validate(chosen["rule"]), chosen["thresholds"][name]
    area_R, precision_R = metrics.bootstrap_auroc(score, label, draws), metrics.bootstrap_auprc(score, label, draws)
    row: dict[str, Any] = {
        "positives": int((label == 1).sum()),
        "negatives": int((label == 0).sum()),
        "unlabelled": int(np.isnan(label).sum()),
        "auroc": _with_interval(metrics.auroc(score, label), area_R).plain(),
        "auprc": _with_interval(metrics.auprc(score, label), precision_R).plain(),
        "threshold": cut["value"],
    }
    calibrated, final, shift, doubt = final_probabilities(
        score, chosen["calibration"][name], rule, rule.priors.get(name)
    )
    if cut["value"] is None:
        row["threshold_reason"] = cut["reason"]
    else:
        row |= metrics.at_threshold(final, label, cut["value"], draws).plain()
    row["report_at"] = [each.plain() for each in metrics.at_thresholds(final, label, rule.report_at, draws)]
    row |= _plain(metrics.probability_metrics(final, label, draws))
    steps = {"raw": np.asarray(score, dtype=np.float64)}
    if chosen["calibration"][name]["calibrator"]["kind"] != "none":
        steps["calibrated"] = calibrated
    if shift is not None:
        steps["corrected"] = final
    if len(steps) > 1:
        row["calibration"] = {
            step: _plain(metrics.probability_metrics(values, label)) for step, values in steps.items()
        }
    if rule.prior_shift != "none":
        row["prior"] = _prior(calibrated, label, cut, shift, doubt, draws)
    row["subgroups"] = {
        by: {group: each.plain() for group, each in metrics.by_group(score, label, group_N, draws).items()}
        for by, group_N in group_of.items()
    }
    return row, area_R, precision_R


def _prior(
    calibrated: Floats,
    label: npt.NDArray[np.float32],
    cut: Mapping[str, Any],
    shift: PriorShift | None,
    doubt: str,
    draws: BootstrapWeights,
) -> dict[str, Any]:
    """From which prevalence to which, what it is in truth, and the calls that would be made without correction."""
    labeled = int(np.isfinite(label).sum())
    found: dict[str, Any] = {
        "validation": None if shift is None else shift.source,
        "assumed": None if shift is None else shift.target,
        "test": float((label == 1).sum() / labeled) if labeled else None,
        **({"reason": doubt} if doubt else {}),
    }
    plain = cut.get("uncorrected", cut)["value"]
    if shift is not None and plain is not None:
        found["without"] = metrics.at_threshold(calibrated, label, plain, draws).plain()
    return found


def _dice(scores: Scores, rule: MaskRule, draws: BootstrapWeights) -> dict[str, Any]:
    """Dice as the challenge scored it, beside Dice on positives and beside what predicting nothing would get."""
    assert scores.maps is not None
    found = metrics.overlaps(scores.maps, rule.top, rule.min_area, rule.bottom, draws)
    return {
        "triplet": asdict(rule),
        "positives": int(metrics.has_mask(scores.maps).sum()),
        "all": found["dice_all"].plain(),
        "on_positives": found["dice_positives"].plain(),
        "iou_all": found["iou_all"].plain(),
        "iou_on_positives": found["iou_positives"].plain(),
        "all_empty_floor": metrics.empty_baseline(scores.maps),
    }


def _each(work: Callable[[int], Any], count: int) -> list[Any]:
    """work(0), ..., work(count - 1), several at a time: numpy lets other threads run while it adds and sorts."""
    with ThreadPoolExecutor(min(count, MOST_THREADS, os.cpu_count() or 1)) as pool:
        return list(pool.map(work, range(count)))


def _with_interval(estimate: Estimate, resampled_R: Floats) -> Estimate:
    return estimate if estimate.reason else metrics.interval(estimate.value, resampled_R)


def _plain(found: Mapping[str, Estimate]) -> dict[str, Any]:
    return {name: estimate.plain() for name, estimate in found.items()}
