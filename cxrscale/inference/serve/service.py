"""Uploaded files in, predictions out, for any number of clients at once; knows nothing of HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from cxrscale.config import Serve
from cxrscale.inference.prediction import Prediction
from cxrscale.inference.serve.batching import Batcher
from cxrscale.inference.serve.decoding import Decoder, StoredPixels
from cxrscale.inference.serve.monitoring import Monitoring
from cxrscale.inference.serve.served_model import ServedModel
from cxrscale.io import LoadedImage
from cxrscale.types import UnreadableImageError

OnUse = Callable[[str], Awaitable[None]]
"""Called with a model's name before an image is predicted by it."""


class BusyError(Exception):
    """Too much waits already; the client should come again in a moment."""

    def __init__(self) -> None:
        super().__init__("too many images wait already; come again in a moment")


@dataclass(frozen=True, slots=True, eq=False)
class Upload:
    """A file that a client sent."""

    name: str
    data: bytes


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What became of an upload."""

    upload: Upload
    prediction: Prediction
    """With `error` where the file could not be read."""
    image: LoadedImage | None = None


class Service:
    """The models, their queues, and the processes that decode."""

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        settings: Serve,
        on_use: OnUse | None = None,
        decoder: Decoder | None = None,
    ) -> None:
        """Args:
        models: name -> model; the first is the default.
        on_use: for models that are not all in memory.
        decoder: one that has been started; None: it is made here.
        """
        self.models, self.settings, self._on_use = models, settings, on_use
        self.monitoring = Monitoring(models, settings.drift_window)
        self.decoder = decoder or Decoder(settings.decode_workers, settings.decode_seconds)
        self._batchers = {name: Batcher(model.predictor, self._noting(name)) for name, model in models.items()}
        self._waiting = 0
        self.ready = False
        """Whether it takes requests."""

    @property
    def default(self) -> str:
        """The model where a request names none."""
        return next(iter(self.models))

    async def start(self) -> None:
        """Make everything ready for the first request."""
        await self.decoder.warm_up()
        self.ready = True

    async def predict(self, model: str, uploads: Sequence[Upload]) -> list[Answer]:
        """The predictions of uploaded files, in order; one that cannot be read has the reason.

        Raises:
            BusyError: more waits than settings.queue allows.
        """
        if self._waiting and self._waiting + len(uploads) > self.settings.queue:
            raise BusyError
        return list(await asyncio.gather(*(self._predict(model, upload) for upload in uploads)))

    async def decode(self, upload: Upload) -> LoadedImage:
        """The image of an uploaded file.

        Raises:
            BusyError: as `predict`.
            UnreadableImageError: with the reason.
        """
        with self._one_more():
            return await self.decoder.decode(upload.data, upload.name)

    async def decode_stored(self, upload: Upload) -> StoredPixels | None:
        """The values of an uploaded file before its window; None where it has no more than 8 bits.

        Raises: as `decode`.
        """
        with self._one_more():
            return await self.decoder.decode_stored(upload.data, upload.name)

    @contextmanager
    def _one_more(self) -> Iterator[None]:
        if self._waiting >= self.settings.queue:
            raise BusyError
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    async def _predict(self, model: str, upload: Upload) -> Answer:
        self._count(1)
        try:
            image = await self.decoder.decode(upload.data, upload.name)
            predictor = self.models[model].predictor
            # Encoding as in the shards takes milliseconds, in which others could be served.
            prepared = await asyncio.to_thread(predictor.prepare, image, upload.name)
            if self._on_use is not None:
                await self._on_use(model)
            prediction = await self._batchers[model].predict(prepared)
        except UnreadableImageError as error:
            self.monitoring.images.labels("unreadable").inc()
            return Answer(upload, Prediction(upload.name, error=str(error)))
        finally:
            self._count(-1)
        self.monitoring.images.labels("predicted").inc()
        self.monitoring.saw(model, prediction)
        return Answer(upload, prediction, image)

    def _count(self, images: int) -> None:
        self._waiting += images
        self.monitoring.waiting.set(self._waiting)

    def _noting(self, model: str) -> Noting:
        return Noting(self.monitoring, model)

    async def close(self) -> None:
        """End threads and processes."""
        self.ready = False
        for batcher in self._batchers.values():
            await batcher.close()
        await asyncio.to_thread(self.decoder.close)


@dataclass(frozen=True, slots=True)
class Noting:
    """Notes the batches of a model."""

    monitoring: Monitoring
    model: str

    def __call__(self, images: int, seconds: float) -> None:
        self.monitoring.batch_images.labels(self.model).observe(images)
        self.monitoring.batch_seconds.labels(self.model).observe(seconds)
