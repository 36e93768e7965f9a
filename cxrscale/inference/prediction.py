"""What is predicted of an image, and by what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cxrscale.config import Recipe
from cxrscale.evaluation import MaskRule
from cxrscale.inference.members import Averaging, Member
from cxrscale.io import ArtifactPart


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a model predicts for one image, or why it cannot."""

    path: str = ""
    """The file's path or address; empty for bytes and arrays. Of an image of a dataset DATASET/SHARD.tar/ID."""
    image_id: str = field(default="", kw_only=True)
    """Of an image of a dataset: its id there."""
    probabilities: Mapping[str, float] = field(default_factory=dict)
    """Finding -> probability in 0..1; for segmentation of the map's highest pixel.

    With thresholds.json in the run it is the final one, as `cxrscale evaluate` computes it: calibrated, and corrected
    for another prevalence."""
    calls: Mapping[str, bool] = field(default_factory=dict)
    """Finding -> whether it is called present: probability >= the run's stored threshold. Findings without a threshold
    are missing; without thresholds.json all are."""
    logits: Mapping[str, float] = field(default_factory=dict)
    """Finding -> the model's own output, which `probabilities` are computed from."""
    gate: Mapping[str, float] = field(default_factory=dict)
    """In a cascade: the finding -> its probability by the classifier that stands before the segmenter."""
    gate_call: bool | None = None
    """In a cascade: whether the classifier calls the finding present. Where it does not, the segmenter has not seen the
    image: there is no probability, the call is absent, and the mask is empty."""
    mask_rle: str | None = None
    """For segmentation: the mask at the image's own size, run-length encoded as in SIIM-ACR; '-1' is empty."""
    mask_area: int | None = None
    """For segmentation: pixels of the mask at the image's own size."""
    mask_area_mm2: float | None = None
    """The same in square millimeters; None where the file does not say the distance between its pixels."""
    height: int | None = None
    """Of the image in pixels, upright; None where it could not be read."""
    width: int | None = None
    spacing_mm: tuple[float, float] | None = None
    """Distance between (rows, columns) in millimeters, where the file says it."""
    error: str = ""
    """Why there are no probabilities; empty where there are."""
    unreachable: bool = False
    """Whether the file could not be reached, which says nothing of its content: another attempt may succeed."""
    maps: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """Where it was asked for: finding -> float32 (h, w) map over the whole image. Of a classifier the class activation
    map, in logits, whose mean is the finding's logit; of a segmenter the probabilities. Kept in no file."""
    gray: tuple[float, float] | None = field(default=None, compare=False)
    """Mean and standard deviation of the gray values of the thumbnail that the model sees. Kept in no file."""
    ood_distance: float | None = None
    """How unlike the training images the image is, 1 being usual (see `evaluation.ood`); above the run's limit there is
    a warning. None where the run has no reference."""
    warnings: tuple[str, ...] = ()
    """Faults of the file, one line each, for which a dataset would refuse it; its gray values are certain."""
    objects: Mapping[str, str] = field(default_factory=dict)
    """Format -> the file that was written for this image alone, relative to the folder of predictions."""
    object_errors: Mapping[str, str] = field(default_factory=dict)
    """Format -> why there is no such file, although one was asked for."""


class Gate(ArtifactPart):
    """The classifier that decides what a segmenter sees."""

    run: str
    """Its absolute path or address."""
    checkpoint: str
    """Digest of its file of weights."""
    thresholds: str
    """Digest of its thresholds.json."""
    finding: str
    threshold: float
    """Of the finding's probability: from this on, the segmenter sees the image."""
    mask_rule: MaskRule
    """Of the segmenter."""


class Provenance(ArtifactPart):
    """What a prediction must name to be reproduced."""

    run: str
    """The run's absolute path or address."""
    checkpoint: str
    """Digest of the file of weights."""
    manifest: str
    """Digest of the datasets that the model was trained on."""
    thresholds: str
    """Digest of thresholds.json; empty where the run has none."""
    threshold: Mapping[str, float] = {}
    """Finding -> the threshold of its call."""
    notes: tuple[str, ...] = ()
    """What is missing from probabilities and calls, and how to get it."""
    members: tuple[Member, ...] = ()
    """Of an ensemble."""
    averaging: Averaging | None = None
    """Of an ensemble."""
    gate: Gate | None = None
    """Of a cascade."""
    recipe: Recipe
