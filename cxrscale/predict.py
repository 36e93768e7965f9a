"""A trained run -> scores: of a split of its shards, or of files that no shard has seen."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from cxrscale import checkpoint, config, masks, models, pictures, scoring, storage
from cxrscale.batches import feed
from cxrscale.config import Recipe
from cxrscale.metrics import bin_of
from cxrscale.schema import Batch, InputError, MapCounts, Prediction, Scores, Unreadable
from cxrscale.shards import manifest
from cxrscale.shards.manifest import Manifest
from cxrscale.thresholds import Triplet
from cxrscale.worker import LocalWorker

MASK = "mask."
"""Prefix of the columns that hold score histograms of segmentation maps."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A run's chosen weights, ready to score."""

    net: nn.Module
    recipe: Recipe
    manifest: str
    """Digest of the shards it was trained on."""
    checkpoint: str
    """Digest of the weights' file."""
    pixels: Mapping[str, Any]
    """How the training pictures were stored: codec, size, quality."""


def load(run: str | Path, device: torch.device) -> Trained:
    """The best checkpoint of a run.

    Raises:
        InputError: the folder is no run, or nothing has been trained in it yet.
    """
    path = storage.join(run, checkpoint.BEST)
    if not storage.exists(path):
        raise InputError(f"{path} does not exist; give the folder that `cxrscale train` printed, after its first epoch")
    content = storage.read(path)
    state = checkpoint.read(content, path)
    recipe = config.parse(Recipe, state["recipe"], where=path)
    bare = recipe.model.model_copy(update={"weights": "none"})
    net = models.build(bare, recipe.data)
    net.load_state_dict(state["model"])
    return Trained(net.to(device).eval(), recipe, state["manifest"], storage.digest(content), state["pixels"])


def about(run: str | Path) -> dict[str, Any]:
    """What a prediction must name to be reproduced: the run, its weights' digest, its shards' digest, its recipe."""
    trained = load(run, torch.device("cpu"))
    return {
        "run": storage.absolute(str(run)),
        "checkpoint": trained.checkpoint,
        "manifest": trained.manifest,
        "recipe": trained.recipe.model_dump(mode="json"),
    }


def address(run: str | Path, name: str) -> str:
    """Where a run keeps its scores of a split."""
    return storage.join(run, f"predictions-{name}.parquet")


def split(run: str | Path, name: str, progress: Callable[[int], None] | None = None) -> Scores:
    """Scores of every picture of a split (its role: train, val or test), computed once and kept in the run.

    Kept scores serve without the shards, but not beside shards that have changed: their labels may have, too.

    Args:
        progress: is told how many more pictures have been scored.

    Raises:
        InputError: the shards are gone or are not those of the run.
    """
    path = address(run, name)
    worker = LocalWorker()
    trained = load(run, worker.device)
    recipe = trained.recipe
    kept = storage.exists(path) and described(path)["checkpoint"] == trained.checkpoint
    if kept and not all(storage.exists(storage.join(root, manifest.NAME)) for root in recipe.data.shards):
        return read(path)
    data = manifest.load(*recipe.data.shards)
    if data.digest != trained.manifest:
        raise InputError(f"{', '.join(recipe.data.shards)}: not the shards that {run} was trained on; restore them")
    if kept:
        return read(path)
    roles = {"train": recipe.data.train_split, "val": recipe.data.val_split, "test": recipe.data.test_split}
    batches = feed.evaluation(
        data, roles.get(name, (name,)), recipe.data, recipe.plan, recipe.augment, 0, 1, worker.device
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
    write(path, scores, {**about, "recipe": recipe.model_dump(mode="json")})
    return scores


def maps(
    run: str | Path, data: Manifest, rows: Sequence[int]
) -> Iterator[tuple[int, npt.NDArray[np.float32], npt.NDArray[np.bool_]]]:
    """Each of some rows of the manifest with its score map and its true mask, both (H, W) at the net's input size.

    What cannot be read is left out.
    """
    worker = LocalWorker()
    trained = load(run, worker.device)
    recipe, chosen = trained.recipe, "the chosen rows"
    # Batches are made of splits: these rows become one of their own.
    split_N = data.split.copy()
    split_N[list(rows)] = chosen
    column = data.table.schema.get_field_index("split")
    apart = Manifest(data.table.set_column(column, "split", pa.array(split_N, pa.string())), data.digest, data.about)
    batches = feed.evaluation(apart, (chosen,), recipe.data, recipe.plan, recipe.augment, 0, 1, worker.device)
    with torch.no_grad():
        for batch in batches:
            assert batch.mask_B1HW is not None
            with scoring.autocast(recipe.train, worker.device):
                logits = trained.net(scoring.images_for(batch, recipe.train)).float()
            score, truth = logits.sigmoid().cpu().numpy()[:, 0], batch.mask_B1HW.cpu().numpy()[:, 0] > 0.5
            for place in np.flatnonzero(batch.valid_B.cpu().numpy()):
                yield int(batch.row_B[place]), score[place], truth[place]


def mask(score_HW: npt.NDArray[np.float32], rule: Triplet) -> npt.NDArray[np.bool_]:
    """The pixels that a triplet calls: none unless `min_area` of them score >= top, then all that score >= bottom."""
    bins = scoring.BINS
    enough = (score_HW * bins >= bin_of(rule.top, bins)).sum() >= max(1, rule.min_area)
    return np.asarray((score_HW * bins >= bin_of(rule.bottom, bins)) & enough)


def files(run: str | Path, paths: Sequence[str], triplet: Triplet | None = None) -> list[Prediction]:
    """Scores of picture files (DICOM, PNG, JPEG), in order; what cannot be read gets its reason instead.

    Each picture goes the way of the training pictures: upright grey, the shard's size and encoding, the same graph.

    Args:
        triplet: for segmentation, the thresholds of the mask; None: 0.5.
    """
    worker = LocalWorker()
    trained = load(run, worker.device)
    readable: list[tuple[int, bytes, tuple[int, int]]] = []
    found: list[Prediction] = [Prediction(path) for path in paths]
    for number, path in enumerate(paths):
        try:
            grey = pictures.load(storage.read(path), name=path).grey_HW
        except (Unreadable, InputError) as error:
            found[number] = Prediction(path, error=str(error))
            continue
        readable.append((number, _as_stored(grey, trained.pixels), grey.shape))
    if not readable:
        return found
    recipe = trained.recipe
    batches = feed.files([data for _, data, _ in readable], recipe.data, recipe.plan, recipe.augment, worker.device)
    with torch.no_grad():
        for batch in batches:
            with scoring.autocast(recipe.train, worker.device):
                logits = trained.net(scoring.images_for(batch, recipe.train)).float()
            probability = logits.sigmoid().cpu().numpy()
            for place in np.flatnonzero(batch.valid_B.cpu().numpy()):
                number, _, shape = readable[int(batch.row_B[place])]
                found[number] = _prediction(paths[number], probability[place], recipe, shape, triplet)
    return found


def write(path: str | Path, scores: Scores, about: Mapping[str, Any]) -> None:
    """Write scores as Parquet: image_id, patient, score.X and label.X a finding, histograms for segmentation."""
    columns: dict[str, Any] = {"image_id": scores.image_id.tolist(), "patient": scores.patient.tolist()}
    for f, name in enumerate(scores.findings):
        columns["score." + name] = scores.score_NF[:, f]
        columns["label." + name] = pa.array(scores.label_NF[:, f], from_pandas=True)
    if scores.maps is not None:
        for part in fields(MapCounts):
            columns[MASK + part.name] = list(getattr(scores.maps, part.name))
    table = pa.table(columns).replace_schema_metadata({b"cxrscale": json.dumps(about).encode()})
    with storage.publishing(str(path)) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def described(path: str | Path) -> dict[str, Any]:
    """What `write` was told of the scores: split, checkpoint, manifest, recipe.

    Raises:
        InputError: this is no file of scores.
    """
    try:
        schema = pq.read_schema(pa.BufferReader(storage.read(str(path))))
    except pa.ArrowInvalid:
        raise InputError(f"{path} is no Parquet file; remove it, and it is made again") from None
    if b"cxrscale" not in (schema.metadata or {}):
        raise InputError(f"{path} does not say whose scores it holds; remove it, and it is made again")
    found: dict[str, Any] = json.loads(schema.metadata[b"cxrscale"])
    return found


def read(path: str | Path) -> Scores:
    """What `write` wrote.

    Raises:
        InputError: no such file, or it holds no scores.
    """
    if not storage.exists(str(path)):
        raise InputError(f"{path} does not exist; make it with `cxrscale predict` or `cxrscale threshold`")
    table = pq.read_table(pa.BufferReader(storage.read(str(path))))
    names = tuple(name.removeprefix("score.") for name in table.column_names if name.startswith("score."))
    if not names:
        raise InputError(f"{path} has no column score.X; give a file that `cxrscale predict` wrote")

    def numbers(name: str) -> Any:
        return table[name].to_numpy(zero_copy_only=False).astype(np.float32)

    parts = [MASK + part.name for part in fields(MapCounts)]
    maps = None
    if parts[0] in table.column_names:
        maps = MapCounts(*(np.stack(table[part].to_numpy()).astype(np.int32) for part in parts))
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


def _as_stored(grey_HW: Any, pixels: Mapping[str, Any]) -> bytes:
    if pixels["codec"] == "source":
        return pictures.encode_png(grey_HW)
    stored = pictures.resize(grey_HW, pixels["size"])
    return pictures.encode_png(stored) if pixels["codec"] == "png" else pictures.encode_jpeg(stored, pixels["quality"])


def _prediction(
    path: str, probability: Any, recipe: Recipe, shape: tuple[int, int], triplet: Triplet | None
) -> Prediction:
    names = recipe.data.findings
    if probability.ndim == 1:
        return Prediction(path, {name: float(value) for name, value in zip(names, probability, strict=True)})
    score_HW = probability[0]
    small = mask(score_HW, triplet or Triplet(0.5, 0, 0.5, float("nan"))).astype(np.uint8)
    whole = cv2.resize(small, (shape[1], shape[0]), interpolation=cv2.INTER_NEAREST)
    return Prediction(path, {names[0]: float(score_HW.max())}, masks.encode(whole.astype(np.bool_)))
