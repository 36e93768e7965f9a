"""One trial, inside Ray Tune: a recipe with a point's fields set, trained in a run folder of its own."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray.tune
from ray.tune.integration.ray_train import TuneReportCallback

from cxrscale import config
from cxrscale.config import LOWER_IS_BETTER, Recipe
from cxrscale.evaluation import metrics, thresholds
from cxrscale.inference import split_scores
from cxrscale.io import lease, read_sealed_yaml, seal, storage, write_sealed_yaml
from cxrscale.training import LocalWorker, RunInputs, checkpoint, launch, resume, run_info, tracking, waiting
from cxrscale.tuning import search_space
from cxrscale.types import UserError, WaitLimitError, one_line

TRIALS = "trials"
FAILED = "failed.txt"
"""Why a trial failed, in its folder; the search goes on without it."""
RETRIED = "retried.txt"
"""Why it had failed before it was run once more."""
NUMBER = "number"
"""Key of the trial's number in its configuration by Ray; the seeds come first."""


@dataclass(frozen=True, slots=True)
class Study:
    """What all trials of a search share; plain values, since it travels to their processes."""

    run: str
    """The search's folder or address."""
    recipe: dict[str, Any]
    """The unchanged recipe, as a tree."""
    inputs: RunInputs
    use_gpu: bool
    owner: str | None = None
    """Of the search's lease; its trials publish under it."""

    def base_recipe(self) -> Recipe:
        """The unchanged recipe."""
        return config.parse(Recipe, self.recipe, where="the search's recipe")

    def name(self, number: int) -> str:
        """seed-0, seed-1, ..., then trial-000, trial-001, ..."""
        seeds = self.recipe["tune"]["baseline_seeds"]
        return f"seed-{number}" if number < seeds else f"trial-{number - seeds:03d}"

    def folder(self, number: int) -> str:
        """The trial's run folder."""
        return storage.join(self.run, TRIALS, self.name(number))

    def trial_recipe(self, number: int, point: Mapping[str, Any]) -> Recipe:
        """The recipe of a trial, or the unchanged recipe with its number-th seed."""
        base = self.base_recipe()
        if number < base.tune.baseline_seeds:
            point = {"sampler.seed": base.sampler.seed + number}
        own = {
            "tracking.runs_dir": storage.join(self.run, TRIALS),
            "tracking.name": self.name(number),
            "tracking.group": self.run.rstrip("/").rsplit("/", 1)[-1],
            "scaling.num_workers": base.tune.workers,
        }
        return search_space.apply_point(base, {**point, **own})


class BestMetric:
    """What Tune compares: the best value so far of the metric; NaN without one, and after a failure.

    An epoch in which the metric is undefined is worse than any other.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.metric = recipe.train.monitor
        self._sign = -1.0 if self.metric in LOWER_IS_BETTER else 1.0
        self._best = math.nan

    def report(self, line: Mapping[str, Any]) -> dict[str, float]:
        """The report to Tune of an epoch's validation metrics."""
        value = line.get(self.metric)
        value = float(value) if value is not None and math.isfinite(value) else math.nan
        if math.isfinite(value) and not self._sign * value <= self._sign * self._best:
            self._best = value
        return {"epoch": int(line["epoch"]), "best": self._best}

    def failed(self, epochs: int) -> dict[str, float]:
        """The report of a trial that failed: whatever it had reached, it is never the best."""
        self._best = math.nan
        return {"epoch": epochs, "best": self._best}


class TrialWorker(LocalWorker):
    """The only worker of a trial, in a process of Ray Tune."""

    reports_when_written = True
    """A killed search loses nothing that was reported, and a disk that is full fails the trial at once."""

    def __init__(self, best: BestMetric, use_gpu: bool) -> None:
        # On a machine with GPUs, Ray hides none from a process that asked for none.
        super().__init__(None if use_gpu else "cpu")
        self._best = best

    def report(self, metrics: Mapping[str, float]) -> None:
        """Report the epoch, whose files are written, to Tune."""
        ray.tune.report(self._best.report(metrics))


class ForwardReports(TuneReportCallback):
    """Reports the epochs of a trial with several workers to Tune."""

    def __init__(self, run: str, best: BestMetric, search: str, limit: float) -> None:
        """`limit` is how many seconds the writing of a checkpoint may take; `search` hears of it when it takes long."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._run, self._best, self._search, self._limit = run, best, search, limit

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """As `TrialWorker.report`."""
        wait_for_checkpoint(self._run, self._limit, _say_in(self._search, self._run.rsplit("/", 1)[-1]))
        super().after_report(run_context, [self._best.report(metrics[0])], checkpoint)


def run_trial(settings: dict[str, Any], study: Study) -> None:
    """Train a trial from its start or its newest checkpoint; a failure ends this trial only, its reason in a file."""
    _quiet()
    patience = storage.waiting_for_stores(study.base_recipe().scaling.store_seconds)
    with patience, lease.share(study.run, study.owner):
        _run_trial(settings, study)


def _run_trial(settings: dict[str, Any], study: Study) -> None:
    number = int(settings[NUMBER])
    folder = study.folder(number)
    recipe = study.base_recipe()
    best = BestMetric(recipe)
    for leftover in (FAILED, run_info.ERROR_FILE, run_info.STOP_FILE):
        storage.remove(storage.join(folder, leftover))
    try:
        recipe = study.trial_recipe(number, {name: value for name, value in settings.items() if name != NUMBER})
        _check_same_point(folder, recipe)
        # Tune may have lost epochs between its last save and a kill.
        for line in validation_lines(folder):
            ray.tune.report(best.report(line))
        if is_finished(folder):
            return
        write_sealed_yaml(storage.join(folder, resume.RECIPE), config.to_yaml(recipe))
        with run_info.record_session(folder, study.inputs, recipe.tune.workers, recipe.tracking.gpu_hour_price):
            if recipe.tune.workers == 1:
                launch.train_here(recipe, folder, TrialWorker(best, study.use_gpu))
            else:
                forward = [ForwardReports(folder, best, study.run, recipe.scaling.hang_seconds)]
                launch.fit(recipe, folder, study.use_gpu, forward, say=_say_in(study.run, recipe.tracking.name))
    except Exception as error:  # whatever a combination of settings may lead to; other trials go on
        reason = one_line(error, limit=500)
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        storage.write(storage.join(folder, FAILED), seal.closed_text(kind + reason))
        ray.tune.report(best.failed(recipe.train.epochs))


def _say_in(search: str, trial: str | None) -> Callable[[str], None]:
    """Says a line of a trial on the console of its search."""
    say = waiting.say_to(search)
    return lambda text: say(f"{trial}: {text}")


def _check_same_point(folder: str, recipe: Recipe) -> None:
    """A kill may have lost which point a trial had: what another one has trained is no start for this one.

    What is there is removed then: the point that comes back is trained from its start.
    """
    address = storage.join(folder, resume.RECIPE)
    if not storage.exists(address):
        return
    changed = resume.changed_fields(recipe, read_sealed_yaml(address))
    if not config.learned_fields(Recipe).isdisjoint(changed):
        for name in storage.listing(storage.join(folder, checkpoint.FOLDER)):
            storage.remove(storage.join(folder, checkpoint.FOLDER, name))
        for name in (checkpoint.BEST, tracking.TRAIN_LOG, run_info.RUN_INFO):
            storage.remove(storage.join(folder, name))


def wait_for_checkpoint(run: str, limit: float, say: Callable[[str], None]) -> int:
    """Wait until the checkpoint of the epoch that was validated last, or a later one, is written; returns its step.

    It is written after best.pt, so that file is complete too.

    Args:
        limit: scaling.hang_seconds.
        say: called with a line when it takes long.

    Raises:
        WaitLimitError: it is not written in time.
    """
    step = next(line["step"] for line in reversed(tracking.read_log(run)) if line["kind"] == "val")
    began, say_at = time.monotonic(), waiting.SAY_SECONDS
    # A later one: by now the epoch's own may have been removed, as only the newest are kept.
    while _newest_step(run) < step:
        waited = time.monotonic() - began
        if waited >= limit:
            raise WaitLimitError(
                f"scaling.hang_seconds={limit:g}: {run} has no checkpoint of step {step} after {waited:.0f} s; check "
                "that its folder can be written and has room, then re-run to resume"
            )
        if waited >= say_at:
            say(f"waiting {waited:.0f} s for the checkpoint of step {step}; ends at scaling.hang_seconds={limit:g}")
            say_at = waiting.next_word(say_at)
        time.sleep(1.0 if storage.is_remote(run) else 0.01)
    return int(step)


def validation_lines(run: str) -> list[dict[str, Any]]:
    """The validation lines of a run's log up to its newest checkpoint: what a resumed trial will not compute again."""
    newest = _newest_step(run)
    return [line for line in tracking.read_log(run) if line["kind"] == "val" and line["step"] <= newest]


def score_at_own_thresholds(run: str) -> float:
    """The mean F1 over findings, each at its best threshold, or the Dice of the best mask rule; validation split only.

    Findings without both classes are left out. NaN where none has them.

    Args:
        run: a trial that has a checkpoint.
    """
    scores = split_scores.predict_split(run, "val")
    if scores.maps is not None:
        return thresholds.best_mask_rule(scores.maps).dice
    values = []
    for score_N, label_N in zip(scores.probability_NF.T, scores.label_NF.T, strict=True):
        if metrics.absent_class(label_N):  # without a negative, calling everything has F1 1
            continue
        threshold = thresholds.best_f1_threshold(score_N, label_N).value
        counts = metrics.confusion(score_N, label_N, threshold) if math.isfinite(threshold) else None
        values.append(metrics.f1(counts) if counts is not None else math.nan)
    return float(np.nanmean(values)) if np.isfinite(values).any() else math.nan


def has_checkpoint(folder: str) -> bool:
    """Whether the trial has come to a best checkpoint."""
    return storage.exists(storage.join(folder, checkpoint.BEST))


def has_failed(folder: str) -> bool:
    """Whether the trial ended with an error."""
    return storage.exists(storage.join(folder, FAILED))


def is_finished(folder: str) -> bool:
    return storage.exists(storage.join(folder, run_info.RUN_INFO)) and run_info.read_run_info(folder).finished


def has_ended(folder: str) -> bool:
    """Whether the trial has nothing more to do: it is finished, or it failed."""
    return is_finished(folder) or has_failed(folder)


def _newest_step(run: str) -> int:
    return max(checkpoint.steps(storage.join(run, checkpoint.FOLDER)).values(), default=0)


def _quiet() -> None:
    # When Tune stops a trial between epochs, its thread has this long to close its files before Ray ends the process.
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = "20"
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    logging.getLogger("ray").setLevel(logging.ERROR)
