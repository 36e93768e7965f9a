"""A manifest and a recipe's sections -> batches: chooses rows and reader, and refuses early what cannot work."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from cxrscale import labels, storage
from cxrscale.batches import plan as planning
from cxrscale.batches import reference
from cxrscale.batches.plan import Flags, Rows, Sampling, Step, Traits
from cxrscale.batches.source import MemorySource, ShardSource
from cxrscale.config import Augment, Data, Plan
from cxrscale.schema import Batch, InputError
from cxrscale.shards.manifest import Manifest

Batches = Generator[Batch, None, None]
"""An iterator of batches; `close()` ends its threads at once, as does dropping it."""


def training_rows(manifest: Manifest, data: Data, plan: Plan) -> int:
    """How many pictures one pass of `training` has: the argument of `plan.steps_per_epoch`.

    Raises:
        InputError: no picture left, a label missing, no masks, no predictions.
    """
    return sampling(manifest, data, plan).pass_length


def sampling(manifest: Manifest, data: Data, plan: Plan) -> Sampling:
    """The training stream itself, for those who want to look at it.

    Raises:
        InputError: no picture left, a label missing, no masks, no predictions.
    """
    rows = usable_rows(manifest, data.train_split, data)
    label_NF = manifest.labels(data.findings)[rows]
    return planning.sampling(rows, label_NF, manifest.key[rows], plan, _traits(manifest, rows, data, plan))


def usable_rows(manifest: Manifest, split: Sequence[str], data: Data) -> Rows:
    """The splits' rows, ascending; for segmentation only those with a mask, since the others are unlabelled.

    With data.negatives=no_finding, only those with one of the task's findings present or every finding of the shards
    absent.

    Raises:
        InputError: the split is empty, none of its pictures has a mask, or none is left.
    """
    rows = manifest.rows(*split)
    if data.task == "segment":
        rows = rows[manifest.table["mask_offset"].is_valid().to_numpy()[rows]]
        if not len(rows):
            raise InputError(f"data.task=segment: split {', '.join(split)} has no masks; shard with pack.masks=true")
    if data.negatives == "no_finding":
        present_N = (manifest.labels(data.findings) == labels.PRESENT).any(axis=1)
        rows = rows[(present_N | labels.no_finding(manifest.labels(manifest.findings())))[rows]]
        if not len(rows):
            raise InputError(
                f"data.negatives=no_finding: split {', '.join(split)} has no picture with {' or '.join(data.findings)} "
                "and none with every finding absent; use data.negatives=any"
            )
    return rows


def training(
    manifest: Manifest,
    data: Data,
    plan: Plan,
    augment: Augment,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
    epoch: int = 0,
    step: int = 0,
) -> Batches:
    """A rank's training batches from (epoch, step) on, without end; ceil(plan.batch / world) rows each.

    Raises:
        InputError: no picture left, a label missing, an input larger than what is stored, no masks, no predictions.
    """
    _check_size(manifest, augment)
    label_NF = manifest.labels(data.findings)
    rows = usable_rows(manifest, data.train_split, data)
    traits = _traits(manifest, rows, data, plan)
    steps = planning.training(rows, label_NF[rows], manifest.key[rows], plan, rank, world, epoch, step, traits)
    return augmented(manifest, steps, data, plan, augment, device)


def augmented(
    manifest: Manifest,
    steps: Iterable[Step],
    data: Data,
    plan: Plan,
    augment: Augment,
    device: torch.device | str = "cpu",
) -> Batches:
    """Training batches of steps of one's own choosing: what a picture looks like at some place of the stream.

    Raises:
        InputError: a label missing, an input larger than what is stored.
    """
    _check_size(manifest, augment)
    label_NF = manifest.labels(data.findings)
    return _reader(data)(
        steps, ShardSource(manifest), label_NF, augment, data, manifest.key, plan.seed, True, torch.device(device)
    )


def evaluation(
    manifest: Manifest,
    split: Sequence[str],
    data: Data,
    plan: Plan,
    augment: Augment,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
) -> Batches:
    """A rank's batches of plan.eval_batch rows over a split, not augmented: each picture valid once over all ranks.

    Raises:
        InputError: the split is empty, a label missing, an input larger than what is stored, no masks.
    """
    _check_size(manifest, augment)
    label_NF = manifest.labels(data.findings)
    steps = planning.evaluation(usable_rows(manifest, split, data), plan.eval_batch, rank, world)
    return _reader(data)(
        steps, ShardSource(manifest), label_NF, augment, data, manifest.key, plan.seed, False, torch.device(device)
    )


def files(
    images: Sequence[bytes], data: Data, plan: Plan, augment: Augment, device: torch.device | str = "cpu"
) -> Batches:
    """Batches over files in memory (JPEG or PNG), not augmented; row i is the i-th file, every label NaN, no mask.

    A file that is no picture has valid = False.
    """
    count = len(images)
    label_NF = np.full((count, len(data.findings)), np.nan, np.float32)
    steps = planning.evaluation(np.arange(count, dtype=np.int64), plan.eval_batch)
    unmasked = data.model_copy(update={"task": "classify"})
    key_N = np.zeros(count, np.int64)
    return _reader(data)(
        steps, MemorySource(images), label_NF, augment, unmasked, key_N, plan.seed, False, torch.device(device)
    )


def _traits(manifest: Manifest, rows: Rows, data: Data, plan: Plan) -> Traits:
    return Traits(
        _shard_sets(manifest, plan)[rows] if plan.mix else None,
        _weights(manifest, plan)[rows] if plan.sampling == "weighted" else None,
        _hard(manifest, rows, data, plan) if plan.sampling == "hard" else None,
    )


def _shard_sets(manifest: Manifest, plan: Plan) -> Rows:
    """(N,) which entry of data.shards each picture lies in."""
    root_N = manifest.column("root")
    # `load` joins the sets in the order of data.shards, so the n-th new root is the n-th entry.
    number = {root: n for n, root in enumerate(dict.fromkeys(root_N.tolist()))}
    if len(plan.mix) != len(number):
        raise InputError(
            f"plan.mix={list(plan.mix)} has {len(plan.mix)} shares for {len(number)} data.shards; give one for each"
        )
    return np.array([number[root] for root in root_N.tolist()], np.int64)


def _weights(manifest: Manifest, plan: Plan) -> npt.NDArray[np.float64]:
    """(N,) the largest weight of each picture's present findings; 1 where none is named."""
    there = (*manifest.findings(), labels.NO_FINDING)
    for name in plan.weights:
        if name not in there:
            raise InputError(f"plan.weights: the shards have no label {name!r}; they have {', '.join(there)}")
    label_NF = manifest.labels(manifest.findings())
    present_NF = label_NF == labels.PRESENT
    weight_F = np.array([plan.weights.get(name, 1.0) for name in manifest.findings()])
    weight_N = np.where(present_NF, weight_F, -np.inf).max(axis=1)
    weight_N[~present_NF.any(axis=1)] = 1.0
    weight_N[labels.no_finding(label_NF)] = plan.weights.get(labels.NO_FINDING, 1.0)
    return np.asarray(weight_N, np.float64)


def _hard(manifest: Manifest, rows: Rows, data: Data, plan: Plan) -> Flags:
    """For each of the rows, whether it is among the worst `plan.hard_share` of those that the file predicted."""
    score_NF, findings = _scores(manifest.table["image_id"].take(rows), data, plan)
    error_NF = np.abs(score_NF - manifest.labels(findings)[rows])
    known_N = np.isfinite(error_NF).any(axis=1)
    if not known_N.any():
        raise InputError(
            f"plan.hard_scores={plan.hard_scores} covers none of the {len(rows)} training pictures; "
            "give the predictions of the training split, predictions-train.parquet"
        )
    error_N = np.where(np.isfinite(error_NF), error_NF, -1).max(axis=1)
    # By key where errors tie, so that the order of the manifest does not matter.
    worst = np.lexsort((manifest.key[rows], -error_N))[: max(1, round(plan.hard_share * int(known_N.sum())))]
    hard_N = np.zeros(len(rows), np.bool_)
    hard_N[worst] = True
    return hard_N


def _scores(image_id_N: pa.ChunkedArray, data: Data, plan: Plan) -> tuple[npt.NDArray[np.float32], list[str]]:
    """(N, F) scores of the pictures, NaN for those the file lacks, and the findings of the task that it has."""
    address = str(plan.hard_scores)
    try:
        table = pq.read_table(pa.BufferReader(storage.read(address)))
    except pa.ArrowInvalid:
        raise InputError(
            f"plan.hard_scores={address} is no Parquet file; give a run's predictions-train.parquet"
        ) from None
    findings = [name for name in data.findings if "score." + name in table.column_names]
    if not findings or "image_id" not in table.column_names:
        raise InputError(
            f"plan.hard_scores={address} has no image_id with a score for any of {', '.join(data.findings)}; "
            "give the predictions of a run with these findings"
        )
    place_N = pc.index_in(image_id_N, value_set=table["image_id"].combine_chunks())
    columns = [
        table["score." + name].cast(pa.float32()).take(place_N).to_numpy(zero_copy_only=False) for name in findings
    ]
    return np.stack(columns, axis=1).astype(np.float32), findings


def _reader(data: Data) -> Callable[..., Batches]:
    if data.reader == "reference":
        return reference.batches
    try:
        from cxrscale.batches import dali
    except ImportError as error:
        raise InputError(f"data.reader=dali: {error}; install nvidia-dali or set data.reader=reference") from None
    return dali.batches


def _check_size(manifest: Manifest, augment: Augment) -> None:
    for about in manifest.about:
        pack = about["pack"]
        if pack["codec"] != "source" and pack["size"] < augment.size:
            raise InputError(
                f"augment.size={augment.size} is more than the {pack['size']} pixels that the shards hold; "
                "lower it or shard again with a larger pack.size"
            )
