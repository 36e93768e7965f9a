"""What is to be loaded to predict, here or in a worker."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from cxrscale.inference.members import Averaging
from cxrscale.inference.onnx_predictor import OnnxPredictor, runs_without_torch
from cxrscale.inference.streaming import ImagePredictor
from cxrscale.types import UserError


@dataclass(frozen=True, slots=True)
class PredictorSpec:
    """What is to be loaded, here or in a worker."""

    runs: tuple[str, ...]
    """Folders or addresses; several are an ensemble."""
    gate: str | None = None
    """A classifier before the segmenter."""
    averaging: Averaging | None = None
    maps: bool = False
    """Whether predictions have their `maps`."""
    explained: tuple[str, ...] | None = None
    """Instead, the findings of one run that get the maps of an `Explainer`; empty: all of its findings."""
    light: bool = False
    """Whether an ONNX export on the CPU is predicted without torch, in a smaller process that starts sooner. Images are
    resized by OpenCV, whatever loader.backend says."""

    def load(self, device: str | None = None) -> ImagePredictor:
        """The predictor.

        Raises:
            UserError: as `Predictor` and `GatedPredictor`; a gate stands before several runs.
        """
        if self.gate is not None and (len(self.runs) > 1 or self.averaging is not None):
            raise UserError("--gate takes one --run; make a run of an ensemble: cxrscale ensemble RUN... --name NAME")
        if self.explained is not None:
            from cxrscale.inference.explain import Explainer

            return Explainer(self.runs[0], device, self.explained)
        alone = len(self.runs) == 1 and self.gate is None and self.averaging is None
        if alone and (self.light or find_spec("torch") is None) and runs_without_torch(self.runs[0], device):
            return OnnxPredictor(self.runs[0], maps=self.maps)
        # Not above: torch comes with them.
        from cxrscale.inference.cascade import GatedPredictor
        from cxrscale.inference.predictor import Predictor

        if self.gate is not None:
            return GatedPredictor(self.runs[0], self.gate, device, maps=self.maps)
        return Predictor(self.runs, device, averaging=self.averaging, maps=self.maps)
