"""Prediction on a Ray cluster: one model per worker, pieces of the list of files as they become free."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

from cxrscale.cluster import ray_session, run_actors
from cxrscale.inference import journal
from cxrscale.inference.cascade import GatedPredictor
from cxrscale.inference.explain import Explainer
from cxrscale.inference.prediction import Prediction, Provenance
from cxrscale.inference.predictor import Predictor
from cxrscale.inference.streaming import GroupPredictor, ImagePredictor
from cxrscale.inference.trained import Averaging
from cxrscale.io import storage
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

    def load(self, device: str | None = None) -> ImagePredictor:
        """The predictor.

        Raises:
            UserError: as `Predictor` and `GatedPredictor`; a gate stands before several runs.
        """
        if self.gate is not None and (len(self.runs) > 1 or self.averaging is not None):
            raise UserError("--gate takes one --run; make a run of an ensemble: cxrscale ensemble RUN... --name NAME")
        if self.explained is not None:
            return Explainer(self.runs[0], device, self.explained)
        if self.gate is not None:
            return GatedPredictor(self.runs[0], self.gate, device, maps=self.maps)
        return Predictor(self.runs, device, averaging=self.averaging, maps=self.maps)


class ClusterPredictor(GroupPredictor):
    """A predictor whose files are shared by the workers of a Ray cluster.

    The batches, and on CPUs each bit of the rows, are those of the predictor in this process. Runs and files must be
    where every node finds them: on shared storage or in a bucket. The rows come back through Ray.
    """

    def __init__(self, spec: PredictorSpec, workers: int) -> None:
        """Load the predictor here, which checks its runs, and connect to the cluster.

        Raises:
            UserError: as `PredictorSpec.load`; no cluster answers.
        """
        runs = tuple(storage.absolute(run) for run in spec.runs)
        gate = spec.gate and storage.absolute(spec.gate)
        self._spec, self._workers = replace(spec, runs=runs, gate=gate), workers
        here = self._spec.load("cpu")
        self._provenance, self._batch_size = here.provenance, here.batch_size

    @property
    def provenance(self) -> Provenance:
        """That of the predictor."""
        return self._provenance

    def groups(self, paths: Sequence[str]) -> Iterator[Sequence[Prediction]]:
        """The predictions piece by piece, as workers finish; the files of a piece are in order.

        Raises:
            UserError: a worker cannot load the runs, or dies again and again.
        """
        ray_session.connect()
        size = -(-journal.ROWS // self._batch_size) * self._batch_size
        make = partial(_worker, self._spec, journal.settings_of(self._provenance))
        gpus = 1 if ray_session.gpus() else 0
        yield from run_actors(make, _pieces(paths, size), self._workers, gpus)


def _pieces(paths: Sequence[str], size: int) -> Iterator[list[tuple[str, str]]]:
    """Files with their absolute addresses: a worker has another working folder."""
    left = ((path, storage.absolute(path)) for path in paths)
    while piece := list(islice(left, size)):
        yield piece


def _worker(spec: PredictorSpec, settings: str) -> Callable[[list[tuple[str, str]]], list[Prediction]]:
    """What a worker does with a piece.

    Raises:
        UserError: it cannot load the runs, or finds other ones.
    """
    predictor = spec.load()
    if journal.settings_of(predictor.provenance) != settings:
        names = ", ".join(spec.runs if spec.gate is None else (*spec.runs, spec.gate))
        raise UserError(f"a worker finds other weights or thresholds in {names} than are here; share the folder")

    def predict(piece: list[tuple[str, str]]) -> list[Prediction]:
        found = predictor.predict([address for _, address in piece])
        return [
            replace(one, path=path, error=one.error.replace(address, path))
            for one, (path, address) in zip(found, piece, strict=True)
        ]

    return predict
