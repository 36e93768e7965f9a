"""A manifest and a recipe's sections -> batches: chooses rows and reader, and refuses early what cannot work."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

import numpy as np
import torch

from cxrscale.batches import plan as planning
from cxrscale.batches import reference
from cxrscale.batches.plan import Rows
from cxrscale.batches.source import MemorySource, ShardSource
from cxrscale.config import Augment, Data, Plan
from cxrscale.schema import Batch, InputError
from cxrscale.shards.manifest import Manifest

Batches = Generator[Batch, None, None]
"""An iterator of batches; `close()` ends its threads at once, as does dropping it."""


def training_rows(manifest: Manifest, data: Data, plan: Plan) -> int:
    """How many pictures one pass of `training` has: the argument of `plan.steps_per_epoch`.

    Raises:
        InputError: no picture left, a label missing, no masks.
    """
    rows = usable_rows(manifest, data.train_split, data)
    label_NF = manifest.labels(data.findings)[rows]
    return planning.pass_length(planning.streams(rows, label_NF, manifest.key[rows], plan))


def usable_rows(manifest: Manifest, split: Sequence[str], data: Data) -> Rows:
    """The splits' rows, ascending; for segmentation only those with a mask, since the others are unlabelled.

    Raises:
        InputError: the split is empty, or none of its pictures has a mask.
    """
    rows = manifest.rows(*split)
    if data.task == "segment":
        rows = rows[manifest.table["mask_offset"].is_valid().to_numpy()[rows]]
        if not len(rows):
            raise InputError(f"data.task=segment: split {', '.join(split)} has no masks; shard with pack.masks=true")
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
        InputError: no picture left, a label missing, an input larger than what is stored, no masks.
    """
    _check_size(manifest, augment)
    label_NF = manifest.labels(data.findings)
    rows = usable_rows(manifest, data.train_split, data)
    steps = planning.training(rows, label_NF[rows], manifest.key[rows], plan, rank, world, epoch, step)
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
