"""export.json: what an exported model takes and gives, what it was made of, and how far it is from the run's model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from cxrscale import config
from cxrscale.config import Augment, Pack, Recipe
from cxrscale.evaluation import Estimate, MaskRule, Thresholds, calibration
from cxrscale.io import Artifact, ArtifactPart, Number, read_artifact, read_sealed_yaml, seal, storage
from cxrscale.training import resume
from cxrscale.types import UserError, one_line

EXPORT = "export.json"
STANDALONE = ("predict.py", "image_input.py")
"""Beside an ONNX model: what predicts without cxrscale and torch, and what reads its images."""
REMEDY = "export the run again"
PIXELS = ("codec", "size", "quality")
"""Fields of the pack section that say how an image is stored."""

Format = Literal["onnx", "torch-export"]
FORMATS: tuple[Format, ...] = ("onnx", "torch-export")
Quantization = Literal["none", "int8-dynamic", "int8-static", "fp16"]
QUANTIZATIONS: tuple[Quantization, ...] = ("none", "int8-dynamic", "int8-static", "fp16")
FILES: Mapping[Format, str] = {"onnx": "model.onnx", "torch-export": "model.pt2"}
"""Format -> the file of its model; `training.run_files.WEIGHTS` knows them."""


class InputContract(ArtifactPart):
    """What the model takes: (B, 1, size, size) float32, and how an upright gray image of 8 bits becomes that.

    The image is resized and encoded as the training images were stored, decoded, warped to `size` with bilinear
    samples, equalized where `clahe`, and normalized."""

    gray: bool = True
    """One channel."""
    codec: Literal["jpeg", "png", "source"]
    """How the training images were stored; source: at their own size."""
    stored_size: int
    """Side in pixels of the stored images."""
    quality: int
    """Of the stored JPEGs."""
    size: int
    """Side in pixels of the model's input."""
    clahe: bool
    """Whether contrast is equalized (CLAHE)."""
    clahe_clip: float
    clahe_tiles: int
    normalize: Literal["fixed", "minmax"]
    """fixed: (x / 255 - mean) / std; minmax: each image to 0..1 between its own extremes."""
    mean: float
    std: float

    def stored(self) -> dict[str, Any]:
        """How the training images were stored, as `TrainedModel.pixels`."""
        return {"codec": self.codec, "size": self.stored_size, "quality": self.quality}


class FindingContract(ArtifactPart):
    """How a logit of the model becomes a probability and a call."""

    calibrator: Literal["none", "platt", "temperature", "isotonic"] = "none"
    slope: Number = 1.0
    """Without knots: probability = sigmoid(slope x logit + offset)."""
    offset: Number = 0.0
    knots: tuple[tuple[Number, Number], ...] = ()
    """Isotonic: (the model's own probability, calibrated probability), linear between them."""
    prior: tuple[Number, Number] | None = None
    """Prevalence that the probability is calibrated for, and the one that it is then corrected to."""
    threshold: Number | None = None
    """Of the final probability: called present from here on; None: no call."""


class Difference(ArtifactPart):
    """How far the outputs of two models are apart on the same images."""

    images: int
    maximum: Number
    """Of the absolute differences of probabilities, of pixels for segmentation."""
    mean: Number
    flipped: Number
    """Share of calls that differ at the run's thresholds (0.5 where it has none). For segmentation 1 - Dice of all
    masks of the one against all masks of the other."""


class Candidate(ArtifactPart):
    """A way to quantize that was tried on validation images."""

    method: str
    """minmax or percentile: how the ranges of activations were calibrated."""
    float_nodes: int
    """Nodes that lose most and were kept in float."""
    nodes: int
    """Nodes that could be quantized."""
    difference: Difference


class Quality(ArtifactPart):
    """AUROC, or Dice over all images, on validation."""

    metric: str
    value: Number
    float_value: Number
    """Of the run's own model."""
    difference: Estimate
    """value - float_value, with the interval over resampled patients."""


class FormRow(ArtifactPart):
    """One form of the model."""

    form: str
    """torch (eager, channels_last), onnx (float32), or what it was exported to."""
    bytes: int
    """Of its file."""
    milliseconds: Mapping[int, Number]
    """Batch size -> median milliseconds per image."""
    times_torch: Mapping[int, Number]
    """Batch size -> median over rounds of torch's time over this one's: above 1 it is faster."""
    difference: Difference | None = None
    """From the run's own model; None for that model."""
    quality: Quality | None = None
    """Where the scores of all validation images are known."""


class ExportInfo(Artifact):
    """export.json."""

    schema_version: int = 1
    format: Format
    quantization: Quantization
    run: str
    """The run's absolute path or address."""
    checkpoint: str
    """Digest of the run's weights."""
    manifest: str
    """Digest of the datasets that it was trained on."""
    model: str
    """Digest of the model's file."""
    task: Literal["classify", "segment"]
    input: InputContract
    findings: Mapping[str, FindingContract]
    """Finding -> what its logit means, in the order of the model's outputs."""
    mask_rule: MaskRule | None = None
    """For segmentation."""
    parity: Difference | None = None
    """From the run's own model, on validation images."""
    tried: tuple[Candidate, ...] = ()
    float_nodes: tuple[str, ...] = ()
    """Nodes kept in float."""
    table: tuple[FormRow, ...] = ()
    threads: int = 0
    """That the times were measured with."""
    notes: tuple[str, ...] = ()
    """Where this form is slower or worse than a float form."""


def read_export(folder: str) -> ExportInfo:
    """An export's export.json.

    Raises:
        UserError: it is missing, damaged or of another version.
    """
    return read_artifact(ExportInfo, storage.join(folder, EXPORT), REMEDY)


def read_exported(run: str) -> ExportInfo | None:
    """What an export's folder says of it; None where the folder is no export.

    Raises:
        UserError: export.json is damaged or of another version.
    """
    return read_export(run) if storage.exists(storage.join(run, EXPORT)) else None


def read_with_recipe(run: str) -> tuple[ExportInfo, Recipe]:
    """An export's export.json and recipe.yaml, which agree: predict.py reads the one and this package the other.

    Raises:
        UserError: one is missing or damaged, or they differ.
    """
    info, path = read_export(run), storage.join(run, resume.RECIPE)
    recipe = config.parse(Recipe, read_sealed_yaml(path), where=path)
    own = input_contract(recipe.augment, stored_pixels(info.input.stored(), storage.join(run, EXPORT)))
    if (info.task, tuple(info.findings), info.input) != (recipe.data.task, recipe.data.findings, own):
        raise UserError(f"{run}: {EXPORT} and {resume.RECIPE} differ; {REMEDY}")
    return info, recipe


def stored_pixels(pixels: Any, path: str) -> dict[str, Any]:
    """How the training images were stored, refused where no dataset can be stored so."""
    try:
        valid = Pack.model_validate({name: pixels[name] for name in PIXELS})
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} does not say how its training images were stored ({one_line(error, limit=120)})"
        ) from None
    return {name: getattr(valid, name) for name in PIXELS}


@contextmanager
def loading(content: bytes, path: str) -> Iterator[None]:
    """Inside, the bytes of an exported file, which fit their seal, are loaded; what a runtime raises is one line.

    Raises:
        UserError: the file is damaged, or what runs it is not installed.
    """
    seal.check(content, path, REMEDY)
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the runtimes raise whatever their parsers do
        raise UserError(f"{path} cannot be loaded ({one_line(error, limit=160)}); {REMEDY}") from None


def input_contract(augment: Augment, pixels: Mapping[str, Any]) -> InputContract:
    """What a model takes whose recipe and stored images these are."""
    return InputContract(
        codec=pixels["codec"],
        stored_size=pixels["size"],
        quality=pixels["quality"],
        size=augment.size,
        clahe=augment.clahe == "always",
        clahe_clip=augment.clahe_clip,
        clahe_tiles=augment.clahe_tiles,
        normalize=augment.normalize,
        mean=augment.mean,
        std=augment.std,
    )


def finding_contracts(
    findings: tuple[str, ...],
    chosen: Thresholds | None,
    estimated: Mapping[str, calibration.PriorShift | None] | None = None,
) -> dict[str, FindingContract]:
    """Finding -> calibrator, correction for another prevalence, threshold; without thresholds the model's own
    probabilities and no calls.

    Args:
        estimated: with threshold.prior_shift=em, what `cxrscale evaluate` estimated for this very model.
    """
    if chosen is None:
        return {name: FindingContract() for name in findings}
    result = {}
    for name in findings:
        fitted, estimate = chosen.calibration[name], chosen.thresholds[name].threshold
        shift, target = (estimated or {}).get(name), chosen.rule.priors.get(name)
        if chosen.rule.prior_shift == "known" and target is not None and 0 < fitted.prevalence < 1:
            shift = calibration.PriorShift(fitted.prevalence, target)
        result[name] = FindingContract(
            calibrator=fitted.calibrator.kind,
            **_mapping(fitted.calibrator),
            prior=(shift.source, shift.target) if shift is not None else None,
            threshold=estimate.value if estimate.defined else None,
        )
    return result


def _mapping(calibrator: calibration.Calibrator) -> dict[str, Any]:
    if isinstance(calibrator, calibration.Platt):
        return {"slope": calibrator.slope, "offset": calibrator.offset}
    if isinstance(calibrator, calibration.Temperature):
        return {"slope": 1 / calibrator.temperature}
    if isinstance(calibrator, calibration.Isotonic):
        return {"knots": tuple(zip(calibrator.score, calibrator.probability, strict=True))}
    return {}
