"""The trials of a search on Ray Tune: run, resumed after a kill, and those that failed run once more."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import ray
import ray.tune

from cxrscale.config import LOWER_IS_BETTER, Recipe
from cxrscale.io import scratch, seal, storage
from cxrscale.training import waiting
from cxrscale.tuning import results, room, trial
from cxrscale.tuning.follower import Follower, bars
from cxrscale.tuning.schedulers import Sampler, scheduler
from cxrscale.tuning.search_space import Point, Space, points
from cxrscale.tuning.trial import NUMBER, Study
from cxrscale.types import UserError, last_line, one_line

RAY_FOLDER = "ray"
"""Ray's own state of the search, from which it resumes after a kill."""

ShowBar = Callable[[str, int | None, str | None], AbstractContextManager[Any]]
"""Title, total, unit -> a progress bar."""


def run_trials(study: Study, space: Space, max_trials: int | None, show_bar: ShowBar) -> tuple[int, bool]:
    """Run the trials that are not finished: (trials with the seeds, False where it was interrupted)."""
    recipe = study.base_recipe()
    path, files = _filesystem(storage.join(study.run, RAY_FOLDER))
    trainable = _trainable(study)
    known = points(space, recipe)
    total = recipe.tune.baseline_seeds + (recipe.tune.trials if recipe.tune.method == "tpe" else len(known))
    if ray.tune.Tuner.can_restore(f"{path}/search", storage_filesystem=files):
        tuner = _restored(f"{path}/search", trainable, _parameters(recipe, space, known), files)
    else:
        tuner = ray.tune.Tuner(
            trainable,
            param_space=_parameters(recipe, space, known),
            tune_config=ray.tune.TuneConfig(
                metric="best",
                mode="min" if recipe.train.monitor in LOWER_IS_BETTER else "max",
                num_samples=total if recipe.tune.method == "tpe" else 1,
                search_alg=Sampler(space, recipe) if recipe.tune.method == "tpe" else None,
                scheduler=scheduler(recipe),
                max_concurrent_trials=max_trials,
                # A process that has imported torch trains the next trial too; nested trials end with theirs.
                reuse_actors=recipe.tune.workers == 1,
            ),
            run_config=ray.tune.RunConfig(
                name="search",
                storage_path=path,
                storage_filesystem=files,
                failure_config=ray.tune.FailureConfig(max_failures=recipe.scaling.max_failures),
                callbacks=[_follower(study, total)],
                verbose=0,
            ),
        )
    with show_bar(f"tuning {study.run.rsplit('/', 1)[-1]}", total, None) as bar:
        bars[study.run] = bar
        try:
            ended = _fit(tuner, study)
        finally:
            del bars[study.run]
    for result in ended:
        if result.error is not None and result.config is not None:
            _record_lost(study.folder(result.config[NUMBER]), result.error)
    return total, _all_ended(study, ended, total, trial.has_ended)


@contextmanager
def ray_locks_in_own_folder() -> Iterator[None]:
    """Inside, Ray's lock files are in a folder of ours, which after a kill goes with the next command."""
    before, folder = os.environ.get("RAY_TMPDIR"), scratch.make()
    os.environ["RAY_TMPDIR"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["RAY_TMPDIR"]
        else:
            os.environ["RAY_TMPDIR"] = before
        scratch.remove(folder)


@contextmanager
def end_as_ctrl_c() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP are what Ctrl-C is to Ray Tune: it saves the state of the search and returns."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, before in previous.items():
        if before != signal.SIG_IGN:
            signal.signal(number, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def retry_failed(study: Study, space: Space, total: int, max_trials: int | None, show_bar: ShowBar) -> bool:
    """Run each trial that failed once more, to its end; False where that was interrupted."""
    again: dict[int, Point] = {}
    for number in range(total):
        folder = study.folder(number)
        failed, retried = (storage.join(folder, name) for name in (trial.FAILED, trial.RETRIED))
        if not storage.exists(retried):
            if not storage.exists(failed):
                continue
            storage.write(retried, storage.read(failed))
        elif storage.exists(failed) or trial.is_finished(folder):
            continue  # it has had its second run
        again[number] = _point(study, space, number)
    if not again:
        return True
    path, files = _filesystem(storage.join(study.run, RAY_FOLDER))
    recipe = study.base_recipe()
    tuner = ray.tune.Tuner(
        _trainable(study),
        param_space=_grid(again, space),
        tune_config=ray.tune.TuneConfig(
            metric="best",
            mode="min" if recipe.train.monitor in LOWER_IS_BETTER else "max",
            max_concurrent_trials=max_trials,
            reuse_actors=recipe.tune.workers == 1,
        ),
        run_config=ray.tune.RunConfig(
            name=f"retry-{time.time_ns()}",
            storage_path=path,
            storage_filesystem=files,
            callbacks=[_follower(study, total)],
            verbose=0,
        ),
    )
    with show_bar(f"retrying {len(again)} failed trials", None, None):
        ended = _fit(tuner, study)
    # Each of them failed before: that it has a reason in its folder says nothing of its second run.
    return _all_ended(study, ended, len(again), trial.is_finished)


def _follower(study: Study, total: int) -> Follower:
    return Follower(study.run, study.base_recipe().train.monitor, [study.name(number) for number in range(total)])


def _fit(tuner: ray.tune.Tuner, study: Study) -> Any:
    """Ray's results of the trials; what they wait for is said here, whoever of them or of us waits.

    Raises:
        WaitLimitError: for longer than scaling.start_seconds no trial had room.
    """
    room.watches[study.run] = room.RoomWatch(study.run, study.base_recipe().scaling)
    try:
        with waiting.relayed(study.run):
            return tuner.fit()
    finally:
        del room.watches[study.run]


def _all_ended(study: Study, ended: Any, count: int, has_ended: Callable[[str], bool]) -> bool:
    """Whether so many trials ran, and each of them to its end or its failure.

    Ray says so of those that it has ended. Of a search that was killed it may have forgotten it: it marks the last
    report as done in place, which does not renew the copy of the report that it may have made for its saved state.
    `has_ended` says it of the trial's folder then.
    """
    if len(ended) != count:
        return False
    open_ones = [r for r in ended if r.error is None and not (r.metrics or {}).get("done")]
    return all(r.config is not None and has_ended(study.folder(r.config[NUMBER])) for r in open_ones)


def _point(study: Study, space: Space, number: int) -> Point:
    """The point of a trial that has begun."""
    recipe = study.base_recipe()
    if number < recipe.tune.baseline_seeds:
        return dict.fromkeys(space)
    if recipe.tune.method == "tpe":
        return results.read_trials(study, space, {study.name(number): math.nan})[0].point
    return points(space, recipe)[number - recipe.tune.baseline_seeds]


def _trainable(study: Study) -> Any:
    recipe = study.base_recipe()
    return ray.tune.with_resources(
        partial(trial.run_trial, study=study), resources(recipe, recipe.tune.workers, study.use_gpu)
    )


def _record_lost(folder: str, error: BaseException) -> None:
    """Write the reason for a trial whose process was lost more than scaling.max_failures times: it could not."""
    address = storage.join(folder, trial.FAILED)
    if not storage.exists(address):
        reason = f"its process was lost too often (out of memory?): {last_line(error)}"
        storage.write(address, seal.closed_text(reason))


def _restored(address: str, trainable: Any, parameters: dict[str, Any] | None, files: Any) -> Any:
    try:
        # Without the space, trials that had not begun would get Ray's placeholders instead of their points.
        return ray.tune.Tuner.restore(
            address, trainable, resume_unfinished=True, param_space=parameters, storage_filesystem=files
        )
    except Exception as error:  # another Ray's pickles may fail in any way
        raise UserError(
            f"{address}: Ray {ray.__version__} cannot read the state of this search ("
            f"{one_line(error, with_type=True, limit=140)}); use the version in its sweep.json"
        ) from error


def resources(recipe: Recipe, workers: int, use_gpu: bool) -> dict[str, float]:
    """What a trial with so many workers requests of Ray: resource -> amount (memory in bytes)."""
    if workers > 1:
        # The outer function only waits; its workers request their own resources. Ray requires it to request something:
        # even a hundredth of a CPU would leave a worker too little where each CPU is a worker's. So one byte of memory.
        return {"memory": 1}
    return {"cpu": recipe.scaling.cpus_per_worker, **({"gpu": recipe.tune.gpu_share} if use_gpu else {})}


def _parameters(recipe: Recipe, space: Space, known: list[Point]) -> dict[str, Any] | None:
    """Ray's configuration of each trial: its number, and its point's fields (None for a seed, which has none).

    None where the sampler chooses the points.
    """
    if recipe.tune.method == "tpe":
        return None
    all_points: list[Point] = [dict.fromkeys(space)] * recipe.tune.baseline_seeds + known
    return _grid(dict(enumerate(all_points)), space)


def _grid(point_of: Mapping[int, Point], space: Space) -> dict[str, Any]:
    """Ray's configurations of the trials with these numbers."""

    def field(name: str) -> Any:
        return ray.tune.sample_from(lambda config: point_of[config[NUMBER]][name])

    return {NUMBER: ray.tune.grid_search(list(point_of)), **{name: field(name) for name in space}}


def _filesystem(address: str) -> tuple[str, Any]:
    """Ray's storage: the path, and for a remote one the file system that `io.storage` uses too."""
    if not storage.is_remote(address):
        return address, None
    import fsspec
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    files, path = fsspec.core.url_to_fs(address)
    return path, PyFileSystem(FSSpecHandler(files))
