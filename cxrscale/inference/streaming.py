"""Images in, predictions out, in order: threads read and decode the next images while the model runs."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from cxrscale.inference.prediction import Prediction, Provenance
from cxrscale.inference.stored_images import Pixels, StoredImage, encode_as_stored, read_stored
from cxrscale.io import LoadedImage, Strictness, load_image, storage
from cxrscale.types import AccessError, GrayImage, UnreadableImageError, UserError

Source = str | Path | bytes | GrayImage
"""An image: a path or fsspec address of a DICOM, PNG or JPEG file, an image of a dataset (DATASET/SHARD.tar/ID), such a
file's bytes, or an upright gray array."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """An image as the models' batches take it; what a thread makes ready while a model runs."""

    prediction: Prediction
    """What is known without a model."""
    stored: tuple[bytes, ...] = ()
    """For each of the predictor's `stores` the image as it would hold it; none where it could not be read."""


class GroupPredictor(ABC):
    """What predicts many files in groups: here, or on a cluster."""

    @property
    @abstractmethod
    def provenance(self) -> Provenance:
        """What its predictions must name to be reproduced."""

    @abstractmethod
    def groups(self, paths: Sequence[str]) -> Iterator[Sequence[Prediction]]:
        """The predictions of all files in groups of whole batches, each as soon as it is done."""


class ImagePredictor(GroupPredictor):
    """What predicts images: one model, an ensemble, a classifier before a segmenter."""

    @property
    def findings(self) -> tuple[str, ...]:
        """The keys of `Prediction.probabilities`."""
        return self.provenance.recipe.data.findings

    @property
    def batch_size(self) -> int:
        """Images per forward pass where the caller does not say."""
        return self.provenance.recipe.sampler.eval_batch_size

    @property
    @abstractmethod
    def stores(self) -> tuple[Pixels, ...]:
        """How the training images of each model are stored: an image goes the same way to the model."""

    @abstractmethod
    def predict_prepared(self, batch: Sequence[Prepared]) -> list[Prediction]:
        """The predictions of images that could be read."""

    def __call__(self, source: Source) -> Prediction:
        """The prediction for one image; an unreadable one gives `Prediction.error`."""
        return self.predict([source])[0]

    def predict(self, items: Sequence[Source], batch_size: int | None = None) -> list[Prediction]:
        """The predictions for many images, in order; an unreadable one gives its `Prediction.error`.

        An image is processed as the training images were: upright gray, stored size and encoding, same operations.
        Files are read leniently: `cxrscale.io.strictness` lists what then becomes a warning instead of an error. An
        image of a dataset that is stored as the training images are goes to the model byte for byte.

        Args:
            batch_size: images per forward pass; None: the recipe's sampler.eval_batch_size. This many are in memory.
        """
        return list(self.stream(items, batch_size))

    def prepare(self, image: LoadedImage, path: str = "") -> Prepared:
        """An image that has been loaded, as `predict_prepared` takes it."""
        height, width = image.image_HW.shape
        known = Prediction(path, height=height, width=width, spacing_mm=image.spacing_mm, warnings=image.warnings)
        return Prepared(known, tuple(encode_as_stored(image.image_HW, pixels) for pixels in self.stores))

    def groups(self, paths: Sequence[str]) -> Iterator[Sequence[Prediction]]:
        """The predictions batch by batch, in order."""
        stream = self.stream(paths)
        while group := list(islice(stream, self.batch_size)):
            yield group

    def stream(
        self, items: Iterable[Source], batch_size: int | None = None, threads: int | None = None
    ) -> Iterator[Prediction]:
        """The predictions for any number of images, in order, each as soon as its batch is done.

        Threads read and decode the next images while the model runs. Two batches are in memory, as they are stored in
        shards, however many images there are.

        Args:
            batch_size: images per forward pass; None: the recipe's sampler.eval_batch_size.
            threads: that decode; None: one per CPU, four at most.
        """
        size = batch_size or self.batch_size
        ahead, left = deque[Future[Prepared]](), iter(items)
        pool = ThreadPoolExecutor(threads or min(4, os.cpu_count() or 1), thread_name_prefix="decode")
        try:
            while True:
                for item in islice(left, 2 * size - len(ahead)):
                    ahead.append(pool.submit(self._prepare, item))
                if not ahead:
                    return
                batch = [ahead.popleft().result() for _ in range(min(size, len(ahead)))]
                done = iter(self.predict_prepared([one for one in batch if one.stored]))
                yield from [next(done) if one.stored else one.prediction for one in batch]
        finally:
            pool.shutdown(cancel_futures=True)

    def _prepare(self, source: Source) -> Prepared:
        """The image as it would be stored, or the reason why there is none."""
        path = str(source) if isinstance(source, str | Path) else ""
        try:
            if path and (stored := read_stored(path)) is not None:
                return self._prepare_stored(path, stored)
            image = _load(source)
        except (UnreadableImageError, UserError) as error:
            return Prepared(Prediction(path, error=str(error), unreachable=isinstance(error, AccessError)))
        return self.prepare(image, path)

    def _prepare_stored(self, path: str, image: StoredImage) -> Prepared:
        warnings = dict.fromkeys(warning for pixels in self.stores for warning in image.warnings(pixels))
        known = Prediction(path, height=image.height, width=image.width, spacing_mm=image.spacing_mm)
        known = replace(known, image_id=image.image_id, warnings=tuple(warnings))
        return Prepared(known, tuple(image.as_stored(pixels) for pixels in self.stores))


def _load(source: Source) -> LoadedImage:
    """The upright gray image of a file, its bytes or an array, read leniently.

    Raises:
        UnreadableImageError: it cannot be decoded.
        UserError: there is no such file, or the array is no image.
        AccessError: the file cannot be reached.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 2:
            raise UserError(f"an array of {source.dtype} {source.shape} is not an image; give uint8 (H, W)")
        return LoadedImage(source)
    if isinstance(source, bytes):
        return load_image(source, strictness=Strictness.LENIENT)
    return load_image(storage.read(str(source)), name=str(source), strictness=Strictness.LENIENT)
