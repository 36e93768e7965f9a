"""The JSON files of a trained run that this room computes, as frozen models: thresholds, test metrics, comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from cxrscale.config import Recipe, Threshold
from cxrscale.evaluation.calibration import Calibrator
from cxrscale.evaluation.metrics import AtThreshold, Estimate, ProbabilityMetrics
from cxrscale.evaluation.thresholds import MaskRule, MaskRuleIntervals
from cxrscale.io import Artifact, ArtifactPart, Number

THRESHOLDS = "thresholds.json"
TEST_METRICS = "test_metrics.json"
PLOTS = "plots"
"""Folder of the figures."""
REPORT = "report.html"

CalibrationStep = Literal["raw", "calibrated", "corrected"]
"""The model's own scores; after the calibrator; after the correction for another prevalence."""


class ScoresProvenance(ArtifactPart):
    """The scores that an artifact was computed from."""

    run: str
    """The run's folder or address."""
    split: str
    """train, val or test."""
    checkpoint: str
    """Digest of the weights."""
    manifest: str
    """Digest of the datasets."""
    unreadable: int
    """Images of the split that could not be read and have no score."""
    recipe: Recipe
    """The recipe that the run was trained by."""


# thresholds.json


class FindingThreshold(ArtifactPart):
    """The threshold of one finding, chosen on validation."""

    threshold: Estimate
    """Of the final probability; undefined, with the reason, where the rule cannot be fulfilled."""
    on_validation: AtThreshold | None = None
    """What it means on the validation split; None where there is no threshold."""
    uncorrected: Estimate | None = None
    """With prior_shift=known: the threshold that the rule gives without the correction."""


class FindingCalibration(ArtifactPart):
    """The calibrator of one finding, fitted on validation."""

    calibrator: Calibrator
    prevalence: Number
    """Share of the labeled validation images that have the finding."""
    before: ProbabilityMetrics
    """Of the model's own scores on validation."""
    after: ProbabilityMetrics | None = None
    """Of the calibrated probabilities; None without a calibrator."""


class ChosenThresholds(ArtifactPart):
    """What is chosen on validation scores."""

    rule: Threshold
    """The recipe's section `threshold`, with the overrides of `cxrscale threshold`."""
    thresholds: Mapping[str, FindingThreshold]
    """By finding."""
    calibration: Mapping[str, FindingCalibration]
    """By finding."""
    mask_rule: MaskRule | None = None
    """For segmentation."""
    mask_rule_intervals: MaskRuleIntervals | None = None
    ood_limit: Number | None = None
    """The distance above which an image counts as unlike the training images: 1% of the validation images lie above
    it. None where distances were not measured."""


class Thresholds(ChosenThresholds, ScoresProvenance, Artifact):
    """thresholds.json."""

    schema_version: int = 1
    images: int
    """Of the validation split."""
    patients: int
    resamples: int
    """Bootstrap resamples of the patients."""

    @model_validator(mode="after")
    def _check_findings(self) -> Thresholds:
        _check_names("thresholds", self.thresholds, self.recipe.data.findings)
        _check_names("calibration", self.calibration, self.recipe.data.findings)
        return self


# test_metrics.json


class SubgroupMetrics(ArtifactPart):
    """A finding in one subgroup of the images."""

    images: int
    """Labeled images."""
    positives: int
    auroc: Estimate
    auprc: Estimate


class PriorShiftMetrics(ArtifactPart):
    """The correction of a finding's probabilities for another prevalence, and what it changes."""

    validation: Number
    """Prevalence that the probabilities are calibrated for; NaN where nothing is corrected."""
    assumed: Number
    """Prevalence that they are corrected for; NaN where nothing is corrected."""
    test: Number
    """Prevalence in the test labels."""
    reason: str = ""
    """Why nothing is corrected; beside a correction, a caveat."""
    uncorrected: AtThreshold | None = None
    """The test split without the correction; None where nothing is corrected."""


class FindingMetrics(ArtifactPart):
    """One finding of the test split. AUROC and AUPRC are of the model's own scores, all else of final probabilities."""

    positives: int
    negatives: int
    unlabeled: int
    auroc: Estimate
    auprc: Estimate
    at_threshold: AtThreshold | None
    """At the stored threshold; None where there is none."""
    threshold_reason: str = ""
    """Why there is no threshold."""
    report_at: tuple[AtThreshold, ...] = ()
    """At the thresholds of threshold.report_at."""
    brier: Estimate
    ece: Estimate
    ece_equal_mass: Estimate
    calibration: Mapping[CalibrationStep, ProbabilityMetrics] = {}
    """Step by step; empty where the final probabilities are the model's own scores."""
    prior_shift: PriorShiftMetrics | None = None
    """None where threshold.prior_shift is none."""
    subgroups: Mapping[str, Mapping[str, SubgroupMetrics]] = {}
    """sex, age or view -> group."""


class DiceMetrics(ArtifactPart):
    """Overlap of predicted and true masks; 'all' counts empty against empty as 1."""

    mask_rule: MaskRule
    positives: int
    """Images with a mask."""
    all: Estimate
    on_positives: Estimate
    iou_all: Estimate
    iou_on_positives: Estimate
    empty_baseline: Number
    """Mean Dice over all images when no mask is predicted."""
    own_size: bool = False
    """At the images' own sizes, with enlarged probabilities, as SIIM-ACR scored it; else at the model's input size."""


class OodMetrics(ArtifactPart):
    """The check for images unlike the training images (see `evaluation.ood`) on test images, all of which are like."""

    limit: Number
    false_alarms: Estimate
    """Share of the images above the limit."""
    images: int
    """Those images."""


class SplitMetrics(ArtifactPart):
    """Every metric of one split's scores."""

    images: int
    patients: int
    resamples: int
    """Bootstrap resamples of the patients."""
    mean_auroc: Estimate
    mean_auprc: Estimate
    findings_in_mean: int
    """Findings with both classes."""
    findings: Mapping[str, FindingMetrics]
    dice: DiceMetrics | None = None
    """For segmentation."""
    ood: OodMetrics | None = None
    """None where distances were not measured."""


class PartInfo(ArtifactPart):
    """What was trained, chosen or tested on."""

    splits: tuple[str, ...]
    images: int
    patients: int


class DatasetInfo(ArtifactPart):
    """One of the datasets, from its manifest's metadata."""

    shards: str
    """Its folder or address."""
    source: str
    input: Any
    """Digests of the raw source's files."""
    pack: Mapping[str, Any]
    """The recipe section it was built by."""


class LeakInfo(ArtifactPart):
    """Result of the search for patients and images that splits share."""

    verdict: tuple[str, ...]
    not_checked: tuple[str, ...]
    patients_in_two_splits: int
    images_in_two_splits: int


class DataInfo(ArtifactPart):
    """The data of a run."""

    parts: Mapping[str, PartInfo]
    """By role: train, val, test."""
    datasets: tuple[DatasetInfo, ...]
    leaks: LeakInfo


class TestMetrics(SplitMetrics, ScoresProvenance, Artifact):
    """test_metrics.json."""

    __test__: ClassVar[bool] = False  # not a test case of pytest

    schema_version: int = 1
    data: DataInfo
    thresholds: str
    """Digest of thresholds.json."""

    @model_validator(mode="after")
    def _check_findings(self) -> TestMetrics:
        _check_names("findings", self.findings, self.recipe.data.findings)
        _check_names("data.parts", self.data.parts, ("train", "val", "test"))
        return self


def _check_names(field: str, given: Mapping[str, Any], expected: Sequence[str]) -> None:
    """Refuse a mapping with other keys than what reads it will ask for."""
    if set(given) != set(expected):
        raise ValueError(f"{field} has {', '.join(given)[:80] or 'nothing'}, not {', '.join(expected)[:80]}")


# The file of `cxrscale compare`


class Difference(ArtifactPart):
    """One metric of two runs."""

    a: Number
    b: Number
    difference: Estimate
    """a - b."""
    p_bootstrap: Number
    """Two-sided p-value from the resampled patients."""


class FindingDifference(Difference):
    """AUROC of one finding of two runs."""

    positives: int
    negatives: int
    p_delong: Number
    """DeLong et al. 1988: treats images as independent."""
    p_delong_patients: Number
    """Obuchowski 1997: treats only patients as independent."""
    p_holm: Number = float("nan")
    """`p_delong_patients`, adjusted for the number of findings (Holm 1979)."""
    p_reason: str = ""
    """Why a p-value is undefined."""


class MeanDifference(Difference):
    """Mean AUROC of two runs."""

    findings: int
    """Findings in the mean."""


class DiceDifference(ArtifactPart):
    """Dice of two runs, each by its own mask rule; 'all' counts empty against empty as 1."""

    positives: int
    """Images with a mask."""
    all: Difference
    on_positives: Difference


class ComparedRun(ArtifactPart):
    """One of the two runs."""

    name: str
    run: str = ""
    """Its folder or address."""
    checkpoint: str = ""
    """Digest of its weights."""
    manifest: str = ""
    """Digest of its datasets."""


class ReaderFinding(ArtifactPart):
    """F1 of one finding by the protocol of CheXNet (Rajpurkar et al. 2017)."""

    images: int
    """Images that all readers labeled."""
    run: Estimate
    """Of the run's calls against each reader's labels, averaged."""
    readers: Mapping[str, Estimate]
    """Of each reader against the other readers and the run, averaged."""
    reader_mean: Estimate
    """The mean of `readers`."""
    difference: Estimate
    """run - reader_mean, on the same resamples."""


class ReaderComparison(Artifact):
    """A run and readers of the same images."""

    schema_version: int = 1
    run: ComparedRun
    split: str = ""
    readers: tuple[str, ...]
    images: int
    """Images of the split that a reader labeled."""
    patients: int
    resamples: int
    """Bootstrap resamples of the patients."""
    seed: int
    """Of the bootstrap."""
    rows_without_image: Mapping[str, int]
    """Reader -> rows of images that the run has not scored."""
    findings: Mapping[str, ReaderFinding]
    """By finding that the run and all readers have."""
    not_compared: tuple[str, ...]
    """Findings of the run that a reader's table has no column for."""


class Comparison(Artifact):
    """Two runs on the same images."""

    schema_version: int = 1
    a: ComparedRun
    b: ComparedRun
    split: str = ""
    images: int
    patients: int
    resamples: int
    """Bootstrap resamples of the patients."""
    seed: int
    """Of the bootstrap."""
    findings: Mapping[str, FindingDifference]
    """By finding that both runs have."""
    only_in_a: tuple[str, ...]
    """Findings that cannot be compared."""
    only_in_b: tuple[str, ...]
    mean_auroc: MeanDifference
    dice: DiceDifference | None = None
    """Where both are segmentation runs."""
