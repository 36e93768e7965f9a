"""The loop of cxrscale under plain torchrun: what Ray's workers are held against.

python -m torch.distributed.run --nproc-per-node N -m tests.benchmarks.scaling_bare RECIPE RUN
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

import torch
import torch.distributed as dist

from cxrscale import config
from cxrscale.training import loop


class Rank:
    """A process of torchrun as the loop's worker; nobody stops it and nobody listens."""

    def __init__(self) -> None:
        """Join the group that torchrun's variables describe."""
        gpu = torch.cuda.is_available()
        self.device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if gpu else "cpu")
        if gpu:
            torch.cuda.set_device(self.device)
        dist.init_process_group("nccl" if gpu else "gloo")
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def report(self, metrics: Mapping[str, float]) -> None:
        """Nobody listens."""

    def should_stop(self) -> bool:
        """Nobody asks."""
        return False

    def should_save(self) -> bool:
        """Nobody asks."""
        return False


def main() -> None:
    """Train the recipe into the run's folder."""
    _, path, run = sys.argv
    rank = Rank()
    try:
        loop.train(config.load_recipe(path), run, rank)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
