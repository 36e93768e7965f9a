"""A trained model, loaded once: probabilities of image files, bytes or arrays."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from cxrscale import config
from cxrscale.config import Recipe
from cxrscale.evaluation import DEFAULT_MASK_RULE, MaskRule, Thresholds, artifacts
from cxrscale.evaluation.metrics import bin_of
from cxrscale.io import (
    ArtifactPart,
    LoadedImage,
    Strictness,
    encode_jpeg,
    encode_png,
    load_image,
    read_artifact,
    resize_image,
    rle_masks,
    storage,
)
from cxrscale.loader import file_batches
from cxrscale.models import build_model, forward, probabilities
from cxrscale.training import LocalWorker, checkpoint, scoring
from cxrscale.types import GrayImage, UnreadableImageError, UserError

Source = str | Path | bytes | GrayImage
"""An image: a path or fsspec address of a DICOM, PNG or JPEG file, such a file's bytes, or an upright gray array."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a model predicts for one image, or why it cannot."""

    path: str = ""
    """The file's path or address; empty for bytes and arrays."""
    probabilities: Mapping[str, float] = field(default_factory=dict)
    """Finding -> probability in 0..1; for segmentation the map's highest pixel. Not calibrated."""
    mask_rle: str | None = None
    """For segmentation: the mask at the image's own size, run-length encoded as in SIIM-ACR; '-1' is empty."""
    error: str = ""
    """Why there are no probabilities; empty where there are."""
    warnings: tuple[str, ...] = ()
    """Faults of the file, one line each, for which a dataset would refuse it; its gray values are certain."""


class Provenance(ArtifactPart):
    """What a prediction must name to be reproduced."""

    run: str
    """The run's absolute path or address."""
    checkpoint: str
    """Digest of the file of weights."""
    manifest: str
    """Digest of the datasets that the model was trained on."""
    recipe: Recipe


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """A run's best weights, ready to score."""

    model: nn.Module
    recipe: Recipe
    manifest: str
    """Digest of the datasets that it was trained on."""
    checkpoint: str
    """Digest of the file of weights."""
    pixels: Mapping[str, Any]
    """How the training images were stored: codec, size, quality."""


class Predictor:
    """A run's model, loaded once, for many calls from any number of threads.

        predictor = cx.Predictor("runs/chexnet14")
        predictor("a.dcm").probabilities  # {'Atelectasis': 0.12, ...}

    Threads decode their images side by side and take turns at the model.
    """

    def __init__(self, run: str | Path, device: str | None = None, mask_rule: MaskRule | None = None) -> None:
        """Load the run's best checkpoint.

        Args:
            run: the run's folder or address.
            device: cpu, cuda, cuda:1, ...; None: the GPU where there is one.
            mask_rule: for segmentation; None: the one in the run's thresholds.json, or 0.5 where there is none.

        Raises:
            UserError: the folder is not a run, nothing has been trained in it yet, or its thresholds.json does not
                belong to its weights.
        """
        self._device = LocalWorker(device).dist.device
        self._trained = load_model(run, self._device)
        self._run = storage.absolute(str(run))
        self._mask_rule = mask_rule or _stored_mask_rule(str(run), self._trained.checkpoint)
        # Batches and model: a DALI pipeline belongs to one thread, and a GPU gains nothing from two at once.
        self._lock = threading.Lock()

    @property
    def recipe(self) -> Recipe:
        """The recipe that the model was trained with."""
        return self._trained.recipe

    @property
    def findings(self) -> tuple[str, ...]:
        """The keys of `Prediction.probabilities`."""
        return self.recipe.data.findings

    @property
    def provenance(self) -> Provenance:
        """The run, the digests of its weights and datasets, and its recipe."""
        return Provenance(
            run=self._run,
            checkpoint=self._trained.checkpoint,
            manifest=self._trained.manifest,
            recipe=self.recipe,
        )

    def __call__(self, source: Source) -> Prediction:
        """The prediction for one image; an unreadable one gives `Prediction.error`."""
        return self.predict([source])[0]

    def predict(self, items: Sequence[Source], batch_size: int | None = None) -> list[Prediction]:
        """The predictions for many images, in order; an unreadable one gives its `Prediction.error`.

        An image is processed as the training images were: upright gray, stored size and encoding, same operations.
        Files are read leniently: `cxrscale.io.strictness` lists what then becomes a warning instead of an error.

        Args:
            batch_size: images per forward pass; None: the recipe's sampler.eval_batch_size. This many are in memory.
        """
        size = batch_size or self.recipe.sampler.eval_batch_size
        return [
            prediction
            for start in range(0, len(items), size)
            for prediction in self._predict_batch(items[start : start + size])
        ]

    def _predict_batch(self, items: Sequence[Source]) -> Iterator[Prediction]:
        images = [self._load(item) for item in items]
        read = [image for image in images if not isinstance(image, str)]
        stored = [encode_as_stored(image.image_HW, self._trained.pixels) for image in read]
        outputs = iter(self._probabilities(stored))
        for item, image in zip(items, images, strict=True):
            path = str(item) if isinstance(item, str | Path) else ""
            if isinstance(image, str):
                yield Prediction(path, error=image)
                continue
            output = next(outputs)
            if output is None:
                yield Prediction(path, error="the image cannot be decoded", warnings=image.warnings)
            elif output.ndim == 1:
                probability = dict(zip(self.findings, output.tolist(), strict=True))
                yield Prediction(path, probability, warnings=image.warnings)
            else:
                mask_rle = self._mask_rle(output[0], image.image_HW)
                yield Prediction(path, {self.findings[0]: float(output.max())}, mask_rle, warnings=image.warnings)

    @staticmethod
    def _load(source: Source) -> LoadedImage | str:
        """The upright gray image, or the reason why there is none."""
        try:
            if isinstance(source, np.ndarray):
                if source.dtype != np.uint8 or source.ndim != 2:
                    raise UserError(f"an array of {source.dtype} {source.shape} is not an image; give uint8 (H, W)")
                return LoadedImage(source)
            if isinstance(source, bytes):
                return load_image(source, strictness=Strictness.LENIENT)
            return load_image(storage.read(str(source)), name=str(source), strictness=Strictness.LENIENT)
        except (UnreadableImageError, UserError) as error:
            return str(error)

    def _probabilities(self, images: Sequence[bytes]) -> list[npt.NDArray[np.float32] | None]:
        """For each stored image (F,) probabilities, or a (1, H, W) map; None where it cannot be decoded."""
        outputs: list[npt.NDArray[np.float32] | None] = [None] * len(images)
        if not images:
            return outputs
        # No padding: a single image must not cost a forward pass of a full batch.
        sampler = self.recipe.sampler.model_copy(update={"eval_batch_size": len(images)})
        recipe = self.recipe.model_copy(update={"sampler": sampler})
        with self._lock, torch.no_grad():
            for batch in file_batches(images, recipe, self._device):
                output = probabilities(forward(self._trained.model, batch, recipe.train, self._device)).cpu().numpy()
                for index in np.flatnonzero(batch.valid_B.cpu().numpy()):
                    outputs[int(batch.row_B[index])] = output[index]
        return outputs

    def _mask_rle(self, score_HW: npt.NDArray[np.float32], image_HW: GrayImage) -> str:
        small_HW = apply_mask_rule(score_HW, self._mask_rule).astype(np.uint8)
        height, width = image_HW.shape
        mask_HW = cv2.resize(small_HW, (width, height), interpolation=cv2.INTER_NEAREST)
        return rle_masks.encode(mask_HW.astype(np.bool_))


def load_model(run: str | Path, device: torch.device) -> TrainedModel:
    """The best checkpoint of a run, in evaluation mode.

    Raises:
        UserError: the folder is not a run, or nothing has been trained in it yet.
    """
    path = storage.join(run, checkpoint.BEST)
    if not storage.exists(path):
        raise UserError(f"{path} does not exist; give the folder that `cxrscale train` printed, after its first epoch")
    content = storage.read(path)
    state = checkpoint.read(content, path)
    recipe = config.parse(Recipe, state["recipe"], where=path)
    settings = recipe.model.model_copy(update={"weights": "none"})
    model = build_model(settings, recipe.data)
    model.load_state_dict(state["model"])
    return TrainedModel(model.to(device).eval(), recipe, state["manifest"], storage.digest(content), state["pixels"])


def stored_thresholds(run: str, digest: str | None = None) -> Thresholds:
    """The run's thresholds.json.

    Args:
        digest: of the run's best.pt, where the caller knows it.

    Raises:
        UserError: there is none, it is damaged or of another version, or the run's weights have changed since.
    """
    path, remedy = storage.join(run, artifacts.THRESHOLDS), f"run `cxrscale threshold {run}`"
    stored = read_artifact(Thresholds, path, remedy)
    digest = digest or storage.digest(storage.read(storage.join(run, checkpoint.BEST)))
    if stored.checkpoint != digest:
        raise UserError(f"{path} belongs to other weights than best.pt; {remedy} again")
    return stored


def _stored_mask_rule(run: str, digest: str) -> MaskRule:
    if not storage.exists(storage.join(run, artifacts.THRESHOLDS)):
        return DEFAULT_MASK_RULE
    return stored_thresholds(run, digest).mask_rule or DEFAULT_MASK_RULE


def apply_mask_rule(score_HW: npt.NDArray[np.float32], rule: MaskRule) -> npt.NDArray[np.bool_]:
    """The mask of a score map: empty unless `min_area` pixels score >= top, else all pixels that score >= bottom."""
    bins = scoring.BINS
    enough = (score_HW * bins >= bin_of(rule.top, bins)).sum() >= max(1, rule.min_area)
    return np.asarray((score_HW * bins >= bin_of(rule.bottom, bins)) & enough)


def encode_as_stored(image_HW: GrayImage, pixels: Mapping[str, Any]) -> bytes:
    """An image as the shards would hold it: same size and encoding."""
    if pixels["codec"] == "source":
        return encode_png(image_HW)
    resized_HW = resize_image(image_HW, pixels["size"])
    return encode_png(resized_HW) if pixels["codec"] == "png" else encode_jpeg(resized_HW, pixels["quality"])
