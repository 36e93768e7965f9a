"""Every knob: frozen sections, one function that reads a recipe and one that applies `section.field=value`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from cxrscale.labels import NIH14
from cxrscale.schema import InputError


def _one_or_more(given: Any) -> Any:
    return (given,) if isinstance(given, str) else given


Names = Annotated[tuple[str, ...], BeforeValidator(_one_or_more)]
"""One name or several; `train` is read as `[train]`."""


class Section(BaseModel):
    """A frozen group of knobs; the sentence under a field is its help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


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
    split_lists: dict[str, str] = {}
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
    """For sampling=hard: a run's predictions of the training split, predictions-train.parquet."""
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
                "hard_scores": "sampling=hard wants a run's predictions, e.g. runs/NAME/predictions-train.parquet",
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


class Model(Section):
    """The net."""

    arch: str = "densenet121"
    """classify: a timm model name; segment: Unet, UnetPlusPlus, FPN, ... of segmentation_models_pytorch."""
    encoder: str = "resnet34"
    """segment only: the encoder, by segmentation_models_pytorch's name."""
    weights: str = "imagenet"
    """imagenet, none, or the path of a cxrscale checkpoint to start from."""
    options: dict[str, Any] = {}
    """Further arguments of the model's constructor, e.g. {growth_rate: 16}."""


class Loss(Section):
    """A weighted sum of terms; a term at 0 is not computed."""

    bce: float = Field(1.0, ge=0)
    """Weight of binary cross-entropy."""
    dice: float = Field(0.0, ge=0)
    """Weight of soft Dice (1 - Dice coefficient of the probabilities), per picture; segmentation only."""
    focal: float = Field(0.0, ge=0)
    """Weight of the focal loss."""
    focal_gamma: float = Field(2.0, ge=0)
    """Exponent that turns easy examples down in the focal loss."""
    positive_weight: float = Field(1.0, gt=0)
    """Factor on the positive term of binary cross-entropy."""


class Optim(Section):
    """Optimizer and learning-rate schedule."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    """The optimizer; sgd uses Nesterov momentum betas[0]."""
    lr: float = Field(1e-3, gt=0)
    """Learning rate at its highest."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates of the first and second moment."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay (decoupled for adamw)."""
    schedule: Literal["constant", "cosine", "plateau"] = "constant"
    """cosine falls to 0 over the run; plateau divides when validation no longer improves."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the rate rises from 0."""
    plateau_factor: float = Field(0.1, gt=0, lt=1)
    """Factor on the rate at a plateau."""
    plateau_patience: int = Field(0, ge=0)
    """Epochs without improvement that are borne before the rate falls; 0: the first one, as in CheXNet."""
    clip_norm: float | None = Field(None, gt=0)
    """Gradients are scaled down to this norm; None: never."""


class Train(Section):
    """The loop."""

    epochs: int = Field(10, ge=1)
    """Epochs in all, counting those before a resume."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on a GPU, fp32 on a CPU."""
    channels_last: bool = True
    """NHWC memory layout, which convolutions prefer."""
    compile: bool = False
    """torch.compile the net."""
    metric: Literal["loss", "auroc", "dice", "dice_positives"] = "auroc"
    """The validation metric that chooses the best checkpoint and drives the plateau."""
    patience: int | None = Field(None, ge=1)
    """Stop after so many epochs without a better metric; None: never."""
    checkpoint_steps: int | None = Field(None, ge=1)
    """Also write a checkpoint every so many steps; None: only at the end of each epoch."""
    keep: int = Field(2, ge=1)
    """How many of the newest checkpoints stay on disk beside the best one."""


class Scaling(Section):
    """Where the loop runs."""

    num_workers: int = Field(1, ge=0)
    """Ray Train workers; 0: in this very process, without Ray, as `--local` does."""
    use_gpu: bool | None = None
    """A GPU a worker; None: when the cluster (or this machine) has one."""
    cpus_per_worker: float = Field(1, gt=0)
    """CPUs that Ray sets aside for each worker."""
    max_failures: int = Field(3, ge=-1)
    """How often a run starts again from its last checkpoint after losing a worker; -1: without end."""


class Tracking(Section):
    """What is written down of a run."""

    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The run's name; None: the recipe's name and the time. An unfinished run of this name goes on."""
    root: str = "runs"
    """The folder that holds runs."""
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Weights & Biases; offline writes files that `wandb sync` sends later."""
    project: str = "cxrscale"
    """The project in Weights & Biases."""
    log_steps: int = Field(10, ge=1)
    """metrics.jsonl gets a line every so many steps."""


class Recipe(Section):
    """One system, whole: what `jobs/*.yaml` states the differences of."""

    pack: Pack = Pack()
    data: Data = Data()
    plan: Plan = Plan()
    augment: Augment = Augment()
    model: Model = Model()
    loss: Loss = Loss()
    optim: Optim = Optim()
    train: Train = Train()
    scaling: Scaling = Scaling()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _check_across_sections(self) -> Recipe:
        if self.data.task == "segment" and len(self.data.findings) != 1:
            raise ValueError(f"data.findings={list(self.data.findings)}: segmentation takes one: data.findings=[X]")
        if self.loss.dice and self.data.task == "classify":
            raise ValueError("loss.dice needs pixels: set data.task=segment or loss.dice=0")
        if self.train.metric.startswith("dice") and self.data.task == "classify":
            raise ValueError(
                f"train.metric={self.train.metric} needs pixels: set data.task=segment or train.metric=auroc"
            )
        return self


AnySection = TypeVar("AnySection", bound=Section)


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe and apply `section.field=value` overrides; values are YAML (`3e-4`, `[a, b]`, `null`).

    Raises:
        InputError: no such file, no YAML, an unknown field (names the one you may have meant), a bad value.
    """
    path = Path(path)
    try:
        text = path.read_text()
    except FileNotFoundError:
        near = sorted(str(other) for other in path.parent.glob("*.yaml"))[:12] if path.parent.is_dir() else []
        remedy = f"recipes there: {', '.join(near)}" if near else "recipes lie in jobs/"
        raise InputError(f"recipe {path} does not exist; {remedy}") from None
    except OSError as error:
        raise InputError(f"recipe {path} cannot be read: {error.strerror}; give a YAML file") from None
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise InputError(f"recipe {path} is not YAML: {_one_line(error)}") from None
    if not isinstance(tree, dict):
        raise InputError(f"recipe {path} is a {type(tree).__name__}, not sections; see `cxrscale config`")
    return parse(Recipe, override(tree, overrides), where=str(path))


def override(tree: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of the nested mapping with each `a.b=value` set; the value is parsed as YAML.

    Raises:
        InputError: an override has no `=` or goes through a field that is no section.
    """
    result: dict[str, Any] = {key: dict(value) if isinstance(value, dict) else value for key, value in tree.items()}
    for item in overrides:
        name, equals, text = item.partition("=")
        if not equals or not name:
            raise InputError(f"override {item!r} is not of the form section.field=value, e.g. optim.lr=3e-4")
        *parents, leaf = name.strip().split(".")
        here = result
        for parent in parents:
            here = here.setdefault(parent, {})
            if not isinstance(here, dict):
                raise InputError(f"override {item!r}: {parent} is a value, not a section")
        here[leaf] = _value(text)
    return result


def parse(section: type[AnySection], tree: Mapping[str, Any], where: str) -> AnySection:
    """Validate a nested mapping; every error becomes one line that names the field, the value and the remedy."""
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise InputError(f"{where}: unknown field {field}; {_nearest(section, field)}") from None
        message = first["msg"].removeprefix("Value error, ")
        value = "" if not field else f"={first['input']!r}"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise InputError(f"{where}: {field}{value}{': ' if field else ''}{message}{more}") from None


def to_yaml(section: Section) -> str:
    """The resolved section as YAML in the order of its definition."""
    text: str = yaml.safe_dump(section.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return text


def fields(section: type[Section], prefix: str = "") -> dict[str, str]:
    """Every dotted field name and the sentence that explains it."""
    names: dict[str, str] = {}
    for name, info in section.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            names |= fields(kind, f"{prefix}{name}.")
        else:
            names[f"{prefix}{name}"] = info.description or ""
    return names


def _nearest(section: type[Section], field: str) -> str:
    names = list(fields(section))
    leaf_matches = [name for name in names if name.rsplit(".", 1)[-1] == field.rsplit(".", 1)[-1]]
    close = leaf_matches or difflib.get_close_matches(field, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else "`cxrscale config RECIPE --help-fields` lists all fields"


def _value(text: str) -> Any:
    # YAML 1.1 reads 1e-3 as a string because it wants a dot; everyone who types a learning rate means a number.
    if re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", text.strip()):
        return float(text)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
