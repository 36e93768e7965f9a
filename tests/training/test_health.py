"""What a run watches for: rows that cannot be read are counted and bounded, NaN is found where it begins."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch

from cxrscale.cli.progress import watch_run
from cxrscale.config import Recipe
from cxrscale.loader import training_batches
from cxrscale.shards import manifest
from cxrscale.training import checkpoint, health, launch, loop, run_info, tracking
from cxrscale.training.distributed import LocalWorker
from cxrscale.training.state import Progress
from cxrscale.types import Batch, DistContext, NonFiniteError, UserError
from tests.conftest import tiny
from tests.training.test_resume import assert_equal, final_state

EPOCHS = ("train.epochs=2", "sampler.steps_per_epoch=4")


def damage(shards: str, root: Path, every: dict[str, int]) -> str:
    """A copy of the dataset in which every n-th image of some splits has other bytes than its checksum says."""
    copy = root / "damaged"
    shutil.copytree(shards, copy)
    data = manifest.load(str(copy))
    for split, step in every.items():
        for row in data.rows(split)[::step].tolist():
            with (copy / data.column("shard")[row]).open("r+b") as tar:
                tar.seek(int(data.column("image_offset")[row]) + 20)
                tar.write(b"\xff" * 8)
    return str(copy)


def test_rows_that_cannot_be_read_are_counted_per_epoch_and_split(nih_shards: str, tmp_path: Path) -> None:
    shards = damage(nih_shards, tmp_path, {"train": 5, "val": 4})
    run = launch.launch(tiny(shards, tmp_path, *EPOCHS, "tracking.log_steps=2"), "tiny", watch_run, local=True)
    batches = training_batches(manifest.load(shards), tiny(shards, tmp_path, *EPOCHS))
    by_step = [8 - int(next(batches).valid_B.sum()) for _ in range(8)]
    batches.close()
    assert sum(by_step) > 4
    lines = tracking.read_log(run)
    counted = [line["bad_rows"] for line in lines if line["kind"] == "train"]
    assert counted == [sum(by_step[:2]), sum(by_step[:4]), sum(by_step[4:6]), sum(by_step[4:8])]
    epochs = [(line["bad_rows_train"], line["bad_rows_val"]) for line in lines if line["kind"] == "val"]
    assert epochs == [(sum(by_step[:4]), 2), (sum(by_step[4:]), 2)]
    assert [(rows.train, rows.val) for rows in run_info.read_run_info(run).bad_rows] == epochs


@pytest.mark.parametrize(
    ("every", "limit", "message"),
    [
        (
            {"train": 5},
            "2",
            r"data\.max_bad_rows=2: \d+ of the epoch's \d+ rows of training could not be read; `cx",
        ),
        ({"val": 4}, "1", r"data\.max_bad_rows=1: 2 of the epoch's 8 rows of validation could not be read"),
        ({"train": 1}, "null", r"data\.shards: 32 of the epoch's 32 rows of training could not be read"),
    ],
    ids=["train", "val", "all"],
)
def test_too_many_of_them_stop_the_run(
    every: dict[str, int], limit: str, message: str, nih_shards: str, tmp_path: Path
) -> None:
    shards = damage(nih_shards, tmp_path, every)
    with pytest.raises(UserError, match=message) as caught:
        launch.launch(tiny(shards, tmp_path, *EPOCHS, f"data.max_bad_rows={limit}"), "tiny", watch_run, local=True)
    info = run_info.read_run_info(str(tmp_path / "tiny"))
    assert (info.finished, info.diverged, info.error) == (False, False, str(caught.value))


def test_a_request_in_a_validation_is_seen_there_and_the_resume_begins_with_it(nih_shards: str, tmp_path: Path) -> None:
    recipe = tiny(nih_shards, tmp_path, *EPOCHS, "sampler.eval_batch_size=2")
    straight, broken = str(tmp_path / "straight"), str(tmp_path / "broken")
    loop.train(recipe, straight, LocalWorker("cpu"))

    class StoppedInValidation(LocalWorker):
        asked = 0

        def should_stop(self) -> bool:
            # Four steps, then four batches of the validation: in the third of them.
            self.asked += 1
            return self.asked == 7

    worker = StoppedInValidation("cpu")
    stopped = loop.train(recipe, broken, worker)
    assert (stopped.finished, worker.asked) == (False, 7)
    names = sorted(path.name[:14] for path in (tmp_path / "broken" / checkpoint.FOLDER).iterdir())
    assert names == ["step-000000004"]
    assert [line["kind"] for line in tracking.read_log(broken)] == ["train"] * 4
    assert loop.train(recipe, broken, LocalWorker("cpu")).finished
    assert_equal(final_state(broken), final_state(straight))
    kinds = [[(line["kind"], line["step"]) for line in tracking.read_log(run)] for run in (broken, straight)]
    assert kinds[0] == kinds[1]


def test_a_stop_between_two_log_lines_changes_no_line(nih_shards: str, tmp_path: Path) -> None:
    recipe = tiny(nih_shards, tmp_path, *EPOCHS, "tracking.log_steps=3")
    straight, broken = str(tmp_path / "straight"), str(tmp_path / "broken")
    loop.train(recipe, straight, LocalWorker("cpu"))

    class Stopped(LocalWorker):
        left = 2

        def should_stop(self) -> bool:
            self.left -= 1
            return self.left == 0

    assert not loop.train(recipe, broken, Stopped("cpu")).finished
    assert loop.train(recipe, broken, LocalWorker("cpu")).finished
    for name in ("step", "loss", "lr", "bad_rows"):
        values = [[line.get(name) for line in tracking.read_log(run)] for run in (broken, straight)]
        assert values[0] == values[1], name


def test_nan_scores_end_a_validation_by_name(nih_shards: str, tmp_path: Path) -> None:
    recipe = tiny(nih_shards, tmp_path, *EPOCHS)
    worker = LocalWorker("cpu")
    data, state = manifest.load(nih_shards), loop.build_state(recipe, worker.dist.device)
    context = loop.make_context(recipe, worker, data, state, 4, None)
    dict(state.model.named_parameters())["classifier.bias"].data[1] = math.nan
    with pytest.raises(NonFiniteError, match=r"the model's scores of 8 of 8 images are not finite"):
        loop.validate(state.model, context)
    with pytest.raises(NonFiniteError, match=r"^weight classifier\.bias is not finite after step 9 \(1 of \d+ tensors"):
        health.check_weights(state, 9, worker.dist)
    with pytest.raises(NonFiniteError, match=r"the loss is nan at step 1"):
        list(loop.train_epoch(context, state, training_batches(data, recipe)))


def test_the_loss_over_no_label_is_undefined_and_not_the_best(nih_shards: str, tmp_path: Path) -> None:
    recipe = tiny(nih_shards, tmp_path, *EPOCHS)
    worker = LocalWorker("cpu")
    data, state = manifest.load(nih_shards), loop.build_state(recipe, worker.dist.device)
    context = loop.make_context(recipe, worker, data, state, 4, None)

    def unlabeled(batches: Iterable[Batch], _context: object, _save: object) -> Iterator[Batch]:
        for batch in batches:
            batch.label_BF.fill_(math.nan)
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_interruptible", unlabeled)
        assert math.isnan(loop.validate(state.model, context)["loss"])


def recipe_of(steps: int) -> Recipe:
    return Recipe.model_validate({"sampler": {"batch_size": 4, "steps_per_epoch": steps}})


def test_the_first_step_that_is_not_finite_is_named() -> None:
    state_progress = Progress(step=3)
    window = health.Window(state_progress, recipe_of(10), 10, DistContext())
    for loss in (0.5, math.inf, math.nan):
        window.add(torch.tensor(loss), torch.tensor(0.0))
    with pytest.raises(NonFiniteError, match="the loss is inf at step 22: lower"):
        window.settle(23)
