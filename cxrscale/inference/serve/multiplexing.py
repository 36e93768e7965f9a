"""Models that are in memory only while they are asked for: more of them than one replica can hold."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from cxrscale.inference.prediction import Prediction, Provenance
from cxrscale.inference.predictor_spec import PredictorSpec
from cxrscale.inference.stored_images import Pixels
from cxrscale.inference.streaming import ImagePredictor, Prepared


class UnloadablePredictor(ImagePredictor):
    """A predictor whose weights can leave the memory; what is said of them stays."""

    def __init__(self, spec: PredictorSpec, loaded: ImagePredictor, device: str | None) -> None:
        """Args:
        loaded: the predictor of `spec`.
        """
        self._spec, self._device = spec, device
        self._provenance, self._stores = loaded.provenance, loaded.stores
        self._loaded: ImagePredictor | None = loaded
        self._lock = threading.Lock()

    @property
    def provenance(self) -> Provenance:
        return self._provenance

    @property
    def stores(self) -> tuple[Pixels, ...]:
        return self._stores

    @property
    def in_memory(self) -> bool:
        """Whether the weights are loaded."""
        return self._loaded is not None

    def load(self) -> ImagePredictor:
        """The predictor, in memory.

        Raises:
            UserError: as `PredictorSpec.load`.
        """
        with self._lock:
            if self._loaded is None:
                self._loaded = self._spec.load(self._device)
            return self._loaded

    def unload(self) -> None:
        """Forget the weights; who computes with them keeps them until it is done."""
        with self._lock:
            self._loaded = None

    def predict_prepared(self, batch: Sequence[Prepared]) -> list[Prediction]:
        return self.load().predict_prepared(batch)


class Held:
    """A model that Ray Serve has in memory: it deletes this when another one needs the place."""

    def __init__(self, predictor: ImagePredictor) -> None:
        """Load a model."""
        self._predictor = predictor
        if isinstance(predictor, UnloadablePredictor):
            predictor.load()

    def __del__(self) -> None:
        if isinstance(self._predictor, UnloadablePredictor):
            self._predictor.unload()
