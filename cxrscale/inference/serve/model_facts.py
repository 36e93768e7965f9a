"""What a page says of a model beside its name: what runs, how old it is, where and for how many it holds."""

from __future__ import annotations

import math
from datetime import UTC, datetime

from cxrscale.evaluation import Thresholds, artifacts
from cxrscale.evaluation.metrics import AtThreshold
from cxrscale.inference.decision import stored_thresholds
from cxrscale.inference.export.contract import read_exported
from cxrscale.io import storage
from cxrscale.training import read_run_info, run_info


def form(run: str) -> str:
    """float, or for an export its format and quantization: onnx, onnx int8-static."""
    exported = read_exported(run)
    if exported is None:
        return "float"
    return exported.format if exported.quantization == "none" else f"{exported.format} {exported.quantization}"


def trained_day(run: str) -> str:
    """The day on which its training ended, in UTC; of an export that of the run it was made of, where it is there."""
    exported = read_exported(run)
    source = run if exported is None else exported.run
    if not storage.exists(storage.join(source, run_info.RUN_INFO)):
        return ""
    ended = [session.ended or session.began for session in read_run_info(source).sessions]
    return datetime.fromtimestamp(max(ended), UTC).strftime("%Y-%m-%d") if ended else ""


def ood_limit(run: str, checkpoint: str) -> float:
    """The distance above which an image is unlike the training images; NaN where it is not known."""
    if not storage.exists(storage.join(run, artifacts.THRESHOLDS)):
        return math.nan
    limit = stored_thresholds(run, checkpoint).ood_limit
    return math.nan if limit is None else limit


def predictive_value(stored: Thresholds, name: str, at: AtThreshold | None) -> tuple[float, float]:
    """(positive predictive value at a finding's threshold, the prevalence that it holds for).

    That of validation, unless threshold.priors says how common the finding is where the model is used.
    """
    fitted = stored.calibration.get(name)
    common = math.nan if fitted is None else fitted.prevalence
    if at is None:
        return math.nan, common
    prior = stored.rule.priors.get(name) if stored.rule.prior_shift == "known" else None
    if prior is None:
        return at.precision.value, common
    true, false = at.recall.value * prior, (1 - at.specificity.value) * (1 - prior)
    return (true / (true + false) if true + false > 0 else math.nan), prior
