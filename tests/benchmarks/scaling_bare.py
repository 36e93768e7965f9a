"""The loop of cxrscale under plain torchrun, to compare Ray's workers with.

python -m torch.distributed.run --nproc-per-node N -m tests.benchmarks.scaling_bare RECIPE RUN
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

import torch
import torch.distributed

from cxrscale import config
from cxrscale.training import loop
from cxrscale.training.tracking import Wait
from cxrscale.types import DistContext


class TorchrunWorker:
    """A process of torchrun as the loop's worker; it is never stopped, and its reports go nowhere."""

    reports_when_written = False
    doing = ""

    def __init__(self) -> None:
        """Join the group that torchrun's variables describe."""
        gpu = torch.cuda.is_available()
        device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if gpu else "cpu")
        if gpu:
            torch.cuda.set_device(device)
        torch.distributed.init_process_group("nccl" if gpu else "gloo")
        self.dist = DistContext(torch.distributed.get_rank(), torch.distributed.get_world_size(), device)

    def report(self, metrics: Mapping[str, float]) -> None:
        """Nothing to do."""

    def waits(self) -> list[Wait]:
        """None."""
        return []

    def should_stop(self) -> bool:
        """Never."""
        return False

    def should_save(self) -> bool:
        """Never."""
        return False


def main() -> None:
    """Train the recipe into the run's folder."""
    _, path, run = sys.argv
    worker = TorchrunWorker()
    try:
        loop.train(config.load_recipe(path), run, worker)
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
