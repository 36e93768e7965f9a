"""What goes into the net: shards, sampling, augmentation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from cxrscale.config.findings import NIH14
from cxrscale.config.presets import PRESETS
from cxrscale.config.section import Names, Section


class Pack(Section):
    """How a raw archive becomes shards."""

    codec: Literal["jpeg", "png", "source"] = "jpeg"
    """jpeg: gray baseline JPEG at `size`; png: lossless at `size`; source: the archive's own bytes, untouched."""
    size: int = Field(512, ge=16, le=4096)
    """Side of the stored square image in pixels; 1.2 to 1.6 times the input size of the models that will read it."""
    quality: int = Field(95, ge=50, le=100)
    """JPEG quality; 95 keeps about 48 dB PSNR at 512 pixels."""
    samples_per_shard: int = Field(2000, ge=1)
    """Images a tar; 2,000 at 54 kB make about 108 MB."""
    masks: bool = False
    """Store a mask for every image (also an empty one); only labeled images enter then."""
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
    """Past this many unreadable images the command exits with an error; what was readable is packed all the same."""
    patient_ids: Literal["hashed", "original"] = "hashed"
    """hashed: a patient's name in the shards is a hash, keyed by the environment's CXRSCALE_PATIENT_KEY; original: the
    archive's own."""
    duplicates: Literal["keep", "merge"] = "keep"
    """merge: every image is read once more beforehand, and patients who share an image count as one."""
    limit: int | None = Field(None, ge=1)
    """Only the first so many images of the archive, in the order of their ids; for trying things out."""
    workers: int | None = Field(None, ge=1)
    """Ray tasks at a time; None: one a CPU of the cluster."""


class Data(Section):
    """Which shards, which labels, and how they are read."""

    shards: tuple[str, ...] = ()
    """Folders or addresses of datasets, as `cxrscale shard` printed them."""
    task: Literal["classify", "segment"] = "classify"
    """classify: one logit a finding and image; segment: one logit a pixel."""
    findings: tuple[str, ...] = NIH14
    """The columns of the task, in the order of the logits."""
    negatives: Literal["any", "no_finding"] = "any"
    """any: every image without the task's findings is a negative; no_finding: only those with every finding of the
    shards absent (Effusion against normal), the others are left out of all splits."""
    train_split: Names = ("train",)
    """The manifest's split that is trained on, or several: [fold1, fold2, fold3, fold4]."""
    val_split: Names = ("val",)
    """The split that chooses checkpoints and thresholds."""
    test_split: Names = ("test",)
    """The split that is only ever evaluated."""
    allow_leaks: bool = False
    """Train although a patient or image stands in two splits."""


class Loader(Section):
    """How batches are decoded and augmented; nothing here changes what is in them."""

    backend: Literal["auto", "dali", "opencv"] = "auto"
    """auto: dali where it is installed, else opencv; dali runs on Linux; opencv makes the same batches, for machines
    without DALI."""
    num_threads: int = Field(2, ge=1)
    """DALI's CPU threads per worker."""
    prefetch: int = Field(2, ge=1)
    """Batches that DALI prepares ahead."""


class Sampler(Section):
    """Which images make up which step."""

    seed: int = Field(0, ge=0)
    """The seed of order and augmentation; the initial weights use it too."""
    batch_size: int = Field(16, ge=1)
    """Images an optimizer step over all workers together; the same at any number of workers."""
    steps_per_epoch: int | None = Field(None, ge=1)
    """Steps an epoch; None: as many as draw no image twice, at least 1; for hard and weighted one pass."""
    sampling: Literal["all", "positives", "balanced", "ratio", "weighted", "hard"] = "all"
    """all: each image once a pass; positives: only with a finding present; balanced: as many with as without; ratio:
    `positive_share` of them with; weighted: by `weights`, with replacement; hard: all, and what `hard_predictions` got wrong
    more often."""
    positive_share: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] = (0.8, 0.4)
    """For sampling=ratio: share of images with a finding present in every step of the first and of the last of
    `positive_share_epochs`; evenly in between, constant afterwards."""
    positive_share_epochs: int = Field(10, ge=1)
    """Epochs over which `positive_share` goes from its first to its last value; 1: the last at once."""
    weights: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field({}, validate_default=True)
    """For sampling=weighted: finding -> how often an image is drawn that shows it, the largest of its findings
    counting; 1 for what is not named. `No Finding` names the images with every finding absent."""
    hard_predictions: str | None = Field(None, validate_default=True)
    """For sampling=hard: a run's predictions of the training split, RUN/predictions-train.parquet; made by
    `cxrscale predict --split train --run RUN`."""
    hard_share: float = Field(0.1, gt=0, le=1)
    """Share of the predicted training images, those with the largest |label - score|, that count as hard."""
    hard_repeats: int = Field(2, ge=1)
    """How many times a hard image is appended to each pass, beyond the once of every image."""
    dataset_weights: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = ()
    """Share of each entry of data.shards, in their order, in every step; [3, 1] is three to one. Empty: by their
    sizes, one shuffle over all."""
    max_images: int | None = Field(None, ge=1)
    """Train on so many images only (the ablation run: can it learn at all?)."""
    eval_batch_size: int = Field(32, ge=1)
    """Images a forward pass and worker in evaluation."""

    @field_validator("weights", "hard_predictions")
    @classmethod
    def _check_given(cls, value: Any, info: ValidationInfo) -> Any:
        wanted = {"weights": "weighted", "hard_predictions": "hard"}
        if not value and info.data.get("sampling") == wanted[str(info.field_name)]:
            remedies = {
                "weights": "sampling=weighted wants a weight for a finding, e.g. sampler.weights={Hernia: 5}",
                "hard_predictions": "sampling=hard wants what `cxrscale predict --split train --run runs/NAME` leaves: "
                "runs/NAME/predictions-train.parquet",
            }
            raise ValueError(remedies[str(info.field_name)])
        return value


class Augment(Section):
    """What happens to an image between the shard and the model; the same matrix moves image and mask."""

    preset: Literal["none", "chexnet", "effusion", "rsna", "siim"] = "none"
    """Where the other fields take their defaults from."""
    size: int = Field(224, ge=16, le=2048)
    """Side of the model's square input in pixels."""
    probability: float = Field(1.0, ge=0, le=1)
    """Chance that a training image is augmented at all."""
    hflip: float = Field(0.0, ge=0, le=1)
    """Chance of a left-right flip. There is no vertical flip: no chest stands on its head."""
    rotation: float = Field(0.0, ge=0, le=45)
    """Rotation is drawn from -rotation to +rotation degrees."""
    translation: float = Field(0.0, ge=0, le=0.5)
    """Shift along each axis, drawn from -translation to +translation of the image's side."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Zoom drawn between these factors; above 1 enlarges."""
    crop_area: tuple[float, float] = (1.0, 1.0)
    """Random resized crop: share of the image's area that is kept."""
    brightness: float = Field(0.0, ge=0, le=1)
    """Shift of the gray level, drawn from -brightness to +brightness of the full range."""
    contrast: float = Field(0.0, ge=0, lt=1)
    """Factor about mid-gray, drawn from 1 - contrast to 1 + contrast."""
    blur: float = Field(0.0, ge=0, le=1)
    """Chance of a Gaussian blur."""
    blur_sigma: float = Field(1.0, gt=0, le=5)
    """Standard deviation of that blur in pixels of the input."""
    noise: float = Field(0.0, ge=0, le=0.5)
    """Standard deviation of added Gaussian noise as a share of the full range."""
    clahe: Literal["never", "random", "always"] = "never"
    """Contrast-limited adaptive histogram equalization: on no image, half the training images, or every one."""
    clahe_clip: float = Field(2.0, gt=0)
    """CLAHE's clip limit."""
    clahe_tiles: int = Field(8, ge=1)
    """CLAHE's tiles along each axis."""
    normalize: Literal["fixed", "minmax"] = "fixed"
    """fixed: (x / 255 - mean) / std; minmax: each image to 0..1 by its own extremes."""
    mean: float = 0.449
    """Gray mean for `fixed`; the default is the mean of ImageNet's three channels."""
    std: float = Field(0.226, gt=0)
    """Gray standard deviation for `fixed`; the default is the mean of ImageNet's three channels."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("preset") in PRESETS:
            return {**PRESETS[given["preset"]], **given}
        return given
