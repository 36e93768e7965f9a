"""A trained model, loaded once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cxrscale import config
from cxrscale.config import Recipe
from cxrscale.evaluation.artifacts import THRESHOLDS
from cxrscale.io import storage
from cxrscale.models import build_model
from cxrscale.training import checkpoint
from cxrscale.types import UserError


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """A run's chosen weights, ready to score."""

    net: nn.Module
    recipe: Recipe
    manifest: str
    """Digest of the shards it was trained on."""
    checkpoint: str
    """Digest of the weights' file."""
    pixels: Mapping[str, Any]
    """How the training images were stored: codec, size, quality."""


def load_model(run: str | Path, device: torch.device) -> TrainedModel:
    """The best checkpoint of a run.

    Raises:
        UserError: the folder is no run, or nothing has been trained in it yet.
    """
    path = storage.join(run, checkpoint.BEST)
    if not storage.exists(path):
        raise UserError(f"{path} does not exist; give the folder that `cxrscale train` printed, after its first epoch")
    content = storage.read(path)
    state = checkpoint.read(content, path)
    recipe = config.parse(Recipe, state["recipe"], where=path)
    bare = recipe.model.model_copy(update={"weights": "none"})
    net = build_model(bare, recipe.data)
    net.load_state_dict(state["model"])
    return TrainedModel(net.to(device).eval(), recipe, state["manifest"], storage.digest(content), state["pixels"])


def provenance(run: str | Path) -> dict[str, Any]:
    """What a prediction must name to be reproduced: the run, its weights' digest, its shards' digest, its recipe."""
    trained = load_model(run, torch.device("cpu"))
    return {
        "run": storage.absolute(str(run)),
        "checkpoint": trained.checkpoint,
        "manifest": trained.manifest,
        "recipe": trained.recipe.model_dump(mode="json"),
    }


def stored_thresholds(run: str) -> dict[str, Any]:
    """The run's thresholds.json.

    Raises:
        UserError: there is none, it is of an earlier version, or the run's weights have changed since.
    """
    path = storage.join(run, THRESHOLDS)
    if not storage.exists(path):
        raise UserError(f"{path} does not exist; make it with `cxrscale threshold {run}`")
    found: dict[str, Any] = json.loads(storage.read(path))
    weights = storage.digest(storage.read(storage.join(run, checkpoint.BEST)))
    if found["checkpoint"] != weights:
        raise UserError(f"{path} belongs to other weights than best.pt; run `cxrscale threshold {run}` again")
    if "rule" not in found:
        raise UserError(f"{path} is of an earlier version of cxrscale; run `cxrscale threshold {run}` again")
    return found
