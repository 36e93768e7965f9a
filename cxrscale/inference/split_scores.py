"""Scores of a split by a trained run: computed once, and stored in the run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from cxrscale.inference import ood
from cxrscale.inference.predictions import (
    PredictionsInfo,
    predictions_path,
    read_info,
    read_predictions,
    write_predictions,
)
from cxrscale.inference.trained import load_model
from cxrscale.io import storage
from cxrscale.loader import evaluation_batches
from cxrscale.models import forward, probabilities
from cxrscale.shards import Manifest, leakage, manifest
from cxrscale.training import LocalWorker, scoring
from cxrscale.types import Batch, Scores, UserError


def predict_split(run: str | Path, name: str, progress: Callable[[int], None] | None = None) -> Scores:
    """Scores of every image of a split (its role: train, val or test), computed once and stored in the run.

    Stored scores can be used without the shards, but not beside shards that have changed: their labels may have, too.
    `Scores.patient` is the person, as `leakage.persons` finds it.

    Args:
        progress: called with the number of images that were scored since its last call.

    Raises:
        UserError: the shards are gone or are not those of the run.
    """
    path = predictions_path(run, name)
    dist = LocalWorker().dist
    trained = load_model(run, dist.device)
    recipe = trained.recipe
    stored = storage.exists(path) and read_info(path).checkpoint == trained.checkpoint
    if stored and not all(storage.exists(storage.join(root, manifest.NAME)) for root in recipe.data.shards):
        return read_predictions(path)
    joined = leakage.join_datasets(*recipe.data.shards)
    data = joined.data
    if data.digest != trained.manifest:
        raise UserError(f"{', '.join(recipe.data.shards)}: not the shards that {run} was trained on; restore them")
    if stored:
        return read_predictions(path)
    roles = {"train": recipe.data.train_split, "val": recipe.data.val_split, "test": recipe.data.test_split}
    reference = ood.reference_of(str(run), trained, data, dist)
    distances = None if reference is None else ood.Distances(reference)
    unwatched = evaluation_batches(data, roles.get(name, (name,)), recipe, dist, trained.also)
    batches = _with_progress(unwatched, progress)
    watched = batches if distances is None else distances.watch(batches)
    own_mask = data.own_mask if data.has_own_masks else None
    rows = scoring.score(trained.model, watched, recipe, dist, own_mask=own_mask)
    scores = Scores(
        data.image_id[rows.row_N],
        leakage.persons(joined)[rows.row_N],
        rows.logit_NF,
        data.labels(recipe.data.findings)[rows.row_N],
        recipe.data.findings,
        rows.maps,
        None if distances is None else distances.of(rows.row_N),
    )
    info = PredictionsInfo(
        split=name,
        checkpoint=trained.checkpoint,
        manifest=trained.manifest,
        unreadable=rows.unreadable,
        recipe=recipe,
    )
    write_predictions(path, scores, info)
    return scores


def score_maps(
    run: str | Path, data: Manifest, rows: Sequence[int]
) -> Iterator[tuple[int, npt.NDArray[np.float32], npt.NDArray[np.bool_]]]:
    """(row, score map, true mask) for the given rows of the manifest, maps (H, W) at the model's input size.

    Unreadable images are left out.
    """
    dist = LocalWorker().dist
    trained = load_model(run, dist.device)
    recipe, name = trained.recipe, "the chosen rows"
    chosen = data.only(rows, name)
    with torch.no_grad():
        for batch in evaluation_batches(chosen, (name,), recipe, dist, trained.also):
            assert batch.mask_B1HW is not None
            score_B1HW = probabilities(forward(trained.model, batch, recipe.train, dist.device)).cpu().numpy()
            mask_B1HW = batch.mask_B1HW.cpu().numpy() > 0.5
            for index in np.flatnonzero(batch.valid_B.cpu().numpy()):
                yield int(batch.row_B[index]), score_B1HW[index, 0], mask_B1HW[index, 0]


def _with_progress(batches: Iterable[Batch], progress: Callable[[int], None] | None) -> Iterator[Batch]:
    for batch in batches:
        yield batch
        if progress is not None:
            progress(int(batch.valid_B.sum()))
