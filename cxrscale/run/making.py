"""The Python API for what makes runs: `train` and `tune`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cxrscale import config
from cxrscale.config import Recipe
from cxrscale.run.trained_run import Run

if TYPE_CHECKING:
    from cxrscale.tuning import SearchResult


def train(recipe: Recipe | str | Path, name: str | None = None, *, local: bool = False) -> Run:
    """Train a recipe; an unfinished run of the same name is resumed.

        run = cx.train(cx.load_recipe("jobs/chexnet14.yaml", ["data.shards=[shards/nih]"]), name="first")

    Args:
        recipe: a recipe, or the path of one.
        name: of the run's folder under tracking.runs_dir; None: the recipe's, or one with the time.
        local: train in this process, without Ray.

    Raises:
        UserError: datasets, weights, the cluster or an earlier run of that name do not fit the recipe.
    """
    from cxrscale.training import launch

    resolved, stem = _named(recipe, name)
    return Run(launch.launch(resolved, stem, no_watcher, local=local))


def tune(recipe: Recipe | str | Path, name: str | None = None) -> SearchResult:
    """Search the fields of a recipe's `tune.space`; an unfinished search of the same name is resumed.

        search = cx.tune("jobs/tune-chexnet14.yaml", name="search")
        recipe = cx.load_recipe(f"{search.run}/best.yaml")

    Args:
        recipe: a recipe, or the path of one.
        name: of the search's folder under tracking.runs_dir; None: the recipe's, or one with the time.

    Raises:
        UserError: space, datasets or cluster do not fit the recipe, or an earlier search of that name was another.
    """
    from cxrscale.reporting import tuning_page
    from cxrscale.tuning import sweep

    resolved, stem = _named(recipe, name)
    return sweep.tune(resolved, stem, _no_bar, tuning_page.write)


def _named(recipe: Recipe | str | Path, name: str | None) -> tuple[Recipe, str]:
    """The recipe with the name set, and the stem for the name of a new run."""
    stem = "run" if isinstance(recipe, Recipe) else Path(recipe).stem
    resolved = recipe if isinstance(recipe, Recipe) else config.load_recipe(recipe)
    if name is not None:
        resolved = resolved.model_copy(update={"tracking": resolved.tracking.model_copy(update={"name": name})})
    return resolved, stem


class _NoBar:
    def update(self, done: int, note: str = "") -> None:
        """Show nothing."""


@contextmanager
def _no_bar(title: str, total: int | None, unit: str | None) -> Iterator[Any]:  # noqa: ARG001 - a bar's arguments
    yield _NoBar()


@contextmanager
def no_watcher(run: str) -> Iterator[None]:  # noqa: ARG001 - a watcher's argument
    yield
