"""The search as a page: one HTML file with its plots inside, for screen and paper, light and dark; plots as PNG too."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from cxrscale import __version__
from cxrscale.config import Recipe
from cxrscale.io import storage
from cxrscale.reporting.style import INK, LINE, STYLE, svg
from cxrscale.tuning import FINISHED, STOPPED, Domain, Space, TrialRow, Verdict, direction, judge, totals

PAGE = "tune.html"
TEMPLATE = "tuning.html.jinja"
TRIAL, BEST, SEED = "#4477aa", "#dd5566", "#c9a227"
"""Told apart by the color-blind too (after Tol 2021), and visible on white and on black."""
FEWEST = 6
"""Trials below which no forest is grown: its importances would be noise."""


@dataclass(frozen=True, slots=True)
class Importance:
    """How much the metric of a forest's predictions hangs on each field."""

    fields: tuple[str, ...]
    mean: tuple[float, ...]
    """Drop of R^2 where the field's values are shuffled over the trials, mean over the shuffles."""
    sd: tuple[float, ...]
    explained: float
    """R^2 of the forest on trials that each tree has not seen; near 0 or below, the importances mean nothing."""


def write(rows: Sequence[TrialRow], recipe: Recipe, space: Space, run: str) -> None:
    """Write tune.html, and each plot as PNG, into the search's folder."""
    verdict = judge(rows, recipe)
    importance = importances(rows, recipe, space)
    with mpl.rc_context(STYLE):
        figures = {
            "noise": _noise(rows, recipe, verdict),
            "curves": _curves(rows, recipe, verdict),
            "parameters": _parameters(rows, recipe, space, verdict),
            "parallel": _parallel(rows, recipe, space, verdict),
            **({"importance": _importance(importance)} if importance else {}),
        }
        titles = {
            "noise": "Every trial's best metric beside the seeds of the unchanged recipe",
            "curves": "The metric of every trial, epoch by epoch",
            "parameters": "The metric against each searched field",
            "parallel": "Each trial as a line through its values and its metric",
            "importance": "Importance of each searched field",
        }
        plots: dict[str, Markup] = {}
        for name, figure in figures.items():
            plots[name] = svg(figure, titles[name])
            with storage.publishing(storage.join(run, f"{name}.png")) as path:
                figure.savefig(path, format="png", dpi=150, facecolor="white")
    storage.write(storage.join(run, PAGE), _render(rows, recipe, space, run, verdict, importance, plots))


def _render(
    rows: Sequence[TrialRow],
    recipe: Recipe,
    space: Space,
    run: str,
    verdict: Verdict,
    importance: Importance | None,
    plots: Mapping[str, Markup],
) -> str:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": _number}
    template = environment.from_string(
        resources.files("cxrscale.reporting").joinpath("templates").joinpath(TEMPLATE).read_text("utf-8")
    )
    sign = direction(recipe)
    order = sorted(rows, key=lambda row: -sign * row.best(sign) if math.isfinite(row.best(sign)) else math.inf)
    trials = [row for row in rows if not row.seed]
    return template.render(
        name=run.rstrip("/").rsplit("/", 1)[-1],
        recipe=recipe,
        metric=recipe.train.monitor,
        own="Dice" if recipe.data.task == "segment" else "F1",
        rows=[(row, row.best(sign)) for row in order],
        trials=len(trials),
        seeds=len(rows) - len(trials),
        finished=sum(row.status == FINISHED for row in trials),
        stopped=sum(row.status == STOPPED for row in trials),
        space={name: str(recipe.tune.space[name]) for name in space},
        verdict=verdict,
        importance=importance,
        fewest=FEWEST,
        plots=plots,
        totals=totals(rows),
        version=__version__,
    )


# Numbers


def importances(rows: Sequence[TrialRow], recipe: Recipe, space: Space) -> Importance | None:
    """Permutation importance (Breiman 2001) of each field in a random forest from the points to the metric.

    Trials that were stopped early count with the best that they had reached. None with too few trials.
    """
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    sign = direction(recipe)
    usable = [row for row in rows if not row.seed and math.isfinite(row.best(sign))]
    values = np.array([row.best(sign) for row in usable])
    if len(usable) < FEWEST or np.ptp(values) == 0:
        return None
    share_ND = np.array([[domain.share(row.point[name]) for name, domain in space.items()] for row in usable])
    forest = RandomForestRegressor(100, oob_score=True, random_state=0).fit(share_ND, values)
    found = permutation_importance(forest, share_ND, values, n_repeats=20, random_state=0)
    order = np.argsort(-found.importances_mean, kind="stable")
    names = list(space)
    return Importance(
        tuple(names[place] for place in order),
        tuple(found.importances_mean[order].tolist()),
        tuple(found.importances_std[order].tolist()),
        float(forest.oob_score_),
    )


def _number(value: Any, digits: int = 4) -> str:
    if isinstance(value, float):
        return f"{value:.{digits}g}".replace("-", "−") if math.isfinite(value) else "–"
    return "–" if value is None else str(value)


def _bests(rows: Sequence[TrialRow], sign: float) -> npt.NDArray[np.float64]:
    return np.array([row.best(sign) for row in rows], dtype=np.float64)


# Plots


def _noise(rows: Sequence[TrialRow], recipe: Recipe, verdict: Verdict) -> Figure:
    sign = direction(recipe)
    figure = Figure(figsize=(9, 1.9), layout="constrained")
    axes = figure.subplots()
    trials = [row for row in rows if not row.seed]
    seeds = _bests([row for row in rows if row.seed], sign)
    if math.isfinite(verdict.sd):
        axes.axvspan(verdict.mean - verdict.sd, verdict.mean + verdict.sd, color=SEED, alpha=0.25, linewidth=0)
    for place, chosen in enumerate(([row for row in trials if row.status == STOPPED], trials)):
        ended = [row for row in chosen if place == 0 or row.status != STOPPED]
        axes.plot(
            _bests(ended, sign),
            np.ones(len(ended)),
            "o",
            color=TRIAL,
            fillstyle="none" if place == 0 else "full",
            alpha=0.8,
            label=f"trial, {'stopped early' if place == 0 else 'to the end'}",
        )
    axes.plot(seeds, np.zeros(len(seeds)), "D", color=SEED, label="unchanged recipe, other seeds (band: ± sd)")
    axes.plot([verdict.value], [1], "*", color=BEST, markersize=13, label=f"best, {verdict.best.name}")
    axes.set_yticks([0, 1], ["default", "trials"])
    axes.set_ylim(-0.6, 1.6)
    axes.set_xlabel(f"validation {recipe.train.monitor}, best epoch")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=4)
    return figure


def _curves(rows: Sequence[TrialRow], recipe: Recipe, verdict: Verdict) -> Figure:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    said: set[str] = set()
    for row in sorted(rows, key=lambda row: (row.name == verdict.best.name, row.seed)):
        best = row.name == verdict.best.name
        color, label = (BEST, f"best, {row.name}") if best else (SEED, "default") if row.seed else (TRIAL, "trial")
        epochs = np.arange(1, len(row.curve) + 1)
        width = 2.2 if best else 1.2
        axes.plot(
            epochs,
            row.curve,
            "--" if row.seed else "-",
            color=color,
            linewidth=width,
            alpha=1 if best or row.seed else 0.6,
            label=None if label in said else label,
        )
        said.add(label)
        if row.status == STOPPED and row.curve:
            mark = None if "stopped" in said else "stopped early"
            axes.plot(epochs[-1:], row.curve[-1:], "o", color=color, markersize=5, label=mark)
            said.add("stopped")
    axes.set_xlabel("epoch")
    axes.set_ylabel(f"validation {recipe.train.monitor}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=4)
    return figure


def _parameters(rows: Sequence[TrialRow], recipe: Recipe, space: Space, verdict: Verdict) -> Figure:
    columns = min(3, len(space))
    lines = math.ceil(len(space) / columns)
    figure = Figure(figsize=(9, 0.4 + 2.4 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
    sign = direction(recipe)
    for axes, (name, domain) in zip(panels, space.items(), strict=False):
        for row in rows:
            if row.point[name] is None:
                continue
            place = _place(domain, row.point[name])
            shape = "*" if row.name == verdict.best.name else "D" if row.seed else "o"
            color = BEST if row.name == verdict.best.name else SEED if row.seed else TRIAL
            hollow = "none" if row.status == STOPPED else "full"
            size = 12 if shape == "*" else 6
            axes.plot([place], [row.best(sign)], shape, color=color, fillstyle=hollow, markersize=size, alpha=0.85)
        _axis(axes, domain)
        axes.set_xlabel(name)
        axes.grid(axis="y")
    for axes in panels[len(space) :]:
        axes.set_axis_off()
    figure.supylabel(f"validation {recipe.train.monitor}", fontsize=9)
    return figure


def _place(domain: Domain, value: Any) -> float:
    """Where a value stands on the axis; a recipe's own value may be no choice of the space."""
    if domain.kind != "choice":
        return float(value)
    return float(domain.choices.index(value)) if value in domain.choices else math.nan


def _axis(axes: Axes, domain: Domain) -> None:
    if domain.kind == "choice":
        axes.set_xticks(range(len(domain.choices)), [str(choice) for choice in domain.choices])
        axes.set_xlim(-0.5, len(domain.choices) - 0.5)
    elif domain.kind == "loguniform":
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if domain.high < 30 * domain.low else (1,)))
        # Powers of ten would need the mathematical letters that pages do without.
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    elif domain.kind == "randint":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _parallel(rows: Sequence[TrialRow], recipe: Recipe, space: Space, verdict: Verdict) -> Figure:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots()
    sign = direction(recipe)
    trials = [row for row in rows if not row.seed and math.isfinite(row.best(sign))]
    values = _bests(trials, sign)
    low, high = float(values.min()), float(values.max())
    colors = mpl.colormaps["viridis"]
    ends = [*space, recipe.train.monitor]
    for row, value in sorted(zip(trials, values, strict=True), key=lambda pair: sign * pair[1]):
        share = (value - low) / (high - low or 1)
        heights = [domain.share(row.point[name]) for name, domain in space.items()]
        best = row.name == verdict.best.name
        shade = share if sign > 0 else 1 - share
        axes.plot(
            range(len(ends)), [*heights, share], color=colors(0.15 + 0.75 * shade), linewidth=2.6 if best else 1.2
        )
    for place, name in enumerate(ends):
        axes.axvline(place, color=LINE, linewidth=0.8)
        if name in space:
            domain = space[name]
            choices = domain.choices
            marks = [str(choices[0]), str(choices[-1])] if choices else [f"{domain.low:g}", f"{domain.high:g}"]
        else:
            marks = [f"{low:.3g}", f"{high:.3g}"]
        for height, mark, side in ((-0.04, marks[0], "top"), (1.04, marks[1], "bottom")):
            axes.text(place, height, mark, ha="center", va=side, color=INK, fontsize=8)
    axes.set_xticks(range(len(ends)), ends)
    axes.set_yticks([])
    axes.set_ylim(-0.16, 1.16)
    axes.tick_params(axis="x", length=0)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    return figure


def _importance(found: Importance) -> Figure:
    figure = Figure(figsize=(9, 0.8 + 0.36 * len(found.fields)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(found.fields))
    axes.barh(places, found.mean, xerr=found.sd, color=TRIAL, ecolor=LINE, height=0.6)
    axes.set_yticks(places, list(found.fields))
    axes.invert_yaxis()
    axes.set_xlabel("drop of the forest's R² when the field is shuffled")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    return figure
