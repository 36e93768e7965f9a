"""Checkpoints: complete or skipped, few of them, and only for the shards they were trained on."""

from pathlib import Path

import pytest
import torch

from cxrscale.config import Optim
from cxrscale.training import checkpoint, optim
from cxrscale.training.checkpoint import CheckpointWriter
from cxrscale.training.state import Progress, TrainState
from cxrscale.types import UserError


def new_state() -> TrainState:
    settings = Optim(ema_decay=0.5)
    model = torch.nn.Linear(2, 1)
    return TrainState(model, optim.build_optimizer(model, settings), optim.build_ema(model, settings), Progress())


def trained(step: int) -> TrainState:
    state = new_state()
    state.model(torch.ones(1, 2)).sum().backward()
    state.optimizer.step()
    assert state.ema is not None
    state.ema.update_parameters(state.model)
    state.progress.step = step
    return state


def save(folder: Path, step: int, keep: int = 2) -> TrainState:
    state = trained(step)
    checkpoint.save_checkpoint(str(folder), step, {**state.state_dict(), "manifest": "m"}, keep)
    return state


def test_the_newest_is_resumed_and_old_ones_are_removed(tmp_path: Path) -> None:
    states = [save(tmp_path, step) for step in (1, 2, 3)]
    assert [path.name[:14] for path in sorted(tmp_path.iterdir())] == ["step-000000002", "step-000000003"]
    again = new_state()
    assert checkpoint.resume(str(tmp_path), again, "m")
    assert again.progress.step == 3
    assert again.ema is not None
    for mine, theirs in ((again.model, states[2].model), (again.ema, states[2].ema)):
        assert theirs is not None
        for name, value in theirs.state_dict().items():
            assert torch.equal(mine.state_dict()[name], value)
    assert again.optimizer.state_dict()["state"]


def test_of_two_checkpoints_of_the_same_step_the_later_is_kept(tmp_path: Path) -> None:
    for epoch in range(6):
        state = trained(4)
        state.progress.epoch = epoch
        checkpoint.save_checkpoint(str(tmp_path), 4, {**state.state_dict(), "manifest": "m"}, keep=2)
        again = new_state()
        assert checkpoint.resume(str(tmp_path), again, "m")
        assert again.progress.epoch == epoch
    assert len(list(tmp_path.iterdir())) == 1


def test_other_shards_are_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(UserError, match="trained on other shards"):
        checkpoint.resume(str(tmp_path), new_state(), "another manifest")


def test_without_checkpoints_nothing_is_resumed(tmp_path: Path) -> None:
    assert not checkpoint.resume(str(tmp_path / "none"), new_state(), "m")


def test_a_file_that_is_not_a_checkpoint_is_a_one_line_error() -> None:
    with pytest.raises(UserError, match=r"x\.pt is not a checkpoint"):
        checkpoint.read(b"not a zip", "x.pt")


def test_the_state_of_the_call_is_written_although_training_goes_on(tmp_path: Path) -> None:
    state, writer = trained(1), CheckpointWriter(str(tmp_path), keep=1)
    before = state.model.state_dict()["weight"].clone()
    writer.save(1, {**state.state_dict(), "manifest": "m"})
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.add_(1)
    writer.close()
    again = new_state()
    assert checkpoint.resume(str(tmp_path), again, "m")
    assert torch.equal(again.model.state_dict()["weight"], before)


def test_a_checkpoint_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    writer = CheckpointWriter(str(tmp_path / "file" / "checkpoints"), keep=1)
    writer.save(1, {"manifest": "m"})
    with pytest.raises(UserError, match="a part of this path is a file"):
        writer.wait()
    writer.close()


def test_checkpoints_are_written_to_a_bucket_and_resumed(s3: str) -> None:
    folder = f"{s3}/run/checkpoints"
    for step in (1, 2, 3):
        checkpoint.save_checkpoint(folder, step, {**trained(step).state_dict(), "manifest": "m"}, keep=2)
    again = new_state()
    assert checkpoint.resume(folder, again, "m")
    assert again.progress.step == 3


def test_a_checkpoint_of_the_first_version_is_resumed(tmp_path: Path) -> None:
    state = trained(3)
    state.progress.lr_scale = 0.1
    stored = state.state_dict()
    assert stored.keys() == {"model", "optimizer", "average", "progress"}
    first = ("epoch", "step", "best", "bad_epochs", "plateau_epochs", "rate_scale", "history")
    assert stored["progress"].keys() == {*first, "bad_rows", "window_loss", "window_steps"}
    stored["progress"] = {name: stored["progress"][name] for name in first}
    checkpoint.save_checkpoint(str(tmp_path), 3, {**stored, "manifest": "m"}, keep=1)
    again = new_state()
    assert checkpoint.resume(str(tmp_path), again, "m")
    assert again.progress == state.progress
