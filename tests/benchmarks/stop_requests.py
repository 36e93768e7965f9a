"""What it costs that every step asks all ranks whether to stop or to save: two numbers more in a sum that is there.

    python -m tests.benchmarks.stop_requests [--workers 2] [--rounds 9] [--steps 2000]

Two exchanges of `training.loop` take turns in real gloo processes: the counts of the loss alone, and the counts with
the requests. Beside them, a collective of its own for the requests. Prints medians over rounds, and the medians of the
ratios within rounds.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed

from cxrscale.training.distributed import LocalWorker, Requests, all_reduce_sum
from cxrscale.types import DistContext

COUNTS = 15
"""Terms of the loss of 14 findings, and the number of valid rows."""


def exchanges(worker: LocalWorker) -> dict[str, Callable[[], None]]:
    """Name -> what a step does."""
    requests, dist = Requests(worker), worker.dist

    def counts_alone() -> None:
        all_reduce_sum(torch.ones(COUNTS), dist)

    def with_requests() -> None:
        total = all_reduce_sum(torch.cat([torch.ones(COUNTS), requests.flags()]), dist)
        requests.received(total[-2:])

    def own_collective() -> None:
        counts_alone()
        requests.ask()

    return {"counts alone": counts_alone, "counts and requests": with_requests, "two collectives": own_collective}


def measure(rank: int, world: int, port: int, rounds: int, steps: int) -> None:
    """One rank; rank 0 prints."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    worker = LocalWorker("cpu")
    worker.dist = DistContext(rank, world, torch.device("cpu"))
    contenders = exchanges(worker)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, exchange in contenders.items():
            began = time.perf_counter()
            for _ in range(steps):
                exchange()
            if number:  # the first round warms up
                seconds[name].append((time.perf_counter() - began) / steps)
    if rank == 0:
        base = seconds["counts alone"]
        for name, values in seconds.items():
            ratio = statistics.median(value / alone for value, alone in zip(values, base, strict=True))
            print(f"{name:22}{1e6 * statistics.median(values):8.1f} us per step  {ratio:5.2f}")
    torch.distributed.destroy_process_group()


def main(arguments: Sequence[str]) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=2000)
    given = parser.parse_args(arguments)
    port = 20000 + os.getpid() % 20000
    processes = [
        multiprocessing.Process(target=measure, args=(rank, given.workers, port, given.rounds, given.steps))
        for rank in range(given.workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


if __name__ == "__main__":
    main(sys.argv[1:])
