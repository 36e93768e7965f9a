"""The check for images unlike the training images, on the batches that a model sees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cxrscale.evaluation import OodReference, ood
from cxrscale.evaluation.metrics import Floats
from cxrscale.io import read_artifact, storage, write_artifact
from cxrscale.shards import Manifest
from cxrscale.types import Batch, DistContext

if TYPE_CHECKING:  # a reference is read without torch, where an exported model is served
    from cxrscale.inference.trained import TrainedModel

IMAGES = 512
"""Training images that a reference is fitted on."""
REMEDY = "remove it, and it is made again"


@dataclass(slots=True)
class Distances:
    """Distances of the images of a split, by manifest row, noted as its batches pass."""

    reference: OodReference
    by_row: dict[int, float] = field(default_factory=dict)

    def watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, each of whose images is measured."""
        for batch in batches:
            valid_B = batch.valid_B.cpu().numpy()
            distance_N = self.reference.distance(thumbnails(batch)[valid_B])
            self.by_row.update(zip(batch.row_B.cpu().numpy()[valid_B].tolist(), distance_N.tolist(), strict=True))
            yield batch

    def of(self, row_N: npt.NDArray[np.int64]) -> Floats:
        """(N,) the distance of each row."""
        return np.array([self.by_row[row] for row in row_N.tolist()])


def thumbnails(batch: Batch) -> Floats:
    """(B, D) mean gray value of each of SIDE x SIDE tiles of what the model sees."""
    from torch.nn.functional import adaptive_avg_pool2d

    tile_BHW = adaptive_avg_pool2d(batch.image_BCHW.float(), ood.SIDE).mean(dim=1)
    result: Floats = tile_BHW.flatten(1).cpu().numpy().astype(np.float64)
    return result


def read_reference(run: str) -> OodReference | None:
    """A run's ood.json; None where there is none.

    Raises:
        UserError: it is damaged or of another version.
    """
    address = storage.join(run, ood.NAME)
    return read_artifact(OodReference, address, REMEDY) if storage.exists(address) else None


def reference_of(run: str, trained: TrainedModel, data: Manifest, dist: DistContext) -> OodReference | None:
    """A run's ood.json, made of up to `IMAGES` training images, evenly spaced, where it is not there; None where its
    training images are too few.

    Raises:
        UserError: it is damaged or of another version.
    """
    from cxrscale.loader import evaluation_batches, usable_rows

    stored = read_reference(run)
    if stored is not None and stored.manifest == trained.manifest:
        return stored
    rows = usable_rows(data, trained.recipe.data.train_split, trained.recipe.data)
    chosen = data.only(rows[np.linspace(0, len(rows) - 1, min(IMAGES, len(rows))).astype(int)], "reference")
    batches = evaluation_batches(chosen, ("reference",), trained.recipe, dist)
    parts = [thumbnails(batch)[batch.valid_B.cpu().numpy()] for batch in batches]
    made = ood.fit_reference(np.concatenate(parts), trained.manifest)
    if made is not None:
        write_artifact(storage.join(run, ood.NAME), made)
    return made
