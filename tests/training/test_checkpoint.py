"""Checkpoints: whole or passed over, few of them, and only for the shards they were trained on."""

from pathlib import Path

import pytest
import torch

from cxrscale.config import Optim
from cxrscale.training import checkpoint, optim
from cxrscale.training.checkpoint import CheckpointWriter, Progress, TrainState
from cxrscale.types import UserError


def learner() -> TrainState:
    settings = Optim(ema_decay=0.5)
    net = torch.nn.Linear(2, 1)
    return TrainState(net, optim.build_optimizer(net, settings), optim.ema_model(net, settings), Progress())


def trained(step: int) -> TrainState:
    made = learner()
    made.net(torch.ones(1, 2)).sum().backward()
    made.optimizer.step()
    assert made.average is not None
    made.average.update_parameters(made.net)
    made.progress.step = step
    return made


def save(folder: Path, step: int, keep: int = 2) -> TrainState:
    made = trained(step)
    checkpoint.save_checkpoint(str(folder), step, {**made.state(), "manifest": "m"}, keep)
    return made


def test_the_newest_is_resumed_and_old_ones_go(tmp_path: Path) -> None:
    made = [save(tmp_path, step) for step in (1, 2, 3)]
    assert [path.name[:14] for path in sorted(tmp_path.iterdir())] == ["step-000000002", "step-000000003"]
    again = learner()
    assert checkpoint.resume(str(tmp_path), again, "m")
    assert again.progress.step == 3
    assert again.average is not None
    for mine, theirs in ((again.net, made[2].net), (again.average, made[2].average)):
        assert theirs is not None
        for name, value in theirs.state_dict().items():
            assert torch.equal(mine.state_dict()[name], value)
    assert again.optimizer.state_dict()["state"]


def test_the_later_of_two_at_the_same_step_is_the_one_that_stays(tmp_path: Path) -> None:
    for epoch in range(6):
        made = trained(4)
        made.progress.epoch = epoch
        checkpoint.save_checkpoint(str(tmp_path), 4, {**made.state(), "manifest": "m"}, keep=2)
        again = learner()
        assert checkpoint.resume(str(tmp_path), again, "m")
        assert again.progress.epoch == epoch
    assert len(list(tmp_path.iterdir())) == 1


def test_other_shards_are_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(UserError, match="trained on other shards"):
        checkpoint.resume(str(tmp_path), learner(), "another manifest")


def test_nothing_to_resume(tmp_path: Path) -> None:
    assert not checkpoint.resume(str(tmp_path / "none"), learner(), "m")


def test_what_is_no_checkpoint_is_one_line() -> None:
    with pytest.raises(UserError, match=r"x\.pt is no checkpoint"):
        checkpoint.read(b"not a zip", "x.pt")


def test_what_is_written_meanwhile_is_the_state_of_the_call(tmp_path: Path) -> None:
    made, writer = trained(1), CheckpointWriter(str(tmp_path), keep=1)
    before = made.net.state_dict()["weight"].clone()
    writer.save(1, {**made.state(), "manifest": "m"})
    with torch.no_grad():
        for parameter in made.net.parameters():
            parameter.add_(1)
    writer.close()
    again = learner()
    assert checkpoint.resume(str(tmp_path), again, "m")
    assert torch.equal(again.net.state_dict()["weight"], before)


def test_a_checkpoint_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    writer = CheckpointWriter(str(tmp_path / "file" / "checkpoints"), keep=1)
    writer.save(1, {"manifest": "m"})
    with pytest.raises(UserError, match="a part of this path is a file"):
        writer.wait()
    writer.close()


def test_checkpoints_in_a_bucket(s3: str) -> None:
    folder = f"{s3}/run/checkpoints"
    for step in (1, 2, 3):
        checkpoint.save_checkpoint(folder, step, {**trained(step).state(), "manifest": "m"}, keep=2)
    again = learner()
    assert checkpoint.resume(folder, again, "m")
    assert again.progress.step == 3
