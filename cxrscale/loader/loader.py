"""A manifest and a recipe's sections -> batches: chooses rows and reader, and refuses early what cannot work."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from cxrscale.config import NO_FINDING, PRESENT, Augment, Data, Sampler, has_no_finding
from cxrscale.io import storage
from cxrscale.loader import sampler as planning
from cxrscale.loader.hashing import Flags, Rows
from cxrscale.loader.reader import MemoryReader, ShardReader
from cxrscale.loader.sampler import BatchIndices, SampleAttributes, TrainingStream
from cxrscale.shards import Manifest
from cxrscale.types import Batch, UserError

Batches = Generator[Batch, None, None]
"""An iterator of batches; `close()` ends its threads at once, as does dropping it."""


def training_epoch_length(manifest: Manifest, data: Data, sampler: Sampler) -> int:
    """How many images one pass of `training` has: the argument of `sampler.steps_per_epoch`.

    Raises:
        UserError: no image left, a label missing, no masks, no predictions.
    """
    return open_training_stream(manifest, data, sampler).pass_length


def open_training_stream(manifest: Manifest, data: Data, sampler: Sampler) -> TrainingStream:
    """The training stream itself, for those who want to look at it.

    Raises:
        UserError: no image left, a label missing, no masks, no predictions.
    """
    rows = usable_rows(manifest, data.train_split, data)
    label_NF = manifest.labels(data.findings)[rows]
    return planning.training_stream(
        rows, label_NF, manifest.key[rows], sampler, _attributes(manifest, rows, data, sampler)
    )


def usable_rows(manifest: Manifest, split: Sequence[str], data: Data) -> Rows:
    """The splits' rows, ascending; for segmentation only those with a mask, since the others are unlabeled.

    With data.negatives=no_finding, only those with one of the task's findings present or every finding of the shards
    absent.

    Raises:
        UserError: the split is empty, none of its images has a mask, or none is left.
    """
    rows = manifest.rows(*split)
    if data.task == "segment":
        rows = rows[manifest.table["mask_offset"].is_valid().to_numpy()[rows]]
        if not len(rows):
            raise UserError(f"data.task=segment: split {', '.join(split)} has no masks; shard with pack.masks=true")
    if data.negatives == "no_finding":
        present_N = (manifest.labels(data.findings) == PRESENT).any(axis=1)
        rows = rows[(present_N | has_no_finding(manifest.labels(manifest.findings())))[rows]]
        if not len(rows):
            raise UserError(
                f"data.negatives=no_finding: split {', '.join(split)} has no image with {' or '.join(data.findings)} "
                "and none with every finding absent; use data.negatives=any"
            )
    return rows


def training_batches(
    manifest: Manifest,
    data: Data,
    sampler: Sampler,
    augment: Augment,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
    epoch: int = 0,
    step: int = 0,
) -> Batches:
    """A rank's training batches from (epoch, step) on, without end; ceil(sampler.batch_size / world) rows each.

    Raises:
        UserError: no image left, a label missing, an input larger than what is stored, no masks, no predictions.
    """
    _check_size(manifest, augment)
    label_NF = manifest.labels(data.findings)
    rows = usable_rows(manifest, data.train_split, data)
    traits = _attributes(manifest, rows, data, sampler)
    steps = planning.training_indices(
        rows, label_NF[rows], manifest.key[rows], sampler, rank, world, epoch, step, traits
    )
    return augmented_batches(manifest, steps, data, sampler, augment, device)


def augmented_batches(
    manifest: Manifest,
    steps: Iterable[BatchIndices],
    data: Data,
    sampler: Sampler,
    augment: Augment,
    device: torch.device | str = "cpu",
) -> Batches:
    """Training batches of steps of one's own choosing: what an image looks like at some place of the stream.

    Raises:
        UserError: a label missing, an input larger than what is stored.
    """
    _check_size(manifest, augment)
    label_NF = manifest.labels(data.findings)
    return _backend(data)(
        steps, ShardReader(manifest), label_NF, augment, data, manifest.key, sampler.seed, True, torch.device(device)
    )


def evaluation_batches(
    manifest: Manifest,
    split: Sequence[str],
    data: Data,
    sampler: Sampler,
    augment: Augment,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
) -> Batches:
    """A rank's batches of sampler.eval_batch_size rows over a split, not augmented: each image valid once over all ranks.

    Raises:
        UserError: the split is empty, a label missing, an input larger than what is stored, no masks.
    """
    _check_size(manifest, augment)
    label_NF = manifest.labels(data.findings)
    steps = planning.evaluation_indices(usable_rows(manifest, split, data), sampler.eval_batch_size, rank, world)
    return _backend(data)(
        steps, ShardReader(manifest), label_NF, augment, data, manifest.key, sampler.seed, False, torch.device(device)
    )


def file_batches(
    images: Sequence[bytes], data: Data, sampler: Sampler, augment: Augment, device: torch.device | str = "cpu"
) -> Batches:
    """Batches over files in memory (JPEG or PNG), not augmented; row i is the i-th file, every label NaN, no mask.

    A file that is no image has valid = False.
    """
    count = len(images)
    label_NF = np.full((count, len(data.findings)), np.nan, np.float32)
    steps = planning.evaluation_indices(np.arange(count, dtype=np.int64), sampler.eval_batch_size)
    unmasked = data.model_copy(update={"task": "classify"})
    key_N = np.zeros(count, np.int64)
    return _backend(data)(
        steps, MemoryReader(images), label_NF, augment, unmasked, key_N, sampler.seed, False, torch.device(device)
    )


def _attributes(manifest: Manifest, rows: Rows, data: Data, sampler: Sampler) -> SampleAttributes:
    return SampleAttributes(
        _dataset_numbers(manifest, sampler)[rows] if sampler.dataset_weights else None,
        _weights(manifest, sampler)[rows] if sampler.sampling == "weighted" else None,
        _hard(manifest, rows, data, sampler) if sampler.sampling == "hard" else None,
    )


def _dataset_numbers(manifest: Manifest, sampler: Sampler) -> Rows:
    """(N,) which entry of data.shards each image lies in."""
    root_N = manifest.column("root")
    # `load` joins the sets in the order of data.shards, so the n-th new root is the n-th entry.
    number = {root: n for n, root in enumerate(dict.fromkeys(root_N.tolist()))}
    if len(sampler.dataset_weights) != len(number):
        raise UserError(
            f"sampler.dataset_weights={list(sampler.dataset_weights)} has {len(sampler.dataset_weights)} shares for {len(number)} data.shards; give one for each"
        )
    return np.array([number[root] for root in root_N.tolist()], np.int64)


def _weights(manifest: Manifest, sampler: Sampler) -> npt.NDArray[np.float64]:
    """(N,) the largest weight of each image's present findings; 1 where none is named."""
    there = (*manifest.findings(), NO_FINDING)
    for name in sampler.weights:
        if name not in there:
            raise UserError(f"sampler.weights: the shards have no label {name!r}; they have {', '.join(there)}")
    label_NF = manifest.labels(manifest.findings())
    present_NF = label_NF == PRESENT
    weight_F = np.array([sampler.weights.get(name, 1.0) for name in manifest.findings()])
    weight_N = np.where(present_NF, weight_F, -np.inf).max(axis=1)
    weight_N[~present_NF.any(axis=1)] = 1.0
    weight_N[has_no_finding(label_NF)] = sampler.weights.get(NO_FINDING, 1.0)
    return np.asarray(weight_N, np.float64)


def _hard(manifest: Manifest, rows: Rows, data: Data, sampler: Sampler) -> Flags:
    """For each of the rows, whether it is among the worst `sampler.hard_share` of those that the file predicted."""
    score_NF, findings = _scores(manifest.table["image_id"].take(rows), data, sampler)
    error_NF = np.abs(score_NF - manifest.labels(findings)[rows])
    known_N = np.isfinite(error_NF).any(axis=1)
    if not known_N.any():
        raise UserError(
            f"sampler.hard_predictions={sampler.hard_predictions} covers none of the {len(rows)} training images; "
            "give the predictions of the training split, predictions-train.parquet"
        )
    error_N = np.where(np.isfinite(error_NF), error_NF, -1).max(axis=1)
    # By key where errors tie, so that the order of the manifest does not matter.
    worst = np.lexsort((manifest.key[rows], -error_N))[: max(1, round(sampler.hard_share * int(known_N.sum())))]
    hard_N = np.zeros(len(rows), np.bool_)
    hard_N[worst] = True
    return hard_N


def _scores(image_id_N: pa.ChunkedArray, data: Data, sampler: Sampler) -> tuple[npt.NDArray[np.float32], list[str]]:
    """(N, F) scores of the images, NaN for those the file lacks, and the findings of the task that it has."""
    address = str(sampler.hard_predictions)
    try:
        table = pq.read_table(pa.BufferReader(storage.read(address)))
    except pa.ArrowInvalid:
        raise UserError(
            f"sampler.hard_predictions={address} is no Parquet file; give a run's predictions-train.parquet"
        ) from None
    findings = [name for name in data.findings if "score." + name in table.column_names]
    if not findings or "image_id" not in table.column_names:
        raise UserError(
            f"sampler.hard_predictions={address} has no image_id with a score for any of {', '.join(data.findings)}; "
            "give the predictions of a run with these findings"
        )
    place_N = pc.index_in(image_id_N, value_set=table["image_id"].combine_chunks())
    columns = [
        table["score." + name].cast(pa.float32()).take(place_N).to_numpy(zero_copy_only=False) for name in findings
    ]
    return np.stack(columns, axis=1).astype(np.float32), findings


def _backend(data: Data) -> Callable[..., Batches]:
    try:
        from cxrscale.loader import dali
    except ImportError as error:
        raise UserError(f"loader.backend=dali: {error}; install nvidia-dali or set loader.backend=reference") from None
    return dali.batches


def _check_size(manifest: Manifest, augment: Augment) -> None:
    for about in manifest.about:
        pack = about["pack"]
        if pack["codec"] != "source" and pack["size"] < augment.size:
            raise UserError(
                f"augment.size={augment.size} is more than the {pack['size']} pixels that the shards hold; "
                "lower it or shard again with a larger pack.size"
            )
