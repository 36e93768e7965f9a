"""Scores -> everything that is chosen on validation and reported of the test split, as the models of `artifacts`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from cxrscale.config import Threshold, age_band
from cxrscale.evaluation import calibration, metrics, ood, thresholds
from cxrscale.evaluation.artifacts import (
    CalibrationStep,
    ChosenThresholds,
    DiceMetrics,
    FindingCalibration,
    FindingMetrics,
    FindingThreshold,
    OodMetrics,
    PriorShiftMetrics,
    SplitMetrics,
    SubgroupMetrics,
)
from cxrscale.evaluation.calibration import PriorShift, Unchanged
from cxrscale.evaluation.metrics import AtThreshold, BootstrapWeights, Curve, Estimate, Floats
from cxrscale.evaluation.thresholds import MaskRule
from cxrscale.shards import Manifest
from cxrscale.types import ScoreHistograms, Scores, UserError, probabilities_of

MAX_THREADS = 8
"""Findings that are processed at once: each takes some 200 MB of temporary arrays on 25,596 images."""

Groups = Mapping[str, npt.NDArray[np.object_]]
"""sex, age, view -> (N,) name of the group that each image is in."""
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Probabilities:
    """A finding's probabilities, (N,) each, after every step."""

    raw_N: Floats
    calibrated_N: Floats
    final_N: Floats
    """Corrected for another prevalence, if that is known; else the calibrated ones."""
    shift: PriorShift | None
    """The correction; None where nothing is corrected."""
    reason: str
    """Why nothing is corrected; beside a correction, a caveat."""


@dataclass(frozen=True, slots=True)
class DiceCurve:
    """Mean Dice by the threshold of the pixels, one value per threshold."""

    threshold: tuple[float, ...]
    all: tuple[float, ...]
    """Over all images, empty against empty counting 1."""
    positives: tuple[float, ...]
    """Over the images with a mask; NaN where there is none."""


def choose_thresholds(scores: Scores, rule: Threshold, weights_RN: BootstrapWeights) -> ChosenThresholds:
    """Choose thresholds, fit calibrators and, for segmentation, choose the mask rule on validation scores.

    A threshold is of the final probability: calibrated, and corrected for a known prior where the rule asks for it.
    """

    def choose(f: int) -> tuple[FindingThreshold, FindingCalibration]:
        prior = rule.priors.get(scores.findings[f])
        return _choose_finding(scores.logit_NF[:, f], scores.label_NF[:, f], rule, weights_RN, prior)

    rows = dict(zip(scores.findings, _in_threads(choose, len(scores.findings)), strict=True))
    mask_rule = None if scores.maps is None else thresholds.best_mask_rule(scores.maps)
    intervals = None
    if scores.maps is not None and mask_rule is not None:
        intervals = thresholds.mask_rule_intervals(scores.maps, mask_rule, weights_RN)
    return ChosenThresholds(
        rule=rule,
        thresholds={name: threshold for name, (threshold, _) in rows.items()},
        calibration={name: fitted for name, (_, fitted) in rows.items()},
        mask_rule=mask_rule,
        mask_rule_intervals=intervals,
        ood_limit=None if scores.ood_distance_N is None else ood.choose_limit(scores.ood_distance_N),
    )


def evaluate_scores(
    scores: Scores, chosen: ChosenThresholds, weights_RN: BootstrapWeights, groups: Groups
) -> SplitMetrics:
    """Every metric of test scores; what is undefined is NaN, with the reason.

    Args:
        chosen: on the validation split.
        weights_RN: resamples of the patients.
        groups: sex, age, view -> (N,) name of the group that each image is in.

    AUROC and AUPRC are of the model's own scores; Brier score, calibration errors and calls of the final probabilities.
    """

    def evaluate(f: int) -> tuple[FindingMetrics, Floats, Floats]:
        return _evaluate_finding(scores, f, chosen, weights_RN, groups)

    rows, auroc_FR, auprc_FR = zip(*_in_threads(evaluate, len(scores.findings)), strict=True)
    return SplitMetrics(
        images=len(scores.image_id),
        patients=len(set(scores.patient.tolist())),
        resamples=len(weights_RN),
        mean_auroc=metrics.macro([row.auroc.value for row in rows], np.stack(auroc_FR)),
        mean_auprc=metrics.macro([row.auprc.value for row in rows], np.stack(auprc_FR)),
        findings_in_mean=sum(row.auroc.defined for row in rows),
        findings=dict(zip(scores.findings, rows, strict=True)),
        dice=None if scores.maps is None or chosen.mask_rule is None else _dice(scores, chosen.mask_rule, weights_RN),
        ood=_ood(scores, chosen.ood_limit, weights_RN),
    )


def subgroups_of(scores: Scores, data: Manifest) -> dict[str, npt.NDArray[np.object_]]:
    """(N,) the sex, age band and view of each image, from the manifest's columns.

    Raises:
        UserError: the datasets lack an image that has a score.
    """
    row_of = {image: row for row, image in enumerate(data.image_id.tolist())}
    unknown = [image for image in scores.image_id.tolist() if image not in row_of]
    if unknown:
        raise UserError(
            f"{len(unknown)} images have a score and are not in data.shards, the first {unknown[0]!r:.60}; remove the "
            "run's predictions, and they are made again"
        )
    row_N = np.array([row_of[image] for image in scores.image_id.tolist()], dtype=np.intp)
    return {
        "sex": metrics.group_names(data.column("sex")[row_N]),
        "age": age_band(data.column("age")[row_N]),
        "view": metrics.group_names(data.column("view")[row_N]),
    }


def final_probabilities(
    logit_N: npt.ArrayLike, fitted: FindingCalibration, rule: Threshold, prior: float | None
) -> Probabilities:
    """Calibrated and final probabilities of a finding.

    Args:
        logit_N: the model's.
        fitted: the finding's calibrator and its prevalence in validation.
        prior: its prevalence where the model is used, for prior_shift=known.
    """
    raw_N = probabilities_of(logit_N)
    calibrated_N = fitted.calibrator.apply(logit_N)
    shift, reason = _shift(fitted, calibrated_N, rule, prior)
    final_N = calibrated_N if shift is None else shift.apply(calibrated_N)
    return Probabilities(raw_N, calibrated_N, final_N, shift, reason)


def threshold_curves(scores: Scores, chosen: ChosenThresholds) -> dict[str, Curve]:
    """Recall (x) and precision (y) of each finding at every threshold of its final validation probabilities."""
    rule = chosen.rule
    # EM estimates the prevalence of the test split: thresholds are chosen as if nothing had shifted.
    before = rule if rule.prior_shift == "known" else rule.model_copy(update={"prior_shift": "none"})
    curves = {}
    for f, name in enumerate(scores.findings):
        fitted, prior = chosen.calibration[name], rule.priors.get(name)
        final_N = final_probabilities(scores.logit_NF[:, f], fitted, before, prior).final_N
        curves[name] = metrics.pr_curve(final_N, scores.label_NF[:, f])
    return curves


def mask_threshold_curve(scores: Scores, rule: MaskRule) -> DiceCurve:
    """Mean Dice at each threshold of the pixels, with the rule's minimum area."""
    assert scores.maps is not None
    bins, positive_N = scores.maps.all_NT.shape[1], metrics.has_mask(scores.maps)
    steps = [index / bins for index in range(0, bins, max(1, bins // 64))]
    dice = [metrics.map_dice(scores.maps, threshold, rule.min_area, threshold) for threshold in steps]
    any_positive = bool(positive_N.any())
    return DiceCurve(
        tuple(steps),
        tuple(float(dice_N.mean()) for dice_N in dice),
        tuple(float(dice_N[positive_N].mean()) if any_positive else float("nan") for dice_N in dice),
    )


def _choose_finding(
    logit_N: npt.ArrayLike,
    label_N: npt.NDArray[np.float32],
    rule: Threshold,
    weights_RN: BootstrapWeights,
    prior: float | None,
) -> tuple[FindingThreshold, FindingCalibration]:
    calibrator = calibration.fit(rule.calibration, logit_N, label_N)
    calibrated_N = calibrator.apply(logit_N)
    unchanged = isinstance(calibrator, Unchanged)
    fitted = FindingCalibration(
        calibrator=calibrator,
        prevalence=_prevalence(label_N),
        before=metrics.probability_metrics(probabilities_of(logit_N), label_N, weights_RN),
        after=None if unchanged else metrics.probability_metrics(calibrated_N, label_N, weights_RN),
    )
    shift = _shift(fitted, calibrated_N, rule, prior)[0] if rule.prior_shift == "known" else None
    uncorrected = thresholds.choose_threshold(calibrated_N, label_N, rule, weights_RN)
    if shift is None:
        at = _at(calibrated_N, label_N, uncorrected)
        return FindingThreshold(threshold=uncorrected, on_validation=at), fitted
    threshold = thresholds.choose_threshold(calibrated_N, label_N, rule, weights_RN, shift.target)
    if rule.goal != "fixed":
        threshold = _shifted(threshold, shift)
    at = _at(shift.apply(calibrated_N), label_N, threshold)
    return FindingThreshold(threshold=threshold, on_validation=at, uncorrected=uncorrected), fitted


def _shifted(threshold: Estimate, shift: PriorShift) -> Estimate:
    """The threshold on the scale of corrected probabilities; the correction keeps their order."""
    value, low, high = (float(shift.apply(end)) for end in (threshold.value, threshold.low, threshold.high))
    return Estimate(value, low, high, threshold.reason)


def _at(
    probability_N: Floats, label_N: npt.ArrayLike, threshold: Estimate, weights_RN: BootstrapWeights | None = None
) -> AtThreshold | None:
    """The metrics at a threshold, if there is one."""
    return metrics.at_threshold(probability_N, label_N, threshold.value, weights_RN) if threshold.defined else None


def _prevalence(label_N: npt.NDArray[np.float32]) -> float:
    labeled = int(np.isfinite(label_N).sum())
    return float((label_N == 1).sum() / labeled) if labeled else float("nan")


def _shift(
    fitted: FindingCalibration, calibrated_N: Floats, rule: Threshold, prior: float | None
) -> tuple[PriorShift | None, str]:
    """The correction that the rule asks for, with a caveat; None with the reason where nothing can be corrected."""
    if rule.prior_shift == "none":
        return None, ""
    if not 0 < fitted.prevalence < 1:
        return None, "not corrected: one class only in validation"
    if rule.prior_shift == "known":
        if prior is None:
            return None, "not corrected: threshold.priors does not name it"
        return PriorShift(fitted.prevalence, prior), ""
    target = calibration.estimate_prior(calibrated_N, fitted.prevalence)
    if not 0 < target.value < 1:
        return None, f"not corrected: {target.reason}"
    caveat = "of scores that are not calibrated" if isinstance(fitted.calibrator, Unchanged) else ""
    return PriorShift(fitted.prevalence, target.value), "; ".join(filter(None, (target.reason, caveat)))


def _evaluate_finding(
    scores: Scores, f: int, chosen: ChosenThresholds, weights_RN: BootstrapWeights, groups: Groups
) -> tuple[FindingMetrics, Floats, Floats]:
    """A finding's metrics, and its AUROC and AUPRC in each resample."""
    name, logit_N, label_N = scores.findings[f], scores.logit_NF[:, f], scores.label_NF[:, f]
    rule, fitted, threshold = chosen.rule, chosen.calibration[name], chosen.thresholds[name]
    auroc_R = metrics.bootstrap_auroc(logit_N, label_N, weights_RN)
    auprc_R = metrics.bootstrap_auprc(logit_N, label_N, weights_RN)
    probabilities = final_probabilities(logit_N, fitted, rule, rule.priors.get(name))
    final = metrics.probability_metrics(probabilities.final_N, label_N, weights_RN)
    steps = calibration_steps(probabilities, fitted)
    row = FindingMetrics(
        positives=int((label_N == 1).sum()),
        negatives=int((label_N == 0).sum()),
        unlabeled=int(np.isnan(label_N).sum()),
        auroc=_with_interval(metrics.auroc(logit_N, label_N), auroc_R),
        auprc=_with_interval(metrics.auprc(logit_N, label_N), auprc_R),
        at_threshold=_at(probabilities.final_N, label_N, threshold.threshold, weights_RN),
        threshold_reason="" if threshold.threshold.defined else threshold.threshold.reason,
        report_at=tuple(metrics.at_thresholds(probabilities.final_N, label_N, rule.report_at, weights_RN)),
        brier=final.brier,
        ece=final.ece,
        ece_equal_mass=final.ece_equal_mass,
        calibration={
            step: metrics.probability_metrics(step_N, label_N) for step, step_N in steps.items() if len(steps) > 1
        },
        prior_shift=(
            None if rule.prior_shift == "none" else _prior_shift(probabilities, label_N, threshold, weights_RN)
        ),
        subgroups={
            by: _subgroups(metrics.by_group(logit_N, label_N, group_N, weights_RN)) for by, group_N in groups.items()
        },
    )
    return row, auroc_R, auprc_R


def calibration_steps(probabilities: Probabilities, fitted: FindingCalibration) -> dict[CalibrationStep, Floats]:
    """Step -> (N,) probabilities after it."""
    steps: dict[CalibrationStep, Floats] = {"raw": probabilities.raw_N}
    if not isinstance(fitted.calibrator, Unchanged):
        steps["calibrated"] = probabilities.calibrated_N
    if probabilities.shift is not None:
        steps["corrected"] = probabilities.final_N
    return steps


def _subgroups(groups: Mapping[str, metrics.Group]) -> dict[str, SubgroupMetrics]:
    return {
        name: SubgroupMetrics(
            images=group.images,
            positives=group.positives,
            auroc=group.estimates["auroc"],
            auprc=group.estimates["auprc"],
        )
        for name, group in groups.items()
    }


def _prior_shift(
    probabilities: Probabilities,
    label_N: npt.NDArray[np.float32],
    threshold: FindingThreshold,
    weights_RN: BootstrapWeights,
) -> PriorShiftMetrics:
    """The prevalences from and to which is corrected, the true one, and the metrics without the correction."""
    shift, undefined = probabilities.shift, float("nan")
    without = None
    if shift is not None:
        without = _at(probabilities.calibrated_N, label_N, threshold.uncorrected or threshold.threshold, weights_RN)
    return PriorShiftMetrics(
        validation=undefined if shift is None else shift.source,
        assumed=undefined if shift is None else shift.target,
        test=_prevalence(label_N),
        reason=probabilities.reason,
        uncorrected=without,
    )


def _dice(scores: Scores, rule: MaskRule, weights_RN: BootstrapWeights) -> DiceMetrics:
    """Dice as the challenge scored it, Dice on positives, and what predicting no mask would reach."""
    assert scores.maps is not None
    refuse_other_size(rule, scores.maps)
    overlaps = metrics.overlaps(scores.maps, rule.top, rule.min_area, rule.bottom, weights_RN)
    return DiceMetrics(
        mask_rule=rule,
        positives=int(metrics.has_mask(scores.maps).sum()),
        all=overlaps["dice_all"],
        on_positives=overlaps["dice_positives"],
        iou_all=overlaps["iou_all"],
        iou_on_positives=overlaps["iou_positives"],
        empty_baseline=metrics.empty_baseline(scores.maps),
        own_size=scores.maps.own_size,
    )


def _ood(scores: Scores, limit: float | None, weights_RN: BootstrapWeights) -> OodMetrics | None:
    if scores.ood_distance_N is None or limit is None or not np.isfinite(limit):
        return None
    above_N = (scores.ood_distance_N > limit).astype(np.float64)
    share = metrics.interval(float(above_N.mean()), metrics.weighted_means(above_N, weights_RN))
    return OodMetrics(limit=limit, false_alarms=share, images=int(above_N.sum()))


def refuse_other_size(rule: MaskRule, maps: ScoreHistograms) -> None:
    """Raise UserError where a rule's minimum area counts pixels of another size than the maps have."""
    if rule.min_area > 1 and rule.own_size != maps.own_size:
        chosen, scored = ("the images' own size", "the model's input size")[:: 1 if rule.own_size else -1]
        raise UserError(
            f"the mask rule was chosen at {chosen}, and the predictions are at {scored}; remove "
            "predictions-*.parquet of the run and run `cxrscale threshold` again"
        )


def _in_threads(work: Callable[[int], Result], count: int) -> list[Result]:
    """work(0), ..., work(count - 1) in threads: numpy releases the GIL while it adds and sorts."""
    with ThreadPoolExecutor(min(count, MAX_THREADS, os.cpu_count() or 1)) as pool:
        return list(pool.map(work, range(count)))


def _with_interval(estimate: Estimate, resampled_R: Floats) -> Estimate:
    return estimate if estimate.reason else metrics.interval(estimate.value, resampled_R)
