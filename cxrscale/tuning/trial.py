"""One trial, inside Ray Tune: a recipe with a point's fields set, trained in a run folder of its own."""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray.tune
from ray.tune.integration.ray_train import TuneReportCallback

from cxrscale import config
from cxrscale.config import LOWER_IS_BETTER, Recipe
from cxrscale.evaluation import metrics, thresholds
from cxrscale.inference import predictions
from cxrscale.io import storage
from cxrscale.training import LocalWorker, checkpoint, launch, run_info, tracking
from cxrscale.tuning import search_space
from cxrscale.types import UserError

TRIALS = "trials"
FAILED = "failed.txt"
"""Why a trial failed, in its folder; the search goes on without it."""
SCHEDULE = "schedule.jsonl"
"""pbt: from which epoch on a trial trained with which values, and whose weights it took over."""
PATIENCE_S = 600.0
"""Seconds that a checkpoint may take to be written."""
NUMBER = "number"
"""The trial's number in Ray's configuration of it; the seeds' come first."""


@dataclass(frozen=True, slots=True)
class Study:
    """What all trials of a search share; plain values, since it travels to their processes."""

    run: str
    """The search's folder or address."""
    recipe: dict[str, Any]
    """The unchanged recipe."""
    inputs: dict[str, Any]
    """What run.json says of the inputs."""
    use_gpu: bool

    def resolved(self) -> Recipe:
        """The unchanged recipe, as its sections."""
        return config.parse(Recipe, self.recipe, where="the search's recipe")

    def name(self, number: int) -> str:
        """seed-0, seed-1, ..., then trial-000, trial-001, ..."""
        seeds = self.recipe["tune"]["baseline_seeds"]
        return f"seed-{number}" if number < seeds else f"trial-{number - seeds:03d}"

    def folder(self, number: int) -> str:
        """The trial's run folder."""
        return storage.join(self.run, TRIALS, self.name(number))

    def trial(self, number: int, point: Mapping[str, Any]) -> Recipe:
        """The recipe of a trial, or of the unchanged recipe with its number-th seed."""
        base = self.resolved()
        if number < base.tune.baseline_seeds:
            point = {"sampler.seed": base.sampler.seed + number}
        own = {
            "tracking.runs_dir": storage.join(self.run, TRIALS),
            "tracking.name": self.name(number),
            "tracking.group": self.run.rstrip("/").rsplit("/", 1)[-1],
            "scaling.num_workers": base.tune.workers,
        }
        # Another trial may take over any epoch's weights.
        more = {"train.keep_checkpoints": base.train.epochs} if base.tune.method == "pbt" else {}
        return search_space.apply_point(base, {**point, **own, **more})


class Score:
    """What Tune compares: the metric of the epoch in `value`, of the best so far in `best`; NaN without one."""

    def __init__(self, recipe: Recipe) -> None:
        self.metric = recipe.train.monitor
        self._sign = -1.0 if self.metric in LOWER_IS_BETTER else 1.0
        # A population sorts its trials, which NaN would make arbitrary.
        self._nothing = -1e30 * self._sign if recipe.tune.method == "pbt" else math.nan
        self._best = self._nothing

    def of(self, found: Mapping[str, Any]) -> dict[str, float]:
        """The report of an epoch's validation metrics."""
        value = found.get(self.metric)
        value = self._nothing if value is None or not math.isfinite(value) else float(value)
        if not self._sign * value <= self._sign * self._best:
            self._best = value
        return {"epoch": int(found["epoch"]), "value": value, "best": self._best}


class TrialWorker(LocalWorker):
    """The only worker of a trial, in a process of Ray Tune."""

    def __init__(self, run: str, recipe: Recipe, score: Score, use_gpu: bool) -> None:
        # On a machine with GPUs, Ray hides none from a process that asked for none.
        super().__init__(None if use_gpu else "cpu")
        self._run, self._score, self._population = run, score, recipe.tune.method == "pbt"

    def report(self, metrics: Mapping[str, float]) -> None:
        """Hand Tune the epoch's score; what Tune has heard of is on disk, so that a killed search loses nothing."""
        step = written(self._run)
        found = self._score.of(metrics)
        if not self._population:
            ray.tune.report(found)
            return
        # Tune moves weights between trials by its own checkpoints: ours only says where the files are.
        with tempfile.TemporaryDirectory() as folder:
            pointer = {"run": self._run, "step": step, "epoch": found["epoch"]}
            (Path(folder) / "pointer.json").write_text(json.dumps(pointer))
            ray.tune.report(found, checkpoint=ray.tune.Checkpoint.from_directory(folder))


class Forward(TuneReportCallback):
    """Brings the epochs of a trial with several workers to Tune."""

    def __init__(self, run: str, score: Score) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._run, self._score = run, score

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """As `TrialWorker.report`."""
        written(self._run)
        super().after_report(run_context, [self._score.of(metrics[0])], checkpoint)


def run_trial(settings: dict[str, Any], study: Study) -> None:
    """A trial from its start or its newest checkpoint; a failure is the trial's own, written down in its folder."""
    _quiet()
    number = int(settings[NUMBER])
    folder = study.folder(number)
    recipe = study.resolved()
    score = Score(recipe)
    for leftover in (FAILED, launch.ERROR_FILE, launch.STOP):
        storage.remove(storage.join(folder, leftover))
    try:
        recipe = study.trial(number, {name: value for name, value in settings.items() if name != NUMBER})
        given = ray.tune.get_checkpoint() if recipe.tune.method == "pbt" else None
        if given is not None:
            _take_over(given, folder, settings)
        else:
            # Tune may have forgotten epochs between its last note and a kill.
            for line in validated(folder):
                ray.tune.report(score.of(line))
        if _finished(folder):
            return
        storage.write(storage.join(folder, launch.RECIPE), config.to_yaml(recipe))
        with run_info.record_session(folder, study.inputs, recipe.tune.workers, recipe.tracking.gpu_hour_price):
            if recipe.tune.workers == 1:
                launch.train_here(recipe, folder, TrialWorker(folder, recipe, score, study.use_gpu))
            else:
                launch.fit(recipe, folder, study.use_gpu, [Forward(folder, score)])
    except Exception as error:  # whatever a combination of settings may lead to; other trials go on
        reason = " ".join(str(error).split())[:500]
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        storage.write(storage.join(folder, FAILED), kind + reason)
        ray.tune.report(score.of({"epoch": recipe.train.epochs}))


def written(run: str) -> int:
    """Wait until the checkpoint of the epoch that was validated last, or a later one, is there; returns its step.

    It is written after best.pt, so that one is there too.

    Raises:
        UserError: it does not come.
    """
    step = next(line["step"] for line in reversed(tracking.read_log(run)) if line["kind"] == "val")
    deadline = time.monotonic() + PATIENCE_S
    # A later one: by now the epoch's own may have been removed as one too many.
    while _newest(run) < step:
        if time.monotonic() > deadline:
            raise UserError(f"{run}: no checkpoint of step {step} after {PATIENCE_S:.0f} s; is the disk full?")
        time.sleep(1.0 if storage.is_remote(run) else 0.01)
    return int(step)


def validated(run: str) -> list[dict[str, Any]]:
    """The validation lines of a run up to its newest checkpoint: what a resumed trial will not compute again."""
    newest = _newest(run)
    return [line for line in tracking.read_log(run) if line["kind"] == "val" and line["step"] <= newest]


def at_own_thresholds(run: str) -> float:
    """The mean F1 over findings, each at its best threshold, or the Dice of the best triplet: validation split only.

    NaN where no finding has a positive, or the trial never came to a checkpoint.
    """
    if not storage.exists(storage.join(run, checkpoint.BEST)):
        return math.nan
    scores = predictions.predict_split(run, "val")
    if scores.maps is not None:
        return thresholds.best_mask_rule(scores.maps).dice
    found = []
    for score_N, label_N in zip(scores.score_NF.T, scores.label_NF.T, strict=True):
        cut = thresholds.best_f1_threshold(score_N, label_N).value
        found.append(metrics.f1(metrics.confusion(score_N, label_N, cut)) if math.isfinite(cut) else math.nan)
    return float(np.nanmean(found)) if np.isfinite(found).any() else math.nan


def _take_over(given: Any, folder: str, settings: Mapping[str, Any]) -> None:
    """Population based training: go on from the checkpoint that Tune chose, which may be another trial's."""
    with given.as_directory() as place:
        pointer = json.loads((Path(place) / "pointer.json").read_text())
    donor, step = pointer["run"], pointer["step"]
    if donor != folder:
        own, theirs = (storage.join(each, checkpoint.FOLDER) for each in (folder, donor))
        for name in storage.listing(own, ".pt"):
            storage.remove(storage.join(own, name))
        for name, of in checkpoint.steps(theirs).items():
            if of == step:
                storage.write(storage.join(own, name), storage.read(storage.join(theirs, name)))
        # The best so far of the weights that were taken over comes with them, as `Progress.best` does.
        storage.write(storage.join(folder, checkpoint.BEST), storage.read(storage.join(donor, checkpoint.BEST)))
    line = {"epoch": pointer["epoch"], "from": donor.rsplit("/", 1)[-1], **settings}
    address = storage.join(folder, SCHEDULE)
    before = storage.read(address) if storage.exists(address) else b""
    storage.write(address, before + json.dumps(line).encode() + b"\n")


def _finished(folder: str) -> bool:
    return storage.exists(storage.join(folder, run_info.RUN_INFO)) and bool(run_info.read_run_info(folder)["finished"])


def _newest(run: str) -> int:
    return max(checkpoint.steps(storage.join(run, checkpoint.FOLDER)).values(), default=0)


def _quiet() -> None:
    # Stopping between epochs, a thread has as long to close its files before Ray gives its process up.
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = "20"
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    logging.getLogger("ray").setLevel(logging.ERROR)
