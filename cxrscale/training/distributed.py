"""The processes of a run: what the loop needs of one (`Worker`), and the collective operations over all of them.

The loop does not know Ray: a worker is either this very process (`LocalWorker`) or one of Ray Train (`RayWorker`).
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed
from torch import nn

from cxrscale.io import storage
from cxrscale.types import DistContext


class Worker(Protocol):
    """What the loop needs of the process that it runs in."""

    dist: DistContext

    def report(self, metrics: Mapping[str, float]) -> None:
        """Called by every rank at the end of an epoch."""

    def should_stop(self) -> bool:
        """Whether this rank has been asked to write a checkpoint and stop."""

    def should_save(self) -> bool:
        """Whether this rank has been asked to write a checkpoint and go on; every rank asks equally often."""


class LocalWorker:
    """The only worker of a run, in this very process: breakpoints work."""

    def __init__(self, device: str | None = None) -> None:
        name = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.dist = DistContext(device=torch.device(name))
        self._stop = threading.Event()

    def report(self, metrics: Mapping[str, float]) -> None:
        """Nothing to do: there is no driver to report to."""

    def should_stop(self) -> bool:
        """Whether SIGTERM arrived inside `stop_on_sigterm`."""
        return self._stop.is_set()

    def should_save(self) -> bool:
        """Never: nothing can ask for it."""
        return False

    @contextmanager
    def stop_on_sigterm(self) -> Iterator[None]:
        """Inside, SIGTERM (preemption) asks for a checkpoint instead of killing at once; main thread only."""
        with handle_sigterm(self._stop.set):
            yield


class RayWorker:
    """A worker of Ray Train, whose process group Ray has set up."""

    STOP_SECONDS = 0.5
    """How often rank 0 looks for the file that asks the run to stop; on an object store each look is a request."""

    def __init__(self, stop_file: str) -> None:
        """`stop_file` is the address of the file whose existence asks the run to stop."""
        import ray.train
        import ray.train.torch

        context = ray.train.get_context()
        self.dist = DistContext(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
        self._report: Any = ray.train.report
        self._preemption: Any = ray.train.get_preemption_info
        self._stop_file, self._checked_at, self._saved = stop_file, 0.0, False

    def report(self, metrics: Mapping[str, float]) -> None:
        """Hand the metrics to Ray; checkpoints are our own files."""
        self._report(dict(metrics))

    def should_stop(self) -> bool:
        """Whether the driver, which gets the signals, has written the file that asks for it."""
        if self.dist.rank or time.monotonic() - self._checked_at < self.STOP_SECONDS:
            return False
        self._checked_at = time.monotonic()
        return storage.exists(self._stop_file)

    def should_save(self) -> bool:
        """Whether a node of this run is about to be taken away: true once, for Ray then restarts the group."""
        if self._saved or self._preemption() is None:
            return False
        self._saved = True
        return True


@contextmanager
def handle_sigterm(react: Callable[[], object]) -> Iterator[None]:
    """Call `react` on SIGTERM instead of dying; outside of the main thread, where no signal arrives, do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(_number: int, _frame: FrameType | None) -> None:
        react()

    previous = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


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


def sync_signals(worker: Worker) -> tuple[bool, bool]:
    """(stop, save): whether any rank was asked to; the same answer on every rank."""
    own = worker.should_stop(), worker.should_save()
    if worker.dist.world == 1:
        return own
    flags = torch.tensor(own, dtype=torch.float32, device=worker.dist.device)
    stop, save = all_reduce_sum(flags, worker.dist).tolist()
    return stop > 0, save > 0
