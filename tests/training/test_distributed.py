"""Two real ranks: what is gathered is whole, what is summed is the sum."""

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cxrscale.training import distributed


class Rank:
    """A rank of a gloo group."""

    def __init__(self, rank: int, world: int, stop: bool = False) -> None:
        self.rank, self.world, self.device, self._stop = rank, world, torch.device("cpu"), stop

    def report(self, metrics: object) -> None:
        raise NotImplementedError

    def should_stop(self) -> bool:
        return self._stop

    def should_save(self) -> bool:
        return False


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    me = Rank(rank, 2, stop=rank == 1)
    ids = distributed.all_gather(np.arange(3, dtype=np.int64) + 10 * rank, me)
    scores = distributed.all_gather(np.full((2, 4), rank, dtype=np.float32), me)
    total = distributed.all_reduce_sum(torch.tensor(rank + 1.0), me)
    net = torch.nn.BatchNorm1d(2)
    assert net.running_mean is not None
    net.running_mean.fill_(rank + 5)
    distributed.broadcast_buffers(net, me)
    np.savez(
        Path(folder) / f"{rank}.npz",
        ids=ids,
        scores=scores,
        total=total.numpy(),
        mean=net.running_mean.numpy(),
        asks=distributed.sync_signals(me),
    )
    dist.destroy_process_group()


def test_two_ranks_gather_in_rank_order_and_agree(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)  # type: ignore[attr-defined,no-untyped-call]
    both = [np.load(tmp_path / f"{rank}.npz") for rank in range(2)]
    for found in both:
        assert found["ids"].tolist() == [0, 1, 2, 10, 11, 12]
        assert found["scores"].tolist() == [[0.0] * 4] * 2 + [[1.0] * 4] * 2
        assert found["total"] == 3.0
        assert found["mean"].tolist() == [5.0, 5.0]
        assert found["asks"].tolist() == [True, False]


def test_one_worker_gathers_itself() -> None:
    me = distributed.LocalWorker("cpu")
    assert distributed.all_gather(np.arange(3), me).tolist() == [0, 1, 2]
    assert distributed.sync_signals(me) == (False, False)
