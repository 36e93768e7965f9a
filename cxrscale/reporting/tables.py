"""What people read at the end: tables of metrics."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

WIDTH = 110
"""Columns of a table where no terminal says how wide it is."""


def print_metrics(found: dict[str, Any], title: str) -> None:
    """Print metrics.json as a table."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(metrics_table(found, title))


def metrics_table(found: dict[str, Any], title: str) -> Table:
    """metrics.json as a table: one line a finding, the mean, and Dice for segmentation."""
    result = Table(title=f"{title}: {found['images']} {found['split']} images of {found['patients']} patients")
    result.add_column("finding", no_wrap=True)
    for name in ("positives", "AUROC (95% interval)", "AUPRC", "threshold", "F1", "recall", "precision"):
        result.add_column(name, justify="right", no_wrap=True)
    for name, row in found["findings"].items():
        cells = [str(row["positives"]), estimate(row["auroc"]), number(row["auprc"]["value"]), number(row["threshold"])]
        rates = (row[key]["value"] if key in row else None for key in ("f1", "recall", "precision"))
        result.add_row(name, *cells, *map(number, rates))
    if len(found["findings"]) > 1:
        result.add_row(f"mean of {found['findings_in_mean']}", "", estimate(found["mean_auroc"]), style="bold")
    if "dice" in found:
        dice = found["dice"]
        result.add_row("Dice, positives", str(dice["positives"]), estimate(dice["on_positives"]), style="bold")
        result.add_row("Dice, all (empty = 1)", str(found["images"]), estimate(dice["all"]))
        result.add_row("  predicting nothing", "", number(dice["all_empty_floor"]))
    return result


def print_thresholds(found: dict[str, Any], title: str) -> None:
    """Print thresholds.json as a table."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(thresholds_table(found, title))


def thresholds_table(found: dict[str, Any], title: str) -> Table:
    """thresholds.json as a table: each finding's threshold with its interval, and what it means on validation."""
    where = f"{found['images']} validation images of {found['patients']} patients"
    result = Table(title=f"{title}: {found['goal']}, {where}")
    result.add_column("finding", no_wrap=True)
    for name in ("threshold (95% interval)", "F1", "recall", "precision"):
        result.add_column(name, justify="right")
    for name, cut in found["thresholds"].items():
        at = cut.get("at", {})
        rates = (at[key]["value"] if key in at else None for key in ("f1", "recall", "precision"))
        result.add_row(name, estimate(cut), *map(number, rates))
    if "triplet" in found:
        rule = found["triplet"]
        said = f"top {rule['top']:.3f}, at least {rule['min_area']} pixels, bottom {rule['bottom']:.3f}"
        result.add_row("masks", said, "", "", f"Dice {rule['dice']:.3f}", style="bold")
    return result


def print_comparison(found: dict[str, Any]) -> None:
    """Print what `compare` found as a table."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(comparison_table(found))


def comparison_table(found: dict[str, Any]) -> Table:
    """Two runs beside one another, AUROC and Dice as A - B: p by DeLong over patients, by Holm, by the bootstrap."""
    names = found["a"]["name"], found["b"]["name"]
    counts = f"{found['images']} {found.get('split', '')} images of {found['patients']} patients".replace("  ", " ")
    result = Table(title=f"A = {names[0]}, B = {names[1]}: {counts}")
    result.add_column("AUROC", no_wrap=True)
    for name in ("present", "A", "B", "A - B (95% interval)", "p", "p Holm", "p boot."):
        result.add_column(name, justify="right", no_wrap=True)

    def add(name: str, count: str, row: dict[str, Any], *tests: float | None, style: str | None = None) -> None:
        cells = (number(row["a"]), number(row["b"]), _signed(row["difference"]), *(_p(p) for p in tests))
        result.add_row(name, count, *cells, style=style)

    for name, row in found["findings"].items():
        add(name, str(row["positives"]), row, row["p_delong_patients"], row["p_holm"], row["p_bootstrap"])
    mean = found["mean_auroc"]
    if len(found["findings"]) > 1:
        add(f"mean of {mean['findings']}", "", mean, None, None, mean["p_bootstrap"], style="bold")
    if "dice" in found:
        dice = found["dice"]
        for name, count, row in (
            ("Dice, positives", str(dice["positives"]), dice["on_positives"]),
            ("Dice, all (empty = 1)", str(found["images"]), dice["all"]),
        ):
            add(name, count, row, None, None, row["p_bootstrap"])
    return result


def estimate(value: dict[str, Any]) -> str:
    """0.912 (0.871-0.944), or why there is no value."""
    if value["value"] is None:
        return str(value.get("reason", "undefined"))
    if value["low"] is None:
        return number(value["value"])
    return f"{value['value']:.3f} ({value['low']:.3f}-{value['high']:.3f})"


def number(value: float | None) -> str:
    """Three digits, or a dash."""
    return "-" if value is None else f"{value:.3f}"


def _signed(value: dict[str, Any]) -> str:
    if value["value"] is None:
        return str(value.get("reason", "undefined"))
    if value["low"] is None:
        return f"{value['value']:+.3f}"
    return f"{value['value']:+.3f} ({value['low']:+.3f} to {value['high']:+.3f})"


def _p(value: float | None) -> str:
    if value is None:
        return "-"
    return "<0.001" if value < 0.001 else f"{value:.3f}"
