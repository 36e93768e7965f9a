"""What goes into the model: datasets, sampling, augmentation."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from cxrscale.config.findings import NIH14
from cxrscale.config.presets import PRESETS
from cxrscale.config.section import NOT_LEARNED, Names, Section, Seed


class Pack(Section):
    """How a source becomes a dataset of shards."""

    learned: ClassVar[bool] = False

    codec: Literal["jpeg", "png", "source"] = "jpeg"
    """jpeg: gray baseline JPEG at `size`; png: lossless at `size`; source: the original file's compressed pixels,
    unchanged, without its metadata (PNG text, EXIF, comments, ...)."""
    size: int = Field(512, ge=16, le=4096)
    """Side of the stored square image in pixels; choose 1.2 to 1.6 times the input size of the models."""
    quality: int = Field(95, ge=50, le=100)
    """JPEG quality; 95 keeps about 48 dB PSNR at 512 pixels."""
    samples_per_shard: int = Field(2000, ge=1)
    """Images per tar file; 2,000 at 54 kB make about 108 MB."""
    masks: bool = False
    """Store a mask for every image, empty ones included; images without a mask label are left out."""
    split: Literal["official", "random", "chexnet", "kfold", "lists"] = "official"
    """All splits are disjoint by patient. official: the source's test list, with validation patients taken from the
    rest (random for siim and rsna, which publish none); random: fractions of the images; chexnet: the paper's
    28,744/1,672/389 patients; kfold: folds with similar findings and mask sizes; lists: `split_lists`."""
    folds: int = Field(5, ge=2)
    """Number of folds of split=kfold; their names are fold0, fold1, ..."""
    split_lists: dict[str, str] = Field({})
    """For split=lists: split -> a text file with one of the source's own image ids per line."""
    val_fraction: float = Field(0.12958, ge=0, lt=1)
    """Share of the images outside the test split that become validation; the default is 11,212 of 86,524."""
    test_fraction: float = Field(0.2, ge=0, lt=1)
    """Share of all images that become test, if the source has no official test list or split is random."""
    split_seed: Seed = 0
    """Random seed of the splits."""
    max_quarantined: int = Field(100, ge=0)
    """With more unreadable images than this, the command exits with an error; readable images are packed anyway."""
    patient_ids: Literal["hashed", "original"] = "hashed"
    """hashed: keyed hashes stand for the patient and image ids, names in the tars included; original: the source's own
    ids, which may name patients."""
    key_file: str | None = None
    """For patient_ids=hashed: the file that holds the key; null: the environment variable CXRSCALE_PATIENT_KEY, else
    ~/.local/state/cxrscale/patient.key, which is made at first use. Datasets of different keys cannot be joined."""
    burned_in: Literal["keep", "quarantine"] = "keep"
    """DICOM images that declare text burned into their pixels (BurnedInAnnotation is YES): keep and count them, or
    quarantine them."""
    duplicates: Literal["keep", "merge"] = "keep"
    """merge: read every image once beforehand and treat patients who share an image as one patient; keep: do not."""
    limit: int | None = Field(None, ge=1)
    """Use only the first `limit` images in the order of their ids, to try things out; null: all."""
    workers: int | None = Field(None, ge=1)
    """Ray tasks that run at the same time; null: one per CPU of the cluster."""


class Data(Section):
    """Which datasets, which findings and which splits."""

    shards: Annotated[tuple[str, ...], NOT_LEARNED] = ()
    """Folders or addresses of datasets, as `cxrscale shard` prints them."""
    task: Literal["classify", "segment"] = "classify"
    """classify: one logit per image and finding; segment: one logit per pixel."""
    findings: tuple[str, ...] = Field(NIH14, min_length=1)
    """The findings that the model predicts, in the order of its logits."""
    negatives: Literal["any", "no_finding"] = "any"
    """any: every image without the task's findings is a negative; no_finding: only images with every finding of the
    dataset absent are negatives (Effusion against normal); other images without them are left out of all splits."""
    train_split: Names = ("train",)
    """The split to train on, or several: [fold1, fold2, fold3, fold4]."""
    val_split: Names = ("val",)
    """The split that chooses checkpoints and thresholds."""
    test_split: Annotated[Names, NOT_LEARNED] = ("test",)
    """The split that is used for evaluation only."""
    allow_leaks: Annotated[bool, NOT_LEARNED] = False
    """Train even if a patient or an image is in two splits."""
    max_bad_rows: Annotated[int | None, NOT_LEARNED] = Field(100, ge=0)
    """Rows of a batch whose image cannot be read or is damaged are left out of loss and metrics, and counted. With more
    of them than this in an epoch, or in a validation, training stops with the count; null: never."""

    @field_validator("findings")
    @classmethod
    def _check_findings(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        twice = sorted({name for name in value if value.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} is there twice; name each finding once")
        return value


class Loader(Section):
    """How batches are decoded and augmented. These fields change the speed, not the content of a batch."""

    learned: ClassVar[bool] = False

    backend: Literal["auto", "dali", "opencv"] = "auto"
    """dali: NVIDIA DALI, on Linux; opencv: the same batches on machines without DALI; auto: dali if it is installed,
    else opencv."""
    num_threads: int = Field(2, ge=1)
    """CPU threads of DALI per worker."""
    prefetch: int = Field(2, ge=1)
    """Batches that DALI prepares ahead."""


class Sampler(Section):
    """Which images are in which batch."""

    seed: Seed = 0
    """Random seed of the image order, of augmentation and of the initial weights."""
    batch_size: int = Field(16, ge=1, le=2**20)
    """Images per optimizer step over all workers together; independent of the number of workers."""
    steps_per_epoch: int | None = Field(None, ge=1)
    """Steps per epoch; null: as many as use no image twice, at least 1; one pass for sampling=hard and weighted."""
    sampling: Literal["all", "positives", "balanced", "ratio", "weighted", "hard"] = "all"
    """all: each image once per pass; positives: only images with a finding present; balanced: half of them with a
    finding, half labeled as without; ratio: `positive_share` of them with a finding; weighted: by `weights`, with
    replacement; hard: each image once, and those with the largest errors in `hard_predictions` more often."""
    positive_share: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] = (0.8, 0.4)
    """For sampling=ratio: share of images with a finding in each batch, in the first and in the last of
    `positive_share_epochs`; linear in between, constant afterwards."""
    positive_share_epochs: int = Field(10, ge=1, le=100_000)
    """Epochs over which `positive_share` goes from its first to its last value; 1: the last value from the start."""
    weights: dict[str, Annotated[float, Field(ge=0)]] = Field({}, validate_default=True)
    """For sampling=weighted: finding -> sampling weight of images that show it. The largest weight of an image's
    findings counts; findings without an entry have weight 1; `No Finding` means images with every finding absent."""
    hard_predictions: str | None = Field(None, validate_default=True)
    """For sampling=hard: a run's predictions for the training split, RUN/predictions-train.parquet; write it with
    `cxrscale predict --split train --run RUN`."""
    hard_share: float = Field(0.1, gt=0, le=1)
    """Share of the predicted training images, those with the largest |label - score|, that count as hard."""
    hard_repeats: int = Field(2, ge=1, le=1000)
    """How many more times a hard image is used in each pass."""
    dataset_weights: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """Weight of each entry of data.shards in every batch, in the same order; [3, 1] is three to one. Empty: one
    shuffle over all images."""
    max_images: int | None = Field(None, ge=1)
    """Train on a fixed random subset of this many images (`cxrscale overfit` uses it); null: on all images."""
    eval_batch_size: Annotated[int, NOT_LEARNED] = Field(32, ge=1, le=2**20)
    """Images per forward pass and worker in evaluation."""

    @field_validator("weights", "hard_predictions")
    @classmethod
    def _check_given(cls, value: Any, info: ValidationInfo) -> Any:
        needed_by = {"weights": "weighted", "hard_predictions": "hard"}
        if not value and info.data.get("sampling") == needed_by[str(info.field_name)]:
            remedies = {
                "weights": "sampling=weighted needs a weight for a finding, e.g. sampler.weights={Hernia: 5}",
                "hard_predictions": "sampling=hard needs predictions of the training split, which "
                "`cxrscale predict --split train --run runs/NAME` writes to runs/NAME/predictions-train.parquet",
            }
            raise ValueError(remedies[str(info.field_name)])
        return value


Factor = Annotated[float, Field(gt=0, le=10)]
Share = Annotated[float, Field(gt=0, le=1)]


class Augment(Section):
    """What happens to an image between the dataset and the model; image and mask get the same geometric transform."""

    preset: Literal["none", "chexnet", "effusion", "rsna", "siim"] = "none"
    """The preset that gives the other fields their defaults."""
    size: int = Field(224, ge=16, le=2048)
    """Side of the model's square input in pixels."""
    probability: float = Field(1.0, ge=0, le=1)
    """Probability that a training image is augmented at all."""
    hflip: float = Field(0.0, ge=0, le=1)
    """Probability of a left-right flip. There is no vertical flip: no chest X-ray is upside down."""
    rotation: float = Field(0.0, ge=0, le=45)
    """Rotation, sampled from -rotation to +rotation degrees."""
    translation: float = Field(0.0, ge=0, le=0.5)
    """Shift along each axis, sampled from -translation to +translation times the side of the image."""
    scale: tuple[Factor, Factor] = (1.0, 1.0)
    """Zoom factor, sampled between these two; above 1 enlarges."""
    crop_area: tuple[Share, Share] = (1.0, 1.0)
    """Random resized crop: the share of the image's area that is kept, sampled between these two."""
    brightness: float = Field(0.0, ge=0, le=1)
    """Shift of the gray level, sampled from -brightness to +brightness times the full range."""
    contrast: float = Field(0.0, ge=0, lt=1)
    """Contrast factor around mid-gray, sampled from 1 - contrast to 1 + contrast."""
    blur: float = Field(0.0, ge=0, le=1)
    """Probability of a Gaussian blur."""
    blur_sigma: float = Field(1.0, gt=0, le=5)
    """Standard deviation of the blur in pixels of the model's input."""
    noise: float = Field(0.0, ge=0, le=0.5)
    """Standard deviation of added Gaussian noise as a share of the full range."""
    clahe: Literal["never", "random", "always"] = "never"
    """Contrast-limited adaptive histogram equalization: on no image, on half of the training images, or on all."""
    clahe_clip: float = Field(2.0, gt=0, le=1000)
    """Clip limit of CLAHE."""
    clahe_tiles: int = Field(8, ge=1, le=64)
    """Tiles of CLAHE along each axis."""
    normalize: Literal["fixed", "minmax"] = "fixed"
    """fixed: (x / 255 - mean) / std; minmax: each image scaled to 0..1 by its own minimum and maximum."""
    mean: float = Field(0.449, ge=0, le=1)
    """Mean for normalize=fixed; the default is the average over ImageNet's three channels."""
    std: float = Field(0.226, gt=0)
    """Standard deviation for normalize=fixed; the default is the average over ImageNet's three channels."""

    @field_validator("scale", "crop_area")
    @classmethod
    def _check_order(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise ValueError(f"the smaller number comes first: [{value[1]:g}, {value[0]:g}]")
        return value

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        if isinstance(given, dict) and isinstance(given.get("preset"), str) and given["preset"] in PRESETS:
            return {**PRESETS[given["preset"]], **given}
        return given
