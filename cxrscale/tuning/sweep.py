"""A recipe with a tune section -> trials on Ray Tune -> the best one as a recipe and a checkpoint."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
import ray.tune
import yaml

from cxrscale import config
from cxrscale.cluster import ray_session
from cxrscale.config import LOWER_IS_BETTER, Recipe
from cxrscale.io import storage
from cxrscale.reporting import tuning_page
from cxrscale.training import launch, run_info
from cxrscale.tuning import results, trial
from cxrscale.tuning.schedulers import Sampler, scheduler
from cxrscale.tuning.search_space import Point, Space, absolute_space, check_space, parse_space, points
from cxrscale.tuning.trial import NUMBER, Study
from cxrscale.types import UserError

SEARCH_INFO = "sweep.json"
RECIPE = "recipe.yaml"
NOTES = "ray"
"""Ray's own notes of the search, by which it goes on after a kill."""
FREE_TO_CHANGE = frozenset({"scaling", "tracking", "pack", "threshold"})
"""Sections that may differ when a search goes on."""
LOG = logging.getLogger("cxrscale")

Shown = Callable[[str, int | None, str | None], AbstractContextManager[Any]]
"""Makes a bar: title, total, unit."""


@dataclass(frozen=True, slots=True)
class SearchResult:
    """How a search ended."""

    run: str
    """Its folder or address."""
    finished: bool
    """False where it was interrupted; the same command goes on."""
    verdict: str
    """Whether the best trial beats the unchanged recipe."""


_bars: dict[str, Any] = {}
"""The bar of a search, by its folder: Ray pickles callbacks for a later restore, and a bar cannot be."""


def tune(recipe: Recipe, stem: str, shown: Shown) -> SearchResult:
    """Search the recipe's `tune.space`; an unfinished search of the same tracking.name goes on.

    Args:
        stem: the recipe file's stem, for the name of a new search.
        shown: makes the bar.

    Returns:
        Where the search is. Finished, it holds best.yaml, best.pt, trials.parquet, tune.html and plots; each trial is a
        run in trials/.

    Raises:
        UserError: space, shards or cluster do not fit the recipe, or an earlier search of that name was another.
    """
    recipe = launch.absolute_paths(recipe)
    space = absolute_space(parse_space(recipe.tune.space))
    inputs = _preflight(recipe, space)
    run = _prepare(recipe, stem, inputs)
    _environment()
    ray_session.connect()
    study = Study(run, recipe.model_dump(mode="json"), inputs, _use_gpu(recipe))
    most = _slots(recipe, study.use_gpu)
    about = _begin(run, inputs)
    try:
        total, done = _fit(study, space, most, shown)
        if done:
            own = _own_thresholds(study, total, shown)
            rows = results.read_trials(study, space, own)
            verdict = results.write_results(rows, recipe, space, run)
            tuning_page.write(rows, recipe, space, run)
            about |= {"finished": True, "verdict": verdict.sentence, **results.totals(rows)}
    finally:
        about["sessions"][-1][1] = round(time.time(), 1)
        _note(run, about)
    return SearchResult(run, done, about.get("verdict", ""))


# Before anything starts


def _preflight(recipe: Recipe, space: Space) -> dict[str, Any]:
    ends = check_space(space, recipe)
    method, trials, workers = recipe.tune.method, recipe.tune.trials, recipe.tune.workers
    if method == "tpe" and importlib.util.find_spec("optuna") is None:
        raise UserError("tune.method=tpe needs Optuna: pip install 'cxrscale[tune]', or use tune.method=asha")
    if method == "pbt" and workers > 1:
        raise UserError(f"tune.method=pbt moves weights between trials of one worker, not of tune.workers={workers}")
    if method == "pbt" and trials < 4:
        raise UserError(f"tune.method=pbt wants a population: tune.trials={trials} is less than 4")
    if recipe.tune.grace_epochs > recipe.train.epochs:
        raise UserError(
            f"tune.grace_epochs={recipe.tune.grace_epochs} is more than train.epochs={recipe.train.epochs}; lower it"
        )
    inputs = launch.preflight(recipe)
    names = [name for name, domain in space.items() for _ in domain.probes]
    for name, end in zip(names, ends, strict=True):
        if name.startswith(("data.", "sampler.", "augment.", "model.")):
            # Leaks do not hang on these; looking for them once is enough.
            launch.preflight(end.model_copy(update={"data": end.data.model_copy(update={"allow_leaks": True})}))
    return inputs


def _prepare(recipe: Recipe, stem: str, inputs: Mapping[str, Any]) -> str:
    """Make the search's folder, or find the unfinished one of that name."""
    name = recipe.tracking.name or f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    run = storage.join(recipe.tracking.runs_dir, name)
    address = storage.join(run, RECIPE)
    if storage.exists(address):
        if not storage.exists(storage.join(run, SEARCH_INFO)):
            raise UserError(f"{run} is no search; give another tracking.name")
        before, now = yaml.safe_load(storage.read(address)), yaml.safe_load(config.to_yaml(recipe))
        for tree in (before, now):
            tree["tune"].pop("max_concurrent_trials")
        changed = [s for s in now if s not in FREE_TO_CHANGE and now[s] != before.get(s)]
        old = json.loads(storage.read(storage.join(run, SEARCH_INFO)))
        if changed:
            raise UserError(
                f"search {name} was begun with other settings in {', '.join(changed)}; give another tracking.name"
            )
        if old["manifest"] != inputs["manifest"] or old["files"] != inputs["files"]:
            raise UserError(f"search {name} was begun with other shards or files; give another tracking.name")
        if old["finished"]:
            page_there = storage.join(run, tuning_page.PAGE)
            raise UserError(f"search {name} is finished, see {page_there}; give another tracking.name for a new one")
    # Before the recipe, which makes the folder a search.
    if not storage.exists(storage.join(run, SEARCH_INFO)):
        _note(run, {**inputs, "finished": False, "sessions": []})
    storage.write(address, config.to_yaml(recipe))
    return run


def resumed(recipe: Recipe, name: str) -> Recipe:
    """The recipe under the name of a search that was begun.

    Raises:
        UserError: there is none of that name.
    """
    if not storage.exists(storage.join(recipe.tracking.runs_dir, name, SEARCH_INFO)):
        raise UserError(
            f"{storage.join(recipe.tracking.runs_dir, name)} is no search; check --resume and tracking.runs_dir"
        )
    return recipe.model_copy(update={"tracking": recipe.tracking.model_copy(update={"name": name})})


def _begin(run: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
    about: dict[str, Any] = json.loads(storage.read(storage.join(run, SEARCH_INFO)))
    about |= {**inputs, "versions": run_info.versions(), "hardware": run_info.hardware(), "git": run_info.git_commit()}
    about["sessions"].append([round(time.time(), 1), None])
    _note(run, about)
    return about


def _note(run: str, about: Mapping[str, Any]) -> None:
    storage.write(storage.join(run, SEARCH_INFO), json.dumps(about, indent=2) + "\n")


def _environment() -> None:
    # Ray notes the state of the search this often: what a kill of the driver makes it forget of.
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "2")
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    # Our own metrics.jsonl holds what its loggers would write once more.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("optuna").setLevel(logging.ERROR)


def _use_gpu(recipe: Recipe) -> bool:
    return recipe.scaling.use_gpu if recipe.scaling.use_gpu is not None else ray_session.gpus() > 0


def _slots(recipe: Recipe, use_gpu: bool) -> int | None:
    """The most trials at a time; None: Ray fits in what it can, on a cluster that may grow."""
    workers, share = recipe.tune.workers, recipe.tune.gpu_share
    room = int(ray_session.cpus() / recipe.scaling.cpus_per_worker)
    if use_gpu:
        room = min(room, int(ray_session.gpus() / (share if workers == 1 else 1)))
    if room < workers:
        kind = f"{ray_session.gpus()} GPUs and {ray_session.cpus()} CPUs" if use_gpu else f"{ray_session.cpus()} CPUs"
        raise UserError(
            f"tune.workers={workers} does not fit the cluster's {kind}; lower it or scaling.cpus_per_worker"
        )
    if workers == 1:
        return recipe.tune.max_concurrent_trials
    # More trials than there is room for would hold each a part of their workers and wait for ever for the rest.
    return min(room // workers, recipe.tune.max_concurrent_trials or room)


# The search


def _fit(study: Study, space: Space, most: int | None, shown: Shown) -> tuple[int, bool]:
    """Run the trials that are not finished: (trials with the seeds, False where it was interrupted)."""
    recipe = study.resolved()
    trainable = ray.tune.with_resources(
        partial(trial.run_trial, study=study), _resources(recipe, recipe.tune.workers, study.use_gpu)
    )
    notes = storage.join(study.run, NOTES)
    place, files = _filesystem(notes)
    known = points(space, recipe)
    total = recipe.tune.baseline_seeds + (recipe.tune.trials if recipe.tune.method == "tpe" else len(known))
    follower = Follower(study.run, recipe.train.monitor, [study.name(number) for number in range(total)])
    if ray.tune.Tuner.can_restore(f"{place}/search", storage_filesystem=files):
        tuner = _restored(f"{place}/search", trainable, files)
    else:
        tuner = ray.tune.Tuner(
            trainable,
            param_space=None if recipe.tune.method == "tpe" else _parameters(recipe, space, known),
            tune_config=ray.tune.TuneConfig(
                metric="value" if recipe.tune.method == "pbt" else "best",
                mode="min" if recipe.train.monitor in LOWER_IS_BETTER else "max",
                num_samples=total if recipe.tune.method == "tpe" else 1,
                search_alg=Sampler(space, recipe) if recipe.tune.method == "tpe" else None,
                scheduler=scheduler(space, recipe),
                max_concurrent_trials=most,
                # A process that has imported torch trains the next trial too; nested trials end with theirs.
                reuse_actors=recipe.tune.workers == 1,
            ),
            run_config=ray.tune.RunConfig(
                name="search",
                storage_path=place,
                storage_filesystem=files,
                failure_config=ray.tune.FailureConfig(max_failures=recipe.scaling.max_failures),
                callbacks=[follower],
                verbose=0,
            ),
        )
    with shown(f"tuning {study.run.rsplit('/', 1)[-1]}", total, None) as bar:
        _bars[study.run] = bar
        try:
            found = tuner.fit()
        finally:
            del _bars[study.run]
    for result in found:
        if result.error is not None and result.config is not None:
            # A process that was lost more than scaling.max_failures times had no time to say so.
            address = storage.join(study.folder(result.config[NUMBER]), trial.FAILED)
            if not storage.exists(address):
                storage.write(address, "its process was lost too often (out of memory?): " + _innermost(result.error))
    return total, len(found) == total and all(r.error is not None or (r.metrics or {}).get("done") for r in found)


def _restored(address: str, trainable: Any, files: Any) -> Any:
    try:
        return ray.tune.Tuner.restore(address, trainable, resume_unfinished=True, storage_filesystem=files)
    except Exception as error:  # another Ray's pickles may fail in any way
        raise UserError(
            f"{address}: Ray {ray.__version__} cannot read the state of this search ({type(error).__name__}: "
            f"{str(error).splitlines()[0][:120] if str(error) else ''}); use the version in its sweep.json"
        ) from error


def _resources(recipe: Recipe, workers: int, use_gpu: bool) -> dict[str, float]:
    if workers > 1:
        # The outer function only waits, its workers ask for their own. Ray wants it to take something: of a CPU even a
        # hundredth would leave a worker too little, and all waiting for ever, where each CPU is a worker's. One byte.
        return {"memory": 1}
    return {"cpu": recipe.scaling.cpus_per_worker, **({"gpu": recipe.tune.gpu_share} if use_gpu else {})}


def _parameters(recipe: Recipe, space: Space, known: list[Point]) -> dict[str, Any]:
    """Ray's configuration of each trial: its number, and its point's fields (None for a seed, which has none)."""
    listed: list[Point] = [dict.fromkeys(space)] * recipe.tune.baseline_seeds + known

    def field(name: str) -> Any:
        return ray.tune.sample_from(lambda config: listed[config[NUMBER]][name])

    return {NUMBER: ray.tune.grid_search(list(range(len(listed)))), **{name: field(name) for name in space}}


def _filesystem(notes: str) -> tuple[str, Any]:
    """Ray's storage: the path, and for a remote one the same file system that everything else of ours uses."""
    if not storage.is_remote(notes):
        return notes, None
    import fsspec
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    files, path = fsspec.core.url_to_fs(notes)
    return path, PyFileSystem(FSSpecHandler(files))


class Follower(ray.tune.Callback):
    """Moves the bar."""

    def __init__(self, run: str, metric: str, names: list[str]) -> None:
        self.run, self.metric, self.names = run, metric, names
        self.done: set[str] = set()
        self.best: tuple[float, str] | None = None

    # ruff: noqa: ARG002 - the names of these arguments are Ray's
    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Point, **info: Any) -> None:
        """Note the best so far."""
        value, name = result["best"], self.names[trial.config[NUMBER]]
        sign = -1.0 if self.metric in LOWER_IS_BETTER else 1.0
        if math.isfinite(value) and (self.best is None or sign * value > sign * self.best[0]):
            self.best = value, name
        self._show(trials)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Count it."""
        self._show(trials, trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Count it too."""
        self._show(trials, trial)

    def _show(self, trials: list[Any], ended: Any = None) -> None:
        bar = _bars.get(self.run)
        if bar is not None:
            # Ray calls before it notes that a trial has ended.
            states = ["TERMINATED" if each is ended else each.status for each in trials]
            best = f"best {self.metric} {self.best[0]:.4f} ({self.best[1]})" if self.best else ""
            done = states.count("TERMINATED") + states.count("ERROR")
            bar.to(done, f"{states.count('RUNNING')} running  {best}")


# After it


def _own_thresholds(study: Study, total: int, shown: Shown) -> dict[str, float]:
    """Folder's name -> the trial's score at its own best thresholds, each computed where it was trained."""
    names = [study.name(number) for number in range(total)]
    recipe = study.resolved()
    resources = _resources(recipe, 1, study.use_gpu)
    score = ray.remote(num_cpus=resources["cpu"], num_gpus=resources.get("gpu", 0))(trial.at_own_thresholds)
    waiting = {score.remote(storage.join(study.run, trial.TRIALS, name)): name for name in names}
    found: dict[str, float] = {}
    with shown("own thresholds", len(names), None) as bar:
        while waiting:
            for ready in ray.wait(list(waiting), num_returns=1)[0]:
                name = waiting.pop(ready)
                try:
                    found[name] = ray.get(ready)
                except ray.exceptions.RayError as error:
                    LOG.warning("%s has no score at its own thresholds: %s", name, _innermost(error))
                    found[name] = math.nan
                bar.to(len(found))
    return {name: found[name] for name in names}


def _innermost(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
