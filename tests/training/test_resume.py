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
from cxrscale.training import checkpoint, launch, tracking
from cxrscale.types import UserError
from tests.conftest import TINY_CLASSIFIER, TINY_SEGMENTER, tiny


def final_state(run: Path | str) -> dict[str, Any]:
    name = sorted((Path(run) / checkpoint.FOLDER).glob("step-*.pt"))[-1]
    state: dict[str, Any] = checkpoint.read(name.read_bytes(), name.name)
    return state


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["model"].keys() == other["model"].keys()
    for name, value in one["model"].items():
        assert torch.equal(value, other["model"][name]), name
    moments, others = one["optimizer"]["state"], other["optimizer"]["state"]
    assert all(torch.equal(moments[n]["exp_avg_sq"], others[n]["exp_avg_sq"]) for n in moments)
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
    assert [path.name[:14] for path in stopped] == ["step-000000002"]
    run = launch.launch(broken, "tiny", watch_run, local=True)
    assert_equal(final_state(run), final_state(straight))


def test_an_unfinished_run_refuses_other_settings(nih_shards: str, tmp_path: Path) -> None:
    more = ("train.epochs=1", "sampler.steps_per_epoch=2")
    launch.launch(tiny(nih_shards, tmp_path, *more), "tiny", watch_run, local=True)
    with pytest.raises(UserError, match="exists with other settings in optim"):
        launch.launch(tiny(nih_shards, tmp_path, *more, "optim.lr=0.5"), "tiny", watch_run, local=True)
    with pytest.raises(UserError, match="is finished; give another"):
        launch.launch(tiny(nih_shards, tmp_path, *more), "tiny", watch_run, local=True)
