"""What a run says of an image: its final probability of each finding, and the call at the stored threshold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cxrscale.evaluation import summary
from cxrscale.evaluation.artifacts import ChosenThresholds, TestMetrics
from cxrscale.evaluation.calibration import PriorShift
from cxrscale.evaluation.metrics import Floats


@dataclass(frozen=True, slots=True)
class Calls:
    """Of N images and F findings."""

    probability_NF: Floats
    """Calibrated, and corrected for another prevalence, where the thresholds are of such probabilities."""
    called_NF: Floats
    """1 present, 0 absent, NaN where the finding has no threshold."""


def call_split(logit_NF: npt.ArrayLike, findings: Sequence[str], chosen: ChosenThresholds) -> Calls:
    """The calls of a whole split, as `summary.evaluate_scores` counts them.

    With threshold.prior_shift=em the prevalence is estimated from these very scores.
    """
    logits = np.asarray(logit_NF, dtype=np.float64)
    rule = chosen.rule
    final = [
        summary.final_probabilities(logits[:, f], chosen.calibration[name], rule, rule.priors.get(name)).final_N
        for f, name in enumerate(findings)
    ]
    return _at_thresholds(np.stack(final, axis=1), findings, chosen)


def call_images(
    logit_NF: npt.ArrayLike,
    findings: Sequence[str],
    chosen: ChosenThresholds,
    estimated: Mapping[str, PriorShift | None],
) -> Calls:
    """The calls of single images: what `call_split` says of them among the images of the split.

    Args:
        estimated: with threshold.prior_shift=em, from `estimated_shifts`: a few images have no prevalence to estimate.
    """
    logits = np.asarray(logit_NF, dtype=np.float64)
    rule, columns = chosen.rule, []
    for f, name in enumerate(findings):
        fitted = chosen.calibration[name]
        if rule.prior_shift == "em":
            shift, calibrated_N = estimated.get(name), fitted.calibrator.apply(logits[:, f])
            columns.append(calibrated_N if shift is None else shift.apply(calibrated_N))
        else:
            columns.append(summary.final_probabilities(logits[:, f], fitted, rule, rule.priors.get(name)).final_N)
    return _at_thresholds(np.stack(columns, axis=1), findings, chosen)


def estimated_shifts(test: TestMetrics) -> dict[str, PriorShift | None]:
    """The corrections that `cxrscale evaluate` estimated on the test split; None for a finding that has none."""
    shifts: dict[str, PriorShift | None] = {}
    for name, row in test.findings.items():
        corrected = row.prior_shift is not None and np.isfinite(row.prior_shift.assumed)
        shifts[name] = (
            PriorShift(row.prior_shift.validation, row.prior_shift.assumed) if row.prior_shift and corrected else None
        )
    return shifts


def _at_thresholds(probability_NF: Floats, findings: Sequence[str], chosen: ChosenThresholds) -> Calls:
    threshold_F = np.array([chosen.thresholds[name].threshold.value for name in findings])
    called_NF = np.where(np.isfinite(threshold_F), probability_NF >= threshold_F, np.nan)
    return Calls(probability_NF, called_NF.astype(np.float64))
