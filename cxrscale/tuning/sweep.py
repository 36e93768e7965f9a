"""A recipe with a tune section -> trials on Ray Tune -> the best one as a recipe and a checkpoint."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
import ray.tune

from cxrscale import config
from cxrscale.cluster import ray_session
from cxrscale.config import Recipe
from cxrscale.io import lease, read_sealed_yaml, storage, write_sealed_yaml
from cxrscale.shards import manifest
from cxrscale.training import RunInputs, launch, preflight, resume, run_info, waiting
from cxrscale.tuning import results, trial
from cxrscale.tuning.results import TrialRow
from cxrscale.tuning.room import PENDING, RUNNING, RoomWatch
from cxrscale.tuning.search_info import SearchInfo, SearchSession, is_search, read_search_info, write_search_info
from cxrscale.tuning.search_space import Space, absolute_space, check_space, parse_space
from cxrscale.tuning.trial import Study
from cxrscale.tuning.tuner import ShowBar, end_as_ctrl_c, ray_locks_in_own_folder, resources, retry_failed, run_trials
from cxrscale.types import UserError, last_line

FREE_TO_CHANGE = frozenset({"tune.max_concurrent_trials", "tune.retry_failed"})
"""Fields of `tune` that may differ when a search is resumed."""
LOG = logging.getLogger("cxrscale")

WritePage = Callable[[Sequence[TrialRow], Recipe, Space, str], None]
"""Writes the page and plots of a search: its rows, recipe, space and folder."""


@dataclass(frozen=True, slots=True)
class SearchResult:
    """How a search ended."""

    run: str
    """Its folder or address."""
    finished: bool
    """False where it was interrupted; re-run the same command to resume."""
    verdict: str
    """Whether the best trial beats the unchanged recipe; empty until finished."""


def tune(recipe: Recipe, stem: str, show_bar: ShowBar, write_page: WritePage | None = None) -> SearchResult:
    """Search the recipe's `tune.space`; an unfinished search of the same tracking.name is resumed.

    Args:
        stem: the stem of the recipe's file, for the name of a new search.
        show_bar: makes a progress bar.
        write_page: called at the end.

    Returns:
        Where the search is. Once finished it holds best.yaml, best.pt and trials.parquet; each trial is a run in
        trials/.

    Raises:
        UserError: space, shards or cluster do not fit the recipe, or an earlier search of that name was another.
    """
    recipe = launch.absolute_paths(recipe)
    space = absolute_space(parse_space(recipe.tune.space))
    inputs = _preflight(recipe, space, stem)
    run = launch.run_address(recipe, inputs)
    patience = storage.waiting_for_stores(recipe.scaling.store_seconds)
    with patience, lease.held(run, f"search {run.rsplit('/', 1)[-1]}") as owned:
        _prepare(recipe, inputs, run)
        _set_environment()
        ray_session.connect()
        study = Study(run, recipe.model_dump(mode="json"), inputs, _use_gpu(recipe), owned.owner)
        return _search(study, space, show_bar, write_page)


def _search(study: Study, space: Space, show_bar: ShowBar, write_page: WritePage | None) -> SearchResult:
    recipe, inputs, run = study.base_recipe(), study.inputs, study.run
    max_trials = _max_concurrent_trials(recipe, study.use_gpu)
    began = round(time.time(), 1)
    info = _new_info(inputs, (*read_search_info(run).sessions, SearchSession(began=began)))
    write_search_info(run, info)
    try:
        with end_as_ctrl_c(), ray_locks_in_own_folder():
            total, finished = run_trials(study, space, max_trials, show_bar)
            if finished and recipe.tune.retry_failed:
                finished = retry_failed(study, space, total, max_trials, show_bar)
        if finished:
            rows = results.read_trials(study, space, _score_at_own_thresholds(study, total, show_bar))
            verdict = results.write_results(rows, recipe, space, run)
            if write_page is not None:
                write_page(rows, recipe, space, run)
            outcome = {"finished": True, "verdict": verdict.sentence, **dict(results.totals(rows))}
            info = info.model_copy(update=outcome)
    finally:
        session = SearchSession(began=began, ended=round(time.time(), 1))
        write_search_info(run, info.model_copy(update={"sessions": (*info.sessions[:-1], session)}))
    return SearchResult(run, finished, info.verdict)


# Before anything starts


def _preflight(recipe: Recipe, space: Space, stem: str) -> RunInputs:
    ends = check_space(space, recipe)
    if recipe.tune.method == "tpe" and importlib.util.find_spec("optuna") is None:
        raise UserError("tune.method=tpe needs Optuna: pip install 'cxrscale[tune]', or use tune.method=asha")
    if recipe.tune.grace_epochs > recipe.train.epochs:
        raise UserError(
            f"tune.grace_epochs={recipe.tune.grace_epochs} is more than train.epochs={recipe.train.epochs}; lower it"
        )
    inputs = launch.preflight(recipe, stem, recipe.tune.workers)
    data, tried = manifest.load(*recipe.data.shards), set[str]()
    names = [name for name, domain in space.items() for _ in domain.probes]
    for name, end in zip(names, ends, strict=True):
        if name.startswith(("data.", "sampler.", "augment.", "model.")):
            # Leaks do not depend on these fields; checking for them once is enough.
            launch.check_inputs(end.model_copy(update={"data": end.data.model_copy(update={"allow_leaks": True})}))
        preflight.refuse(end, data, recipe.tune.workers, tried)
    return inputs


def _prepare(recipe: Recipe, inputs: RunInputs, run: str) -> None:
    """Create the search's folder, or check that the recipe continues the unfinished search that is there."""
    address = storage.join(run, resume.RECIPE)
    if storage.exists(address):
        _check_resumable(recipe, inputs, run)
    # Before the recipe, which makes the folder a search.
    if not is_search(run):
        write_search_info(run, _new_info(inputs))
    write_sealed_yaml(address, config.to_yaml(recipe))


def _check_resumable(recipe: Recipe, inputs: RunInputs, run: str) -> None:
    name = run.rsplit("/", 1)[-1]
    if not is_search(run):
        raise UserError(f"{run} is not a search; give another tracking.name")
    address = storage.join(run, resume.RECIPE)
    stored = read_sealed_yaml(address)
    learned = config.learned_fields(Recipe)
    changed = {
        field: change
        for field, change in resume.changed_fields(recipe, stored).items()
        if field in learned or (field.startswith("tune.") and field not in FREE_TO_CHANGE)
    }
    old = read_search_info(run)
    if changed:
        raise UserError(
            f"search {name} was begun with another recipe: {resume.describe(changed)}; give another tracking.name"
        )
    if old.manifest != inputs.manifest or old.files != inputs.files:
        raise UserError(f"search {name} was begun with other shards or files; give another tracking.name")
    failed = any(row["status"] == results.BROKEN for row in results.read_results(run)) if old.finished else False
    if old.finished and not (recipe.tune.retry_failed and failed):
        retry = "; tune.retry_failed=true runs the trials that failed once more" if failed else ""
        raise UserError(f"search {name} is finished, see {run}; give another tracking.name for a new one{retry}")


def _new_info(inputs: RunInputs, sessions: tuple[SearchSession, ...] = ()) -> SearchInfo:
    return SearchInfo(**dict(inputs), **dict(run_info.environment()), sessions=sessions)


def resumed(recipe: Recipe, name: str) -> Recipe:
    """The recipe under the name of an existing search.

    Raises:
        UserError: there is none of that name.
    """
    run = storage.join(recipe.tracking.runs_dir, name)
    if not is_search(run):
        raise UserError(f"{run} is not a search; check --resume and tracking.runs_dir")
    return recipe.model_copy(update={"tracking": recipe.tracking.model_copy(update={"name": name})})


def _set_environment() -> None:
    # Ray saves the state of the search this often; it is what a kill of the driver loses.
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "2")
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    # Our own train_log.jsonl holds what its loggers would write again.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("optuna").setLevel(logging.ERROR)


def _use_gpu(recipe: Recipe) -> bool:
    return recipe.scaling.use_gpu if recipe.scaling.use_gpu is not None else ray_session.gpus() > 0


def _max_concurrent_trials(recipe: Recipe, use_gpu: bool) -> int | None:
    """None: as many as Ray finds room for, on a cluster that may grow."""
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
    # Were there more trials than room, each would hold some of its workers and wait forever for the rest.
    return min(room // workers, recipe.tune.max_concurrent_trials or room)


# After it


def _score_at_own_thresholds(study: Study, trials: int, show_bar: ShowBar) -> dict[str, float]:
    """Trial's name -> its score at its own best thresholds, computed on the cluster; NaN without a checkpoint, and for
    one that failed: how far it had come by then is chance."""
    recipe = study.base_recipe()
    scores = dict.fromkeys(map(study.name, range(trials)), math.nan)
    runs = {name: storage.join(study.run, trial.TRIALS, name) for name in scores}
    left = [name for name, run in reversed(runs.items()) if trial.has_checkpoint(run) and not trial.has_failed(run)]
    needs, total = resources(recipe, 1, study.use_gpu), len(left)
    task = ray.remote(num_cpus=needs["cpu"], num_gpus=needs.get("gpu", 0))(_score)
    limit = recipe.tune.max_concurrent_trials or total
    pending: dict[Any, str] = {}
    watch, begun = RoomWatch(study.run, recipe.scaling), set[str]()
    with show_bar("own thresholds", total, None) as bar, _cancelled(pending):
        while left or pending:
            while left and len(pending) < limit:
                name = left.pop()
                pending[task.remote(study.run, name, runs[name])] = name
            ready_ones, _ = ray.wait(list(pending), num_returns=1, timeout=1)
            begun |= waiting.take_begun(study.run)
            watch.see([RUNNING if name in begun else PENDING for name in pending.values()])
            for ready in ready_ones:
                name = pending.pop(ready)
                try:
                    scores[name] = ray.get(ready)
                except ray.exceptions.RayError as error:
                    LOG.warning("%s has no score at its own thresholds: %s", name, last_line(error))
                bar.update(total - len(left) - len(pending))
    return scores


@contextmanager
def _cancelled(pending: Mapping[Any, str]) -> Iterator[None]:
    """At the end, what is left of the tasks asks the cluster for nothing any more."""
    try:
        yield
    finally:
        for reference in pending:
            ray.cancel(reference, force=True)


def _score(search: str, name: str, run: str) -> float:
    waiting.begin(search, name)
    return trial.score_at_own_thresholds(run)
