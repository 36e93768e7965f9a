"""Images that wait for a model become its next batch: nobody waits for others while the model is free."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from cxrscale.inference.prediction import Prediction
from cxrscale.inference.streaming import ImagePredictor, Prepared


class Batcher:
    """The queue before a model, and the thread in which it runs."""

    def __init__(self, predictor: ImagePredictor, on_batch: Callable[[int, float], None] | None = None) -> None:
        """Args:
        on_batch: called with a batch's number of images and its seconds.
        """
        self.predictor = predictor
        self._on_batch = on_batch
        self._waiting: asyncio.Queue[tuple[Prepared, asyncio.Future[Prediction]]] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._task: asyncio.Task[None] | None = None

    async def predict(self, prepared: Prepared) -> Prediction:
        """The prediction for an image, in a batch with whatever waits beside it."""
        loop = asyncio.get_running_loop()
        if self._task is None:
            self._task = loop.create_task(self._run())
        future: asyncio.Future[Prediction] = loop.create_future()
        await self._waiting.put((prepared, future))
        return await future

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._waiting.get()]
            while len(batch) < self.predictor.batch_size and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            # A client that has gone away needs no prediction.
            batch = [(prepared, future) for prepared, future in batch if not future.cancelled()]
            if not batch:
                continue
            began = loop.time()
            try:
                predictions = await loop.run_in_executor(
                    self._thread, self.predictor.predict_prepared, [prepared for prepared, _ in batch]
                )
            except Exception as error:  # the requests of this batch end with it, the service goes on
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            if self._on_batch is not None:
                self._on_batch(len(batch), loop.time() - began)
            for (_, future), prediction in zip(batch, predictions, strict=True):
                if not future.done():
                    future.set_result(prediction)

    async def close(self) -> None:
        """End the thread; what waits is cancelled."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._thread.shutdown()
