"""What goes into the net: shards, sampling, augmentation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from cxrscale.config.section import Names, Section
from cxrscale.labels import NIH14


class Pack(Section):
    """How a raw archive becomes shards."""

    codec: Literal["jpeg", "png", "source"] = "jpeg"
    """jpeg: grey baseline JPEG at `size`; png: lossless at `size`; source: the archive's own bytes, untouched."""
    size: int = Field(512, ge=16, le=4096)
    """Side of the stored square picture in pixels; 1.2 to 1.6 times the input size of the nets that will read it."""
    quality: int = Field(95, ge=50, le=100)
    """JPEG quality; 95 keeps about 48 dB PSNR at 512 pixels."""
    samples_per_shard: int = Field(2000, ge=1)
    """Pictures a tar; 2,000 at 54 kB make about 108 MB."""
    masks: bool = False
    """Store a mask for every picture (also an empty one); only labelled pictures enter then."""
    split: Literal["official", "random", "chexnet", "kfold", "lists"] = "official"
    """official: the archive's test list, validation carved out of the rest by patient; random: shares of the images, by
    patient; chexnet: the paper's 28,744/1,672/389 patients; kfold: by patient, alike in findings and mask sizes; lists:
    `split_lists`."""
    folds: int = Field(5, ge=2)
    """How many folds kfold makes; they are called fold0, fold1, ..."""
    split_lists: dict[str, str] = Field({})
    """Split -> a text file with one image id a line, for split=lists."""
    val_fraction: float = Field(0.12958, ge=0, lt=1)
    """Share of the images outside the test split that become validation, carved by patient (11,212 of 86,524)."""
    test_fraction: float = Field(0.2, ge=0, lt=1)
    """Share of all images that become test where the archive has no official test list or split is random."""
    split_seed: int = Field(0, ge=0)
    """Which of the possible patient-disjoint splits is drawn."""
    max_quarantined: int = Field(100, ge=0)
    """Past this many unreadable pictures the command exits with an error; what was readable is packed all the same."""
    patients: Literal["hashed", "original"] = "hashed"
    """hashed: a patient's name in the shards is a hash, keyed by the environment's CXRSCALE_PATIENT_KEY; original: the
    archive's own."""
    repeats: Literal["keep", "unite"] = "keep"
    """unite: every picture is read once more beforehand, and patients who share a picture count as one."""
    limit: int | None = Field(None, ge=1)
    """Only the first so many pictures of the archive, in the order of their ids; for trying things out."""
    workers: int | None = Field(None, ge=1)
    """Ray tasks at a time; None: one a CPU of the cluster."""


class Data(Section):
    """Which shards, which labels, and how they are read."""

    shards: tuple[str, ...] = ()
    """Folders or addresses of shard sets, as `cxrscale shard` printed them."""
    task: Literal["classify", "segment"] = "classify"
    """classify: one logit a finding and picture; segment: one logit a pixel."""
    findings: tuple[str, ...] = NIH14
    """The columns of the task, in the order of the logits."""
    negatives: Literal["any", "no_finding"] = "any"
    """any: every picture without the task's findings is a negative; no_finding: only those with every finding of the
    shards absent (Effusion against normal), the others are left out of all splits."""
    train_split: Names = ("train",)
    """The manifest's split that is trained on, or several: [fold1, fold2, fold3, fold4]."""
    val_split: Names = ("val",)
    """The split that chooses checkpoints and thresholds."""
    test_split: Names = ("test",)
    """The split that is only ever evaluated."""
    reader: Literal["dali", "reference"] = "dali"
    """dali on Linux; reference is the same plan with OpenCV, slower, for machines without DALI."""
    threads: int = Field(2, ge=1)
    """DALI's CPU threads a worker."""
    prefetch: int = Field(2, ge=1)
    """Batches that DALI prepares ahead; never changes what is in them."""
    allow_leaks: bool = False
    """Train although a patient or picture stands in two splits."""


class Plan(Section):
    """Which pictures make up which step."""

    seed: int = Field(0, ge=0)
    """The seed of order and augmentation; the initial weights use it too."""
    batch: int = Field(16, ge=1)
    """Pictures an optimizer step over all workers together; the same at any number of workers."""
    steps_per_epoch: int | None = Field(None, ge=1)
    """Steps an epoch; None: as many as draw no picture twice, at least 1; for hard and weighted one pass."""
    sampling: Literal["all", "positives", "balanced", "ratio", "weighted", "hard"] = "all"
    """all: each picture once a pass; positives: only with a finding present; balanced: as many with as without; ratio:
    `positive_share` of them with; weighted: by `weights`, with replacement; hard: all, and what `hard_scores` got wrong
    more often."""
    positive_share: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] = (0.8, 0.4)
    """For sampling=ratio: share of pictures with a finding present in every step of the first and of the last of
    `share_epochs`; evenly in between, constant afterwards."""
    share_epochs: int = Field(10, ge=1)
    """Epochs over which `positive_share` goes from its first to its last value; 1: the last at once."""
    weights: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field({}, validate_default=True)
    """For sampling=weighted: finding -> how often a picture is drawn that shows it, the largest of its findings
    counting; 1 for what is not named. `No Finding` names the pictures with every finding absent."""
    hard_scores: str | None = Field(None, validate_default=True)
    """For sampling=hard: a run's predictions of the training split, RUN/predictions-train.parquet; made by
    `cxrscale predict --split train --run RUN`."""
    hard_share: float = Field(0.1, gt=0, le=1)
    """Share of the predicted training pictures, those with the largest |label - score|, that count as hard."""
    hard_repeats: int = Field(2, ge=1)
    """How many times a hard picture is appended to each pass, beyond the once of every picture."""
    mix: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = ()
    """Share of each entry of data.shards, in their order, in every step; [3, 1] is three to one. Empty: by their
    sizes, one shuffle over all."""
    subset: int | None = Field(None, ge=1)
    """Train on so many pictures only (the ablation run: can it learn at all?)."""
    eval_batch: int = Field(32, ge=1)
    """Pictures a forward pass and worker in evaluation."""

    @field_validator("weights", "hard_scores")
    @classmethod
    def _check_given(cls, value: Any, info: ValidationInfo) -> Any:
        wanted = {"weights": "weighted", "hard_scores": "hard"}
        if not value and info.data.get("sampling") == wanted[str(info.field_name)]:
            remedies = {
                "weights": "sampling=weighted wants a weight for a finding, e.g. plan.weights={Hernia: 5}",
                "hard_scores": "sampling=hard wants what `cxrscale predict --split train --run runs/NAME` leaves: "
                "runs/NAME/predictions-train.parquet",
            }
            raise ValueError(remedies[str(info.field_name)])
        return value


PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    "chexnet": {"hflip": 0.5, "normalise": "fixed"},
    "effusion": {
        "probability": 0.5,
        "hflip": 0.5,
        "rotation": 10.0,
        "translation": 0.08,
        "scale": (0.9, 1.1),
        "crop_area": (0.85, 1.0),
        "brightness": 0.1,
        "contrast": 0.1,
        "noise": 0.02,
        "normalise": "minmax",
    },
    "rsna": {
        "crop_area": (0.8, 1.0),
        "rotation": 5.0,
        "translation": 0.05,
        "scale": (0.9, 1.1),
        "normalise": "fixed",
    },
    "siim": {
        "hflip": 0.5,
        "rotation": 10.0,
        "translation": 0.06,
        "scale": (0.9, 1.1),
        "brightness": 0.1,
        "contrast": 0.1,
        "blur": 0.1,
        "clahe": "always",
        "normalise": "fixed",
    },
}
"""Named augmentations; a field that the recipe gives itself wins over its preset."""


class Augment(Section):
    """What happens to a picture between the shard and the net; the same matrix moves picture and mask."""

    preset: Literal["none", "chexnet", "effusion", "rsna", "siim"] = "none"
    """Where the other fields take their defaults from."""
    size: int = Field(224, ge=16, le=2048)
    """Side of the net's square input in pixels."""
    probability: float = Field(1.0, ge=0, le=1)
    """Chance that a training picture is augmented at all."""
    hflip: float = Field(0.0, ge=0, le=1)
    """Chance of a left-right flip. There is no vertical flip: no chest stands on its head."""
    rotation: float = Field(0.0, ge=0, le=45)
    """Rotation is drawn from -rotation to +rotation degrees."""
    translation: float = Field(0.0, ge=0, le=0.5)
    """Shift along each axis, drawn from -translation to +translation of the picture's side."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Zoom drawn between these factors; above 1 enlarges."""
    crop_area: tuple[float, float] = (1.0, 1.0)
    """Random resized crop: share of the picture's area that is kept."""
    brightness: float = Field(0.0, ge=0, le=1)
    """Shift of the grey level, drawn from -brightness to +brightness of the full range."""
    contrast: float = Field(0.0, ge=0, lt=1)
    """Factor about mid-grey, drawn from 1 - contrast to 1 + contrast."""
    blur: float = Field(0.0, ge=0, le=1)
    """Chance of a Gaussian blur."""
    blur_sigma: float = Field(1.0, gt=0, le=5)
    """Standard deviation of that blur in pixels of the input."""
    noise: float = Field(0.0, ge=0, le=0.5)
    """Standard deviation of added Gaussian noise as a share of the full range."""
    clahe: Literal["never", "random", "always"] = "never"
    """Contrast-limited adaptive histogram equalisation: on no picture, half the training pictures, or every one."""
    clahe_clip: float = Field(2.0, gt=0)
    """CLAHE's clip limit."""
    clahe_tiles: int = Field(8, ge=1)
    """CLAHE's tiles along each axis."""
    normalise: Literal["fixed", "minmax"] = "fixed"
    """fixed: (x / 255 - mean) / std; minmax: each picture to 0..1 by its own extremes."""
    mean: float = 0.449
    """Grey mean for `fixed`; the default is the mean of ImageNet's three channels."""
    std: float = Field(0.226, gt=0)
    """Grey standard deviation for `fixed`; the default is the mean of ImageNet's three channels."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("preset") in PRESETS:
            return {**PRESETS[given["preset"]], **given}
        return given
