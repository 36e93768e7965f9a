"""A run that is killed and started again ends in the same weights, bit for bit."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from cxrscale import config
from cxrscale.cli.progress import watch_run
from cxrscale.config import Recipe
from cxrscale.io import storage
from cxrscale.training import checkpoint, launch, loop, resume, run_info, tracking
from cxrscale.training.run_info import Change
from cxrscale.tuning.search_info import SearchInfo, read_search_info, write_search_info
from cxrscale.types import NonFiniteError, UserError
from tests.conftest import tiny
from tests.tiny import TINY_CLASSIFIER, TINY_SEGMENTER


def final_state(run: Path | str) -> dict[str, Any]:
    name = sorted((Path(run) / checkpoint.FOLDER).glob("step-*.pt"))[-1]
    state: dict[str, Any] = checkpoint.read(name.read_bytes(), name.name)
    return state


def assert_same_weights(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["model"].keys() == other["model"].keys()
    for name, value in one["model"].items():
        assert torch.equal(value, other["model"][name]), name
    moments, others = one["optimizer"]["state"], other["optimizer"]["state"]
    assert all(torch.equal(moments[n]["exp_avg_sq"], others[n]["exp_avg_sq"]) for n in moments)


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert_same_weights(one, other)
    # As text, because NaN (an undefined metric of so few images) is not equal to itself.
    assert repr(one["progress"]) == repr(other["progress"])


def killed_at(recipe: Recipe, folder: Path, step: int) -> None:
    """Train in a process of its own that is killed (SIGKILL) once `step` optimizer steps are done."""
    (folder / "recipe.yaml").write_text(config.to_yaml(recipe))
    script = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from cxrscale import config\n"
        "from cxrscale.training import launch, tracking\n"
        "from contextlib import nullcontext\n"
        "log = tracking.Tracker.log\n"
        "def log_and_print(self, kind, step, values):\n"
        "    log(self, kind, step, values); print(kind, step, flush=True)\n"
        f"    if kind == 'train' and step >= {step}: import time; time.sleep(60)\n"
        "tracking.Tracker.log = log_and_print\n"
        "recipe = config.load_recipe(sys.argv[1])\n"
        "launch.launch(recipe, 'tiny', lambda *_: nullcontext(), local=True)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, str(folder / "recipe.yaml")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.split() == ["train", str(step)]:
                break
        # Checkpoints are written while training goes on: the one before the kill may still be being written.
        deadline = time.monotonic() + 20
        while not checkpoints_of_step_6(folder / "tiny") and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)


def checkpoints_of_step_6(run: Path) -> list[Path]:
    return list((run / checkpoint.FOLDER).glob("step-000000006-*.pt"))


@pytest.mark.parametrize(
    ("base", "shards"), [(TINY_CLASSIFIER, "nih_shards"), (TINY_SEGMENTER, "siim_shards")], ids=["classify", "segment"]
)
def test_two_epochs_equal_one_and_a_kill_and_one(
    base: tuple[str, ...], shards: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    more = ("train.epochs=2", "sampler.steps_per_epoch=4", "train.checkpoint_steps=3", "augment.hflip=0.5")
    data = request.getfixturevalue(shards)
    straight = launch.launch(tiny(data, tmp_path / "straight", *more, base=base), "tiny", watch_run, local=True)
    broken = tiny(data, tmp_path / "broken", *more, base=base)
    (tmp_path / "broken").mkdir()
    # Step 7 of 8: the newest checkpoint is of step 6, in the middle of the second epoch.
    killed_at(broken, tmp_path / "broken", step=7)
    newest = sorted((tmp_path / "broken" / "tiny" / checkpoint.FOLDER).glob("step-*.pt"))[-1]
    assert "step-000000006" in newest.name
    run = launch.launch(broken, "tiny", watch_run, local=True)
    assert_equal(final_state(run), final_state(straight))
    assert [line["step"] for line in tracking.read_log(run)] == [line["step"] for line in tracking.read_log(straight)]


def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    nih_shards: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    more = ("train.epochs=2", "sampler.steps_per_epoch=4", "train.checkpoint_steps=3")
    straight = launch.launch(tiny(nih_shards, tmp_path / "straight", *more), "tiny", watch_run, local=True)
    broken = tiny(nih_shards, tmp_path / "broken", *more)
    (tmp_path / "broken").mkdir()
    killed_at(broken, tmp_path / "broken", step=7)
    newest = sorted((tmp_path / "broken" / "tiny" / checkpoint.FOLDER).glob("step-*.pt"))[-1]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    run = launch.launch(broken, "tiny", watch_run, local=True)
    assert "is damaged; falling back" in caplog.text
    assert_equal(final_state(run), final_state(straight))


@pytest.mark.smoke
def test_sigterm_writes_a_checkpoint_and_the_same_command_resumes(nih_shards: str, tmp_path: Path) -> None:
    more = ("train.epochs=2", "sampler.steps_per_epoch=4")
    straight = launch.launch(tiny(nih_shards, tmp_path / "straight", *more), "tiny", watch_run, local=True)
    broken = tiny(nih_shards, tmp_path / "broken", *more)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "recipe.yaml").write_text(config.to_yaml(broken))
    script = (
        "import os, signal, sys, torch; torch.set_num_threads(1)\n"
        "from cxrscale import config\n"
        "from cxrscale.training import launch, tracking\n"
        "from contextlib import nullcontext\n"
        "log = tracking.Tracker.log\n"
        "def log_and_signal(self, kind, step, values):\n"
        "    log(self, kind, step, values)\n"
        "    if step == 2: os.kill(os.getpid(), signal.SIGTERM)\n"
        "tracking.Tracker.log = log_and_signal\n"
        "launch.launch(config.load_recipe(sys.argv[1]), 'tiny', lambda *_: nullcontext(), local=True)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "broken" / "recipe.yaml")]
    subprocess.run(command, check=True)
    stopped = list((tmp_path / "broken" / "tiny" / checkpoint.FOLDER).glob("step-*.pt"))
    # The signal came after step 2, and is seen in the next one.
    assert [path.name[:14] for path in stopped] == ["step-000000003"]
    run = launch.launch(broken, "tiny", watch_run, local=True)
    assert_equal(final_state(run), final_state(straight))


def test_a_run_goes_on_with_fields_that_change_nothing_and_refuses_others(nih_shards: str, tmp_path: Path) -> None:
    more = ("train.epochs=1", "sampler.steps_per_epoch=2")
    launch.launch(tiny(nih_shards, tmp_path, *more), "tiny", watch_run, local=True)
    with pytest.raises(UserError) as caught:
        launch.launch(tiny(nih_shards, tmp_path, *more, "optim.lr=0.5"), "tiny", watch_run, local=True)
    assert str(caught.value) == (
        "run tiny was begun with another recipe: optim.lr=0.001 before, 0.5 now; give another tracking.name"
    )
    with pytest.raises(UserError, match=r"run tiny is finished; raise train\.epochs=1 to go on, give another"):
        launch.launch(tiny(nih_shards, tmp_path, *more, "loader.num_threads=1"), "tiny", watch_run, local=True)


def test_epochs_may_grow_and_the_sessions_say_what_changed(nih_shards: str, tmp_path: Path) -> None:
    more = ("sampler.steps_per_epoch=3", "train.epochs=2")
    straight = launch.launch(tiny(nih_shards, tmp_path / "straight", *more), "tiny", watch_run, local=True)
    grown = tmp_path / "grown"
    launch.launch(tiny(nih_shards, grown, *more, "train.epochs=1"), "tiny", watch_run, local=True)
    free = ("sampler.eval_batch_size=5", "train.keep_checkpoints=3", "tracking.log_steps=1")
    run = launch.launch(tiny(nih_shards, grown, *more, *free), "tiny", watch_run, local=True)
    ended, expected = final_state(run), final_state(straight)
    assert_same_weights(ended, expected)
    # Some CPUs compute a forward pass of 5 images with other kernels than one of 8: the last bit of the loss differs.
    for epoch, same in zip(ended["progress"]["history"], expected["progress"]["history"], strict=True):
        assert epoch == pytest.approx(same, rel=1e-6, nan_ok=True)
    info = run_info.read_run_info(run)
    assert (info.finished, info.epochs, info.error) == (True, 2, None)
    assert [dict(session.changed) for session in info.sessions] == [
        {},
        {
            "sampler.eval_batch_size": Change(old=8, new=5),
            "train.epochs": Change(old=1, new=2),
            "train.keep_checkpoints": Change(old=2, new=3),
        },
    ]
    with pytest.raises(UserError, match=r"train\.epochs=1: run tiny was begun with 2, which may only grow"):
        launch.launch(tiny(nih_shards, grown, *more, "train.epochs=1"), "tiny", watch_run, local=True)


def test_a_run_killed_before_its_recipe_and_a_search_of_that_name(nih_shards: str, tmp_path: Path) -> None:
    recipe = tiny(nih_shards, tmp_path, "train.epochs=1", "sampler.steps_per_epoch=1")
    run = storage.join(recipe.tracking.runs_dir, "tiny")
    run_info.write_new(run, run_info.RunInputs(manifest="m"))
    assert resume.prepare(recipe, run_info.RunInputs(manifest="m"), run) == {}
    storage.write(storage.join(run, resume.SEARCH_INFO), "{}")
    with pytest.raises(UserError, match=r"tiny is a search; give another tracking\.name"):
        resume.prepare(recipe, run_info.RunInputs(manifest="m"), run)


def test_the_file_of_a_search_is_known_by_its_name(nih_shards: str, tmp_path: Path) -> None:
    recipe = tiny(nih_shards, tmp_path)
    run = storage.join(recipe.tracking.runs_dir, "tiny")
    search = SearchInfo(manifest="m", **dict(run_info.environment()))
    write_search_info(run, search)
    assert read_search_info(run) == search
    with pytest.raises(UserError, match=r"tiny is a search; give another tracking\.name"):
        resume.prepare(recipe, run_info.RunInputs(manifest="m"), run)


class Diverging:
    """Makes the gradient of one step infinite; the loss of that step is finite, those after it are not."""

    def __init__(self, step: int) -> None:
        self.left = step
        self.backward = torch.autograd.backward

    def __call__(self, loss: torch.Tensor) -> None:
        self.left -= 1
        self.backward(loss * float("inf") if self.left == 0 else loss)


def test_what_is_not_finite_ends_the_run_and_a_lower_rate_goes_on(
    nih_shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("train.epochs=2", "sampler.steps_per_epoch=4", "train.checkpoint_steps=3", "tracking.log_steps=4")
    recipe = tiny(nih_shards, tmp_path, *more)
    # The seventh pass, since preflight does one. Step 6 writes a checkpoint, step 8 the next log line: the weights are
    # looked at before the checkpoint is written.
    monkeypatch.setattr(torch.autograd, "backward", Diverging(7))
    with pytest.raises(
        NonFiniteError, match=r"^weight \S+ is not finite after step 6 \(\d+ of \d+ tensors are not\): lower"
    ):
        launch.launch(recipe, "tiny", watch_run, local=True)
    monkeypatch.undo()
    run = tmp_path / "tiny"
    kept = sorted(path.name[:14] for path in (run / checkpoint.FOLDER).glob("step-*.pt"))
    assert kept == ["step-000000003", "step-000000004"]
    info = run_info.read_run_info(str(run))
    assert (info.finished, info.diverged) == (False, True)
    assert info.error == info.sessions[0].error
    assert "is not finite after step 6" in str(info.error)
    with pytest.raises(UserError, match=r"optim\.betas=\[0\.9, 0\.999\] before, \[0\.5, 0\.9\] now"):
        launch.launch(tiny(nih_shards, tmp_path, *more, "optim.betas=[0.5, 0.9]"), "tiny", watch_run, local=True)
    slower = tiny(nih_shards, tmp_path, *more, "optim.lr=1e-4")
    assert launch.launch(slower, "tiny", watch_run, local=True) == str(run)
    info = run_info.read_run_info(str(run))
    assert (info.finished, info.diverged, info.error) == (True, False, None)
    assert dict(info.sessions[1].changed) == {"optim.lr": Change(old=1e-3, new=1e-4)}
    lines = [line for line in tracking.read_log(str(run)) if line["kind"] == "train"]
    assert [(line["step"], line["lr"]) for line in lines] == [(4, 1e-3), (8, 1e-4)]


def test_a_checkpoint_of_nan_weights_is_passed_over(
    nih_shards: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Earlier versions wrote such files.
    recipe = tiny(nih_shards, tmp_path, "train.epochs=1", "sampler.steps_per_epoch=1")
    folder = str(tmp_path / "checkpoints")
    for step, value in ((1, 0.5), (2, float("nan"))):
        state = loop.build_state(recipe, torch.device("cpu"))
        dict(state.model.named_parameters())["classifier.bias"].data.fill_(value)
        state.progress.step = step
        checkpoint.save_checkpoint(folder, step, {**state.state_dict(), "manifest": "m"}, keep=2)
    again = loop.build_state(recipe, torch.device("cpu"))
    assert checkpoint.resume(folder, again, "m")
    assert again.progress.step == 1
    assert "holds infinite or NaN weights; falling back" in caplog.text
