"""Figures of evaluated and training runs: thresholds, curves, calibration, confusion, subgroups, loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from cxrscale.evaluation import Estimate, MaskRule, artifacts, summary
from cxrscale.evaluation.metrics import Curve, Reliability
from cxrscale.reporting.style import BLUE, COLORS, LINE, RED, WIDE, YELLOW, styled
from cxrscale.training import overfit

COLUMNS = 4
"""Panels per row."""
FAINT: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 6.5, "alpha": 0.6}


@styled
def threshold_curves(curves: Mapping[str, Curve], thresholds: Mapping[str, Estimate]) -> Figure:
    """Recall, precision and F1 at every threshold of each finding, with the chosen one and its interval.

    Args:
        curves: finding -> `metrics.pr_curve`; an empty one shows its reason.
        thresholds: finding -> the chosen threshold.
    """
    figure, panels = _panels(list(curves), height=1.75, single=(4.35, 3.2))
    for axes, (name, curve) in zip(panels, curves.items(), strict=True):
        if _empty_panel(axes, curve.reason):
            continue
        threshold, recall, precision = (np.asarray(part)[1:] for part in (curve.threshold, curve.x, curve.y))
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        for values, color, label in ((recall, BLUE, "recall"), (precision, YELLOW, "precision"), (f1, RED, "F1")):
            axes.plot(threshold, values, color=color, linewidth=1.4, label=label)
        chosen = thresholds[name]
        if chosen.defined:
            axes.axvline(chosen.value, color=LINE, linewidth=1.2, label="chosen, 95% interval")
            if math.isfinite(chosen.low):
                axes.axvspan(chosen.low, chosen.high, color=LINE, alpha=0.18, linewidth=0)
        axes.set_ylim(0, 1.02)
        axes.set_xlim(0, max(float(threshold.max()), chosen.value if chosen.defined else 0) * 1.02)
        _grid(axes)
    _labels(figure, panels, "threshold", "")
    _legend(figure, panels)
    return figure


@styled
def mask_threshold_curve(curve: summary.DiceCurve, rule: MaskRule) -> Figure:
    """Mean Dice on validation against the threshold of the pixels, with the chosen rule's top and bottom."""
    figure = Figure(figsize=(4.35, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(curve.threshold, curve.all, color=BLUE, label="all images (empty = 1)")
    axes.plot(curve.threshold, curve.positives, color=RED, label="images with a mask")
    axes.axvline(rule.bottom, color=LINE, linewidth=1.2, linestyle="--", label="bottom: part of a mask")
    axes.axvline(rule.top, color=LINE, linewidth=1.2, label="top: is there one?")
    axes.set_xlabel(f"threshold of the pixels, at least {rule.min_area:g} of them")
    axes.set_ylabel("mean Dice")
    axes.set_ylim(0, 1.02)
    axes.set_xlim(0, 1)
    _grid(axes)
    figure.legend(loc="outside upper center", ncols=2, fontsize=8)
    return figure


@styled
def roc(curves: Mapping[str, Curve], points: Mapping[str, tuple[float, float]], notes: Mapping[str, str]) -> Figure:
    """ROC curves.

    Args:
        curves: finding -> `metrics.roc_curve`.
        points: finding -> (false positive rate, recall) at the stored threshold, where there is one.
        notes: finding -> text over the panel, such as its AUROC.
    """
    figure, panels = _panels(list(curves), height=2.25, single=(2.85, 3.1), notes=notes)
    for axes, (name, curve) in zip(panels, curves.items(), strict=True):
        if _empty_panel(axes, curve.reason):
            continue
        axes.plot([0, 1], [0, 1], color=LINE, linewidth=0.8, linestyle=":")
        axes.plot(curve.x, curve.y, color=BLUE, linewidth=1.4, label="ROC")
        _point(axes, points.get(name))
        _square(axes)
    _labels(figure, panels, "false positive rate", "recall")
    return figure


@styled
def precision_recall(
    curves: Mapping[str, Curve],
    points: Mapping[str, tuple[float, float]],
    prevalence: Mapping[str, float],
    notes: Mapping[str, str],
) -> Figure:
    """Precision against recall; the dotted line is the prevalence, the precision of calling every image positive.

    Args:
        points: finding -> (recall, precision) at the stored threshold, where there is one.
    """
    figure, panels = _panels(list(curves), height=2.25, single=(2.85, 3.1), notes=notes)
    for axes, (name, curve) in zip(panels, curves.items(), strict=True):
        if _empty_panel(axes, curve.reason):
            continue
        axes.axhline(prevalence[name], color=LINE, linewidth=0.8, linestyle=":")
        axes.plot(curve.x, curve.y, color=BLUE, linewidth=1.4, label="precision")
        _point(axes, points.get(name))
        _square(axes)
    _labels(figure, panels, "recall", "precision")
    return figure


@styled
def calibration(steps: Mapping[str, Mapping[artifacts.CalibrationStep, Reliability]]) -> Figure:
    """Reliability diagrams: the share of images with the finding against the mean probability, bin by bin.

    Args:
        steps: finding -> step (raw, calibrated, corrected) -> `metrics.reliability`.
    """
    colors = {"raw": BLUE, "calibrated": YELLOW, "corrected": RED}
    figure, panels = _panels(list(steps), height=2.2, single=(3.6, 3.8))
    for axes, parts in zip(panels, steps.values(), strict=True):
        if _empty_panel(axes, "" if any(points.count for points in parts.values()) else "no labeled image"):
            continue
        highest = max(max((*points.predicted, *points.observed)) for points in parts.values() if points.count)
        end = min(1.0, 1.15 * highest)
        axes.plot([0, end], [0, end], color=LINE, linewidth=0.8, linestyle=":")
        for step, points in parts.items():
            error = np.abs(np.array([points.low, points.high]) - np.array(points.observed))
            axes.errorbar(
                points.predicted,
                points.observed,
                yerr=error,
                color=colors[step],
                linewidth=1.2,
                elinewidth=0.7,
                marker="o",
                markersize=3,
                label=step,
            )
        axes.set_xlim(0, end)
        axes.set_ylim(0, end)
        _grid(axes)
    _labels(figure, panels, "mean probability", "share with it")
    if any(len(parts) > 1 for parts in steps.values()):
        _legend(figure, panels)
    return figure


@styled
def confusion(matrices: Mapping[str, Mapping[str, int]], columns: int = COLUMNS) -> Figure:
    """Confusion matrices; a cell's shade is its share of the row, which has the images of one label.

    Args:
        matrices: heading -> tp, fp, fn, tn.
        columns: matrices per row.
    """
    figure, panels = _panels(list(matrices), height=1.75, single=(3.2, 2.8), columns=columns)
    for axes, cells in zip(panels, matrices.values(), strict=True):
        rows = (("present", cells["tp"], cells["fn"]), ("absent", cells["fp"], cells["tn"]))
        for row, (_, *counts) in enumerate(rows):
            for column, count in enumerate(counts):
                share = count / max(1, sum(counts))
                color = BLUE if column == row else RED
                axes.add_patch(Rectangle((column, 1 - row), 1, 1, color=color, alpha=0.08 + 0.5 * share, linewidth=0))
                axes.text(column + 0.5, 1.5 - row, f"{count:,}\n{share:.1%}", ha="center", va="center", fontsize=8)
        axes.set_xlim(0, 2)
        axes.set_ylim(0, 2)
        axes.set_xticks([0.5, 1.5], ["called\npresent", "called\nabsent"], fontsize=7)
        axes.set_yticks([1.5, 0.5], ["present", "absent"], fontsize=7, rotation=90, va="center")
        axes.tick_params(length=0)
        for side in axes.spines.values():
            side.set_visible(False)
    return figure


@styled
def forest(groups: Mapping[str, Mapping[str, artifacts.SubgroupMetrics]], overall: Mapping[str, Estimate]) -> Figure:
    """AUROC of each finding in each subgroup, with intervals; the band is the interval over all images.

    Args:
        groups: finding -> group -> its metrics.
        overall: finding -> AUROC over all images.
    """
    names = list(dict.fromkeys(name for rows in groups.values() for name in rows))
    figure, panels = _panels(list(groups), height=0.5 + 0.16 * len(names), single=(6.5, 0.9 + 0.24 * len(names)))
    columns = min(COLUMNS, len(panels))
    for number, (axes, (finding, rows)) in enumerate(zip(panels, groups.items(), strict=True)):
        total = overall[finding]
        if math.isfinite(total.low):
            axes.axvspan(total.low, total.high, color=LINE, alpha=0.18, linewidth=0)
        if total.defined:
            axes.axvline(total.value, color=LINE, linewidth=0.8)
        for y, name in enumerate(names):
            auroc = rows[name].auroc if name in rows else None
            if auroc is None or not auroc.defined:
                axes.text(0.5, y, "too few", transform=axes.get_yaxis_transform(), **FAINT)
                continue
            if math.isfinite(auroc.low):
                axes.plot([auroc.low, auroc.high], [y, y], color=BLUE, linewidth=1.4)
            axes.plot(auroc.value, y, "o", color=BLUE, markersize=4)
        axes.set_ylim(len(names) - 0.5, -0.5)
        labels = [_with_counts(name, rows) for name in names] if len(panels) == 1 else names
        axes.set_yticks(range(len(names)), labels if number % columns == 0 else [""] * len(names), fontsize=8)
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.grid(axis="x")
        axes.set_axisbelow(True)
    _labels(figure, panels, "AUROC", "")
    return figure


@styled
def overlap(dice_P: Sequence[float]) -> Figure:
    """Histogram of the Dice of the images with a mask."""
    figure = Figure(figsize=(2.85, 3.1), layout="constrained")
    axes = figure.subplots()
    axes.hist(dice_P, bins=np.linspace(0, 1, 21).tolist(), color=BLUE, rwidth=0.94)
    axes.set_xlabel("Dice of an image with a mask")
    axes.set_ylabel("images")
    axes.set_xlim(0, 1)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    return figure


@styled
def history(lines: Sequence[Mapping[str, Any]], best: int | None) -> Figure:
    """Loss of training and validation, and the validation metrics, over epochs.

    Args:
        lines: of train_log.jsonl.
        best: the epoch whose weights were kept, a dashed line.
    """
    val = [line for line in lines if line["kind"] == "val"]
    train = [line for line in lines if line["kind"] == "train" and line.get("loss") is not None]
    steps = max((line["step"] / max(1, line["epoch"]) for line in val), default=1.0)
    figure = Figure(figsize=(WIDE, 2.7), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(
        [line["step"] / steps for line in train], [line["loss"] for line in train], color=BLUE, lw=1, label="training"
    )
    _over_epochs(left, val, "loss", RED, "validation")
    left.set_ylabel("loss")
    known = ("auroc", "auprc", "f1", "accuracy", "dice", "dice_positives", "iou")
    logged = [name for name in known if any(line.get(name) is not None for line in val)]
    for name, color in zip(logged, (*COLORS, "#888888"), strict=False):
        _over_epochs(right, val, name, color, name.replace("_", " on "))
    right.set_ylabel("validation")
    right.set_ylim(top=1)
    for axes in (left, right):
        if best is not None:
            axes.axvline(best, color=LINE, linewidth=0.9, linestyle="--")
        axes.set_xlabel("epoch")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _grid(axes)
        if axes.get_legend_handles_labels()[0]:
            position = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if axes is right else {"loc": "best"}
            axes.legend(fontsize=8, **position)
    return figure


@styled
def learning_curve(curve: overfit.LearningCurve) -> Figure:
    """Loss by step and metric by epoch of an overfit run, with the values that it must reach (dashed)."""
    figure = Figure(figsize=(WIDE, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(np.arange(1, len(curve.losses) + 1), curve.losses, color=BLUE, linewidth=1, label="per step")
    if curve.losses:
        limit = overfit.LOSS_SHARE * curve.start_loss
        left.axhline(limit, color=RED, linestyle="--", linewidth=1, label="rule")
    left.set_xlabel("optimizer step")
    left.set_ylabel("training loss")
    left.set_ylim(bottom=0)
    left.legend(loc="best")
    required = dict(overfit.PASS_RULES.values())[curve.metric]
    right.plot(range(len(curve.scores)), curve.scores, color=BLUE, marker=".", label="per epoch")
    right.axhline(required, color=RED, linestyle="--", linewidth=1, label="rule")
    right.set_xlabel("epoch")
    right.set_ylabel(f"{curve.metric} of the trained images")
    right.set_ylim(0, 1.02)
    right.legend(loc="best")
    return figure


def _over_epochs(axes: Axes, val: Sequence[Mapping[str, Any]], name: str, color: str, label: str) -> None:
    known = [line for line in val if line.get(name) is not None]
    x, y = [line["epoch"] for line in known], [line[name] for line in known]
    axes.plot(x, y, color=color, lw=1.4, marker="o", markersize=3, label=label)


def _panels(
    names: Sequence[str],
    height: float,
    single: tuple[float, float],
    columns: int = COLUMNS,
    notes: Mapping[str, str] | None = None,
) -> tuple[Figure, list[Axes]]:
    """One panel per name: a single one has the size `single`, several stand in rows that are `height` inches high."""
    rows, columns = math.ceil(len(names) / columns), min(columns, len(names))
    size = single if len(names) == 1 else (WIDE * (0.1 + 0.9 * columns / COLUMNS), rows * height + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[len(names) :]:
        axes.remove()
    panels = panels[: len(names)]
    for axes, name in zip(panels, names, strict=True):
        note = (notes or {}).get(name, "")
        axes.set_title("\n".join(filter(None, (name.replace("_", " "), note))), fontsize=9)
    return figure, panels


def _labels(figure: Figure, panels: Sequence[Axes], x: str, y: str) -> None:
    figure.supxlabel(x, fontsize=9)
    if y:
        figure.supylabel(y, fontsize=9)
    for axes in panels:
        axes.tick_params(labelsize=8)


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    handles: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles), fontsize=8)


def _empty_panel(axes: Axes, reason: str) -> bool:
    """If there is a reason why the panel is empty, write it into the panel."""
    if reason:
        axes.text(0.5, 0.5, reason.replace(" with", "\nwith"), ha="center", va="center", fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])
    return bool(reason)


def _point(axes: Axes, point: tuple[float, float] | None) -> None:
    if point is not None:
        axes.plot(*point, "o", color=RED, markersize=5, zorder=3, clip_on=False, label="at the threshold")


def _square(axes: Axes) -> None:
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    _grid(axes)


def _grid(axes: Axes) -> None:
    axes.grid(visible=True)
    axes.set_axisbelow(True)


def _with_counts(name: str, rows: Mapping[str, artifacts.SubgroupMetrics]) -> str:
    return f"{name} ({rows[name].positives:,} of {rows[name].images:,})" if name in rows else name
