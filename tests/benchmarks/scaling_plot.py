"""The projection as a plot: speed and efficiency over the number of GPUs, each point marked by what binds it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tests.benchmarks import scaling_projection as projection

MARKS = {
    projection.COMPUTE: "o",
    projection.FIXED: "s",
    projection.PADDING: "P",
    projection.NETWORK: "v",
    projection.LINK: "^",
    projection.MESSAGES: "X",
    projection.LOADER: "D",
    projection.DISK: "*",
}
COLORS = ("#1f6feb", "#c2410c", "#15803d", "#7c3aed", "#b91c1c", "#0f766e")


def draw(projected: Mapping[str, Any], path: Path) -> None:
    """A row of panels for each kind of GPU, written as a PNG."""
    tables: dict[str, list[dict[str, Any]]] = projected["tables"]
    kinds = list(projected["costs"])
    figure = Figure(figsize=(11, 4.4 * len(kinds)), layout="constrained")
    panels = figure.subplots(len(kinds), 2, squeeze=False)
    for kind, (speed, share) in zip(kinds, panels, strict=True):
        curves = {label.removeprefix(f"{kind}, "): rows for label, rows in tables.items() if label.startswith(kind)}
        for (label, rows), color in zip(curves.items(), COLORS, strict=False):
            gpus = [row["gpus"] for row in rows]
            ideal = [rows[0]["per_second"] * n for n in gpus]
            speed.plot(gpus, ideal, color=color, linewidth=0.8, linestyle=":")
            marked(speed, rows, gpus, [row["per_second"] for row in rows], color, label)
            marked(share, rows, gpus, [100 * row["efficiency"] for row in rows], color, label)
        speed.set(title=f"{kind}: projected", ylabel="images per second", yscale="log")
        share.set(title="efficiency, %", ylim=(0, 105))
        for axes in (speed, share):
            axes.set(xscale="log", xlabel="GPUs")
            axes.set_xticks(gpus, [str(n) for n in gpus])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        speed.legend(fontsize=8)
    bounds = {row["bound"] for rows in tables.values() for row in rows}
    handles = [
        Line2D([], [], color="gray", marker=mark, linestyle="", label=name)
        for name, mark in MARKS.items()
        if name in bounds
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, title="bound by (dotted: ideal)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=130)


def marked(
    axes: Axes, rows: list[dict[str, Any]], gpus: list[int], values: list[float], color: str, label: str
) -> None:
    """A line whose points have the mark of what binds them."""
    axes.plot(gpus, values, color=color, linewidth=1.4, label=label)
    for row, x, y in zip(rows, gpus, values, strict=True):
        axes.plot([x], [y], color=color, marker=MARKS[row["bound"]], markersize=6)
