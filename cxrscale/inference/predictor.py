"""A trained model, loaded once: probabilities of image files, bytes or arrays."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from cxrscale.config import Recipe
from cxrscale.evaluation import DEFAULT_MASK_RULE, MaskRule, ood
from cxrscale.inference.decision import Decision, read_decision
from cxrscale.inference.members import Averaging
from cxrscale.inference.ood import read_reference, thumbnails
from cxrscale.inference.outputs import Output, Reading
from cxrscale.inference.prediction import Prediction, Provenance
from cxrscale.inference.stored_images import Pixels
from cxrscale.inference.streaming import ImagePredictor, Prepared
from cxrscale.inference.trained import load_models
from cxrscale.io import storage
from cxrscale.loader import FileLoader
from cxrscale.models import forward, pooled_features, probabilities
from cxrscale.training import LocalWorker
from cxrscale.types import Batch

NO_CALLS = (
    "an ensemble without thresholds: probabilities are the mean of its models' own and no calls; "
    "`cxrscale ensemble RUN... --name NAME` makes a run of it"
)


class Predictor(ImagePredictor):
    """A run's model, loaded once, for many calls from any number of threads.

        predictor = cx.Predictor("runs/chexnet14")
        predictor("a.dcm").probabilities  # {'Atelectasis': 0.12, ...}
        predictor("a.dcm").calls  # {'Atelectasis': False, ...}

    Threads decode their images side by side and take turns at the model.
    """

    def __init__(
        self,
        run: str | Path | Sequence[str | Path],
        device: str | None = None,
        mask_rule: MaskRule | None = None,
        averaging: Averaging | None = None,
        *,
        maps: bool = False,
    ) -> None:
        """Load the run's best checkpoint.

        Args:
            run: the run's folder or address. Several runs, or `averaging`, are an ensemble: its probabilities are no
                run's own and it makes no calls, until `cxrscale ensemble` has made a run of it.
            device: cpu, cuda, cuda:1, ...; None: the GPU where there is one.
            mask_rule: for segmentation; None: the one in the run's thresholds.json, or 0.5 where there is none.
            averaging: of several models, and of an image and its mirror image (test-time augmentation).
            maps: give each prediction its `Prediction.maps`, where the model has them.

        Raises:
            UserError: the folder is not a run, nothing has been trained in it yet, its thresholds.json does not belong
                to its weights, or the runs cannot be averaged.
        """
        runs = [run] if isinstance(run, str | Path) else list(run)
        self._device = LocalWorker(device).dist.device
        self._trained = load_models(runs, self._device, averaging)
        self._run = " + ".join(storage.absolute(str(one)) for one in runs)
        own = len(runs) == 1 and averaging in (None, Averaging())
        self._decision = read_decision(str(runs[0]), self._trained.checkpoint) if own else Decision(notes=(NO_CALLS,))
        chosen = self._decision.thresholds
        self.mask_rule = mask_rule or (chosen and chosen.mask_rule) or DEFAULT_MASK_RULE
        self._maps = maps
        self._reference = read_reference(str(runs[0])) if own else None
        self._loader = FileLoader(self.recipe, self._device, self._trained.also)
        # Batches and model: a DALI pipeline takes one thread at a time, and a GPU gains nothing from two at once.
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
            members=self._trained.members,
            averaging=self._trained.averaging,
            recipe=self.recipe,
        )

    @property
    def stores(self) -> tuple[Pixels, ...]:
        """That of the run's datasets."""
        return (self._trained.pixels,)

    def predict_stored(self, known: Sequence[Prediction], stored: Sequence[bytes]) -> list[Prediction]:
        """The predictions of images that are in memory, in one batch.

        Args:
            known: of each image what is known without the model.
            stored: the images, as `stores` says.
        """
        reading = self._reading
        return [
            replace(one, error="the image cannot be decoded") if output is None else reading.prediction(one, output)
            for one, output in zip(known, self._outputs(stored), strict=True)
        ]

    def predict_prepared(self, batch: Sequence[Prepared]) -> list[Prediction]:
        return self.predict_stored([one.prediction for one in batch], [one.stored[0] for one in batch])

    @property
    def _reading(self) -> Reading:
        return Reading(self.findings, self._decision, self.mask_rule, self._maps)

    def _forward(self, batch: Batch) -> tuple[torch.Tensor, npt.NDArray[np.float32] | None]:
        """The logits of a batch, and (B, F, h, w) class activation maps where they were asked for and the model has
        them."""
        model, settings = self._trained.model, self.recipe.train
        if not self._maps:
            return forward(model, batch, settings, self._device), None
        with pooled_features(model) as features:
            logits = forward(model, batch, settings, self._device)
        map_BFhw = features.maps(logits) if logits.ndim == 2 else None
        return logits, None if map_BFhw is None else map_BFhw.cpu().numpy()

    def _outputs(self, images: Sequence[bytes]) -> list[Output | None]:
        """The model's output for each stored image; None where it cannot be decoded."""
        outputs: list[Output | None] = [None] * len(images)
        if not images:
            return outputs
        with self._lock, torch.no_grad():
            # No padding: a single image must not cost a forward pass of a full batch.
            batch = self._loader.batch(images)
            logits, map_BFhw = self._forward(batch)
            thumbnail_BD = thumbnails(batch)
            distance_B = None if self._reference is None else self._reference.distance(thumbnail_BD)
        gray_B2 = np.stack([ood.brightness(thumbnail_BD), ood.contrast(thumbnail_BD)], axis=1)
        maps = probabilities(logits)[:, 0].cpu().numpy() if logits.ndim == 4 else None
        logit_BF = logits.flatten(2).amax(dim=2).cpu().numpy() if logits.ndim == 4 else logits.cpu().numpy()
        for index in np.flatnonzero(batch.valid_B.cpu().numpy()):
            mean, spread = gray_B2[index].tolist()
            outputs[index] = Output(
                logit_BF[index],
                None if maps is None else maps[index],
                None if map_BFhw is None else map_BFhw[index],
                (mean, spread),
                None if distance_B is None else float(distance_B[index]),
            )
        return outputs
