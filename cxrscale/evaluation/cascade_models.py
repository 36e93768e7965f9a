"""The JSON files of a cascade, a classifier before a segmenter, as frozen models."""

from __future__ import annotations

from cxrscale.evaluation.artifacts import ComparedRun
from cxrscale.evaluation.metrics import Estimate
from cxrscale.evaluation.thresholds import MaskRule, Share
from cxrscale.io import Artifact, ArtifactPart

CASCADE = "cascade.json"
CASCADE_METRICS = "cascade_metrics.json"


class MaskMetrics(ArtifactPart):
    """Predicted masks of one split; as differences, of the cascade minus the segmenter alone on the same resamples."""

    dice_all: Estimate
    """Mean Dice over all images; empty against empty counts 1."""
    dice_on_positives: Estimate
    """Over the images with a mask."""
    sensitivity: Estimate
    """Share of the images with a mask for which one is predicted."""
    false_masks: Estimate
    """Share of the images without a mask for which one is predicted."""


class CascadeMetrics(ArtifactPart):
    """A segmenter behind a classifier, and alone."""

    cascade: MaskMetrics
    segmenter: MaskMetrics
    difference: MaskMetrics
    passed: Estimate
    """Share of the images that the classifier passes on."""


class CascadeRule(ArtifactPart):
    """What decides in a cascade."""

    gate: ComparedRun
    """The classifier."""
    segmenter: ComparedRun
    finding: str
    threshold: Share
    """Of the classifier's final probability."""
    mask_rule: MaskRule
    """Of the segmenter behind it."""


class Cascade(CascadeRule, Artifact):
    """cascade.json: threshold and mask rule, chosen together on validation."""

    schema_version: int = 1
    images: int
    patients: int
    validation: CascadeMetrics


class CascadeTest(CascadeRule, Artifact):
    """cascade_metrics.json: a cascade on the test split."""

    schema_version: int = 1
    chosen_together: bool
    """Whether threshold and mask rule are those of cascade.json; else each run's own."""
    images: int
    patients: int
    resamples: int
    test: CascadeMetrics
