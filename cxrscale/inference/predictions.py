"""A trained run -> scores: of a split of its shards, or of files that no shard has seen."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cxrscale.config import Recipe
from cxrscale.evaluation import MaskRule
from cxrscale.evaluation.metrics import bin_of
from cxrscale.inference.predictor import load_model
from cxrscale.io import encode_jpeg, encode_png, load_image, resize_image, rle_masks, storage
from cxrscale.loader import evaluation_batches, file_batches
from cxrscale.models import autocast, model_input
from cxrscale.shards import Manifest, manifest
from cxrscale.training import LocalWorker, scoring
from cxrscale.types import Batch, Prediction, ScoreHistograms, Scores, UnreadableImageError, UserError

MASK = "mask."
"""Prefix of the columns that hold score histograms of segmentation maps."""


def predictions_path(run: str | Path, name: str) -> str:
    """Where a run keeps its scores of a split."""
    return storage.join(run, f"predictions-{name}.parquet")


def predict_split(run: str | Path, name: str, progress: Callable[[int], None] | None = None) -> Scores:
    """Scores of every image of a split (its role: train, val or test), computed once and kept in the run.

    Kept scores serve without the shards, but not beside shards that have changed: their labels may have, too.

    Args:
        progress: is told how many more images have been scored.

    Raises:
        UserError: the shards are gone or are not those of the run.
    """
    path = predictions_path(run, name)
    worker = LocalWorker()
    trained = load_model(run, worker.device)
    recipe = trained.recipe
    kept = storage.exists(path) and read_metadata(path)["checkpoint"] == trained.checkpoint
    if kept and not all(storage.exists(storage.join(root, manifest.NAME)) for root in recipe.data.shards):
        return read_predictions(path)
    data = manifest.load(*recipe.data.shards)
    if data.digest != trained.manifest:
        raise UserError(f"{', '.join(recipe.data.shards)}: not the shards that {run} was trained on; restore them")
    if kept:
        return read_predictions(path)
    roles = {"train": recipe.data.train_split, "val": recipe.data.val_split, "test": recipe.data.test_split}
    batches = evaluation_batches(
        data, roles.get(name, (name,)), recipe.data, recipe.sampler, recipe.augment, 0, 1, worker.device
    )
    rows = scoring.score(trained.net, _counted(batches, progress), recipe.train, worker)
    scores = Scores(
        data.image_id[rows.row_N],
        data.patient[rows.row_N],
        rows.score_NF,
        data.labels(recipe.data.findings)[rows.row_N],
        recipe.data.findings,
        rows.maps,
    )
    about = {"split": name, "checkpoint": trained.checkpoint, "manifest": trained.manifest, "unreadable": rows.bad}
    write_predictions(path, scores, {**about, "recipe": recipe.model_dump(mode="json")})
    return scores


def score_maps(
    run: str | Path, data: Manifest, rows: Sequence[int]
) -> Iterator[tuple[int, npt.NDArray[np.float32], npt.NDArray[np.bool_]]]:
    """Each of some rows of the manifest with its score map and its true mask, both (H, W) at the model's input size.

    What cannot be read is left out.
    """
    worker = LocalWorker()
    trained = load_model(run, worker.device)
    recipe, chosen = trained.recipe, "the chosen rows"
    # Batches are made of splits: these rows become one of their own.
    split_N = data.split.copy()
    split_N[list(rows)] = chosen
    column = data.table.schema.get_field_index("split")
    apart = Manifest(data.table.set_column(column, "split", pa.array(split_N, pa.string())), data.digest, data.about)
    batches = evaluation_batches(apart, (chosen,), recipe.data, recipe.sampler, recipe.augment, 0, 1, worker.device)
    with torch.no_grad():
        for batch in batches:
            assert batch.mask_B1HW is not None
            with autocast(recipe.train, worker.device):
                logits = trained.net(model_input(batch, recipe.train)).float()
            score, truth = logits.sigmoid().cpu().numpy()[:, 0], batch.mask_B1HW.cpu().numpy()[:, 0] > 0.5
            for place in np.flatnonzero(batch.valid_B.cpu().numpy()):
                yield int(batch.row_B[place]), score[place], truth[place]


def apply_mask_rule(score_HW: npt.NDArray[np.float32], rule: MaskRule) -> npt.NDArray[np.bool_]:
    """The pixels that a triplet calls: none unless `min_area` of them score >= top, then all that score >= bottom."""
    bins = scoring.BINS
    enough = (score_HW * bins >= bin_of(rule.top, bins)).sum() >= max(1, rule.min_area)
    return np.asarray((score_HW * bins >= bin_of(rule.bottom, bins)) & enough)


def predict_files(run: str | Path, paths: Sequence[str], triplet: MaskRule | None = None) -> list[Prediction]:
    """Scores of image files (DICOM, PNG, JPEG), in order; what cannot be read gets its reason instead.

    Each image goes the way of the training images: upright gray, the shard's size and encoding, the same graph.

    Args:
        triplet: for segmentation, the thresholds of the mask; None: 0.5.
    """
    worker = LocalWorker()
    trained = load_model(run, worker.device)
    readable: list[tuple[int, bytes, tuple[int, int]]] = []
    found: list[Prediction] = [Prediction(path) for path in paths]
    for number, path in enumerate(paths):
        try:
            gray = load_image(storage.read(path), name=path).image_HW
        except (UnreadableImageError, UserError) as error:
            found[number] = Prediction(path, error=str(error))
            continue
        readable.append((number, _as_stored(gray, trained.pixels), gray.shape))
    if not readable:
        return found
    recipe = trained.recipe
    batches = file_batches(
        [data for _, data, _ in readable], recipe.data, recipe.sampler, recipe.augment, worker.device
    )
    with torch.no_grad():
        for batch in batches:
            with autocast(recipe.train, worker.device):
                logits = trained.net(model_input(batch, recipe.train)).float()
            probability = logits.sigmoid().cpu().numpy()
            for place in np.flatnonzero(batch.valid_B.cpu().numpy()):
                number, _, shape = readable[int(batch.row_B[place])]
                found[number] = _prediction(paths[number], probability[place], recipe, shape, triplet)
    return found


def write_predictions(path: str | Path, scores: Scores, about: Mapping[str, Any]) -> None:
    """Write scores as Parquet: image_id, patient, score.X and label.X a finding, histograms for segmentation."""
    columns: dict[str, Any] = {"image_id": scores.image_id.tolist(), "patient": scores.patient.tolist()}
    for f, name in enumerate(scores.findings):
        columns["score." + name] = scores.score_NF[:, f]
        columns["label." + name] = pa.array(scores.label_NF[:, f], from_pandas=True)
    if scores.maps is not None:
        for part in fields(ScoreHistograms):
            columns[MASK + part.name] = list(getattr(scores.maps, part.name))
    table = pa.table(columns).replace_schema_metadata({b"cxrscale": json.dumps(about).encode()})
    with storage.publishing(str(path)) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What `write` was told of the scores: split, checkpoint, manifest, recipe.

    Raises:
        UserError: this is no file of scores.
    """
    try:
        schema = pq.read_schema(pa.BufferReader(storage.read(str(path))))
    except pa.ArrowInvalid:
        raise UserError(f"{path} is no Parquet file; remove it, and it is made again") from None
    if b"cxrscale" not in (schema.metadata or {}):
        raise UserError(f"{path} does not say whose scores it holds; remove it, and it is made again")
    found: dict[str, Any] = json.loads(schema.metadata[b"cxrscale"])
    return found


def read_predictions(path: str | Path) -> Scores:
    """What `write` wrote.

    Raises:
        UserError: no such file, or it holds no scores.
    """
    if not storage.exists(str(path)):
        raise UserError(f"{path} does not exist; make it with `cxrscale predict` or `cxrscale threshold`")
    table = pq.read_table(pa.BufferReader(storage.read(str(path))))
    names = tuple(name.removeprefix("score.") for name in table.column_names if name.startswith("score."))
    if not names:
        raise UserError(f"{path} has no column score.X; give a file that `cxrscale predict` wrote")

    def numbers(name: str) -> Any:
        return table[name].to_numpy(zero_copy_only=False).astype(np.float32)

    parts = [MASK + part.name for part in fields(ScoreHistograms)]
    maps = None
    if parts[0] in table.column_names:
        maps = ScoreHistograms(*(np.stack(table[part].to_numpy()).astype(np.int32) for part in parts))
    return Scores(
        table["image_id"].to_numpy(zero_copy_only=False),
        table["patient"].to_numpy(zero_copy_only=False),
        np.stack([numbers("score." + name) for name in names], axis=1),
        np.stack([numbers("label." + name) for name in names], axis=1),
        names,
        maps,
    )


def _counted(batches: Iterable[Batch], progress: Callable[[int], None] | None) -> Iterator[Batch]:
    for batch in batches:
        yield batch
        if progress is not None:
            progress(int(batch.valid_B.sum()))


def _as_stored(image_HW: Any, pixels: Mapping[str, Any]) -> bytes:
    if pixels["codec"] == "source":
        return encode_png(image_HW)
    stored = resize_image(image_HW, pixels["size"])
    return encode_png(stored) if pixels["codec"] == "png" else encode_jpeg(stored, pixels["quality"])


def _prediction(
    path: str, probability: Any, recipe: Recipe, shape: tuple[int, int], triplet: MaskRule | None
) -> Prediction:
    names = recipe.data.findings
    if probability.ndim == 1:
        return Prediction(path, {name: float(value) for name, value in zip(names, probability, strict=True)})
    score_HW = probability[0]
    small = apply_mask_rule(score_HW, triplet or MaskRule(0.5, 0, 0.5, float("nan"))).astype(np.uint8)
    whole = cv2.resize(small, (shape[1], shape[0]), interpolation=cv2.INTER_NEAREST)
    return Prediction(path, {names[0]: float(score_HW.max())}, rle_masks.encode(whole.astype(np.bool_)))
