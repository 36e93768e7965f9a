"""explain.json as a frozen model: maps against boxes, against themselves under other weights, and against occlusion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from cxrscale.evaluation.artifacts import ScoresProvenance
from cxrscale.evaluation.metrics import Estimate
from cxrscale.io import Artifact, ArtifactPart

EXPLAIN = "explain.json"
Baseline = Literal["whole", "center", "median", "peak"]
BASELINES: tuple[Baseline, ...] = ("whole", "center", "median", "peak")
"""What is said without looking at the image; see `localization.baseline`."""
MapMethod = Literal["exact", "grad-cam", "score map"]
"""The exact class activation map, Grad-CAM, or the probabilities of a segmenter."""


class LocalizationScores(ArtifactPart):
    """Measures of boxes and points; the keys are T. As a gain: those of the map minus those of a baseline."""

    pointing: Estimate
    """Share of the images whose point lies in a box of the finding; of `whole` that of a random point."""
    iobb: Mapping[str, Estimate]
    """Share of the boxes that a detected box meets with an intersection over the detected box above T."""
    iou: Mapping[str, Estimate]
    """The same with the intersection over union."""
    false_positives_iobb: Mapping[str, Estimate]
    """Detected boxes that are not above T with any box, per image with a box of the finding."""
    false_positives_iou: Mapping[str, Estimate]


class Localization(ArtifactPart):
    """One finding, or the mean of all."""

    images: int
    """Images with a box; in the mean, pairs of image and finding."""
    boxes: int
    patients: int
    map: LocalizationScores
    baselines: Mapping[Baseline, LocalizationScores]
    gain: Mapping[Baseline, LocalizationScores]
    """Map minus baseline on the same resamples."""


class SanityStage(ArtifactPart):
    """Maps after some of the weights were drawn anew (Adebayo et al. 2018, arXiv 1810.03292: cascading
    randomization)."""

    randomized: str
    """The first of the model's parts whose weights are random: it and all parts after it, up to the output."""
    parameters: int
    """Random ones of the model's parameters, in all."""
    correlation: Estimate
    """Mean Spearman rank correlation of the map with that of the trained model. Near 1: the map does not depend on what
    was learned."""
    absolute: Estimate
    """The same of the maps' absolute values."""


class Sanity(ArtifactPart):
    """Whether maps depend on the weights."""

    images: int
    maps: int
    """Pairs of image and finding that are boxed."""
    stages: tuple[SanityStage, ...]
    """The last one is a model of random weights alone."""


class Occlusion(ArtifactPart):
    """How a finding's probability falls when the pixels of its boxes are replaced by the image's mean."""

    images: int
    """Images whose boxes fit a second time beside themselves."""
    left_out: int
    """Images whose boxes leave no room for as large an area elsewhere."""
    box: Estimate
    """Mean fall of the probability (before - after) with the boxes occluded."""
    elsewhere: Estimate
    """The same with as large areas elsewhere, a mean over several places."""
    difference: Estimate
    """box - elsewhere: above 0, the score comes from the boxes more than from other places."""


class ExplainReport(ScoresProvenance, Artifact):
    """explain.json."""

    schema_version: int = 1
    method: MapMethod
    map_size: tuple[int, int]
    """(rows, columns) of a map before it is enlarged."""
    images: int
    """Images of the split with a box of the findings, each counted once."""
    patients: int
    boxes: int
    left_out: int
    """Boxes without any area inside their image."""
    resamples: int
    """Bootstrap resamples of the patients."""
    findings: Mapping[str, Localization]
    without_boxes: tuple[str, ...]
    """Findings of the run that have no box in this split."""
    mean: Localization
    """Over `findings`, each counted once; its intervals are of the same resamples."""
    sanity: Sanity | None = None
    """On request."""
    occlusion: Mapping[str, Occlusion] | None = None
    """On request, by finding."""
