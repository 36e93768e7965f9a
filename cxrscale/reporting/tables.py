"""Tables for the terminal: test metrics, thresholds, comparisons, searches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from cxrscale.config import Recipe
from cxrscale.evaluation import (
    Cascade,
    CascadeTest,
    Comparison,
    Estimate,
    ExplainReport,
    Localization,
    ReaderComparison,
    TestMetrics,
    Thresholds,
    Variants,
    artifacts,
)
from cxrscale.io import terminal

if TYPE_CHECKING:
    from cxrscale.inference import ExportInfo

WIDTH = 110
"""Columns of a table where no terminal gives its width."""


def print_metrics(test: TestMetrics, title: str) -> None:
    """Print test metrics as a table."""
    terminal.show(metrics_table(test, title), WIDTH)


def metrics_table(test: TestMetrics, title: str) -> Table:
    """Test metrics as a table: one row per finding, the mean, and Dice for segmentation."""
    table = Table(title=f"{title}: {test.images} {test.split} images of {test.patients} patients")
    table.add_column("finding", no_wrap=True)
    for name in ("positives", "AUROC (95% interval)", "AUPRC", "threshold", "F1", "recall", "precision"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, row in test.findings.items():
        at = row.at_threshold
        rates = (at.threshold, at.f1.value, at.recall.value, at.precision.value) if at else (math.nan,) * 4
        table.add_row(name, str(row.positives), estimate(row.auroc), *map(number, (row.auprc.value, *rates)))
    if len(test.findings) > 1:
        table.add_row(f"mean of {test.findings_in_mean}", "", estimate(test.mean_auroc), style="bold")
    if test.dice:
        size = "" if test.dice.own_size else " (input size)"
        table.add_row(
            f"Dice, positives{size}", str(test.dice.positives), estimate(test.dice.on_positives), style="bold"
        )
        table.add_row("Dice, all (empty = 1)", str(test.images), estimate(test.dice.all))
        table.add_row("  predicting nothing", "", number(test.dice.empty_baseline))
    if test.ood:
        table.add_row("unlike training images", str(test.ood.images), estimate(test.ood.false_alarms))
    return table


def print_thresholds(thresholds: Thresholds, title: str) -> None:
    """Print thresholds as a table, and below it the findings that could not be calibrated."""
    terminal.show(thresholds_table(thresholds, title), WIDTH)
    for name, fitted in thresholds.calibration.items():
        if reason := getattr(fitted.calibrator, "reason", ""):
            print(f"{terminal.printable(name)} is not calibrated: {reason}")


def thresholds_table(thresholds: Thresholds, title: str) -> Table:
    """Thresholds as a table: each finding's threshold with its interval, and its rates on validation."""
    images = f"{thresholds.images} validation images of {thresholds.patients} patients"
    table = Table(title=f"{title}: {thresholds.rule.goal}, {images}")
    table.add_column("finding", no_wrap=True)
    for name in ("threshold (95% interval)", "F1", "recall", "precision"):
        table.add_column(name, justify="right")
    for name, row in thresholds.thresholds.items():
        at = row.on_validation
        rates = (at.f1.value, at.recall.value, at.precision.value) if at else (math.nan,) * 3
        table.add_row(name, estimate(row.threshold), *map(number, rates))
    if thresholds.mask_rule:
        rule = thresholds.mask_rule
        of = "" if rule.own_size else " of the input"
        text = f"top {rule.top:.3f}, at least {rule.min_area} pixels{of}, bottom {rule.bottom:.3f}"
        table.add_row("masks", text, "", "", f"Dice {rule.dice:.3f}", style="bold")
    return table


def print_cascade(result: Cascade | CascadeTest) -> None:
    """Print what a classifier before a segmenter changes, as a table."""
    terminal.show(cascade_table(result), WIDTH)


def cascade_table(result: Cascade | CascadeTest) -> Table:
    """Masks behind the classifier, alone, and the difference with its interval."""
    split, found = ("test", result.test) if isinstance(result, CascadeTest) else ("validation", result.validation)
    title = f"{result.segmenter.name} behind {result.gate.name}: {result.images} {split} images"
    rule = result.mask_rule
    caption = (
        f"passed on: {estimate(found.passed)}, at {result.finding} >= {result.threshold:.3f}; "
        f"masks: top {rule.top:.3f}, at least {rule.min_area} pixels, bottom {rule.bottom:.3f}"
    )
    table = Table(title=f"{title} of {result.patients} patients", caption=caption)
    table.add_column("masks", no_wrap=True)
    for name in ("cascade", "segmenter alone", "difference (95% interval)"):
        table.add_column(name, justify="right", no_wrap=True)
    for field, words in (
        ("dice_all", "Dice, all (empty = 1)"),
        ("dice_on_positives", "Dice, positives"),
        ("sensitivity", "positives with a mask"),
        ("false_masks", "negatives with a mask"),
    ):
        both = (number(getattr(side, field).value) for side in (found.cascade, found.segmenter))
        table.add_row(words, *both, signed(getattr(found.difference, field)))
    return table


def print_comparison(comparison: Comparison) -> None:
    """Print a comparison of two runs as a table."""
    terminal.show(comparison_table(comparison), WIDTH)


def comparison_table(comparison: Comparison) -> Table:
    """AUROC and Dice of two runs and A - B, with p-values by DeLong over patients, by Holm, and by the bootstrap."""
    names = comparison.a.name, comparison.b.name
    images = " ".join(filter(None, (str(comparison.images), comparison.split, "images")))
    table = Table(title=f"A = {names[0]}, B = {names[1]}: {images} of {comparison.patients} patients")
    table.add_column("AUROC", no_wrap=True)
    for name in ("positives", "A", "B", "A - B (95% interval)", "p", "p Holm", "p boot."):
        table.add_column(name, justify="right", no_wrap=True)

    def add(name: str, positives: str, row: artifacts.Difference, p_delong: str, p_holm: str, style: str = "") -> None:
        cells = (number(row.a), number(row.b), signed(row.difference), p_delong, p_holm, _p(row.p_bootstrap))
        table.add_row(name, positives, *cells, style=style)

    for name, row in comparison.findings.items():
        add(name, str(row.positives), row, _p(row.p_delong_patients), _p(row.p_holm))
    mean = comparison.mean_auroc
    if len(comparison.findings) > 1:
        add(f"mean of {mean.findings}", "", mean, "-", "-", style="bold")
    if comparison.dice:
        dice = comparison.dice
        add("Dice, positives", str(dice.positives), dice.on_positives, "-", "-")
        add("Dice, all (empty = 1)", str(comparison.images), dice.all, "-", "-")
    return table


def print_readers(comparison: ReaderComparison) -> None:
    """Print a comparison of a run with readers as a table, and what was left out below it."""
    terminal.show(readers_table(comparison), WIDTH)
    for reader, count in comparison.rows_without_image.items():
        if count:
            print(f"{terminal.printable(reader)}: {count} rows of images that the run has not scored")
    if comparison.not_compared:
        print(f"no column of all readers, not compared: {terminal.printable(', '.join(comparison.not_compared))}")


def readers_table(comparison: ReaderComparison) -> Table:
    """F1 of a run and of readers: each finding's, against all others."""
    images = f"{comparison.images} {comparison.split} images of {comparison.patients} patients"
    table = Table(title=f"{comparison.run.name} and {len(comparison.readers)} readers: {images}")
    table.add_column("F1 against all others", no_wrap=True)
    for name in ("images", "run (95% interval)", "readers' mean", "run - readers", "readers, lowest to highest"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, row in comparison.findings.items():
        own = sorted(value.value for value in row.readers.values() if value.defined)
        span = f"{number(own[0])} to {number(own[-1])}" if own else "-"
        table.add_row(name, str(row.images), estimate(row.run), estimate(row.reader_mean), signed(row.difference), span)
    return table


def print_localization(report: ExplainReport, title: str) -> None:
    """Print what maps are worth against boxes: pointing game and IoBB beside the baselines; sanity and occlusion."""
    terminal.show(localization_table(report, title), WIDTH)
    if report.sanity is not None:
        table = Table(title="rank correlation with the maps of random weights")
        table.add_column("random from the output up to", no_wrap=True)
        table.add_column("Spearman (95% interval)", justify="right", no_wrap=True)
        for stage in report.sanity.stages:
            table.add_row(stage.randomized, signed(stage.correlation))
        terminal.show(table, WIDTH)
    if report.occlusion is not None:
        table = Table(title="fall of the probability")
        table.add_column("finding", no_wrap=True)
        for name in ("boxes occluded", "elsewhere", "difference (95% interval)"):
            table.add_column(name, justify="right", no_wrap=True)
        for name, row in report.occlusion.items():
            table.add_row(name, signed(row.box), signed(row.elsewhere), signed(row.difference))
        terminal.show(table, WIDTH)


def localization_table(report: ExplainReport, title: str) -> Table:
    """One row per finding and the mean: pointing game, and boxes found with an IoBB above 0.1 and 0.5, each beside the
    best of the baselines that do not see the image."""
    images = f"{report.boxes} boxes in {report.images} {report.split} images of {report.patients} patients"
    table = Table(title=f"{title}: {report.method} maps, {images}")
    table.add_column("finding", no_wrap=True)
    for name in ("boxes", "pointing (95% interval)", "blind", "IoBB>0.1", "blind", "IoBB>0.5", "blind"):
        table.add_column(name, justify="right", no_wrap=True)

    def cells(row: Localization) -> list[str]:
        blind = [max(base.pointing.value for base in row.baselines.values() if base.pointing.defined)]
        blind += [
            max(base.iobb[t].value for base in row.baselines.values() if base.iobb[t].defined) for t in ("0.1", "0.5")
        ]
        own = [estimate(row.map.pointing), number(row.map.iobb["0.1"].value), number(row.map.iobb["0.5"].value)]
        return [str(row.boxes), *(text for pair in zip(own, map(number, blind), strict=True) for text in pair)]

    for name, row in report.findings.items():
        table.add_row(name, *cells(row))
    if len(report.findings) > 1:
        table.add_row(f"mean of {len(report.findings)}", *cells(report.mean), style="bold")
    return table


def print_export(info: ExportInfo) -> None:
    """Print the forms of an exported model as a table, and below it what was tried."""
    terminal.show(export_table(info), WIDTH)
    if (quality := info.table[-1].quality) is not None:
        change = signed(quality.difference)
        print(f"{quality.metric} on validation: {number(quality.value)}, {change} against the run's own")
    for one in info.tried:
        found = one.difference
        print(
            f"tried: {one.method}, {one.float_nodes} of {one.nodes} nodes in float: mean {found.mean:.2g}, largest "
            f"{found.maximum:.2g}, flipped {found.flipped:.1%} of {found.images} images"
        )


def export_table(info: ExportInfo) -> Table:
    """Size, time per image and speed relative to torch, and differences from the run's model."""
    batches = tuple(info.table[0].milliseconds)
    table = Table(
        title=f"{info.run}: {info.parity.images if info.parity else 0} validation images, {info.threads} threads",
        caption="times are medians per image, measured in turns; in brackets how many times as fast as torch",
    )
    table.add_column("form", no_wrap=True)
    for name in ("MB", *(f"ms at {batch} (speed)" for batch in batches), "largest diff.", "mean diff.", "flipped"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in info.table:
        times = [f"{row.milliseconds[batch]:.1f} ({row.times_torch[batch]:.2f})" for batch in batches]
        found = row.difference
        apart = ["", "", ""]
        if found is not None:
            apart = [f"{found.maximum:.2g}", f"{found.mean:.2g}", f"{found.flipped:.1%}"]
        table.add_row(row.form, f"{row.bytes / 1e6:.1f}", *times, *apart)
    return table


def print_variants(result: Variants) -> None:
    """Print variants as a table, and one over the split where there is one."""
    terminal.show(variants_table(result), WIDTH)
    for table in [split_table(result)] if result.scores else []:
        terminal.show(table, WIDTH)


def variants_table(result: Variants) -> Table:
    """Each variant's size and speed, and how far it agrees with the first one on the images."""
    read = sum(not one.error for one in result.images)
    table = Table(title=f"{len(result.variants)} variants, {read} images", caption="compared with the first variant")
    table.add_column("variant")
    for name in ("MB", "ms per image", "speed", "same calls", "mask Dice", "largest diff."):
        table.add_column(name, justify="right", no_wrap=True)
    for variant, row in zip(result.variants, result.rows, strict=True):
        speed = "-" if math.isnan(row.times_first) else f"{row.times_first:.2f} x"
        same = "-" if math.isnan(row.same_calls) else f"{row.same_calls:.1%}"
        times = "-" if math.isnan(row.milliseconds) else f"{row.milliseconds:.1f}"
        cells = (f"{row.bytes / 1e6:.1f}", times, speed, same, number(row.mask_dice), number(row.largest_difference))
        table.add_row(terminal.printable(variant.name), *cells)
    return table


def split_table(result: Variants) -> Table:
    """Each variant's metrics over a split, with intervals."""
    table = Table(title=f"{result.split_images} {result.split} images")
    table.add_column("variant")
    names = list(dict.fromkeys(name for one in result.scores for name in one.metrics))
    for name in (*names, "same calls"):
        table.add_column(name.replace("_", " "), justify="right")
    for variant, scores in zip(result.variants, result.scores, strict=True):
        cells = [estimate(scores.metrics[name]) if name in scores.metrics else "" for name in names]
        same = "-" if math.isnan(scores.same_calls) else f"{scores.same_calls:.1%}"
        table.add_row(terminal.printable(variant.name), *cells, same)
    return table


def print_trials(rows: Sequence[Mapping[str, Any]], recipe: Recipe, fields: Sequence[str], title: str) -> None:
    """Print the trials of a search as a table, the best first.

    Args:
        rows: of trials.parquet.
        fields: the searched ones.
    """
    terminal.show(trials_table(rows, recipe, fields, title), max(WIDTH, 70 + 18 * len(fields)))


def trials_table(rows: Sequence[Mapping[str, Any]], recipe: Recipe, fields: Sequence[str], title: str) -> Table:
    """The trials of a search as a table, the best first; the arguments are those of `print_trials`."""
    from cxrscale.tuning import FINISHED, direction, results  # only here: it brings Ray

    sign, metric = direction(recipe), recipe.train.monitor
    own = next(name for name in rows[0] if name.endswith(results.OWN_THRESHOLDS))
    table = Table(title=f"{title}: {len(rows)} trainings")
    table.add_column("trial", no_wrap=True)
    for name in (*fields, metric, own.removesuffix("_thresholds").replace("_", " "), "epochs", "", "minutes"):
        table.add_column(name, justify="right", no_wrap=True)
    ranked = sorted(rows, key=lambda row: -sign * row[metric] if math.isfinite(row[metric]) else math.inf)
    for rank, row in enumerate(ranked):
        status = "" if row["status"] == FINISHED else row["status"]
        values = [_text(row[name]) for name in (*fields, metric, own)]
        style = "bold" if rank == 0 else "dim" if row["seed"] else ""
        table.add_row(row["trial"], *values, str(row["epochs"]), status, f"{row['seconds'] / 60:.1f}", style=style)
    return table


def estimate(value: Estimate) -> str:
    """0.912 (0.871-0.944), or the reason for no value."""
    if not value.defined:
        return value.reason or "undefined"
    return number(value.value) if math.isnan(value.low) else f"{value.value:.3f} ({value.low:.3f}-{value.high:.3f})"


def number(value: float) -> str:
    """Three digits after the point, or a dash."""
    return "-" if math.isnan(value) else f"{value:.3f}"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "-"
    return str(value)


def signed(value: Estimate) -> str:
    """+0.041 (-0.003 to +0.082), for what may be negative."""
    if not value.defined:
        return value.reason or "undefined"
    interval = "" if math.isnan(value.low) else f" ({value.low:+.3f} to {value.high:+.3f})"
    return f"{value.value:+.3f}{interval}"


def _p(value: float) -> str:
    return "-" if math.isnan(value) else "<0.001" if value < 0.001 else f"{value:.3f}"
