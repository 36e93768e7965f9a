"""A trained run's scores of a split of its datasets, as Parquet beside the run."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from cxrscale.config import Recipe
from cxrscale.io import Artifact, parquet, storage
from cxrscale.shards import ids
from cxrscale.types import ScoreHistograms, Scores, UserError, logits_of

LOG = logging.getLogger("cxrscale")
MASK = "mask."
"""Prefix of the columns that hold score histograms of segmentation maps at the size of the model's input."""
OWN_MASK = "own_mask."
"""The same for maps at the images' own sizes."""
HISTOGRAMS = ("all_NT", "true_NT")
LOGIT, LABEL = "logit.", "label."
"""Prefixes of the columns of a finding."""
PROBABILITY = "score."
"""Prefix that the files of schema version 1 have instead of `LOGIT`: they hold float32 probabilities."""
REMEDY = "remove it, and it is made again"
OOD = "ood_distance"
"""Column of `Scores.ood_distance_N`; files of earlier versions lack it."""
INFO = b"cxrscale"
"""Key of `PredictionsInfo` in the file's metadata."""


class PredictionsInfo(Artifact):
    """Metadata of a file of predictions. Version 1 has probabilities instead of logits, and patients as the datasets
    name them."""

    schema_version: int = 2
    split: str
    """train, val or test, or a split of the manifest."""
    checkpoint: str
    """Digest of the file of weights."""
    manifest: str
    """Digest of the datasets."""
    unreadable: int
    """Images of the split that could not be read and have no row."""
    recipe: Recipe


def predictions_path(run: str | Path, name: str) -> str:
    """Where a run keeps its scores of a split."""
    return storage.join(run, f"predictions-{name}.parquet")


def write_predictions(path: str | Path, scores: Scores, info: PredictionsInfo) -> None:
    """Write scores as Parquet: image_id, patient, logit.X and label.X per finding, ood_distance, histograms for
    segmentation."""
    columns: dict[str, Any] = {"image_id": scores.image_id.tolist(), "patient": scores.patient.tolist()}
    for f, name in enumerate(scores.findings):
        columns[LOGIT + name] = scores.logit_NF[:, f]
        columns[LABEL + name] = pa.array(scores.label_NF[:, f], from_pandas=True)
    if scores.ood_distance_N is not None:
        columns[OOD] = scores.ood_distance_N
    if scores.maps is not None:
        for part in HISTOGRAMS:
            columns[(OWN_MASK if scores.maps.own_size else MASK) + part] = list(getattr(scores.maps, part))
    table = pa.table(columns).replace_schema_metadata({INFO: info.model_dump_json().encode()})
    storage.write(str(path), parquet.encode(table, sealed=True))


def write_under_source_ids(address: str, scores: Scores, id_map: str) -> None:
    """Write scores as CSV under the images' IDs in their source; only the owner can read the file.

    Args:
        address: a local path.
        id_map: the private map that `cxrscale shard --keep-map` wrote for the datasets of the run.

    Raises:
        UserError: the map lacks an image, or a file cannot be read or written.
    """
    source_id = ids.read_map(id_map)
    missing = [name for name in scores.image_id.tolist() if name not in source_id]
    if missing:
        raise UserError(
            f"{id_map} lacks {len(missing)} of the {len(scores.image_id)} images; give the map of the run's dataset"
        )
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["image_id", *scores.findings])
    for name, score_F in zip(scores.image_id.tolist(), scores.probability_NF.tolist(), strict=True):
        table.writerow([source_id[name], *score_F])
    storage.write(address, text.getvalue().encode(errors="surrogateescape"), private=True)


def read_info(path: str | Path) -> PredictionsInfo:
    """The metadata that `write_predictions` stored.

    Raises:
        UserError: this is not a file of predictions of this version.
    """
    metadata = parquet.read_metadata(storage.read(str(path)), str(path), REMEDY)
    if INFO not in metadata:
        raise UserError(f"{path} does not say whose scores it holds; {REMEDY}")
    try:
        info = PredictionsInfo.model_validate_json(metadata[INFO])
    except ValidationError:
        info = None
    if info is None or info.schema_version not in (1, PredictionsInfo.model_fields["schema_version"].default):
        raise UserError(f"{path} is of another version of cxrscale; {REMEDY}")
    return info


def read_predictions(path: str | Path) -> Scores:
    """The scores that `write_predictions` stored. A file of schema version 1 is read too, with a warning in the log.

    Raises:
        UserError: no such file, or it holds no scores.
    """
    if not storage.exists(str(path)):
        raise UserError(f"{path} does not exist; make it with `cxrscale predict` or `cxrscale threshold`")
    table = parquet.read_table(storage.read(str(path)), str(path), REMEDY)
    prefix = PROBABILITY if any(name.startswith(PROBABILITY) for name in table.column_names) else LOGIT
    names = tuple(name.removeprefix(prefix) for name in table.column_names if name.startswith(prefix))
    _check(table, prefix, names, str(path))

    def columns(prefix: str) -> npt.NDArray[Any]:
        return np.stack([table[prefix + name].to_numpy(zero_copy_only=False) for name in names], axis=1)

    logit_NF = columns(LOGIT) if prefix == LOGIT else logits_of(columns(PROBABILITY))
    if prefix == PROBABILITY:
        _note_older(str(path))
    maps = None
    for prefix in (MASK, OWN_MASK):
        if prefix + HISTOGRAMS[0] in table.column_names:
            all_NT, true_NT = (_histograms(table, prefix + part, str(path)) for part in HISTOGRAMS)
            maps = ScoreHistograms(all_NT, true_NT, own_size=prefix == OWN_MASK)
    return Scores(
        table["image_id"].to_numpy(zero_copy_only=False),
        table["patient"].to_numpy(zero_copy_only=False),
        logit_NF,
        columns(LABEL).astype(np.float32),
        names,
        maps,
        _distances(table, str(path)),
    )


def _distances(table: pa.Table, path: str) -> npt.NDArray[np.float64] | None:
    if OOD not in table.column_names:
        return None
    if not pa.types.is_floating(table.schema.field(OOD).type):
        raise UserError(f"{path}: column {OOD} is not a number; {REMEDY}")
    parquet.check_no_nulls(table, (OOD,), path, REMEDY)
    return np.asarray(table[OOD].to_numpy(), dtype=np.float64)


def _check(table: pa.Table, prefix: str, names: Sequence[str], path: str) -> None:
    """Refuse a table that `write_predictions` cannot have written."""
    if not names:
        raise UserError(f"{path} has no column logit.X; give a file that `cxrscale predict` wrote")
    texts = {name: pa.string() for name in ("image_id", "patient")}
    parquet.check_columns(table, texts, path, REMEDY)
    parquet.check_no_nulls(table, tuple(texts), path, REMEDY)
    if len(pc.unique(table["image_id"])) < len(table):
        raise UserError(f"{path} has an image twice; {REMEDY}")
    for column in [start + name for start in (prefix, LABEL) for name in names]:
        if column not in table.column_names or not pa.types.is_floating(table.schema.field(column).type):
            raise UserError(f"{path}: column {column:.80} is not there or not a number; {REMEDY}")
    parquet.check_no_nulls(table, [prefix + name for name in names], path, REMEDY)
    for name in names:
        values = [value for value in pc.unique(table[LABEL + name]).to_pylist() if value is not None]
        wrong = [value for value in values if value not in (0, 1) and not np.isnan(value)]
        if wrong:
            raise UserError(f"{path}: column {LABEL}{name:.80} has the label {wrong[0]}, not 1, 0 or null; {REMEDY}")


def _histograms(table: pa.Table, name: str, path: str) -> npt.NDArray[np.int32]:
    """(N, T) histograms of one column."""
    if name not in table.column_names or not pa.types.is_list(table.schema.field(name).type):
        raise UserError(f"{path}: column {name} is not there or holds no histograms; {REMEDY}")
    column = table[name].combine_chunks()
    counts = column.flatten()
    whole = pa.types.is_integer(counts.type) and not column.null_count and not counts.null_count
    lengths = set(pc.list_value_length(column).to_pylist())
    if not whole or len(lengths) > 1 or (len(counts) and pc.min(counts).as_py() < 0):
        raise UserError(f"{path}: column {name} has not as many counts in every row; {REMEDY}")
    result: npt.NDArray[np.int32] = np.asarray(counts.to_numpy()).reshape(len(table), -1).astype(np.int32)
    return result


@lru_cache
def _note_older(path: str) -> None:
    """Once per file: a command reads it several times."""
    LOG.warning(
        "%s holds float32 probabilities, as earlier versions wrote them: those near 0 and 1 may tie, and patients of "
        "several datasets may count twice; remove it, and it is made again",
        path,
    )
