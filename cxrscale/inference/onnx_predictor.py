"""An exported ONNX model on a CPU, without torch: the same probabilities, calls and masks in a small process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from cxrscale.evaluation import DEFAULT_MASK_RULE, ood
from cxrscale.inference.decision import read_decision
from cxrscale.inference.export import contract, session
from cxrscale.inference.export.standalone import image_input
from cxrscale.inference.ood import read_reference
from cxrscale.inference.outputs import Output, Reading
from cxrscale.inference.prediction import Prediction, Provenance
from cxrscale.inference.stored_images import Pixels
from cxrscale.inference.streaming import ImagePredictor, Prepared
from cxrscale.io import storage
from cxrscale.types import probabilities_of


def runs_without_torch(run: str, device: str | None) -> bool:
    """Whether a run is an ONNX export that runs on the CPU: it is to, or ONNX Runtime is that for CPUs alone.

    Raises:
        UserError: onnxruntime is not installed.
    """
    if not storage.exists(storage.join(run, contract.FILES["onnx"])):
        return False
    return device == "cpu" or not session.gpu_providers()


class OnnxPredictor(ImagePredictor):
    """`Predictor` for the ONNX model of an export's folder, on the CPU."""

    def __init__(self, run: str | Path, *, maps: bool = False) -> None:
        """Load the model.

        Args:
            run: the export's folder or address.
            maps: give each prediction its `Prediction.maps`: a segmenter's probabilities.

        Raises:
            UserError: the folder is damaged, or onnxruntime is not installed.
        """
        self._run, self._maps = storage.absolute(str(run)), maps
        self._about, self.recipe = contract.read_with_recipe(self._run)
        path = storage.join(self._run, contract.FILES["onnx"])
        content = storage.read(path)
        with contract.loading(content, path):
            self._model = session.OnnxModel(content, session.available_threads())
        self._checkpoint = storage.digest(content)
        self._decision = read_decision(self._run, self._checkpoint)
        self._reference = read_reference(self._run)

    @cached_property
    def _reading(self) -> Reading:
        chosen = self._decision.thresholds
        rule = (chosen and chosen.mask_rule) or DEFAULT_MASK_RULE
        return Reading(self.findings, self._decision, rule, self._maps)

    @property
    def provenance(self) -> Provenance:
        """The export, the digests of its model and thresholds, and the recipe of the run."""
        return Provenance(
            run=self._run,
            checkpoint=self._checkpoint,
            manifest=self._about.manifest,
            thresholds=self._decision.digest,
            threshold=self._decision.threshold(),
            notes=self._decision.notes,
            recipe=self.recipe,
        )

    @property
    def stores(self) -> tuple[Pixels, ...]:
        return (self._about.input.stored(),)

    def predict_prepared(self, batch: Sequence[Prepared]) -> list[Prediction]:
        decoded = [cv2.imdecode(np.frombuffer(one.stored[0], np.uint8), cv2.IMREAD_GRAYSCALE) for one in batch]
        know = self._about.input.model_dump()
        seen = [image_input.seen(image, know) for image in decoded if image is not None]
        outputs = iter(self._outputs(np.stack(seen)[:, None]) if seen else ())
        return [
            replace(one.prediction, error="the image cannot be decoded")
            if image is None
            else self._reading.prediction(one.prediction, next(outputs))
            for one, image in zip(batch, decoded, strict=True)
        ]

    def _outputs(self, image_BCHW: npt.NDArray[np.float32]) -> list[Output]:
        logits = self._model(image_BCHW)
        score_BHW = probabilities_of(logits[:, 0]) if logits.ndim == 4 else [None] * len(logits)
        logit_BF = logits.reshape(*logits.shape[:2], -1).max(axis=2)
        thumbnail_BD = thumbnails(image_BCHW[:, 0])
        gray = zip(ood.brightness(thumbnail_BD).tolist(), ood.contrast(thumbnail_BD).tolist(), strict=True)
        distance_B = None if self._reference is None else self._reference.distance(thumbnail_BD).tolist()
        return [
            Output(logit_F, score_HW, None, one_gray, None if distance_B is None else distance_B[index])
            for index, (logit_F, score_HW, one_gray) in enumerate(zip(logit_BF, score_BHW, gray, strict=True))
        ]


def thumbnails(image_BHW: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """(B, D) mean of each of SIDE x SIDE tiles, whose edges are those of torch's adaptive average pooling."""
    side = image_BHW.shape[-1]
    edges = [(side * i // ood.SIDE, -(-side * (i + 1) // ood.SIDE)) for i in range(ood.SIDE)]
    rows_BSW = np.stack([image_BHW[:, low:high].mean(axis=1) for low, high in edges], axis=1)
    tile_BSS = np.stack([rows_BSW[:, :, low:high].mean(axis=2) for low, high in edges], axis=2)
    return tile_BSS.reshape(len(image_BHW), -1).astype(np.float64)
