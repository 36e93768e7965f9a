"""A manifest and a recipe -> batches: chooses rows and backend, and refuses early what cannot work."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch

from cxrscale.config import ABSENT, PRESENT, Augment, Data, Loader, Recipe, has_no_finding
from cxrscale.loader import sampler
from cxrscale.loader.hashing import Rows
from cxrscale.loader.policies import POLICIES
from cxrscale.loader.reader import MemoryReader, ShardReader
from cxrscale.loader.sample_weights import dataset_numbers
from cxrscale.loader.sampler import BatchIndices, TrainingStream
from cxrscale.loader.spec import LoaderSpec
from cxrscale.shards import Manifest
from cxrscale.types import Batch, DistContext, UserError

Batches = Generator[Batch, None, None]
"""An iterator of batches; `close()` ends its threads at once, as does dropping it."""

_log = logging.getLogger("cxrscale")


def make_loader(recipe: Recipe, dataset: Manifest, split: str = "train", dist: DistContext = DistContext()) -> Batches:
    """The batches of one split of a dataset, as the recipe wants them.

        recipe = cx.load_recipe("jobs/demo.yaml")
        dataset = cx.open_dataset("runs/demo/shards/nih")
        for batch in cx.make_loader(recipe, dataset, split="val"):
            logits = model(batch.image_BCHW)[batch.valid_B]

    Args:
        recipe: its sections data, loader, sampler and augment are used.
        dataset: an open dataset; `recipe.data.shards` is not read.
        split: train, val or test, which are looked up in `recipe.data`, or the name of a split of the dataset.
        dist: rank, world size and device of this process.

    Returns:
        For train, augmented batches without end; for every other split, batches that have each image valid exactly
        once over all ranks. Rows with `valid_B` False are padding, or their bytes were bad.

    Raises:
        UserError: no image left, a label missing, an input larger than what is stored, no masks, no predictions.
    """
    if split == "train":
        return training_batches(dataset, recipe, dist)
    splits = {"val": recipe.data.val_split, "test": recipe.data.test_split}
    return evaluation_batches(dataset, splits.get(split, (split,)), recipe, dist)


def training_epoch_length(manifest: Manifest, recipe: Recipe) -> int:
    """Number of images in one pass over the training split: the argument of `sampler.steps_per_epoch`.

    Raises:
        UserError: no image left, a label missing, no masks, no predictions.
    """
    return open_training_stream(manifest, recipe).epoch_length


def open_training_stream(manifest: Manifest, recipe: Recipe) -> TrainingStream:
    """The order of the training images.

    Raises:
        UserError: no image left, a label missing, no masks, no predictions.
    """
    data, settings = recipe.data, recipe.sampler
    label_NF = manifest.labels(data.findings)
    if data.task == "segment":  # every row has a mask, also where the finding has no label
        label_NF = np.nan_to_num(label_NF, nan=ABSENT)
    rows = usable_rows(manifest, data.train_split, data)
    attributes = POLICIES[settings.sampling].attributes(manifest, rows, data, settings)
    if settings.dataset_weights:
        attributes = replace(attributes, dataset_N=dataset_numbers(manifest, settings)[rows])
    return sampler.training_stream(rows, label_NF[rows], manifest.key[rows], settings, attributes)


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
    manifest: Manifest, recipe: Recipe, dist: DistContext = DistContext(), epoch: int = 0, step: int = 0
) -> Batches:
    """A rank's training batches from (epoch, step) on, without end; ceil(sampler.batch_size / world) rows each.

    Raises:
        UserError: no image left, a label missing, an input larger than what is stored, no masks, no predictions.
    """
    _check_size(manifest, recipe.augment)
    indices = sampler.training_indices(open_training_stream(manifest, recipe), dist, epoch, step)
    return augmented_batches(manifest, indices, recipe, dist.device)


def augmented_batches(
    manifest: Manifest, indices: Iterable[BatchIndices], recipe: Recipe, device: torch.device | str = "cpu"
) -> Batches:
    """Training batches of chosen rows: what an image looks like at some position of the training stream.

    Raises:
        UserError: a label missing, an input larger than what is stored.
    """
    _check_size(manifest, recipe.augment)
    return _backend(recipe.loader)(indices, _spec(manifest, recipe, training=True), torch.device(device))


def evaluation_batches(
    manifest: Manifest,
    split: Sequence[str],
    recipe: Recipe,
    dist: DistContext = DistContext(),
    also: Sequence[Augment] = (),
) -> Batches:
    """A rank's batches of sampler.eval_batch_size rows, not augmented: each image is valid once over all ranks.

    Args:
        also: inputs of other members of an ensemble, for `Batch.also_BCHW`.

    Raises:
        UserError: the split is empty, a label missing, an input larger than what is stored, no masks.
    """
    rows, spec = usable_rows(manifest, split, recipe.data), _spec(manifest, recipe, training=False)
    parts = []
    for augment in (recipe.augment, *also):
        _check_size(manifest, augment)
        indices = sampler.evaluation_indices(rows, recipe.sampler.eval_batch_size, dist)
        parts.append(_backend(recipe.loader)(indices, replace(spec, augment=augment), dist.device))
    return parts[0] if len(parts) == 1 else _joined(parts)


def _joined(parts: Sequence[Batches]) -> Batches:
    """Batches of the same rows as one: the first, with the images of the others."""
    try:
        for first, *others in zip(*parts, strict=True):
            valid_B = torch.stack([one.valid_B for one in (first, *others)]).all(dim=0)
            yield replace(first, valid_B=valid_B, also_BCHW=tuple(one.image_BCHW for one in others))
    finally:
        for part in parts:
            part.close()


def file_batches(images: Sequence[bytes], recipe: Recipe, device: torch.device | str = "cpu") -> Batches:
    """Batches over files in memory (JPEG or PNG), not augmented; row i is the i-th file, every label NaN, no mask.

    A file that is no image has valid = False.
    """
    count = len(images)
    spec = _memory_spec(MemoryReader(images), count, recipe)
    indices = sampler.evaluation_indices(np.arange(count, dtype=np.int64), recipe.sampler.eval_batch_size)
    return _backend(recipe.loader)(indices, spec, torch.device(device))


class FileLoader:
    """Batches over files in memory (JPEG or PNG), as `file_batches` makes them, by graphs that are built once.

    Building one for each batch took 62 ms of a batch of 16, as much as the model takes for one image. One thread at a
    time may use it.
    """

    def __init__(self, recipe: Recipe, device: torch.device | str = "cpu", also: Sequence[Augment] = ()) -> None:
        """Build nothing yet.

        Args:
            also: inputs of other members of an ensemble, for `Batch.also_BCHW`.
        """
        self._recipe, self._device, self._also = recipe, torch.device(device), tuple(also)
        self._reader = MemoryReader(())
        self._batches: Batches | None = None
        self._size = 0

    def batch(self, images: Sequence[bytes]) -> Batch:
        """The batch of at least one file; row i is the i-th. A file that is no image has valid = False."""
        if len(images) > self._size:
            self.close()
        self._reader.load(images)
        if self._batches is None:
            self._size = len(images)
            self._batches = self._open()
        try:
            batch = next(self._batches)
        except BaseException:
            self.close()
            raise
        if not bool(batch.valid_B.all()):
            # DALI may have built another graph, for a batch of this size and no larger one.
            self.close()
        return batch

    def close(self) -> None:
        """End the graphs' threads; the next batch builds others."""
        if self._batches is not None:
            self._batches.close()
        self._batches, self._size = None, 0

    def _open(self) -> Batches:
        # One batch ahead would be a batch of images that nobody has given yet.
        spec = replace(_memory_spec(self._reader, self._size, self._recipe), prefetch=1)
        backend = _backend(self._recipe.loader)
        parts = [
            backend(self._steps(), replace(spec, augment=augment), self._device)
            for augment in (self._recipe.augment, *self._also)
        ]
        return parts[0] if len(parts) == 1 else _joined(parts)

    def _steps(self) -> Iterator[BatchIndices]:
        while True:
            count = len(self._reader)
            row_B = np.arange(count, dtype=np.int64)
            yield BatchIndices(row_B, np.zeros(count, np.int64), np.ones(count, np.bool_))


def _memory_spec(reader: MemoryReader, count: int, recipe: Recipe) -> LoaderSpec:
    return LoaderSpec(
        reader=reader,
        label_NF=np.full((count, len(recipe.data.findings)), np.nan, np.float32),
        key_N=np.zeros(count, np.int64),
        augment=recipe.augment,
        seed=recipe.sampler.seed,
        training=False,
        masks=False,
        num_threads=recipe.loader.num_threads,
        prefetch=recipe.loader.prefetch,
    )


def _spec(manifest: Manifest, recipe: Recipe, training: bool) -> LoaderSpec:
    return LoaderSpec(
        reader=ShardReader(manifest),
        label_NF=manifest.labels(recipe.data.findings),
        key_N=manifest.key,
        augment=recipe.augment,
        seed=recipe.sampler.seed,
        training=training,
        masks=recipe.data.task == "segment",
        num_threads=recipe.loader.num_threads,
        prefetch=recipe.loader.prefetch,
    )


def _backend(settings: Loader) -> Callable[[Iterable[BatchIndices], LoaderSpec, torch.device], Batches]:
    """The function that makes the batches: DALI's, or OpenCV's where it is wanted or DALI is missing."""
    if settings.backend != "opencv":
        try:
            from cxrscale.loader import dali

            return dali.batches
        except ImportError as error:
            if settings.backend == "dali":
                raise UserError(
                    f"loader.backend=dali: {error}; install nvidia-dali or set loader.backend=opencv"
                ) from None
            _warn_once(str(error))
    from cxrscale.loader import opencv

    return opencv.batches


@lru_cache
def _warn_once(reason: str) -> None:
    _log.warning("loader.backend=auto: no DALI (%s); OpenCV makes the batches, more slowly", reason)


def _check_size(manifest: Manifest, augment: Augment) -> None:
    for metadata in manifest.metadata:
        pack = metadata["pack"]
        if pack["codec"] != "source" and pack["size"] < augment.size:
            raise UserError(
                f"augment.size={augment.size} is more than the {pack['size']} pixels that the shards hold; "
                "lower it or shard again with a larger pack.size"
            )
