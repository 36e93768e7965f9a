"""The progress of a search, as Ray Tune tells it."""

from __future__ import annotations

import math
from typing import Any

import ray.tune

from cxrscale.config import LOWER_IS_BETTER
from cxrscale.tuning import room
from cxrscale.tuning.search_space import Point
from cxrscale.tuning.trial import NUMBER

bars: dict[str, Any] = {}
"""The progress bar of a search, by its folder: Ray pickles callbacks for a later restore, and a bar cannot be."""


class Follower(ray.tune.Callback):
    """Updates the progress bar, and looks whether a trial has room."""

    def __init__(self, run: str, metric: str, names: list[str]) -> None:
        self.run, self.metric, self.names = run, metric, names
        self.best: tuple[float, str] | None = None

    # ruff: noqa: ARG002 - the names of these arguments are Ray's
    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Point, **info: Any) -> None:
        """Update the best so far."""
        value, name = result["best"], self.names[trial.config[NUMBER]]
        sign = -1.0 if self.metric in LOWER_IS_BETTER else 1.0
        if math.isfinite(value) and (self.best is None or sign * value > sign * self.best[0]):
            self.best = value, name
        self._show(trials)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Count the trial."""
        self._show(trials, trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Count the trial."""
        self._show(trials, trial)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Called every tenth of a second or so: look whether any trial runs."""
        watch = room.watches.get(self.run)
        if watch is not None:
            watch.see([trial.status for trial in trials])

    def _show(self, trials: list[Any], ended: Any = None) -> None:
        bar = bars.get(self.run)
        if bar is not None:
            # Ray calls before it sets the status of a trial that has ended.
            states = ["TERMINATED" if item is ended else item.status for item in trials]
            best = f"best {self.metric} {self.best[0]:.4f} ({self.best[1]})" if self.best else ""
            done = states.count("TERMINATED") + states.count("ERROR")
            bar.update(done, f"{states.count('RUNNING')} running  {best}")
