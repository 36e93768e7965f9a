"""A run's folder: made for a new run, or found to be that of an earlier one that goes on with what has changed."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from cxrscale import config
from cxrscale.config import Recipe
from cxrscale.io import read_sealed_yaml, storage, write_sealed_yaml
from cxrscale.training import run_info
from cxrscale.training.run_info import Change, RunInfo, RunInputs
from cxrscale.types import UserError

LOG = logging.getLogger("cxrscale")
RECIPE = "recipe.yaml"
SEARCH_INFO = "sweep.json"
"""What makes a folder that of a search (`tuning.search_info`, which this room does not know)."""
SLOWER = frozenset({"optim.lr", "optim.max_grad_norm"})
"""Fields that may change after a run in which something was not finite: it goes on, more carefully."""


def prepare(recipe: Recipe, inputs: RunInputs, run: str) -> dict[str, Change]:
    """Create the run's folder, or check that the recipe continues the run that is there.

    Fields that do not change what is learned may differ at a resume. So may train.epochs, which may grow, also after
    the last epoch, and optim.lr and optim.max_grad_norm where a loss or a weight was not finite.

    Returns:
        What differs from the run's last session: field -> old and new value.

    Raises:
        UserError: the name is that of a finished run, of a search, or of a run with another recipe or other inputs.
    """
    address, changed = storage.join(run, RECIPE), dict[str, Change]()
    if storage.exists(storage.join(run, SEARCH_INFO)):
        raise UserError(f"{run} is a search; give another tracking.name")
    # run.json comes first: a kill between the two leaves nothing that looks like a run.
    if not storage.exists(storage.join(run, run_info.RUN_INFO)):
        run_info.write_new(run, inputs)
    elif storage.exists(address):
        changed = changed_fields(recipe, read_sealed_yaml(address))
        _check_resumable(run, recipe, run_info.read_run_info(run), inputs, changed)
    write_sealed_yaml(address, config.to_yaml(recipe))
    return changed


def changed_fields(recipe: Recipe, stored: Mapping[str, Any]) -> dict[str, Change]:
    """Dotted field -> its old and new value, for all that differ from a stored recipe; a field that it lacks, being
    older, has its default."""
    current, default = recipe.model_dump(mode="json"), Recipe().model_dump(mode="json")
    return {
        f"{section}.{field}": Change(old=old, new=value)
        for section, fields in current.items()
        for field, value in fields.items()
        if (old := (stored.get(section) or {}).get(field, default[section][field])) != value
    }


def describe(changed: Mapping[str, Change]) -> str:
    """The first few changes in words."""
    shown = [f"{field}={change.old} before, {change.new} now" for field, change in list(changed.items())[:3]]
    return "; ".join(shown) + (f"; and {len(changed) - 3} more" if len(changed) > 3 else "")


def _check_resumable(run: str, recipe: Recipe, old: RunInfo, inputs: RunInputs, changed: Mapping[str, Change]) -> None:
    name = run.rsplit("/", 1)[-1]
    allowed = SLOWER if old.diverged else frozenset()
    refused = {field: change for field, change in changed.items() if field in config.learned_fields(Recipe) - allowed}
    epochs = refused.pop("train.epochs", None)
    if refused:
        raise UserError(f"run {name} was begun with another recipe: {describe(refused)}; give another tracking.name")
    if epochs and epochs.new < epochs.old:
        raise UserError(f"train.epochs={epochs.new}: run {name} was begun with {epochs.old}, which may only grow")
    if old.manifest != inputs.manifest:
        raise UserError(f"run {name} was trained on other shards; give another tracking.name")
    if old.files != inputs.files:
        raise UserError(f"run {name} was begun with other files in {', '.join(inputs.files)}; rename the run")
    if not old.finished:
        return
    stopped_early = old.epochs is not None and old.epochs < (epochs.old if epochs else recipe.train.epochs)
    if stopped_early and "train.patience" not in changed:
        raise UserError(
            f"run {name} is finished: train.patience={recipe.train.patience} ended it after epoch {old.epochs}; raise "
            f"train.patience to go on, give another tracking.name, or `cxrscale evaluate {run}`"
        )
    if not stopped_early and not epochs:
        raise UserError(
            f"run {name} is finished; raise train.epochs={recipe.train.epochs} to go on, give another tracking.name, "
            f"or `cxrscale evaluate {run}`"
        )
    if epochs and recipe.optim.schedule == "cosine":
        lr = recipe.optim.lr * 0.5 * (1 + math.cos(math.pi * (old.epochs or 0) / epochs.new))
        LOG.warning(
            "train.epochs grows from %d to %d: the cosine over the new total continues at a learning rate of %.2g",
            epochs.old,
            epochs.new,
            lr,
        )
