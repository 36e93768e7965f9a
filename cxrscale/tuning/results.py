"""What a search found: one row a trial, the noise of the seeds, the best trial as a recipe."""

from __future__ import annotations

import io
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from rich.console import Console
from rich.table import Table
from scipy.integrate import quad
from scipy.stats import norm

from cxrscale.config import LOWER_IS_BETTER, Recipe
from cxrscale.io import storage
from cxrscale.reporting import tables
from cxrscale.training import checkpoint, run_info, tracking
from cxrscale.tuning.search_space import Point, Space, apply_point, differences
from cxrscale.tuning.trial import FAILED, SCHEDULE, TRIALS, Study
from cxrscale.types import UserError

PARQUET = "trials.parquet"
BEST = "best.yaml"
FINISHED, STOPPED, BROKEN = "finished", "stopped early", "failed"


@dataclass(frozen=True, slots=True)
class TrialRow:
    """One trial, or one training of the unchanged recipe with another seed."""

    name: str
    seed: bool
    status: str
    reason: str
    """Why it failed."""
    point: Point
    """The searched fields' values; for pbt the last ones."""
    curve: tuple[float, ...]
    """The metric of each epoch; NaN where it was undefined."""
    own: float
    """F1 (the findings' mean) or Dice at the trial's own best thresholds on the validation split."""
    seconds: float
    worker_hours: float
    gpu_hours: float
    cost: float | None
    run: str

    def best(self, sign: float) -> float:
        """The metric of the best epoch; `sign` is -1 where less is better. NaN without one."""
        return float(sign * np.nanmax(sign * np.array(self.curve))) if np.isfinite(self.curve).any() else math.nan


@dataclass(frozen=True, slots=True)
class Verdict:
    """The best trial against the unchanged recipe and its seeds' noise."""

    best: TrialRow
    value: float
    mean: float
    """Of the unchanged recipe over its seeds; NaN without seeds."""
    sd: float
    """Their standard deviation (n - 1); NaN of fewer than two."""
    gain: float
    """How much better the best trial is than the mean; below 0 where it is worse."""
    sentence: str

    @property
    def ratio(self) -> float:
        """The gain in standard deviations of the seeds."""
        return self.gain / self.sd if self.sd else math.nan


def direction(recipe: Recipe) -> float:
    """-1 where less of train.monitor is better, else 1."""
    return -1.0 if recipe.train.monitor in LOWER_IS_BETTER else 1.0


def read_trials(study: Study, space: Space, own: Mapping[str, float]) -> list[TrialRow]:
    """The rows from the trials' folders, seeds first.

    Args:
        own: folder's name -> score at own thresholds; these are the trials.
    """
    metric = study.recipe["train"]["monitor"]
    price = study.recipe["tracking"]["gpu_hour_price"]
    return [_row(storage.join(study.run, TRIALS, name), space, metric, price, score) for name, score in own.items()]


def _row(run: str, space: Space, metric: str, price: float | None, own: float) -> TrialRow:
    lines = tracking.read_log(run)
    curve = tuple(math.nan if line[metric] is None else line[metric] for line in lines if line["kind"] == "val")
    failure = storage.join(run, FAILED)
    reason = storage.read(failure).decode() if storage.exists(failure) else ""
    point: Point = dict.fromkeys(space)
    spent: dict[str, Any] = {"seconds": 0.0, "worker_hours": 0.0, "gpu_hours": 0.0, "cost": None}
    finished = False
    name = run.rsplit("/", 1)[-1]
    if storage.exists(storage.join(run, run_info.RUN_INFO)):
        about = run_info.read_run_info(run)
        finished = about["finished"]
        sessions = about["sessions"]
        # A trial that is stopped from outside has no time to note its end: its last line counts.
        last = max((line["time"] for line in lines), default=0.0)
        device = next((line for line in lines if "gpu_memory_gb" in line), None)
        for each in sessions:
            each["ended"] = each["ended"] or max(each["began"], last)
            each["device"] = each["device"] or ("GPU" if device else "CPU")
        spent = run_info.totals(sessions, price)
        tree = yaml.safe_load(storage.read(storage.join(run, "recipe.yaml")))
        point = {field: _at(tree, field) for field in space}
    status = BROKEN if reason else FINISHED if finished else STOPPED
    return TrialRow(name, name.startswith("seed-"), status, reason, point, curve, own, run=run, **spent)


def _at(tree: Any, name: str) -> Any:
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
    valid = [row for row in trials if math.isfinite(row.best(sign))]
    if not valid:
        why = next((row.reason for row in trials if row.reason), f"{metric} is undefined on the validation split")
        raise UserError(f"no trial has a {metric}: {why}")
    best = max(valid, key=lambda row: sign * row.best(sign))
    value = best.best(sign)
    seeds = [row.best(sign) for row in rows if row.seed and math.isfinite(row.best(sign))]
    mean = float(np.mean(seeds)) if seeds else math.nan
    sd = float(np.std(seeds, ddof=1)) if len(seeds) > 1 else math.nan
    gain = sign * (value - mean)
    return Verdict(best, value, mean, sd, gain, _sentence(best.name, value, seeds, mean, sd, gain, len(valid), metric))


def _sentence(
    name: str, value: float, seeds: list[float], mean: float, sd: float, gain: float, trials: int, metric: str
) -> str:
    said = f"{name} reaches {metric} {value:.4f}"
    if not seeds:
        return f"{said}; the unchanged recipe was not trained beside it: tune.baseline_seeds=3 would say what that is worth."
    said += f", the unchanged recipe {mean:.4f}"
    if not gain > 0:
        return f"{said} (mean of {len(seeds)} seeds): no trial beats the default. Keep the recipe."
    if not sd > 0:
        return f"{said} with one seed: it beats the default by {gain:.4f}; tune.baseline_seeds=3 would say if that is noise."
    chance = expected_lead(trials)
    verdict = "more than" if gain / sd > chance else "no more than"
    return (
        f"{said} (mean of {len(seeds)} seeds, sd {sd:.4f}): it beats the default by {gain:.4f}, {gain / sd:.1f} times "
        f"the seed sd, {verdict} the {chance:.1f} sd by which the best of {trials} equal trials would lead by chance."
    )


def expected_lead(count: int) -> float:
    """The expected largest of `count` standard normal draws: the integral of x times the density of the largest."""
    area, _ = quad(lambda x: x * count * norm.pdf(x) * norm.cdf(x) ** (count - 1), -10, 10, points=[0, 2, 4])
    return float(area)


def totals(rows: Sequence[TrialRow]) -> dict[str, float | None]:
    """Hours and cost of all trials together."""
    costs = [row.cost for row in rows if row.cost is not None]
    return {
        "worker_hours": round(sum(row.worker_hours for row in rows), 4),
        "gpu_hours": round(sum(row.gpu_hours for row in rows), 4),
        "cost": round(sum(costs), 2) if costs else None,
    }


# What is written


def write_results(rows: Sequence[TrialRow], recipe: Recipe, space: Space, run: str) -> Verdict:
    """Write trials.parquet, best.yaml and best.pt into the search's folder.

    Raises:
        UserError: as `judge`; the table is written all the same.
    """
    with storage.publishing(storage.join(run, PARQUET)) as path:
        pq.write_table(results_table(rows, recipe, space), path, compression="zstd")
    verdict = judge(rows, recipe)
    storage.write(storage.join(run, BEST), best_recipe(verdict, recipe, space, run))
    weights = storage.read(storage.join(verdict.best.run, checkpoint.BEST))
    storage.write(storage.join(run, checkpoint.BEST), weights)
    return verdict


def results_table(rows: Sequence[TrialRow], recipe: Recipe, space: Space) -> pa.Table:
    """One row a trial; a searched field is a column of its own name, as JSON where its values are of several types."""
    sign = direction(recipe)
    columns: dict[str, Any] = {
        "trial": [row.name for row in rows],
        "seed": [row.seed for row in rows],
        "status": [row.status for row in rows],
    }
    for name in space:
        values = [row.point[name] for row in rows]
        kinds = {type(value) for value in values if value is not None}
        plain = (len(kinds) <= 1 and kinds <= {int, float, str, bool}) or kinds == {int, float}
        columns[name] = (
            [float(v) if kinds == {int, float} and v is not None else v for v in values]
            if plain
            else [json.dumps(value) for value in values]
        )
    best = [row.best(sign) for row in rows]
    own = "dice" if recipe.data.task == "segment" else "f1"
    columns |= {
        recipe.train.monitor: best,
        "last": [row.curve[-1] if row.curve else math.nan for row in rows],
        "best_epoch": [
            row.curve.index(value) + 1 if math.isfinite(value) else None for row, value in zip(rows, best, strict=True)
        ],
        "epochs": [len(row.curve) for row in rows],
        "stopped_early": [row.status == STOPPED for row in rows],
        f"{own}_at_own_thresholds": [row.own for row in rows],
        "seconds": [row.seconds for row in rows],
        "worker_hours": [row.worker_hours for row in rows],
        "gpu_hours": [row.gpu_hours for row in rows],
        "cost": pa.array([row.cost for row in rows], pa.float64()),
        "curve": [list(row.curve) for row in rows],
        "reason": [row.reason for row in rows],
        "run": [row.run for row in rows],
    }
    return pa.table(columns)


def best_recipe(verdict: Verdict, recipe: Recipe, space: Space, run: str) -> str:
    """The best trial as a recipe of its own: what differs from the defaults, under what it is and what it scored."""
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
        f"Validation {metric}: {verdict.value:.4f}, at its best epoch. The test split was not looked at.",
        f"Trained already: best.pt beside this file, and the run {verdict.best.run}",
        "(`cxrscale threshold` and `cxrscale evaluate` take it).",
        *textwrap.wrap(verdict.sentence, 115),
    ]
    if recipe.tune.method == "pbt":
        lines.append(f"The values changed while it was trained: see {storage.join(verdict.best.run, SCHEDULE)}.")
    header = "".join(f"# {line}".rstrip() + "\n" for line in lines)
    body: str = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, default_flow_style=None)
    return header + body


def print_results(run: str, recipe: Recipe, space: Space) -> None:
    """Print the table of a finished search, the best first."""
    content = pq.read_table(io.BytesIO(storage.read(storage.join(run, PARQUET)))).to_pylist()
    sign, metric = direction(recipe), recipe.train.monitor
    own = next(name for name in content[0] if name.endswith("_at_own_thresholds"))
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(tables.WIDTH, 70 + 18 * len(space)))
    result = Table(title=f"{run}: {len(content)} trainings")
    result.add_column("trial", no_wrap=True)
    for name in (*space, metric, own.removesuffix("_thresholds").replace("_", " "), "epochs", "", "minutes"):
        result.add_column(name, justify="right", no_wrap=True)
    content.sort(key=lambda row: -sign * row[metric] if math.isfinite(row[metric]) else math.inf)
    for place, row in enumerate(content):
        cells = [_text(row[name]) for name in space]
        status = "" if row["status"] == FINISHED else row["status"]
        numbers = [_text(row[metric]), _text(row[own]), str(row["epochs"]), status, f"{row['seconds'] / 60:.1f}"]
        result.add_row(row["trial"], *cells, *numbers, style="bold" if place == 0 else "dim" if row["seed"] else "")
    console.print(result)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "-"
    return str(value)
