"""Who this process is in a run, and how it speaks with the others; the loop knows no Ray.

Two forms behind one small interface: a process of its own (`LocalWorker`) and a Ray Train worker (`RayWorker`).
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Mapping
from types import FrameType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn


class Worker(Protocol):
    """What the loop needs of the world around it."""

    rank: int
    world: int
    device: torch.device

    def report(self, metrics: Mapping[str, float]) -> None:
        """Called by every rank at the end of an epoch."""

    def should_stop(self) -> bool:
        """Whether this rank has been asked to write a checkpoint and leave."""


class LocalWorker:
    """The only worker of a run, in this very process: breakpoints work."""

    rank, world = 0, 1

    def __init__(self, device: str | None = None) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._stop = threading.Event()

    def report(self, metrics: Mapping[str, float]) -> None:
        """Nobody else listens."""

    def should_stop(self) -> bool:
        """Whether SIGTERM came since `obey_signals`."""
        return self._stop.is_set()

    def obey_signals(self) -> None:
        """From now on SIGTERM (preemption) asks for a checkpoint instead of killing at once; main thread only."""

        def ask(_number: int, _frame: FrameType | None) -> None:
            self._stop.set()

        signal.signal(signal.SIGTERM, ask)


class RayWorker:
    """A worker of Ray Train, whose process group Ray has set up."""

    def __init__(self) -> None:
        import ray.train
        import ray.train.torch

        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world: int = context.get_world_size()
        self.device: torch.device = ray.train.torch.get_device()
        self._report: Any = ray.train.report

    def report(self, metrics: Mapping[str, float]) -> None:
        """Hand the metrics to Ray; checkpoints are our own files."""
        self._report(dict(metrics))

    def should_stop(self) -> bool:
        """Ray restarts a lost group from the last checkpoint; nobody asks a single worker to leave."""
        return False


def wrap(net: nn.Module, worker: Worker) -> nn.Module:
    """The net that averages gradients over the workers; the net itself where there is one worker."""
    if worker.world == 1:
        return net
    devices = [worker.device] if worker.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(net, device_ids=devices, gradient_as_bucket_view=True)


def add_up(value: torch.Tensor, worker: Worker) -> torch.Tensor:
    """The sum over all workers, on each of them."""
    if worker.world > 1:
        dist.all_reduce(value)
    return value


def gather(values: npt.NDArray[Any], worker: Worker) -> npt.NDArray[Any]:
    """The workers' arrays one after another along the first axis, in rank order, on each of them.

    Shapes must agree: the evaluation plan gives every rank the same number of rows.
    """
    if worker.world == 1:
        return values
    mine = torch.from_numpy(np.ascontiguousarray(values)).to(worker.device)
    everyone = [torch.empty_like(mine) for _ in range(worker.world)]
    dist.all_gather(everyone, mine)
    return torch.cat(everyone).cpu().numpy()


def share_buffers(net: nn.Module, worker: Worker) -> None:
    """Give every rank rank 0's buffers: batch-norm statistics drift apart between the forward passes of DDP."""
    if worker.world > 1:
        for buffer in net.buffers():
            dist.broadcast(buffer, src=0)


def any_asks(worker: Worker) -> bool:
    """Whether any rank was asked to stop; the same answer on every rank."""
    if worker.world == 1:
        return worker.should_stop()
    flag = torch.tensor(float(worker.should_stop()), device=worker.device)
    return bool(add_up(flag, worker).item() > 0)
