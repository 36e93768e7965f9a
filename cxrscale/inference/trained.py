"""A run's best weights as a model that is ready to score; several of them as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from cxrscale import config
from cxrscale.config import Augment, Recipe
from cxrscale.inference.export import contract, runtime
from cxrscale.inference.members import Averaging, Member
from cxrscale.io import storage
from cxrscale.models import Averaged, build_model
from cxrscale.training import checkpoint, run_files
from cxrscale.types import UserError, one_line

INPUT = ("size", "clahe", "clahe_clip", "clahe_tiles", "normalize", "mean", "std")
"""Fields of the augment section that say what the model sees of an image that is not augmented."""


SPARE_WEIGHTS = 50_000_000
"""How many more weights than its file a model may have while it is built: encoders are made whole and then cut."""


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """A run's best weights, ready to score."""

    model: nn.Module
    recipe: Recipe
    manifest: str
    """Digest of the datasets that it was trained on."""
    checkpoint: str
    """Digest of the file of weights."""
    pixels: Mapping[str, Any]
    """How the training images were stored: codec, size, quality."""
    members: tuple[Member, ...] = ()
    """Of an ensemble."""
    averaging: Averaging | None = None
    """Of an ensemble."""
    also: tuple[Augment, ...] = ()
    """Of an ensemble whose members see an image at several sizes, or otherwise normalized: what the model sees beside
    what the recipe says (`Batch.also_BCHW`)."""


def load_model(run: str | Path, device: torch.device) -> TrainedModel:
    """The best checkpoint of a run, in evaluation mode; of an export, the model that runs it.

    Raises:
        UserError: the folder is not a run, or nothing has been trained in it yet; what runs an export is not installed.
    """
    path = run_files.weights_file(run)
    if not path.endswith(checkpoint.BEST):
        return _exported(str(run), path, device)
    if not storage.exists(path):
        raise UserError(f"{path} does not exist; give the folder that `cxrscale train` printed, after its first epoch")
    content = storage.read(path)
    state = checkpoint.read(content, path)
    if not isinstance(state.get("recipe"), dict):
        raise UserError(f"{path} has no recipe; give a run's best.pt")
    recipe = config.parse(Recipe, state["recipe"], where=path)
    stored = contract.stored_pixels(state.get("pixels"), path)
    digest = storage.digest(content)
    if "members" not in state:
        model = _with_weights(recipe, state["model"], path).to(device).eval()
        return TrainedModel(model, recipe, state["manifest"], digest, stored)
    models, augments, members, averaging = _members(state, recipe, path)
    averaged, also = _averaged(models, augments, averaging)
    return TrainedModel(averaged.to(device), recipe, state["manifest"], digest, stored, members, averaging, also)


def load_cpu_model(run: str | Path) -> TrainedModel:
    """`load_model` on the CPU, also where there is a GPU.

    Raises:
        UserError: as `load_model`.
    """
    return load_model(run, torch.device("cpu"))


def load_models(runs: Sequence[str | Path], device: torch.device, averaging: Averaging | None = None) -> TrainedModel:
    """The models of several runs as one; of one run without `averaging`, its own.

    Raises:
        UserError: as `load_model`; the runs cannot be averaged, or there is none.
    """
    if not runs:
        raise UserError("give a run")
    loaded = [load_model(run, device) for run in runs]
    plain = averaging is None or averaging == Averaging()
    return loaded[0] if len(loaded) == 1 and plain else average(runs, loaded, averaging or Averaging())


def average(runs: Sequence[str | Path], loaded: Sequence[TrainedModel], averaging: Averaging) -> TrainedModel:
    """Several models as one; its recipe is that of the first. Each sees an image as it was trained to.

    Raises:
        UserError: a model is an ensemble itself, or they differ in findings or datasets.
    """
    for run, model in zip(runs, loaded, strict=True):
        if model.members:
            raise UserError(f"{run} is an ensemble itself; name its members: {_names(model.members)}")
    for run, model in zip(runs[1:], loaded[1:], strict=True):
        _check_same_images((str(runs[0]), loaded[0]), (str(run), model))
    members = tuple(
        Member(run=storage.absolute(str(run)), checkpoint=one.checkpoint) for run, one in zip(runs, loaded, strict=True)
    )
    parts = [*(one.checkpoint for one in members), averaging.model_dump_json()]
    averaged, also = _averaged([one.model for one in loaded], [one.recipe.augment for one in loaded], averaging)
    return replace(
        loaded[0],
        model=averaged,
        checkpoint=storage.digest("\n".join(parts).encode()),
        members=members,
        averaging=averaging,
        also=also,
    )


def ensemble_state(loaded: Sequence[TrainedModel], ensemble: TrainedModel) -> dict[str, Any]:
    """An ensemble as the content of a best.pt, with the weights of all its members.

    Args:
        loaded: the members.
    """
    assert ensemble.averaging is not None
    members = [
        {
            **member.model_dump(),
            "recipe": one.recipe.model_dump(mode="json"),
            "model": {name: value.cpu() for name, value in one.model.state_dict().items()},
        }
        for member, one in zip(ensemble.members, loaded, strict=True)
    ]
    return {
        "recipe": loaded[0].recipe.model_dump(mode="json"),
        "manifest": ensemble.manifest,
        "pixels": dict(ensemble.pixels),
        "model": {},
        "members": members,
        "averaging": ensemble.averaging.model_dump(),
    }


def _exported(run: str, path: str, device: torch.device) -> TrainedModel:
    """The model of an export's folder."""
    info, recipe = contract.read_with_recipe(run)
    content = storage.read(path)
    # On a GPU a run computes in bf16 unless its recipe says fp32; an engine of it may take fp16.
    model = runtime.exported_module(content, path, device, half=recipe.train.precision != "fp32")
    return TrainedModel(model, recipe, info.manifest, storage.digest(content), info.input.stored())


def _averaged(
    models: Sequence[nn.Module], augments: Sequence[Augment], averaging: Averaging
) -> tuple[nn.Module, tuple[Augment, ...]]:
    """The models as one, in evaluation mode, and what it sees of an image beside what the first sees."""
    distinct = {_input_of(augment): augment for augment in reversed(augments)}
    order = list(dict.fromkeys(map(_input_of, augments)))
    sees = [order.index(_input_of(augment)) for augment in augments]
    model = Averaged(models, averaging.mean, hflip=averaging.hflip, sees=sees).eval()
    return model, tuple(distinct[one] for one in order[1:])


def _members(
    state: Mapping[str, Any], whole: Recipe, path: str
) -> tuple[list[nn.Module], list[Augment], tuple[Member, ...], Averaging]:
    """The models of an ensemble's best.pt, what they see, and what they are.

    Args:
        whole: the ensemble's own recipe.
    """
    try:
        given = TypeAdapter(list[dict[str, Any]]).validate_python(state["members"], strict=True)
        averaging = Averaging.model_validate(state.get("averaging"))
        members = tuple(Member(run=one["run"], checkpoint=one["checkpoint"]) for one in given)
        parts = [(one["recipe"], one["model"]) for one in given]
    except (ValidationError, LookupError) as error:
        raise UserError(f"{path} is no ensemble ({one_line(error, limit=160)}); make it again") from None
    if not parts:
        raise UserError(f"{path} is an ensemble without members; make it again")
    recipes = [config.parse(Recipe, recipe, where=path) for recipe, _ in parts]
    outputs = {(recipe.data.task, recipe.data.findings) for recipe in (*recipes, whole)}
    if len(outputs) > 1:
        raise UserError(f"{path}: its members have other findings than it has itself; make it again")
    models = [_with_weights(recipe, weights, path) for recipe, (_, weights) in zip(recipes, parts, strict=True)]
    return models, [recipe.augment for recipe in recipes], members, averaging


def _count(weights: Any) -> int:
    """The values that a file of weights holds in fact: a tensor may repeat one of them a billion times."""
    given = weights.values() if isinstance(weights, Mapping) else ()
    dense = [one for one in given if torch.is_tensor(one) and one.layout == torch.strided]
    return sum(one.untyped_storage().nbytes() // one.element_size() for one in dense)


def _with_weights(recipe: Recipe, weights: Any, path: str) -> nn.Module:
    model = build_model(recipe.model.without_weights(), recipe.data, 2 * _count(weights) + SPARE_WEIGHTS)
    try:
        model.load_state_dict(weights)
    except Exception as error:  # torch raises whatever a value of another type or shape leads to
        raise UserError(f"{path}: its weights do not fit its recipe ({one_line(error, limit=160)})") from None
    return model


def _check_same_images(a: tuple[str, TrainedModel], b: tuple[str, TrainedModel]) -> None:
    """Refuse two models that cannot be averaged."""
    fields_a, fields_b = (_images_of(one) for _, one in (a, b))
    for name, value in fields_a.items():
        if value != fields_b[name]:
            raise UserError(
                f"{a[0]} and {b[0]} cannot be averaged: {name} is {value} and {fields_b[name]}; an ensemble's members "
                "share datasets and findings"
            )


def _images_of(trained: TrainedModel) -> dict[str, Any]:
    data = trained.recipe.data
    fields = {f"data.{name}": getattr(data, name) for name in ("task", "findings", "val_split", "test_split")}
    fields |= {f"pack.{name}": value for name, value in trained.pixels.items()}
    return {**fields, "the datasets' digest": trained.manifest}


def _input_of(augment: Augment) -> tuple[Any, ...]:
    return tuple(getattr(augment, name) for name in INPUT)


def _names(members: Sequence[Member]) -> str:
    return ", ".join(member.run for member in members)
