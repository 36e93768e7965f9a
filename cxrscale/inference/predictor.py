"""A trained model, loaded once: probabilities of image files, bytes or arrays."""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from cxrscale import config
from cxrscale.config import Pack, Recipe
from cxrscale.evaluation import DEFAULT_MASK_RULE, MaskRule, calls
from cxrscale.evaluation.metrics import bin_of
from cxrscale.inference.decision import read_decision
from cxrscale.io import (
    ArtifactPart,
    LoadedImage,
    Strictness,
    encode_jpeg,
    encode_png,
    load_image,
    resize_image,
    rle_masks,
    storage,
)
from cxrscale.loader import file_batches
from cxrscale.models import build_model, forward, probabilities
from cxrscale.training import LocalWorker, checkpoint, scoring
from cxrscale.types import AccessError, GrayImage, UnreadableImageError, UserError, one_line, probabilities_of

PIXELS = ("codec", "size", "quality")
"""Fields of the pack section that say how an image is stored."""
Source = str | Path | bytes | GrayImage
"""An image: a path or fsspec address of a DICOM, PNG or JPEG file, such a file's bytes, or an upright gray array."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a model predicts for one image, or why it cannot."""

    path: str = ""
    """The file's path or address; empty for bytes and arrays."""
    probabilities: Mapping[str, float] = field(default_factory=dict)
    """Finding -> probability in 0..1; for segmentation of the map's highest pixel.

    With thresholds.json in the run it is the final one, as `cxrscale evaluate` computes it: calibrated, and corrected
    for another prevalence."""
    calls: Mapping[str, bool] = field(default_factory=dict)
    """Finding -> whether it is called present: probability >= the run's stored threshold. Findings without a threshold
    are missing; without thresholds.json all are."""
    logits: Mapping[str, float] = field(default_factory=dict)
    """Finding -> the model's own output, which `probabilities` are computed from."""
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
    warnings: tuple[str, ...] = ()
    """Faults of the file, one line each, for which a dataset would refuse it; its gray values are certain."""
    objects: Mapping[str, str] = field(default_factory=dict)
    """Format -> the file that was written for this image alone, relative to the folder of predictions."""
    object_errors: Mapping[str, str] = field(default_factory=dict)
    """Format -> why there is no such file, although one was asked for."""


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


@dataclass(frozen=True, slots=True)
class _Prepared:
    """An image as the model's batches take it; what a thread makes ready while the model runs."""

    prediction: Prediction
    """What is known without the model."""
    stored: bytes | None = None
    """The image as the shards would hold it; None where it could not be read."""


@dataclass(frozen=True, slots=True)
class _Output:
    """What the model gives for one image."""

    logit_F: npt.NDArray[np.float32]
    """For segmentation of the map's highest pixel."""
    score_HW: npt.NDArray[np.float32] | None
    """For segmentation: the map's probabilities."""


class Predictor:
    """A run's model, loaded once, for many calls from any number of threads.

        predictor = cx.Predictor("runs/chexnet14")
        predictor("a.dcm").probabilities  # {'Atelectasis': 0.12, ...}
        predictor("a.dcm").calls  # {'Atelectasis': False, ...}

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
        self._decision = read_decision(str(run), self._trained.checkpoint)
        chosen = self._decision.thresholds
        self._mask_rule = mask_rule or (chosen and chosen.mask_rule) or DEFAULT_MASK_RULE
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
            thresholds=self._decision.digest,
            threshold=self._decision.threshold(),
            notes=self._decision.notes,
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
        return list(self.stream(items, batch_size))

    def stream(
        self, items: Iterable[Source], batch_size: int | None = None, threads: int | None = None
    ) -> Iterator[Prediction]:
        """The predictions for any number of images, in order, each as soon as its batch is done.

        Threads read and decode the next images while the model runs. Two batches are in memory, as they are stored in
        shards, however many images there are.

        Args:
            batch_size: images per forward pass; None: the recipe's sampler.eval_batch_size.
            threads: that decode; None: one per CPU, four at most.
        """
        size = batch_size or self.recipe.sampler.eval_batch_size
        ahead, left = deque[Future[_Prepared]](), iter(items)
        pool = ThreadPoolExecutor(threads or min(4, os.cpu_count() or 1), thread_name_prefix="decode")
        try:
            while True:
                for item in islice(left, 2 * size - len(ahead)):
                    ahead.append(pool.submit(self._prepare, item))
                if not ahead:
                    return
                batch = [ahead.popleft().result() for _ in range(min(size, len(ahead)))]
                yield from self._predict_batch(batch)
        finally:
            pool.shutdown(cancel_futures=True)

    def _predict_batch(self, batch: Sequence[_Prepared]) -> Iterator[Prediction]:
        outputs = iter(self._outputs([one.stored for one in batch if one.stored is not None]))
        for one in batch:
            if one.stored is None:
                yield one.prediction
            elif (output := next(outputs)) is None:
                yield replace(one.prediction, error="the image cannot be decoded")
            else:
                yield self._prediction(one.prediction, output)

    def _prediction(self, known: Prediction, output: _Output) -> Prediction:
        logit_F = output.logit_F
        known = replace(known, logits=dict(zip(self.findings, logit_F.tolist(), strict=True)))
        if output.score_HW is not None and known.height is not None and known.width is not None:
            mask_HW = apply_mask_rule(output.score_HW, self._mask_rule, (known.height, known.width))
            area = int(mask_HW.sum())
            area_mm2 = None if known.spacing_mm is None else area * known.spacing_mm[0] * known.spacing_mm[1]
            known = replace(known, mask_rle=rle_masks.encode(mask_HW), mask_area=area, mask_area_mm2=area_mm2)
        chosen = self._decision.thresholds
        if chosen is None:
            own = dict(zip(self.findings, probabilities_of(logit_F).tolist(), strict=True))
            return replace(known, probabilities=own)
        found = calls.call_images(logit_F[None], self.findings, chosen, self._decision.estimated)
        final = dict(zip(self.findings, found.probability_NF[0].tolist(), strict=True))
        called = {
            name: bool(value)
            for name, value in zip(self.findings, found.called_NF[0].tolist(), strict=True)
            if not math.isnan(value)
        }
        return replace(known, probabilities=final, calls=called)

    def _prepare(self, source: Source) -> _Prepared:
        """The image as it would be stored, or the reason why there is none."""
        path = str(source) if isinstance(source, str | Path) else ""
        try:
            image = _load(source)
        except (UnreadableImageError, UserError) as error:
            return _Prepared(Prediction(path, error=str(error), unreachable=isinstance(error, AccessError)))
        height, width = image.image_HW.shape
        known = Prediction(path, height=height, width=width, spacing_mm=image.spacing_mm, warnings=image.warnings)
        return _Prepared(known, encode_as_stored(image.image_HW, self._trained.pixels))

    def _outputs(self, images: Sequence[bytes]) -> list[_Output | None]:
        """The model's output for each stored image; None where it cannot be decoded."""
        outputs: list[_Output | None] = [None] * len(images)
        if not images:
            return outputs
        # No padding: a single image must not cost a forward pass of a full batch.
        sampler = self.recipe.sampler.model_copy(update={"eval_batch_size": len(images)})
        recipe = self.recipe.model_copy(update={"sampler": sampler})
        with self._lock, torch.no_grad():
            for batch in file_batches(images, recipe, self._device):
                logits = forward(self._trained.model, batch, recipe.train, self._device)
                maps = probabilities(logits)[:, 0].cpu().numpy() if logits.ndim == 4 else None
                logit_BF = logits.flatten(2).amax(dim=2).cpu().numpy() if logits.ndim == 4 else logits.cpu().numpy()
                for index in np.flatnonzero(batch.valid_B.cpu().numpy()):
                    score_HW = None if maps is None else maps[index]
                    outputs[int(batch.row_B[index])] = _Output(logit_BF[index], score_HW)
        return outputs


def _load(source: Source) -> LoadedImage:
    """The upright gray image of a file, its bytes or an array, read leniently.

    Raises:
        UnreadableImageError: it cannot be decoded.
        UserError: there is no such file, or the array is no image.
        AccessError: the file cannot be reached.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 2:
            raise UserError(f"an array of {source.dtype} {source.shape} is not an image; give uint8 (H, W)")
        return LoadedImage(source)
    if isinstance(source, bytes):
        return load_image(source, strictness=Strictness.LENIENT)
    return load_image(storage.read(str(source)), name=str(source), strictness=Strictness.LENIENT)


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
    if not isinstance(state.get("recipe"), dict):
        raise UserError(f"{path} has no recipe; give a run's best.pt")
    recipe = config.parse(Recipe, state["recipe"], where=path)
    try:
        pixels = Pack.model_validate({name: state["pixels"][name] for name in PIXELS})
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} does not say how its training images were stored ({one_line(error, limit=120)})"
        ) from None
    model = build_model(recipe.model.without_weights(), recipe.data)
    try:
        model.load_state_dict(state["model"])
    except Exception as error:  # torch raises whatever a value of another type or shape leads to
        raise UserError(f"{path}: its weights do not fit its recipe ({one_line(error, limit=160)})") from None
    stored = {name: getattr(pixels, name) for name in PIXELS}
    return TrainedModel(model.to(device).eval(), recipe, state["manifest"], storage.digest(content), stored)


def apply_mask_rule(score_HW: npt.NDArray[np.float32], rule: MaskRule, shape: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """The mask of a score map at the size (H, W) of its image: empty unless `min_area` pixels score >= top, else all
    pixels that score >= bottom.

    The probabilities are enlarged, not the mask. `min_area` counts pixels of the image, or of the map where the rule
    was chosen at that size.
    """
    bins = scoring.BINS
    own_HW = scoring.enlarged(score_HW, shape)
    gate_HW = own_HW if rule.own_size else score_HW
    enough = (gate_HW * bins >= bin_of(rule.top, bins)).sum() >= max(1, rule.min_area)
    return np.asarray((own_HW * bins >= bin_of(rule.bottom, bins)) & enough)


def encode_as_stored(image_HW: GrayImage, pixels: Mapping[str, Any]) -> bytes:
    """An image as the shards would hold it: same size and encoding."""
    if pixels["codec"] == "source":
        return encode_png(image_HW)
    resized_HW = resize_image(image_HW, pixels["size"])
    return encode_png(resized_HW) if pixels["codec"] == "png" else encode_jpeg(resized_HW, pixels["quality"])
