"""Heat maps of files and of rows of a dataset: where a model's scores come from."""

from __future__ import annotations

import difflib
import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from cxrscale.evaluation import MapMethod
from cxrscale.inference.export.contract import read_exported
from cxrscale.inference.files import FilePredictions, OnPrediction, predict_files
from cxrscale.inference.map_maker import MapMaker, Maps
from cxrscale.inference.objects import Draft, Drafter
from cxrscale.inference.overlay import overlay_drafter
from cxrscale.inference.prediction import Prediction, Provenance
from cxrscale.inference.predictor import Predictor
from cxrscale.inference.streaming import GroupPredictor, Prepared
from cxrscale.io import storage
from cxrscale.loader import evaluation_batches
from cxrscale.shards import Manifest
from cxrscale.types import Batch, DistContext, UserError

MAPS = "maps"
"""Key of an image's raw maps among its objects."""
MAPS_SUFFIX = ".maps.npz"
METHOD = "method"
"""Name in that file of how its maps were made; the other names are findings."""


@dataclass(frozen=True, slots=True)
class MappedRow:
    """An image of a dataset with its maps."""

    row: int
    """Of the manifest."""
    probabilities: Mapping[str, float]
    """Finding of the run -> the model's own probability."""
    maps: Mapping[str, npt.NDArray[np.float32]]
    """Finding -> (h, w) map over the whole image."""


class Explainer(Predictor):
    """A predictor whose predictions have `maps` of some findings: exact ones where the model has them, of other
    classifiers Grad-CAM, of a segmenter its score map.

        explainer = cx.Explainer("runs/chexnet14", findings=["Mass"])
        explainer("a.dcm").maps["Mass"]  # (16, 16), in logits
    """

    def __init__(self, run: str | Path, device: str | None = None, findings: Sequence[str] = ()) -> None:
        """Load the run's best checkpoint, and find out which maps it has.

        Args:
            run: its folder or address.
            device: cpu, cuda, cuda:1, ...; None: the GPU where there is one.
            findings: whose maps; none: those of all findings of the run.

        Raises:
            UserError: as `Predictor`; the run has no such finding, it is an ensemble, an exported classifier, or its
                network has no maps.
        """
        super().__init__(run, device, maps=True)
        if (info := read_exported(str(run))) is not None and info.task == "classify":
            raise UserError(
                f"{run} is an export, which has no features to map; explain the run it was made of: {info.run}"
            )
        if self._trained.members:
            names = ", ".join(member.run for member in self._trained.members)
            raise UserError(f"{run} is an ensemble, which has no maps of its own; explain a member: {names}")
        self.explained = _chosen(findings, self.findings, str(run))
        """The findings that have maps."""
        self._chosen = [self.findings.index(name) for name in self.explained]
        self._maker = MapMaker(self._trained.model, self.recipe, self._device)

    @property
    def method(self) -> MapMethod:
        """How its maps are made."""
        return self._maker.method

    def maker(self, model: torch.nn.Module) -> MapMaker:
        """The same kind of maps of another model of the run's architecture."""
        return MapMaker(model.to(self._device).eval(), self.recipe, self._device, self.method)

    def logits(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """(B, F) logits of images as `batches` has them."""
        return self._maker.logits(image_BCHW)

    @property
    def model(self) -> torch.nn.Module:
        """The trained model, in evaluation mode."""
        return self._trained.model

    def batches(self, data: Manifest, rows: Sequence[int]) -> Iterator[Batch]:
        """Batches of rows of a dataset, as the run is evaluated."""
        name = "the chosen rows"
        return evaluation_batches(data.only(rows, name), (name,), self.recipe, DistContext(device=self._device))

    def rows(
        self, data: Manifest, rows: Sequence[int], progress: Callable[[int], None] | None = None
    ) -> Iterator[MappedRow]:
        """The maps of rows of a dataset, batch by batch; unreadable images are left out.

        Args:
            progress: called with the number of images since its last call.
        """
        for batch in self.batches(data, rows):
            logit_BF, map_BFhw = self._maker(batch, self._chosen)
            probability_BF = logit_BF.sigmoid().cpu().numpy()
            for index in np.flatnonzero(batch.valid_B.cpu().numpy()):
                own = dict(zip(self.findings, probability_BF[index].tolist(), strict=True))
                maps = dict(zip(self.explained, map_BFhw[index], strict=True))
                yield MappedRow(int(batch.row_B[index]), own, maps)
            if progress is not None:
                progress(int(batch.valid_B.sum()))

    def _forward(self, batch: Batch) -> tuple[torch.Tensor, npt.NDArray[np.float32] | None]:
        """The logits of a batch, and (B, F, h, w) maps of all findings, NaN for those that are not explained."""
        if self.method == "score map":
            return super()._forward(batch)
        logit_BF, map_BChw = self._maker(batch, self._chosen)
        map_BFhw: Maps = np.full((len(map_BChw), len(self.findings), *map_BChw.shape[2:]), np.nan, np.float32)
        map_BFhw[:, self._chosen] = map_BChw
        return logit_BF, map_BFhw

    def predict_prepared(self, batch: Sequence[Prepared]) -> list[Prediction]:
        """Predictions with the maps of the chosen findings alone."""
        return [
            replace(one, maps={name: one.maps[name] for name in self.explained if name in one.maps})
            for one in super().predict_prepared(batch)
        ]


def explain_files(
    explainer: Explainer,
    paths: Sequence[str],
    out: str,
    on_prediction: OnPrediction | None = None,
    predictor: GroupPredictor | None = None,
) -> FilePredictions:
    """Predict files, and write for each image raw maps and an overlay per finding into `out`/objects.

    `out`/predictions.json has a row per file, whose `objects` names its files: `maps` is an npz with a float32 (h, w)
    array per finding, `overlay.FINDING` a PNG at the image's own size. A command that was stopped goes on, as
    `predict_files` does.

    Args:
        predictor: what predicts instead, with the same maps: a `ClusterPredictor`.

    Raises:
        UserError: as `predict_files`.
        BusyError: another process writes this folder.
    """
    drafters = {MAPS: maps_drafter(explainer.provenance, explainer.method, explainer.explained)}
    drafters |= {f"overlay.{name}": overlay_drafter(explainer.provenance, name) for name in explainer.explained}
    return predict_files(predictor or explainer, paths, out, on_prediction=on_prediction, drafters=drafters)


def maps_of_rows(run: str, data: Manifest, rows: Sequence[int]) -> dict[int, Mapping[str, npt.NDArray[np.float32]]]:
    """Row of the manifest -> finding -> (h, w) map; empty for an ensemble and for a network without maps."""
    try:
        explainer = Explainer(run)
    except UserError as error:
        logging.getLogger("cxrscale").info("no maps of %s: %s", run, error)
        return {}
    return {mapped.row: mapped.maps for mapped in explainer.rows(data, rows)}


def maps_drafter(provenance: Provenance, method: MapMethod, findings: Sequence[str]) -> Drafter:
    """What writes an image's raw maps, as a compressed npz."""

    def draft(prediction: Prediction) -> Draft:
        identity = (provenance.checkpoint, method, *findings, storage.digest(storage.read(prediction.path)))

        def encode() -> bytes:
            buffer = io.BytesIO()
            maps = {name: np.asarray(prediction.maps[name], np.float32) for name in findings}
            np.savez_compressed(buffer, allow_pickle=False, **{METHOD: np.array(method)}, **maps)
            return buffer.getvalue()

        return Draft(MAPS_SUFFIX, identity, encode)

    return draft


def _chosen(given: Sequence[str], known: Sequence[str], run: str) -> tuple[str, ...]:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
            raise UserError(f"--finding {name}: {run} has no such finding; {hint}")
    return tuple(name for name in known if not given or name in given)
