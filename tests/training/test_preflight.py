"""Before anything starts: what cannot be trained is refused, what is odd is said in numbers, the rest trains."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cxrscale import config
from cxrscale.config import Recipe
from cxrscale.models import build_model
from cxrscale.shards import manifest
from cxrscale.training import launch, loop, preflight, tracking
from cxrscale.training.distributed import LocalWorker
from cxrscale.types import UserError
from tests.conftest import tiny
from tests.small_datasets import MakeShards, rewrite_manifest
from tests.tiny import TINY_CLASSIFIER, TINY_SEGMENTER

JOBS = sorted((Path(__file__).parents[2] / "jobs").glob("*.yaml"))


def resolve(*overrides: str) -> Recipe:
    return config.parse(Recipe, config.override({}, overrides), where="test")


def refusal(recipe: Recipe, workers: int = 1) -> str:
    with pytest.raises(UserError) as caught:
        preflight.check(recipe, manifest.load(*recipe.data.shards), workers)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "workers", "message"),
    [
        (
            ("sampler.batch_size=1", "augment.size=32"),
            1,
            "model.arch=densenet121 cannot train on 1 image of 32 x 32 pixels per forward pass: batch normalization "
            "needs more than one value per channel; raise sampler.batch_size=1 (1 workers and optim.grad_accum_steps=1 "
            "share it), or augment.size",
        ),
        (("sampler.batch_size=5", "augment.size=32", "optim.grad_accum_steps=2"), 2, "cannot train on 1 image of"),
        (("model.arch=vit_tiny_patch16_224", "augment.size=80"), 1, "Input height (80) doesn't match model (224)"),
        (
            (
                "data.findings=[Mass]",
                "data.task=segment",
                "model.arch=Unet",
                "model.options={aux_params: {classes: 1}}",
            ),
            1,
            "cannot train on 16 images of 224 x 224 pixels per forward pass: 'tuple' object has no attribute",
        ),
    ],
)
def test_a_model_that_cannot_do_a_step_is_refused(overrides: tuple[str, ...], workers: int, message: str) -> None:
    with pytest.raises(UserError) as caught:
        preflight.try_step(resolve("model.weights=none", *overrides), workers)
    assert message in str(caught.value)


def test_parameters_without_a_gradient_are_named_for_several_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    build = build_model

    def with_an_unused_branch(*arguments: Any) -> torch.nn.Module:
        model = build(*arguments)
        model.branch = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        return model

    monkeypatch.setattr(preflight, "build_model", with_an_unused_branch)
    recipe = resolve(*TINY_CLASSIFIER)
    preflight.try_step(recipe, workers=1)
    with pytest.raises(UserError) as caught:
        preflight.try_step(recipe, workers=2)
    assert str(caught.value) == (
        "model.arch=densenet121: 4 parameters get no gradient, which several workers cannot train (branch.0.weight, "
        "branch.0.bias, branch.1.weight, branch.1.bias); set model.freeze_prefixes=[branch] or scaling.num_workers=1"
    )


def test_labels_that_loss_or_monitor_need_are_counted_first(make_shards: MakeShards, tmp_path: Path) -> None:
    # Effusion: one in three. Mass: absent or unlabeled. Validation is every third image, all without Effusion.
    data = make_shards()
    root = str(data.table["root"][0])
    mass = tiny(root, tmp_path, "data.findings=[Effusion, Mass]", "loss.class_balance=true", "train.monitor=loss")
    assert refusal(mass) == (
        "loss.class_balance: Mass is absent in all 13 labeled images of split train, so that its weights are 0 and 1 "
        "and nothing is learned; set loss.class_balance=false, or leave the finding out"
    )
    for monitor in ("auroc", "auroc.Effusion", "f1"):
        undefined = tiny(root, tmp_path, "data.findings=[Effusion, Mass]", f"train.monitor={monitor}")
        assert f"train.monitor={monitor} is undefined on split val: Effusion is present in 0" in refusal(undefined)
    fine = tiny(root, tmp_path, "data.findings=[Effusion]", "train.monitor=loss")
    assert preflight.check(fine, data, 1) == []
    assert preflight.check(mass.model_copy(update={"loss": fine.loss}), data, 1) == [
        "Mass is absent in all 13 labeled training images: nothing tells them apart"
    ]


def test_a_finding_without_a_label_is_refused(make_shards: MakeShards, tmp_path: Path) -> None:
    data = make_shards()
    columns = {name: data.table[name] for name in data.table.column_names if name != "root"}
    columns["label.Mass"] = pa.nulls(len(data), pa.int8())
    root = str(data.table["root"][0])
    rewrite_manifest(root, pa.table(columns), data.metadata[0])
    message = refusal(tiny(root, tmp_path, "data.findings=[Effusion, Mass]", "train.monitor=loss"))
    assert message.startswith("data.findings: none of the 16 images of split train is labeled for Mass; leave it out")


def test_correcting_twice_is_said_in_numbers(nih_shards: str, tmp_path: Path) -> None:
    data = manifest.load(nih_shards)
    findings = ("data.findings=[Mass]", "data.val_split=train")
    one = (*findings, "sampler.sampling=balanced")
    assert preflight.check(tiny(nih_shards, tmp_path, *one), data, 1) == []
    assert preflight.check(tiny(nih_shards, tmp_path, *findings, "loss.class_balance=true"), data, 1) == []
    (sentence,) = preflight.check(tiny(nih_shards, tmp_path, *one, "loss.class_balance=true"), data, 1)
    train = data.labels(["Mass"])[data.rows("train")]
    prevalence = float((train == 1).mean())
    assert sentence == (
        f"sampler.sampling=balanced and the weights of the loss correct twice: Mass is in {prevalence:.3f} of the "
        f"training images and in 0.500 of those sampled, times {1 - prevalence:.3g} against {prevalence:.3g}; the best "
        f"constant prediction becomes {1 - prevalence:.3f}. Drop one of them"
    )


def test_what_changes_nothing_or_hardly_can_be_meant_is_said(nih_shards: str, tmp_path: Path) -> None:
    more = (
        "loss.focal_gamma=3",
        "optim.plateau_factor=0.5",
        "train.epochs=2",
        "sampler.steps_per_epoch=5",
        "optim.warmup_steps=40",
        "optim.ema_decay=0.999",
    )
    assert preflight.check(tiny(nih_shards, tmp_path, *more), manifest.load(nih_shards), 1) == [
        "loss.focal_gamma changes nothing: it needs loss.focal above 0",
        "optim.plateau_factor changes nothing: it needs optim.schedule=plateau",
        "optim.warmup_steps=40 is no less than the run's 10 steps: the learning rate ends at 0.00025 instead of 0.001",
        "optim.ema_decay=0.999: after the run's 10 steps, 99% of the average are still the initial weights; lower it",
    ]


def test_one_process_needs_one_image_per_batch_whatever_the_number_of_workers(nih_shards: str, tmp_path: Path) -> None:
    recipe = tiny(nih_shards, tmp_path, "sampler.batch_size=1", "scaling.num_workers=2")
    assert launch.preflight(recipe, workers=1).manifest
    with pytest.raises(UserError, match=r"sampler.batch_size=1 is less than 2 workers; raise it, or lower scaling"):
        launch.preflight(recipe)


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_every_recipe_does_a_step_and_warns_of_nothing(
    path: Path, nih_shards: str, siim_shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "_meta_step", _once)
    recipe = config.load_recipe(path)
    data = manifest.load(siim_shards if "siim" in path.stem or recipe.data.task == "segment" else nih_shards)
    # Labels of 80 drawn images say nothing of the recipe: those checks have tests of their own.
    sampling = {"sampling": "all", "hard_predictions": None, "hard_repeats": 2}
    if recipe.sampler.sampling == "hard":
        recipe = recipe.model_copy(update={"sampler": recipe.sampler.model_copy(update=sampling)})
    preflight.try_step(recipe, recipe.scaling.workers[1])
    said = [sentence for sentence in preflight.warnings(recipe, data) if "nothing tells them apart" not in sentence]
    # Eighty images make short runs.
    assert [sentence for sentence in said if "steps" not in sentence] == []


_step = preflight._meta_step
_tried: set[str] = set()


def _once(model: torch.nn.Module, recipe: Recipe, rows: int) -> None:
    """One pass per model: some recipes share one."""
    key = repr((recipe.model, recipe.data.task, recipe.augment.size, len(recipe.data.findings)))
    if key not in _tried:
        _tried.add(key)
        _step(model, recipe, rows)


CHOICES: dict[str, list[str]] = {
    "sampler.batch_size": ["1", "2", "3", "8"],
    "sampler.sampling": ["all", "positives", "balanced", "ratio"],
    "optim.grad_accum_steps": ["1", "2", "5"],
    "optim.name": ["adam", "adamw", "sgd"],
    "optim.lr": ["1e-5", "1e-2"],
    "optim.betas": ["[0, 0]", "[0.9, 0.999]", "[0.5, 0.9999]"],
    "optim.schedule": ["constant", "cosine", "plateau"],
    "optim.warmup_steps": ["0", "2", "50"],
    "optim.max_grad_norm": ["null", "1"],
    "optim.ema_decay": ["null", "0.5", "0.9999"],
    "optim.weight_decay": ["0", "0.1"],
    "augment.size": ["32", "40", "48", "64"],
    "augment.hflip": ["0", "0.5"],
    "loss.bce": ["0", "1"],
    "loss.focal": ["0", "1"],
    "loss.focal_gamma": ["0", "0.5", "4"],
    "loss.asymmetric": ["0", "0.5"],
    "loss.cost_matrix_weight": ["0", "1"],
    "loss.class_balance": ["false", "true"],
    "train.precision": ["fp32", "bf16"],
}
CLASSIFY = {
    "model.arch": ["resnet10t", "densenet121", "vit_tiny_patch16_224", "test_efficientnet"],
    "train.monitor": ["loss", "auroc", "auroc.Mass", "f1.Hernia", "auprc", "brier"],
    "data.findings": ["[Mass]", "[Mass, Hernia]", "[Cardiomegaly, Effusion, Mass]"],
}
SEGMENT = {
    "model.arch": ["Unet", "FPN", "DeepLabV3Plus", "PSPNet"],
    "train.monitor": ["loss", "dice", "dice_positives", "iou", "auroc"],
    "loss.dice": ["0", "1"],
    "loss.lovasz": ["0", "1"],
}


@functools.cache
def base_of(segment: bool) -> tuple[str, ...]:
    base = TINY_SEGMENTER if segment else TINY_CLASSIFIER
    return tuple(word for word in base if not word.startswith("model.options"))


def random_overrides(segment: bool) -> st.SearchStrategy[dict[str, str]]:
    choices = CHOICES | (SEGMENT if segment else CLASSIFY)
    return st.fixed_dictionaries({name: st.sampled_from(values) for name, values in choices.items()})


def passes_or_is_refused(overrides: dict[str, str], segment: bool, shards: str, root: Path) -> bool:
    """Whatever passes takes its first three steps and one validation, with finite losses."""
    words = [f"{name}={value}" for name, value in overrides.items()]
    more = ("sampler.steps_per_epoch=3", "train.epochs=1", "tracking.log_steps=1", "loader.backend=opencv")
    try:
        recipe = tiny(shards, root, *words, *more, base=base_of(segment))
        preflight.check(recipe, manifest.load(shards), 1)
    except UserError:
        return False
    run = str(root / "run")
    assert loop.train(recipe, run, LocalWorker("cpu")).finished
    lines = tracking.read_log(run)
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3]
    assert all(line["loss"] is not None for line in lines)
    assert [line[recipe.train.monitor] for line in lines if line["kind"] == "val"] != [None]
    return True


def many_recipes(count: int, shards: dict[bool, str], factory: pytest.TempPathFactory) -> list[bool]:
    outcomes: list[bool] = []

    @settings(max_examples=count, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.booleans().flatmap(lambda segment: st.tuples(st.just(segment), random_overrides(segment))))
    def run(drawn: tuple[bool, dict[str, str]]) -> None:
        segment, overrides = drawn
        root = factory.mktemp("random")
        outcomes.append(passes_or_is_refused(overrides, segment, shards[segment], root))

    run()
    return outcomes


def test_what_passes_takes_its_first_three_steps(
    nih_shards: str, siim_shards: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert many_recipes(4, {False: nih_shards, True: siim_shards}, tmp_path_factory)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_what_passes_takes_its_first_three_steps_for_many_recipes(
    nih_shards: str, siim_shards: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outcomes = many_recipes(150, {False: nih_shards, True: siim_shards}, tmp_path_factory)
    # Neither everything nor nothing is refused.
    assert 0.1 < sum(outcomes) / len(outcomes) < 0.9
    print(f"{sum(outcomes)} of {len(outcomes)} random recipes passed, and trained")
