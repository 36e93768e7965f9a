"""Who this process is in a run, and how it speaks with the others; the loop knows no Ray.

Two forms behind one small interface: a process of its own (`LocalWorker`) and a Ray Train worker (`RayWorker`).
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn

from cxrscale.io import storage


class Worker(Protocol):
    """What the loop needs of the world around it."""

    rank: int
    world: int
    device: torch.device

    def report(self, metrics: Mapping[str, float]) -> None:
        """Called by every rank at the end of an epoch."""

    def should_stop(self) -> bool:
        """Whether this rank has been asked to write a checkpoint and leave."""

    def should_save(self) -> bool:
        """Whether this rank has been asked to write a checkpoint and go on; every rank asks as often."""


class LocalWorker:
    """The only worker of a run, in this very process: breakpoints work."""

    rank, world = 0, 1

    def __init__(self, device: str | None = None) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._stop = threading.Event()

    def report(self, metrics: Mapping[str, float]) -> None:
        """Nobody else listens."""

    def should_stop(self) -> bool:
        """Whether SIGTERM came inside `obeying_sigterm`."""
        return self._stop.is_set()

    def should_save(self) -> bool:
        """Nobody asks for that."""
        return False

    @contextmanager
    def obeying_sigterm(self) -> Iterator[None]:
        """Meanwhile SIGTERM (preemption) asks for a checkpoint instead of killing at once; main thread only."""
        with handle_sigterm(self._stop.set):
            yield


class RayWorker:
    """A worker of Ray Train, whose process group Ray has set up."""

    STOP_SECONDS = 0.5
    """How often rank 0 looks for the file that asks the run to stop; on an object store each look is a request."""

    def __init__(self, stop: str) -> None:
        """`stop` is the address of the file whose existence asks the run to leave."""
        import ray.train
        import ray.train.torch

        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world: int = context.get_world_size()
        self.device: torch.device = ray.train.torch.get_device()
        self._report: Any = ray.train.report
        self._preemption: Any = ray.train.get_preemption_info
        self._stop, self._looked, self._saved = stop, 0.0, False

    def report(self, metrics: Mapping[str, float]) -> None:
        """Hand the metrics to Ray; checkpoints are our own files."""
        self._report(dict(metrics))

    def should_stop(self) -> bool:
        """Whether the driver, which gets the signals, has left the file that asks for it."""
        if self.rank or time.monotonic() - self._looked < self.STOP_SECONDS:
            return False
        self._looked = time.monotonic()
        return storage.exists(self._stop)

    def should_save(self) -> bool:
        """Whether a node of this run is about to be taken away: true once, for Ray then starts the group again."""
        if self._saved or self._preemption() is None:
            return False
        self._saved = True
        return True


@contextmanager
def handle_sigterm(react: Any) -> Iterator[None]:
    """Call `react` on SIGTERM instead of dying; outside of the main thread, where none arrives, do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def caught(_number: int, _frame: FrameType | None) -> None:
        react()

    before = signal.signal(signal.SIGTERM, caught)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def wrap_ddp(net: nn.Module, worker: Worker) -> nn.Module:
    """The model that averages gradients over the workers; the model itself where there is one worker."""
    if worker.world == 1:
        return net
    devices = [worker.device] if worker.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(net, device_ids=devices, gradient_as_bucket_view=True)


@contextmanager
def no_sync(net: nn.Module, really: bool) -> Iterator[None]:
    """Gradients of a wrapped model stay on their worker meanwhile: only the last piece of a step is averaged."""
    if really and isinstance(net, nn.parallel.DistributedDataParallel):
        with net.no_sync():
            yield
    else:
        yield


def all_reduce_sum(value: torch.Tensor, worker: Worker) -> torch.Tensor:
    """The sum over all workers, on each of them."""
    if worker.world > 1:
        dist.all_reduce(value)
    return value


def all_gather(values: npt.NDArray[Any], worker: Worker) -> npt.NDArray[Any]:
    """The workers' arrays one after another along the first axis, in rank order, on each of them.

    Shapes must agree: the evaluation plan gives every rank the same number of rows.
    """
    if worker.world == 1:
        return values
    mine = torch.from_numpy(np.ascontiguousarray(values)).to(worker.device)
    everyone = [torch.empty_like(mine) for _ in range(worker.world)]
    dist.all_gather(everyone, mine)
    return torch.cat(everyone).cpu().numpy()


def broadcast_buffers(net: nn.Module, worker: Worker) -> None:
    """Give every rank rank 0's buffers: batch-norm statistics drift apart between the forward passes of DDP."""
    if worker.world > 1:
        for buffer in net.buffers():
            dist.broadcast(buffer, src=0)


def sync_signals(worker: Worker) -> tuple[bool, bool]:
    """(stop, save): whether any rank was asked to; the same answer on every rank."""
    asked = worker.should_stop(), worker.should_save()
    if worker.world == 1:
        return asked
    stop, save = all_reduce_sum(torch.tensor(asked, dtype=torch.float32, device=worker.device), worker).tolist()
    return stop > 0, save > 0
