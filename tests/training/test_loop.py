"""The loop: its pure parts, its fast paths against the plain one, and the epoch that it keeps."""

from __future__ import annotations

import itertools
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cxrscale import config
from cxrscale.config import Optim, Recipe
from cxrscale.io import storage
from cxrscale.loader.loader import usable_rows
from cxrscale.models import losses
from cxrscale.shards import manifest
from cxrscale.shards.splits import refuse_leaks
from cxrscale.training import checkpoint, loop, optim, tracking
from cxrscale.training.distributed import LocalWorker, Requests
from cxrscale.training.loop import TrainContext, microbatches, update_progress
from cxrscale.training.optim import learning_rate
from cxrscale.training.state import Progress, TrainState
from cxrscale.types import Batch, NonFiniteError, UserError
from tests.conftest import tiny
from tests.tiny import TINY_SEGMENTER
from tests.training.test_distributed import GlooWorker
from tests.training.test_resume import assert_equal, final_state


def resolve(*overrides: str) -> Recipe:
    return config.parse(Recipe, config.override({}, overrides), where="test")


def test_warmup_then_cosine_to_zero() -> None:
    optim = Optim(lr=1.0, schedule="cosine", warmup_steps=4)
    lrs = [learning_rate(optim, step, total=104) for step in range(105)]
    assert lrs[:4] == [0.25, 0.5, 0.75, 1.0]
    assert lrs[54] == pytest.approx(0.5)
    assert lrs[104] == pytest.approx(0.0)


def test_the_learning_rate_falls_tenfold_at_a_plateau_and_the_best_is_kept() -> None:
    recipe = resolve("optim.schedule=plateau", "train.monitor=loss")
    progress = Progress()
    improved = [update_progress(progress, {"loss": loss}, recipe) for loss in (1.0, 0.8, 0.9, 0.7, 0.7)]
    assert improved == [True, True, False, True, False]
    assert progress.best == 0.7
    assert progress.lr_scale == pytest.approx(0.01)
    assert progress.bad_epochs == 1


def test_an_undefined_metric_never_is_the_best_but_the_first_epoch_is_kept() -> None:
    recipe = resolve()
    progress = Progress()
    assert update_progress(progress, {"auroc": math.nan}, recipe)
    assert not update_progress(progress, {"auroc": math.nan}, recipe)
    assert update_progress(progress, {"auroc": 0.6}, recipe)
    assert not update_progress(progress, {"auroc": math.nan}, recipe)
    assert progress.best == 0.6


def refuse(patients: list[str], split: list[str], *overrides: str) -> None:
    refuse_leaks(np.array(split, dtype=object), patients, resolve(*overrides).data)


def test_a_patient_in_two_splits_is_refused_unless_allowed() -> None:
    with pytest.raises(
        UserError, match=r"1 patients are in more than one of train, val and test, e\.g\. a; .*data.allow_leaks=true"
    ):
        refuse(["a", "b", "a"], ["train", "train", "test"])
    refuse(["a", "b", "a"], ["train", "train", "test"], "data.allow_leaks=true")
    refuse(["a", "b", "a"], ["train", "test", "train"])
    # Splits that the recipe does not use do not matter.
    refuse(["a", "a"], ["train", "fold9"])
    # Folds that are trained on together may share a patient; training and validation may not.
    folds = ["a", "a", "b"], ["fold1", "fold2", "fold0"]
    several = ("data.train_split=[fold1, fold2]", "data.val_split=fold0", "data.test_split=none")
    refuse(*folds, *several)
    with pytest.raises(UserError, match="1 patients are"):
        refuse(*folds, *several, "data.val_split=fold2")


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [
        ("auroc.Effusion", (0.6, 0.8, 0.7), 1),
        ("f1.Mass", (0.5, 0.4, 0.6), 2),
        ("dice_positives", (0.1, 0.1, 0.1), 0),
        ("brier", (0.3, 0.1, 0.2), 1),
        ("loss", (0.3, 0.2, 0.1), 2),
        ("auprc", (math.nan, 0.2, 0.1), 1),
    ],
)
def test_the_best_epoch_by_any_metric(metric: str, values: tuple[float, ...], best: int) -> None:
    task = ("data.task=segment", "data.findings=[Pneumothorax]") if metric.startswith("dice") else ()
    recipe, progress = resolve(f"train.monitor={metric}", *task), Progress()
    # Another metric of the same epochs goes the other way.
    improved = [update_progress(progress, {metric: value, "other": -value}, recipe) for value in values]
    assert max(epoch for epoch, better in enumerate(improved) if better) == best
    assert progress.best == values[best]
    assert progress.bad_epochs == len(values) - 1 - best


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.sampled_from(["auroc", "brier"]))
def test_the_best_is_the_extreme_and_patience_counts_from_it(values: list[float], metric: str) -> None:
    recipe, progress = resolve(f"train.monitor={metric}"), Progress()
    for value in values:
        update_progress(progress, {metric: value}, recipe)
    extreme = min(values) if metric == "brier" else max(values)
    assert progress.best == extreme
    assert progress.bad_epochs == len(values) - 1 - values.index(extreme)


@given(st.integers(1, 20), st.integers(1, 24), st.booleans())
def test_microbatches_put_together_are_the_batch(rows: int, count: int, masked: bool) -> None:
    batch = random_batch(rows, segment=masked)
    parts = microbatches(batch, count)
    sizes = [len(part.row_B) for part in parts]
    assert len(parts) == min(count, rows)
    assert max(sizes) - min(sizes) <= 1
    for name in ("image_BCHW", "label_BF", "row_B", "valid_B", "mask_B1HW"):
        total, split = getattr(batch, name), [getattr(part, name) for part in parts]
        if total is None:
            assert split == [None] * len(parts)
        else:
            torch.testing.assert_close(torch.cat(split), total, rtol=0, atol=0, equal_nan=True)


def random_batch(rows: int, segment: bool = False, seed: int = 0) -> Batch:
    """Random images; a third of the labels NaN, the last of several rows padding."""
    draw = torch.Generator().manual_seed(seed)
    label = torch.rand(rows, 1 if segment else 3, generator=draw)
    label = torch.where(label < 1 / 3, torch.nan, (label > 2 / 3).float())
    mask = (torch.rand(rows, 1, 12, 12, generator=draw) > 0.7).float() if segment else None
    valid = torch.ones(rows, dtype=torch.bool)
    valid[-1] = rows == 1
    return Batch(torch.randn(rows, 1, 12, 12, generator=draw), label, mask, torch.arange(rows), valid)


def random_model(segment: bool) -> nn.Module:
    """Without batch normalization, which sees microbatches instead of the batch."""
    torch.manual_seed(1)
    tail: tuple[nn.Module, ...] = (nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    if segment:
        tail = (nn.Conv2d(4, 1, 1),)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GELU(), *tail)


def steps_of(segment: bool, *overrides: str, count: int = 3) -> tuple[TrainState, list[float]]:
    """The state after some steps of the real loop over random batches, and each step's loss."""
    task = ("data.task=segment", "data.findings=[Pneumothorax]", "loss.dice=1") if segment else ()
    labels = () if segment else ("data.findings=[Effusion, Mass, Edema]",)
    recipe = resolve(*task, *labels, "optim.name=sgd", "optim.lr=0.1", "tracking.log_steps=1", *overrides)
    model, worker = random_model(segment), LocalWorker("cpu")
    optimizer, ema = optim.build_optimizer(model, recipe.optim), optim.build_ema(model, recipe.optim)
    state = TrainState(model, optimizer, ema, Progress())
    weights = losses.class_weights(recipe.loss, np.zeros((1, 1 if segment else 3), np.float32), worker.dist.device)
    mode = recipe.train.compile
    compiled: Any = torch.compile(model, mode=mode) if mode == "default" else model
    tracker = FakeTracker()
    nothing: Any = None
    requests = Requests(worker)
    context = TrainContext(recipe, worker, nothing, model, compiled, weights, count, tracker, requests)  # type: ignore[arg-type]
    for _ in loop.train_epoch(context, state, (random_batch(10, segment, seed) for seed in itertools.count())):
        pass
    return state, tracker.losses


class FakeTracker:
    """Keeps the losses that the loop logs."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def log(self, _kind: str, _step: int, values: dict[str, float]) -> None:
        self.losses.append(values["loss"])

    def samples(self, image_BCHW: object) -> None:
        pass


@pytest.mark.parametrize("segment", [False, True], ids=["classify", "segment"])
def test_accumulation_changes_neither_loss_nor_weights(segment: bool) -> None:
    plain, plain_losses = steps_of(segment)
    for count in (3, 4, 10):
        accumulated, accumulated_losses = steps_of(segment, f"optim.grad_accum_steps={count}")
        assert accumulated_losses == pytest.approx(plain_losses, rel=1e-5)
        for ours, theirs in zip(accumulated.model.parameters(), plain.model.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_gradient_is_clipped_to_the_maximum_norm() -> None:
    torch.manual_seed(1)
    start = [parameter.detach().clone() for parameter in random_model(False).parameters()]
    state, _ = steps_of(False, "optim.max_grad_norm=1e-3", "optim.betas=[0, 0.9]", count=1)
    moved = torch.cat([(a - b).flatten() for a, b in zip(state.model.parameters(), start, strict=True)])
    assert float(moved.detach().norm()) == pytest.approx(0.1 * 1e-3, rel=1e-2)


@pytest.mark.parametrize("segment", [False, True], ids=["classify", "segment"])
def test_bf16_autocast_is_on_and_close_to_fp32(segment: bool) -> None:
    _, plain = steps_of(segment)
    _, half = steps_of(segment, "train.precision=bf16")
    assert all(math.isfinite(loss) for loss in half)
    assert half != plain
    assert half == pytest.approx(plain, rel=0.02)


@pytest.mark.slow
def test_a_compiled_model_learns_the_same() -> None:
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        pytest.skip("torch.compile on a CPU needs a C++ compiler")
    plain, plain_losses = steps_of(False)
    compiled, compiled_losses = steps_of(False, "train.compile=default")
    assert compiled_losses == pytest.approx(plain_losses, rel=1e-5)
    for ours, theirs in zip(compiled.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_loss_that_is_not_finite_ends_the_run() -> None:
    with pytest.raises(NonFiniteError, match=r"the loss is (nan|inf) at step \d+: lower optim.lr"):
        steps_of(False, "optim.lr=1e30", count=6)


class StoppingWorker(LocalWorker):
    """Asks for a stop at the `after`-th check: one per step, and per batch of a validation."""

    def __init__(self, after: int) -> None:
        super().__init__("cpu")
        self.left = after

    def should_stop(self) -> bool:
        self.left -= 1
        return self.left == 0


def validated(recipe: Recipe, weights: dict[str, torch.Tensor]) -> dict[str, float]:
    """The validation metrics of these weights."""
    worker = LocalWorker("cpu")
    data, state = manifest.load(*recipe.data.shards), loop.build_state(recipe, worker.dist.device)
    state.model.load_state_dict(weights)
    return loop.validate(state.model, loop.make_context(recipe, worker, data, state, 1, None))


def test_the_moving_average_is_validated_and_kept_and_resumes_bit_for_bit(nih_shards: str, tmp_path: Path) -> None:
    more = (
        "optim.ema_decay=0.8",
        "train.epochs=2",
        "sampler.steps_per_epoch=3",
        "augment.hflip=0.5",
        "train.monitor=loss",
    )
    recipe = tiny(nih_shards, tmp_path, *more)
    straight, broken = str(tmp_path / "straight"), str(tmp_path / "broken")
    assert loop.train(recipe, straight, LocalWorker("cpu")).finished
    # In the middle of the second epoch.
    stopped = loop.train(recipe, broken, StoppingWorker(6))
    assert (stopped.finished, stopped.progress.epoch, stopped.progress.step) == (False, 1, 2)
    assert loop.train(recipe, broken, LocalWorker("cpu")).finished
    one, other = final_state(straight), final_state(broken)
    assert_equal(one, other)
    for name, value in one["average"].items():
        assert torch.equal(value, other["average"][name]), name
    best = checkpoint.read(storage.read(storage.join(straight, checkpoint.BEST)), "best.pt")
    assert best["epoch"] == 2
    weight = "classifier.weight"
    assert torch.equal(best["model"][weight], one["average"][f"module.{weight}"])
    assert not torch.equal(best["model"][weight], one["model"][weight])
    logged = [line for line in tracking.read_log(straight) if line["kind"] == "val"][-1]
    assert logged["loss"] == pytest.approx(validated(recipe, best["model"])["loss"], rel=1e-6)
    assert logged["loss"] != pytest.approx(validated(recipe, one["model"])["loss"], rel=1e-6)


@pytest.mark.parametrize("metric", ["auroc.Effusion", "brier"])
def test_a_run_stops_early_and_keeps_the_best_by_its_metric(metric: str, nih_shards: str, tmp_path: Path) -> None:
    more = (
        "train.epochs=8",
        "sampler.steps_per_epoch=2",
        "train.patience=2",
        "optim.lr=0.05",
        f"train.monitor={metric}",
    )
    result = loop.train(tiny(nih_shards, tmp_path, *more), str(tmp_path / "run"), LocalWorker("cpu"))
    values = [line[metric] for line in tracking.read_log(str(tmp_path / "run")) if line["kind"] == "val"]
    sign = -1 if metric == "brier" else 1
    bests = [min(range(1 + e), key=lambda b: -sign * values[b]) for e in range(len(values))]
    stale_epochs = [epoch - best for epoch, best in enumerate(bests)]
    expected = stale_epochs.index(2) + 1 if 2 in stale_epochs else 8
    assert result.finished
    assert len(values) == result.progress.epoch == expected
    best = checkpoint.read((tmp_path / "run" / checkpoint.BEST).read_bytes(), "best.pt")
    assert best["epoch"] == bests[-1] + 1
    assert best["metrics"][metric] == values[bests[-1]]


@pytest.mark.parametrize("frozen", ["model.freeze_children=2", "model.freeze_prefixes=[conv1, bn1]"])
def test_frozen_parts_keep_weights_and_statistics(frozen: str, nih_shards: str, tmp_path: Path) -> None:
    model = ("model.arch=resnet10t", "model.options={stem_type: ''}", frozen)
    recipe = tiny(nih_shards, tmp_path, *model, "train.epochs=2", "sampler.steps_per_epoch=2")
    initial = loop.build_state(recipe, torch.device("cpu")).model.state_dict()
    before = {name: value.clone() for name, value in initial.items()}
    loop.train(recipe, str(tmp_path / "run"), LocalWorker("cpu"))
    after = final_state(tmp_path / "run")["model"]
    frozen_names = [name for name in before if name.startswith(("conv1.", "bn1."))]
    assert {"conv1.weight", "bn1.running_mean", "bn1.running_var"} <= set(frozen_names)
    for name in before:
        assert torch.equal(after[name], before[name]) == (name in frozen_names), name


def _validate_on_a_rank(rank: int, folder: str, world: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    for path in sorted(Path(folder).glob("*.yaml")):
        recipe = config.load_recipe(path)
        worker = GlooWorker(rank, world)
        data, state = manifest.load(*recipe.data.shards), loop.build_state(recipe, worker.dist.device)
        result = loop.validate(state.model, loop.make_context(recipe, worker, data, state, 1, None))
        torch.save(result, Path(folder) / f"{path.stem}-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_validation_is_the_same_on_one_and_on_two_workers(nih_shards: str, siim_shards: str, tmp_path: Path) -> None:
    # Neither 8 nor 16 divides the images: some rows are padding.
    odd = ("sampler.eval_batch_size=8", "data.val_split=train")
    recipes = {
        "classify": tiny(nih_shards, tmp_path, *odd),
        "segment": tiny(siim_shards, tmp_path, *odd, base=TINY_SEGMENTER),
    }
    for name, recipe in recipes.items():
        (tmp_path / f"{name}.yaml").write_text(config.to_yaml(recipe))
        data = manifest.load(*recipe.data.shards)
        assert len(usable_rows(data, recipe.data.val_split, recipe.data)) % 8
    mp.spawn(_validate_on_a_rank, args=(str(tmp_path), 2), nprocs=2)  # type: ignore[attr-defined,no-untyped-call]
    for name, recipe in recipes.items():
        alone = validated(recipe, loop.build_state(recipe, torch.device("cpu")).model.state_dict())
        for rank in range(2):
            assert torch.load(tmp_path / f"{name}-{rank}.pt") == pytest.approx(alone, rel=1e-6, nan_ok=True)
