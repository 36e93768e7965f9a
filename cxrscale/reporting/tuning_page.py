"""A search as a page: one HTML file with its plots inside, for screen and print, light and dark; the plots as PNG too.

It needs the rows of the trials alone, so that it can be written again from a search that is over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from cxrscale.config import Recipe
from cxrscale.io import seal, storage
from cxrscale.reporting import html
from cxrscale.reporting.style import BLUE, INK, LINE, RED, WIDE, YELLOW, png, styled, svg
from cxrscale.tuning import FINISHED, STOPPED, Domain, Space, TrialRow, Verdict, direction, judge, totals

PAGE = "tune.html"
TEMPLATE = "tuning.html.jinja"
TRIAL, BEST, SEED = BLUE, RED, YELLOW
"""The colors of a trial, of the best one, and of the unchanged recipe."""
MIN_TRIALS = 6
"""With fewer trials no forest is fitted: its importances would be noise."""
PLOT_TITLES = {
    "noise": "Every trial's best metric beside the seeds of the unchanged recipe",
    "curves": "The metric of every trial, epoch by epoch",
    "parameters": "The metric against each searched field",
    "parallel": "Each trial as a line through its values and its metric",
    "importance": "Importance of each searched field",
}


@dataclass(frozen=True, slots=True)
class Importance:
    """How much a forest's prediction of the metric depends on each field."""

    fields: tuple[str, ...]
    mean: tuple[float, ...]
    """Drop of R^2 when the field's values are shuffled over the trials, mean over the shuffles."""
    sd: tuple[float, ...]
    explained: float
    """R^2 of the forest on trials that each tree was not fitted on; near 0 or below, the importances mean nothing."""


@dataclass(frozen=True, slots=True)
class Search:
    """A finished search: what the page and its plots show."""

    rows: Sequence[TrialRow]
    recipe: Recipe
    space: Space
    verdict: Verdict

    @property
    def sign(self) -> float:
        """-1 where less of the metric is better, else 1."""
        return direction(self.recipe)

    @property
    def trials(self) -> list[TrialRow]:
        """The rows without the seeds of the unchanged recipe."""
        return [row for row in self.rows if not row.seed]

    @property
    def seeds(self) -> list[TrialRow]:
        """The trainings of the unchanged recipe."""
        return [row for row in self.rows if row.seed]

    def is_best(self, row: TrialRow) -> bool:
        """Whether the row is the best trial."""
        return row.name == self.verdict.best.name

    def color(self, row: TrialRow) -> str:
        """The row's color in every plot."""
        return BEST if self.is_best(row) else SEED if row.seed else TRIAL

    def values(self, rows: Sequence[TrialRow]) -> npt.NDArray[np.float64]:
        """The metric of each row's best epoch."""
        return np.array([row.best(self.sign) for row in rows], dtype=np.float64)


def write(rows: Sequence[TrialRow], recipe: Recipe, space: Space, run: str) -> None:
    """Write tune.html, and each plot as PNG, into the search's folder.

    Raises:
        UserError: no trial has a finite metric.
    """
    search = Search(rows, recipe, space, judge(rows, recipe))
    importance = importances(rows, recipe, space)
    figures = {
        "noise": _noise_plot(search),
        "curves": _curve_plot(search),
        "parameters": _parameter_plot(search),
        "parallel": _parallel_plot(search),
        **({"importance": _importance_plot(importance)} if importance else {}),
    }
    for name, figure in figures.items():
        storage.write(storage.join(run, f"{name}.png"), png(figure))
    plots = {name: svg(figure, PLOT_TITLES[name]) for name, figure in figures.items()}
    name = run.rstrip("/").rsplit("/", 1)[-1]
    page = render(search, name, importance, plots)
    storage.write(storage.join(run, PAGE), seal.closed_text(page, "<!-- {} -->"))


def render(search: Search, name: str, importance: Importance | None, plots: Mapping[str, Markup]) -> str:
    """The page, the same for the same search.

    Args:
        name: the search's.
        importance: of each field; None with too few trials.
        plots: the figures as SVG, by the names of PLOT_TITLES.
    """
    sign, recipe = search.sign, search.recipe

    def worst_last(row: TrialRow) -> float:
        return -sign * row.best(sign) if math.isfinite(row.best(sign)) else math.inf

    return html.render(
        TEMPLATE,
        name=name,
        recipe=recipe,
        metric=recipe.train.monitor,
        own_metric="Dice" if recipe.data.task == "segment" else "F1",
        rows=[(row, row.best(sign)) for row in sorted(search.rows, key=worst_last)],
        trials=len(search.trials),
        seeds=len(search.seeds),
        finished=sum(row.status == FINISHED for row in search.trials),
        stopped=sum(row.status == STOPPED for row in search.trials),
        space={field: str(recipe.tune.space[field]) for field in search.space},
        verdict=search.verdict,
        importance=importance,
        min_trials=MIN_TRIALS,
        plots=plots,
        totals=totals(search.rows),
    )


def importances(rows: Sequence[TrialRow], recipe: Recipe, space: Space) -> Importance | None:
    """Permutation importance (Breiman 2001) of each field in a random forest from the points to the metric.

    Trials that were stopped early count with the best value that they had reached. None with too few trials.
    """
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    sign = direction(recipe)
    usable = [row for row in rows if not row.seed and math.isfinite(row.best(sign))]
    values = np.array([row.best(sign) for row in usable])
    if len(usable) < MIN_TRIALS or np.ptp(values) == 0:
        return None
    unit_ND = np.array([[domain.unit(row.point[name]) for name, domain in space.items()] for row in usable])
    forest = RandomForestRegressor(100, oob_score=True, random_state=0).fit(unit_ND, values)
    result = permutation_importance(forest, unit_ND, values, n_repeats=20, random_state=0)
    order = np.argsort(-result.importances_mean, kind="stable")
    names = list(space)
    return Importance(
        tuple(names[index] for index in order),
        tuple(result.importances_mean[order].tolist()),
        tuple(result.importances_std[order].tolist()),
        float(forest.oob_score_),
    )


# Plots


@styled
def _noise_plot(search: Search) -> Figure:
    figure = Figure(figsize=(WIDE, 1.9), layout="constrained")
    axes = figure.subplots()
    verdict = search.verdict
    if math.isfinite(verdict.sd):
        axes.axvspan(verdict.mean - verdict.sd, verdict.mean + verdict.sd, color=SEED, alpha=0.25, linewidth=0)
    for stopped, label in ((True, "trial, stopped early"), (False, "trial, to the end")):
        values = search.values([row for row in search.trials if (row.status == STOPPED) == stopped])
        fill = "none" if stopped else "full"
        axes.plot(values, np.ones(len(values)), "o", color=TRIAL, fillstyle=fill, alpha=0.8, label=label)
    values = search.values(search.seeds)
    axes.plot(values, np.zeros(len(values)), "D", color=SEED, label="unchanged recipe, other seeds (band: ± SD)")
    axes.plot([verdict.value], [1], "*", color=BEST, markersize=13, label=f"best, {verdict.best.name}")
    axes.set_yticks([0, 1], ["default", "trials"])
    axes.set_ylim(-0.6, 1.6)
    axes.set_xlabel(f"validation {search.recipe.train.monitor}, best epoch")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=4)
    return figure


@styled
def _curve_plot(search: Search) -> Figure:
    figure = Figure(figsize=(WIDE, 3.6), layout="constrained")
    axes = figure.subplots()
    labeled: set[str] = set()
    for row in sorted(search.rows, key=lambda row: (search.is_best(row), row.seed)):
        best, color = search.is_best(row), search.color(row)
        label = f"best, {row.name}" if best else "default" if row.seed else "trial"
        epochs = np.arange(1, len(row.curve) + 1)
        axes.plot(
            epochs,
            row.curve,
            "--" if row.seed else "-",
            color=color,
            linewidth=2.2 if best else 1.2,
            alpha=1 if best or row.seed else 0.6,
            label=None if label in labeled else label,
        )
        labeled.add(label)
        if row.status == STOPPED and row.curve:
            mark = None if "stopped" in labeled else "stopped early"
            axes.plot(epochs[-1:], row.curve[-1:], "o", color=color, markersize=5, label=mark)
            labeled.add("stopped")
    axes.set_xlabel("epoch")
    axes.set_ylabel(f"validation {search.recipe.train.monitor}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=4)
    return figure


@styled
def _parameter_plot(search: Search) -> Figure:
    columns = min(3, len(search.space))
    lines = math.ceil(len(search.space) / columns)
    figure = Figure(figsize=(WIDE, 0.4 + 2.4 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
    for axes, (name, domain) in zip(panels, search.space.items(), strict=False):
        for row in search.rows:
            if row.point[name] is None:
                continue
            position = _axis_position(domain, row.point[name])
            marker = "*" if search.is_best(row) else "D" if row.seed else "o"
            fill = "none" if row.status == STOPPED else "full"
            size = 12 if marker == "*" else 6
            axes.plot(
                [position],
                [row.best(search.sign)],
                marker,
                color=search.color(row),
                fillstyle=fill,
                markersize=size,
                alpha=0.85,
            )
        _scale_axis(axes, domain)
        axes.set_xlabel(name)
        axes.grid(axis="y")
    for axes in panels[len(search.space) :]:
        axes.set_axis_off()
    figure.supylabel(f"validation {search.recipe.train.monitor}", fontsize=9)
    return figure


def _axis_position(domain: Domain, value: Any) -> float:
    """A value's position on the axis; NaN for the recipe's own value where it is no choice of the space."""
    if domain.kind != "choice":
        return float(value)
    return float(domain.choices.index(value)) if value in domain.choices else math.nan


def _scale_axis(axes: Axes, domain: Domain) -> None:
    if domain.kind == "choice":
        axes.set_xticks(range(len(domain.choices)), [str(choice) for choice in domain.choices])
        axes.set_xlim(-0.5, len(domain.choices) - 0.5)
    elif domain.kind == "loguniform":
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if domain.high < 30 * domain.low else (1,)))
        # Powers of ten need math text, which SVG text without fonts cannot show.
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    elif domain.kind == "randint":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


@styled
def _parallel_plot(search: Search) -> Figure:
    figure = Figure(figsize=(WIDE, 3.4), layout="constrained")
    axes = figure.subplots()
    space, sign, metric = search.space, search.sign, search.recipe.train.monitor
    trials = [row for row in search.trials if math.isfinite(row.best(sign))]
    values = search.values(trials)
    low, high = float(values.min()), float(values.max())
    colors = mpl.colormaps["viridis"]
    names = [*space, metric]
    for row, value in sorted(zip(trials, values, strict=True), key=lambda pair: sign * pair[1]):
        height = (value - low) / (high - low or 1)
        heights = [domain.unit(row.point[name]) for name, domain in space.items()]
        shade = height if sign > 0 else 1 - height
        width = 2.6 if search.is_best(row) else 1.2
        axes.plot(range(len(names)), [*heights, height], color=colors(0.15 + 0.75 * shade), linewidth=width)
    for position, name in enumerate(names):
        axes.axvline(position, color=LINE, linewidth=0.8)
        ends = _axis_ends(space[name]) if name in space else (f"{low:.3g}", f"{high:.3g}")
        for height, end, side in ((-0.04, ends[0], "top"), (1.04, ends[1], "bottom")):
            axes.text(position, height, end, ha="center", va=side, color=INK, fontsize=8)
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks([])
    axes.set_ylim(-0.16, 1.16)
    axes.tick_params(axis="x", length=0)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    return figure


def _axis_ends(domain: Domain) -> tuple[str, str]:
    if domain.choices:
        return str(domain.choices[0]), str(domain.choices[-1])
    return f"{domain.low:g}", f"{domain.high:g}"


@styled
def _importance_plot(importance: Importance) -> Figure:
    figure = Figure(figsize=(WIDE, 0.8 + 0.36 * len(importance.fields)), layout="constrained")
    axes = figure.subplots()
    positions = np.arange(len(importance.fields))
    axes.barh(positions, importance.mean, xerr=importance.sd, color=TRIAL, ecolor=LINE, height=0.6)
    axes.set_yticks(positions, list(importance.fields))
    axes.invert_yaxis()
    axes.set_xlabel("drop of the forest's R² when the field is shuffled")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    return figure
