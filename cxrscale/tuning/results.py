"""The results of a search: one row per trial, the noise of the seeds, the best trial as a recipe."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.integrate import quad
from scipy.stats import norm

from cxrscale import config
from cxrscale.config import LOWER_IS_BETTER, Recipe
from cxrscale.io import parquet, read_sealed_yaml, seal, storage, write_sealed_yaml
from cxrscale.training import checkpoint, resume, run_info, tracking
from cxrscale.tuning.search_info import SearchTotals
from cxrscale.tuning.search_space import Point, Space, apply_point, differences
from cxrscale.tuning.trial import FAILED, RETRIED, TRIALS, Study
from cxrscale.types import UserError

PARQUET = "trials.parquet"
BEST = "best.yaml"
FINISHED, STOPPED, BROKEN = "finished", "stopped early", "failed"
OWN_THRESHOLDS = "_at_own_thresholds"
"""Suffix of the column of f1 or dice at each trial's own thresholds."""


@dataclass(frozen=True, slots=True)
class TrialRow:
    """One trial, or one training of the unchanged recipe with another seed."""

    name: str
    seed: bool
    """Whether it is a training of the unchanged recipe."""
    status: str
    reason: str
    """Why it failed; empty where it did not."""
    point: Point
    """The values of the searched fields."""
    curve: tuple[float, ...]
    """The metric of each epoch; NaN where it was undefined."""
    own: float
    """F1 (mean over the findings) or Dice at the trial's own best thresholds on the validation split."""
    seconds: float
    worker_hours: float
    gpu_hours: float
    cost: float | None
    run: str

    def best(self, sign: float) -> float:
        """The metric of the best epoch; `sign` is -1 where lower is better. NaN without one."""
        return float(sign * np.nanmax(sign * np.array(self.curve))) if np.isfinite(self.curve).any() else math.nan


@dataclass(frozen=True, slots=True)
class Verdict:
    """The best trial against the unchanged recipe and the noise of its seeds."""

    best: TrialRow
    value: float
    """The metric of the best trial."""
    mean: float
    """Mean of the unchanged recipe over its seeds; NaN without seeds."""
    sd: float
    """Their standard deviation (n - 1); NaN with fewer than two."""
    gain: float
    """How much better the best trial is than the mean; below 0 where it is worse."""
    sentence: str

    @property
    def ratio(self) -> float:
        """The gain in standard deviations of the seeds."""
        return self.gain / self.sd if self.sd else math.nan


def direction(recipe: Recipe) -> float:
    """-1 where lower train.monitor is better, else 1."""
    return -1.0 if recipe.train.monitor in LOWER_IS_BETTER else 1.0


def read_trials(study: Study, space: Space, own: Mapping[str, float]) -> list[TrialRow]:
    """The rows from the trials' folders, seeds first.

    Args:
        own: trial's name -> score at its own thresholds; these are the trials.
    """
    return [_read_trial(study, space, name, score) for name, score in own.items()]


def _read_trial(study: Study, space: Space, name: str, own: float) -> TrialRow:
    run, metric = storage.join(study.run, TRIALS, name), study.recipe["train"]["monitor"]
    lines = tracking.read_log(run)
    curve = tuple(math.nan if line[metric] is None else line[metric] for line in lines if line["kind"] == "val")
    failure = storage.join(run, FAILED)
    reason = _first_line(failure) if storage.exists(failure) else ""
    if reason and storage.exists(storage.join(run, RETRIED)):
        reason += " (also when it was run once more)"
    point: Point = dict.fromkeys(space)
    usage, finished = run_info.Usage(), False
    if storage.exists(storage.join(run, run_info.RUN_INFO)):
        info = run_info.read_run_info(run)
        finished = info.finished
        # A trial that is stopped from outside has no time to record its end and its device.
        device = "GPU" if any("gpu_memory_gb" in line for line in lines) else "CPU"
        sessions = [
            session.model_copy(update={"device": session.device or device})
            for session in run_info.close_sessions(info.sessions, lines)
        ]
        usage = run_info.sum_usage(sessions, study.recipe["tracking"]["gpu_hour_price"])
        address = storage.join(run, resume.RECIPE)
        tree = read_sealed_yaml(address)
        point = {field: _value_at(tree, field) for field in space}
    status = BROKEN if reason else FINISHED if finished else STOPPED
    return TrialRow(name, name.startswith("seed-"), status, reason, point, curve, own, run=run, **dict(usage))


def _first_line(address: str) -> str:
    """Of a text under a seal."""
    line, _, _ = seal.read(address, "remove it").decode().partition("\n")
    return line


def _value_at(tree: Any, name: str) -> Any:
    for part in name.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def judge(rows: Sequence[TrialRow], recipe: Recipe) -> Verdict:
    """The best trial, and whether it beats the unchanged recipe by more than its seeds differ.

    Raises:
        UserError: no trial has a finite metric.
    """
    sign, metric = direction(recipe), recipe.train.monitor
    trials = [row for row in rows if not row.seed]
    # A trial that failed is never chosen, however well it began.
    valid = [row for row in trials if row.status != BROKEN and math.isfinite(row.best(sign))]
    if not valid:
        reason = next((row.reason for row in trials if row.reason), f"{metric} is undefined on the validation split")
        raise UserError(f"no trial has a {metric}: {reason}")
    best = max(valid, key=lambda row: sign * row.best(sign))
    value = best.best(sign)
    seeds = [row.best(sign) for row in rows if row.seed and row.status != BROKEN and math.isfinite(row.best(sign))]
    mean = float(np.mean(seeds)) if seeds else math.nan
    sd = float(np.std(seeds, ddof=1)) if len(seeds) > 1 else math.nan
    verdict = Verdict(best, value, mean, sd, gain=sign * (value - mean), sentence="")
    if sentence := _no_effect(valid, best, rows):
        return replace(verdict, gain=0.0, sentence=sentence)
    return replace(verdict, sentence=_sentence(verdict, metric, len(valid), len(seeds)))


def _no_effect(valid: Sequence[TrialRow], best: TrialRow, rows: Sequence[TrialRow]) -> str:
    """The sentence for a search whose fields change nothing; empty where they change something."""
    if len(valid) > 1 and all(_same_curve(row, best) for row in valid):
        return (
            f"no effect: the {len(valid)} trials are the same in every epoch to the last digit; "
            f"{', '.join(best.point)} changed nothing. Keep the recipe."
        )
    # The trials have the seed of the first training of the unchanged recipe.
    unchanged = next((row for row in rows if row.name == "seed-0"), None)
    if unchanged is not None and len(unchanged.curve) == len(best.curve) and _same_curve(unchanged, best):
        return (
            f"no effect: {best.name}, the best trial, is the same in every epoch to the last digit as the unchanged "
            "recipe with the same seed. Keep the recipe."
        )
    return ""


def _same_curve(one: TrialRow, other: TrialRow) -> bool:
    """Whether two trials had the same metric in each epoch that both did."""
    epochs = min(len(one.curve), len(other.curve))
    return epochs > 0 and np.array_equal(one.curve[:epochs], other.curve[:epochs], equal_nan=True)


def _sentence(verdict: Verdict, metric: str, trials: int, seeds: int) -> str:
    best = f"{verdict.best.name} reaches {metric} {verdict.value:.4f}"
    if not seeds:
        return f"{best}; the unchanged recipe was not trained: tune.baseline_seeds=3 would show what that is worth."
    best += f", the unchanged recipe {verdict.mean:.4f}"
    if not verdict.gain > 0:
        return f"{best} (mean of {seeds} seeds): no trial beats the default. Keep the recipe."
    if not verdict.sd > 0:
        return (
            f"{best} with one seed: it beats the default by {verdict.gain:.4f}; tune.baseline_seeds=3 would show "
            "whether that is noise."
        )
    chance = expected_lead(trials)
    comparison = "more than" if verdict.ratio > chance else "no more than"
    return (
        f"{best} (mean of {seeds} seeds, sd {verdict.sd:.4f}): it beats the default by {verdict.gain:.4f}, "
        f"{verdict.ratio:.1f} times the seed sd, {comparison} the {chance:.1f} sd by which the best of {trials} equal "
        "trials would lead by chance."
    )


def expected_lead(count: int) -> float:
    """The expected maximum of `count` standard normal variables: the integral of x times its density."""
    integral, _ = quad(lambda x: x * count * norm.pdf(x) * norm.cdf(x) ** (count - 1), -10, 10, points=[0, 2, 4])
    return float(integral)


def totals(rows: Sequence[TrialRow]) -> SearchTotals:
    """Hours and cost of all trials together."""
    costs = [row.cost for row in rows if row.cost is not None]
    return SearchTotals(
        worker_hours=round(sum(row.worker_hours for row in rows), 4),
        gpu_hours=round(sum(row.gpu_hours for row in rows), 4),
        cost=round(sum(costs), 2) if costs else None,
    )


# Output


def write_results(rows: Sequence[TrialRow], recipe: Recipe, space: Space, run: str) -> Verdict:
    """Write trials.parquet, best.yaml and best.pt into the search's folder.

    Raises:
        UserError: as `judge`; the table is written all the same.
    """
    storage.write(storage.join(run, PARQUET), parquet.encode(results_table(rows, recipe, space), sealed=True))
    verdict = judge(rows, recipe)
    write_sealed_yaml(storage.join(run, BEST), best_recipe(verdict, recipe, space, run))
    weights = storage.read(storage.join(verdict.best.run, checkpoint.BEST))
    storage.write(storage.join(run, checkpoint.BEST), weights)
    return verdict


def results_table(rows: Sequence[TrialRow], recipe: Recipe, space: Space) -> pa.Table:
    """One row per trial; a searched field is a column of its own name, as JSON where its values have several types."""
    sign = direction(recipe)
    best = [row.best(sign) for row in rows]
    own = "dice" if recipe.data.task == "segment" else "f1"
    columns: dict[str, Any] = {
        "trial": [row.name for row in rows],
        "seed": [row.seed for row in rows],
        "status": [row.status for row in rows],
        **{name: _column([row.point[name] for row in rows]) for name in space},
        recipe.train.monitor: best,
        "last": [row.curve[-1] if row.curve else math.nan for row in rows],
        "best_epoch": [
            row.curve.index(value) + 1 if math.isfinite(value) else None for row, value in zip(rows, best, strict=True)
        ],
        "epochs": [len(row.curve) for row in rows],
        "stopped_early": [row.status == STOPPED for row in rows],
        own + OWN_THRESHOLDS: [row.own for row in rows],
        "seconds": [row.seconds for row in rows],
        "worker_hours": [row.worker_hours for row in rows],
        "gpu_hours": [row.gpu_hours for row in rows],
        "cost": pa.array([row.cost for row in rows], pa.float64()),
        "curve": [list(row.curve) for row in rows],
        "reason": [row.reason for row in rows],
        "run": [row.run for row in rows],
    }
    return pa.table(columns)


def _column(values: Sequence[Any]) -> list[Any]:
    """The values of one field as one type: numbers as float, a mixture or lists as JSON."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        return [None if value is None else float(value) for value in values]
    if len(kinds) <= 1 and kinds <= {int, float, str, bool}:
        return list(values)
    return [json.dumps(value) for value in values]


def read_results(run: str) -> list[dict[str, Any]]:
    """The rows of a finished search's trials.parquet."""
    address, remedy = storage.join(run, PARQUET), "give another tracking.name, for a new search"
    table = parquet.read_table(storage.read(address), address, remedy)
    parquet.check_columns(table, {"trial": pa.string(), "status": pa.string()}, address, remedy)
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def best_recipe(verdict: Verdict, recipe: Recipe, space: Space, run: str) -> str:
    """The best trial as the text of a recipe: what differs from the defaults, below a header with its score."""
    tree = differences(apply_point(recipe, verdict.best.point))
    for section in ("tune", "pack"):
        tree.pop(section, None)
    tree.get("tracking", {}).pop("name", None)
    fields = ", ".join(f"{name}={json.dumps(verdict.best.point[name])}" for name in space)
    metric, path = recipe.train.monitor, storage.join(run, BEST)
    lines = [
        f"{verdict.best.name} of the search {run.rsplit('/', 1)[-1]}: {fields}",
        "",
        f"  cxrscale train {path}",
        "",
        f"Validation {metric}: {verdict.value:.4f}, at its best epoch. The test split was not used.",
        f"Already trained: best.pt beside this file, and the run {verdict.best.run}",
        "(for `cxrscale threshold` and `cxrscale evaluate`).",
        *textwrap.wrap(verdict.sentence, 115),
    ]
    header = "".join(f"# {line}".rstrip() + "\n" for line in lines)
    return header + config.write_yaml(tree, flow=None)
