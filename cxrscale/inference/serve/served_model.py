"""A model of the service: what it is called, what is said of it, and its predictor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from cxrscale.evaluation import TestMetrics, artifacts, drift
from cxrscale.evaluation.metrics import Estimate
from cxrscale.inference.decision import read_test_metrics, stored_thresholds
from cxrscale.inference.ood import read_reference
from cxrscale.inference.predictions import predictions_path, read_predictions
from cxrscale.inference.predictor_spec import PredictorSpec
from cxrscale.inference.serve import model_facts
from cxrscale.inference.serve.multiplexing import UnloadablePredictor
from cxrscale.inference.streaming import ImagePredictor
from cxrscale.io import ArtifactPart, Number, storage
from cxrscale.types import UserError

BRIGHTNESS, CONTRAST, DISTANCE = "brightness", "contrast", "unlike training"
"""Statistics of the images, beside one of the score of each finding."""


class FindingInfo(ArtifactPart):
    """What is said of a finding beside its probability."""

    threshold: Number
    """NaN where there is none: no call is made."""
    low: Number
    """The threshold's 95% interval."""
    high: Number
    sensitivity: Number
    """At the threshold, on validation."""
    specificity: Number
    precision: Number
    """Positive predictive value there, at `prevalence`."""
    prevalence: Number
    """Share of the labeled validation images that have the finding; with threshold.prior_shift=known the prior."""
    auroc: Number
    """On the test split; NaN before the run was evaluated."""
    auroc_low: Number
    auroc_high: Number


class ModelInfo(ArtifactPart):
    """What a client learns of a model."""

    name: str
    task: str
    findings: Mapping[str, FindingInfo]
    input_size: int
    """Side of what the model sees, in pixels."""
    checkpoint: str
    """Digest of the weights."""
    thresholds: str
    """Digest of thresholds.json; empty where the run has none."""
    gate: str
    """Digest of the weights of the classifier before it; empty without one."""
    form: str
    """What runs: float, or for an export such as onnx int8-static its format and quantization."""
    trained_on: tuple[str, ...]
    """Names of the datasets."""
    trained: str
    """The day on which the training ended, as 2026-11-30; empty where it is not known."""
    ood_limit: Number
    """Distance above which an image counts as unlike the training images; NaN where there is none."""
    score: str
    """How good it is, in a line; empty before the run was evaluated."""
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model of the service."""

    info: ModelInfo
    predictor: ImagePredictor
    references: Mapping[str, drift.Reference]
    """Statistic -> its distribution when the model was made."""
    test_values: Mapping[str, npt.NDArray[np.float64]]
    """Statistic -> its values on the test split, where the run has predicted it: they say how often drift is seen where
    there is none."""


def load_models(
    runs: Mapping[str, str], gate: str | None = None, device: str | None = None, *, places: int | None = None
) -> dict[str, ServedModel]:
    """Load several runs for the service.

    Args:
        runs: name -> run.
        gate: a classifier's run before every segmenter.
        places: models that stay in memory; the others are loaded when they are asked for. None: all stay.

    Raises:
        UserError: as `PredictorSpec.load`; there is a gate and no segmenter.
    """
    models: dict[str, ServedModel] = {}
    for name, run in runs.items():
        spec = PredictorSpec((run,), maps=True, light=True)
        model = load_served(name, spec, device)
        if gate is not None and model.info.task == "segment":
            spec = replace(spec, gate=gate)
            model = load_served(name, spec, device)
        if places is not None:
            held = UnloadablePredictor(spec, model.predictor, device)
            if len(models) >= places:
                held.unload()
            model = replace(model, predictor=held)
        models[name] = model
    if gate is not None and not any(model.info.gate for model in models.values()):
        raise UserError(f"--gate {gate}: none of the runs is a segmenter's")
    return models


def load_served(name: str, spec: PredictorSpec, device: str | None = None) -> ServedModel:
    """Load a run for the service.

    Raises:
        UserError: as `PredictorSpec.load`.
    """
    predictor = spec.load(device)
    run, about = spec.runs[0], predictor.provenance
    single = len(spec.runs) == 1 and spec.averaging is None
    test = read_test_metrics(run) if single else None
    data = about.recipe.data
    info = ModelInfo(
        name=name,
        task=data.task,
        findings={
            finding: _finding(finding, run if single else None, about.checkpoint, test) for finding in data.findings
        },
        input_size=about.recipe.augment.size,
        checkpoint=about.checkpoint,
        thresholds=about.thresholds,
        gate=about.gate.checkpoint if about.gate is not None else "",
        form=model_facts.form(run) if single else "ensemble",
        trained=model_facts.trained_day(run) if single else "",
        ood_limit=model_facts.ood_limit(run, about.checkpoint) if single else float("nan"),
        trained_on=tuple(storage.absolute(root).rstrip("/").rpartition("/")[2] for root in data.shards),
        score=_score(test),
        notes=about.notes,
    )
    references = _references(run, data.findings) if single else {}
    return ServedModel(info, predictor, references, _scores(run, "test", data.findings) if references else {})


def _finding(name: str, run: str | None, checkpoint: str, test: TestMetrics | None) -> FindingInfo:
    nan = float("nan")
    chosen, at, predictive, prevalence = None, None, nan, nan
    if run is not None and storage.exists(storage.join(run, artifacts.THRESHOLDS)):
        stored = stored_thresholds(run, checkpoint)
        chosen = stored.thresholds.get(name)
        at = None if chosen is None else chosen.on_validation
        predictive, prevalence = model_facts.predictive_value(stored, name, at)
    auroc = test.findings[name].auroc if test is not None and name in test.findings else Estimate(nan)
    threshold = chosen.threshold if chosen is not None else Estimate(nan)
    return FindingInfo(
        threshold=threshold.value,
        low=threshold.low,
        high=threshold.high,
        sensitivity=at.recall.value if at is not None else nan,
        specificity=at.specificity.value if at is not None else nan,
        precision=predictive,
        prevalence=prevalence,
        auroc=auroc.value,
        auroc_low=auroc.low,
        auroc_high=auroc.high,
    )


def _score(test: TestMetrics | None) -> str:
    if test is None:
        return ""
    metric, value = ("Dice", test.dice.all) if test.dice is not None else ("AUROC", test.mean_auroc)
    if not math.isfinite(value.value):
        return ""
    return f"{metric} {value.value:.3f} ({value.low:.3f} to {value.high:.3f}), test split of {test.images} images"


def _references(run: str, findings: tuple[str, ...]) -> dict[str, drift.Reference]:
    """Of the scores on validation, and of the training images."""
    found: dict[str, drift.Reference | None] = {}
    reference = read_reference(run)
    if reference is not None:
        found |= {BRIGHTNESS: reference.brightness, CONTRAST: reference.contrast}
    found |= {name: drift.fit_reference(values) for name, values in _scores(run, "val", findings).items()}
    return {name: one for name, one in found.items() if one is not None}


def _scores(run: str, split: str, findings: tuple[str, ...]) -> dict[str, npt.NDArray[np.float64]]:
    """Statistic -> its values on a split that the run has predicted; none where it has not."""
    path = predictions_path(run, split)
    if not storage.exists(path):
        return {}
    try:
        scores = read_predictions(path)
    except UserError:  # of an earlier version: no drift is measured, and predictions do not need it
        return {}
    values = {name: scores.logit_NF[:, number].astype(np.float64) for number, name in enumerate(findings)}
    if scores.ood_distance_N is not None:
        values[DISTANCE] = scores.ood_distance_N
    return values
