"""The processes of a run: what the loop needs of one (`Worker`), and the collective operations over all of them.

The loop does not know Ray: a worker is either this very process (`LocalWorker`) or one of Ray Train (`RayWorker`).
"""

from __future__ import annotations

import logging
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from queue import SimpleQueue
from types import FrameType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed
from torch import nn

from cxrscale.io import storage
from cxrscale.training import waiting
from cxrscale.training.tracking import Wait
from cxrscale.types import DistContext

LOG = logging.getLogger("cxrscale")
STARTING = "the workers to load model and data"
DATA, STEP = "the next batch of images", "all workers to do a step"
CHECKPOINT, VALIDATION = "the checkpoint before to be written", "the next batch of the validation"
"""What a rank is doing (`Worker.doing`), in the words of a wait."""


class Worker(Protocol):
    """What the loop needs of the process that it runs in."""

    dist: DistContext
    reports_when_written: bool
    """Whether `report` has to come after the files of the epoch; else they are written while training goes on."""

    doing: str
    """What this rank does, or waits for: said to the user when it takes long."""

    def report(self, metrics: Mapping[str, float]) -> None:
        """Called by every rank at the end of an epoch."""

    def waits(self) -> list[Wait]:
        """What the run has waited for, as far as rank 0 has not asked for it yet: it belongs into the training log."""

    def should_stop(self) -> bool:
        """Whether this rank has been asked to write a checkpoint and stop; asked in every step, so it must be cheap."""

    def should_save(self) -> bool:
        """Whether this rank has been asked to write a checkpoint and go on; cheap, and true once per request."""


class LocalWorker:
    """The only worker of a run, in this very process: breakpoints work."""

    reports_when_written = False
    doing = ""

    def __init__(self, device: str | None = None) -> None:
        name = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.dist = DistContext(device=torch.device(name))
        self._stop = threading.Event()

    def report(self, metrics: Mapping[str, float]) -> None:
        """Nothing to do: there is no driver to report to."""

    def waits(self) -> list[Wait]:
        """None: there is no driver that watches."""
        return []

    def should_stop(self) -> bool:
        """Whether a signal arrived inside `stop_on_signals`."""
        return self._stop.is_set()

    def should_save(self) -> bool:
        """Never: nothing can ask for it."""
        return False

    def stop_on_signals(self) -> AbstractContextManager[list[int]]:
        """Inside, a signal to end asks for a checkpoint instead (see `handle_stop_signals`)."""
        return handle_stop_signals(self._stop.set)


class RayWorker:
    """A worker of Ray Train, whose process group Ray has set up."""

    reports_when_written = False

    LOOK_SECONDS = 0.5
    """How often a thread looks for requests: never the training itself, which would wait for an object store."""

    def __init__(self, run: str, stop_file: str) -> None:
        """`stop_file` is the address of the file whose existence asks the run to stop."""
        import ray.train
        import ray.train.torch
        from ray.train.v2._internal.execution.context import get_train_context

        context = ray.train.get_context()
        self.dist = DistContext(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
        self._report: Any = ray.train.report
        # ray.train.get_preemption_info is a barrier over all ranks, too slow for every step; this is what it reads.
        self._preemption: Any = get_train_context().preemption_context
        self._saved, self._stop = False, threading.Event()
        self.doing, self._steps = STARTING, 0
        self._waits: SimpleQueue[Wait] = SimpleQueue()
        if self.dist.rank == 0:
            threading.Thread(target=self._look_for, args=(run, stop_file), daemon=True, name="requests").start()

    def report(self, metrics: Mapping[str, float]) -> None:
        """Hand the metrics to Ray; checkpoints are our own files."""
        self._report(dict(metrics))

    def waits(self) -> list[Wait]:
        """What the driver has seen this run wait for."""
        return [self._waits.get() for _ in range(self._waits.qsize())]

    def should_stop(self) -> bool:
        """Whether the driver, which gets the signals, has written the file that asks for it."""
        self._steps += 1  # asked in every step: so the driver knows that they come to an end
        return self._stop.is_set()

    def should_save(self) -> bool:
        """Whether a node of this run is about to be taken away: true once, for Ray then restarts the group."""
        if self._saved or self._preemption.preemption_info is None:
            return False
        self._saved = True
        return True

    def _look_for(self, run: str, stop_file: str) -> None:
        # The store may take long to answer, or to fail: that is no sign of death.
        threading.Thread(target=self._give_signs, args=(run,), daemon=True, name="signs").start()
        while not self._stop.wait(self.LOOK_SECONDS):
            # A store that is away for a moment is asked again.
            with suppress(Exception):
                if storage.exists(stop_file):
                    self._stop.set()

    def _give_signs(self, run: str) -> None:
        group = uuid.uuid4().hex
        while True:
            # A control service that is away for a moment is told again.
            with suppress(Exception):
                waiting.give_sign(run, waiting.Sign(group, self._steps, self.doing, time.time()))
                for wait in waiting.take_waits(run):
                    self._waits.put(wait)
            time.sleep(self.LOOK_SECONDS)


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@contextmanager
def handle_stop_signals(react: Callable[[], object]) -> Iterator[list[int]]:
    """Call `react` on SIGTERM (preemption), SIGINT (Ctrl-C) and SIGHUP (a closed terminal) instead of dying.

    Gives the list of the signals that have arrived. A second SIGINT is a KeyboardInterrupt at once. A signal that the
    process ignores, as SIGHUP under nohup, stays ignored. Outside of the main thread, where no signal arrives, nothing
    is done.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def handler(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        if received.count(signal.SIGINT) > 1:
            raise KeyboardInterrupt
        LOG.warning("stopping with a checkpoint at the next step")
        react()

    previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number, before in previous.items():
        if before != signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield received
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


class Requests:
    """Whether any rank was asked to stop or to save: the same answer on every rank after the same step.

    The flags travel with the counts that every step adds up over the ranks anyway. On a GPU they are read a step late,
    when they have long arrived, so that nothing waits for them.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._pending: tuple[torch.Tensor, torch.cuda.Event] | None = None
        self.stop = self.save = False
        """The answer of the last exchange."""

    def flags(self) -> torch.Tensor:
        """(2,) this rank's flags, to be added up over all ranks with something else."""
        own = torch.tensor((self._worker.should_stop(), self._worker.should_save()), dtype=torch.float32)
        device = self._worker.dist.device
        if device.type == "cuda":
            return own.pin_memory().to(device, non_blocking=True)
        return own

    def received(self, total: torch.Tensor) -> None:
        """Take note of the (2,) sums over all ranks."""
        if total.device.type != "cuda":
            self._set(total)
            return
        host = torch.empty(2, pin_memory=True)
        host.copy_(total, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        before, self._pending = self._pending, (host, event)
        if before is not None:
            before[1].synchronize()
            self._set(before[0])

    def ask(self) -> None:
        """Without a step: one collective of two numbers."""
        if self._worker.dist.world == 1:
            self.local()
        else:
            self._set(all_reduce_sum(self.flags(), self._worker.dist))

    def local(self) -> None:
        """The answer of the only rank: nothing is sent."""
        self.stop, self.save = self._worker.should_stop(), self._worker.should_save()

    def _set(self, total: torch.Tensor) -> None:
        stop, save = total.tolist()
        self.stop, self.save = stop > 0, save > 0


def wrap_ddp(model: nn.Module, dist: DistContext) -> nn.Module:
    """The model in DistributedDataParallel, which averages gradients over the workers; unwrapped for one worker."""
    if dist.world == 1:
        return model
    devices = [dist.device] if dist.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


@contextmanager
def no_sync(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Inside, gradients of a wrapped model stay on their worker: only a step's last microbatch averages them."""
    if enabled and isinstance(model, nn.parallel.DistributedDataParallel):
        with model.no_sync():
            yield
    else:
        yield


def all_reduce_sum(value: torch.Tensor, dist: DistContext) -> torch.Tensor:
    """The sum over all workers, on each of them."""
    if dist.world > 1:
        torch.distributed.all_reduce(value)
    return value


def all_gather(values: npt.NDArray[Any], dist: DistContext) -> npt.NDArray[Any]:
    """The workers' arrays concatenated along the first axis in rank order, on each of them.

    Shapes must agree: the evaluation sampler gives every rank the same number of rows.
    """
    if dist.world == 1:
        return values
    own = torch.from_numpy(np.ascontiguousarray(values)).to(dist.device)
    gathered = [torch.empty_like(own) for _ in range(dist.world)]
    torch.distributed.all_gather(gathered, own)
    return torch.cat(gathered).cpu().numpy()


def broadcast_buffers(model: nn.Module, dist: DistContext) -> None:
    """Give every rank the buffers of rank 0: batch-norm statistics drift apart between the forward passes of DDP."""
    if dist.world > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)
