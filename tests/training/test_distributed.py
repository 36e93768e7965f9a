"""Collective operations on two real ranks, and on one."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing as mp

from cxrscale.training import distributed
from cxrscale.training.tracking import Wait
from cxrscale.types import DistContext


class GlooWorker:
    """A rank of a gloo group."""

    reports_when_written = False
    doing = ""

    def __init__(self, rank: int, world: int, stop: bool = False) -> None:
        self.dist, self._stop = DistContext(rank, world), stop

    def report(self, metrics: object) -> None:
        raise NotImplementedError

    def waits(self) -> list[Wait]:
        return []

    def should_stop(self) -> bool:
        return self._stop

    def should_save(self) -> bool:
        return False


def asked(worker: GlooWorker) -> tuple[bool, bool]:
    requests = distributed.Requests(worker)
    requests.ask()
    return requests.stop, requests.save


def carried(worker: GlooWorker) -> tuple[bool, bool]:
    """The flags as a passenger of another sum."""
    requests = distributed.Requests(worker)
    total = distributed.all_reduce_sum(torch.cat([torch.ones(3), requests.flags()]), worker.dist)
    requests.received(total[3:])
    return requests.stop, requests.save


def _rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    worker = GlooWorker(rank, 2, stop=rank == 1)
    ids = distributed.all_gather(np.arange(3, dtype=np.int64) + 10 * rank, worker.dist)
    scores = distributed.all_gather(np.full((2, 4), rank, dtype=np.float32), worker.dist)
    total = distributed.all_reduce_sum(torch.tensor(rank + 1.0), worker.dist)
    model = torch.nn.BatchNorm1d(2)
    assert model.running_mean is not None
    model.running_mean.fill_(rank + 5)
    distributed.broadcast_buffers(model, worker.dist)
    np.savez(
        Path(folder) / f"{rank}.npz",
        ids=ids,
        scores=scores,
        total=total.numpy(),
        mean=model.running_mean.numpy(),
        asked=asked(worker),
        carried=carried(worker),
    )
    torch.distributed.destroy_process_group()


@pytest.mark.smoke
def test_two_ranks_gather_in_rank_order_and_agree(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)  # type: ignore[attr-defined,no-untyped-call]
    both = [np.load(tmp_path / f"{rank}.npz") for rank in range(2)]
    for result in both:
        assert result["ids"].tolist() == [0, 1, 2, 10, 11, 12]
        assert result["scores"].tolist() == [[0.0] * 4] * 2 + [[1.0] * 4] * 2
        assert result["total"] == 3.0
        assert result["mean"].tolist() == [5.0, 5.0]
        assert result["asked"].tolist() == result["carried"].tolist() == [True, False]


def test_one_worker_gathers_its_own_values() -> None:
    worker = distributed.LocalWorker("cpu")
    assert distributed.all_gather(np.arange(3), worker.dist).tolist() == [0, 1, 2]
    requests = distributed.Requests(worker)
    requests.ask()
    assert (requests.stop, requests.save) == (False, False)


@pytest.mark.parametrize("number", distributed.STOP_SIGNALS, ids=lambda number: number.name)
def test_every_signal_to_end_asks_for_a_stop(number: signal.Signals, caplog: pytest.LogCaptureFixture) -> None:
    worker, before = distributed.LocalWorker("cpu"), signal.getsignal(number)
    with worker.stop_on_signals() as received:
        assert not worker.should_stop()
        os.kill(os.getpid(), number)
        assert worker.should_stop()
    assert received == [number]
    assert signal.getsignal(number) == before
    assert "stopping with a checkpoint at the next step" in caplog.text


def test_a_second_ctrl_c_ends_at_once_and_an_ignored_signal_stays_ignored() -> None:
    worker = distributed.LocalWorker("cpu")
    with worker.stop_on_signals():
        os.kill(os.getpid(), signal.SIGINT)
        assert worker.should_stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    # As nohup does.
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with distributed.LocalWorker("cpu").stop_on_signals() as received:
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert received == []
