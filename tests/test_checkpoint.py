"""Checkpoints: whole or passed over, few of them, and only for the shards they were trained on."""

from pathlib import Path

import pytest
import torch

from cxrscale import checkpoint
from cxrscale.checkpoint import Progress
from cxrscale.schema import InputError


def net_and_optimizer() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    net = torch.nn.Linear(2, 1)
    return net, torch.optim.Adam(net.parameters())


def save(folder: Path, step: int, keep: int = 2) -> torch.nn.Module:
    net, optimizer = net_and_optimizer()
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    checkpoint.save(str(folder), step, net, optimizer, Progress(step=step), {"manifest": "m"}, keep)
    return net


def test_the_newest_is_resumed_and_old_ones_go(tmp_path: Path) -> None:
    nets = [save(tmp_path, step) for step in (1, 2, 3)]
    assert [path.name[:14] for path in sorted(tmp_path.iterdir())] == ["step-000000002", "step-000000003"]
    net, optimizer = net_and_optimizer()
    progress = checkpoint.resume(str(tmp_path), net, optimizer, "m")
    assert progress is not None
    assert progress.step == 3
    assert torch.equal(net.state_dict()["weight"], nets[2].state_dict()["weight"])
    assert optimizer.state_dict()["state"]


def test_other_shards_are_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(InputError, match="trained on other shards"):
        checkpoint.resume(str(tmp_path), *net_and_optimizer(), "another manifest")


def test_nothing_to_resume(tmp_path: Path) -> None:
    assert checkpoint.resume(str(tmp_path / "none"), *net_and_optimizer(), "m") is None


def test_what_is_no_checkpoint_is_one_line() -> None:
    with pytest.raises(InputError, match=r"x\.pt is no checkpoint"):
        checkpoint.read(b"not a zip", "x.pt")
