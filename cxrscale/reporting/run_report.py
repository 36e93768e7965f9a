"""The report of an evaluated run: one HTML file with its plots and example images inside, for screen and paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from cxrscale.config import LOWER_IS_BETTER, Recipe
from cxrscale.evaluation import TestMetrics, Thresholds, artifacts, metrics, summary
from cxrscale.inference import EnsembleInfo, predictions, read_ensemble, stored_thresholds
from cxrscale.io import read_artifact, seal, storage
from cxrscale.reporting import gallery, html, plots, published, style
from cxrscale.reporting.gallery import ShownCase
from cxrscale.shards import manifest
from cxrscale.training import RunInfo, run_info, tracking
from cxrscale.types import Scores, UserError

TEMPLATE = "run_report.html.jinja"
NOT_LEARNED = ("tracking", "pack", "tune", "threshold", "reference")
"""Sections of a recipe that do not change what is learned."""


@dataclass(frozen=True, slots=True)
class Plot:
    """A figure of the page, which is a PNG in plots/ too."""

    figure: Figure
    title: str

    def on_page(self) -> Markup:
        """The SVG, in the figure's share of the page's width."""
        share = float(self.figure.get_size_inches()[0]) / style.WIDE
        return Markup('<div class="plot" style="width: {:.1f}%">{}</div>').format(
            100 * share, style.svg(self.figure, self.title)
        )


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that the page shows."""

    run: str
    """The run's folder or address."""
    thresholds: Thresholds
    test: TestMetrics
    info: RunInfo
    log: Sequence[Mapping[str, Any]]
    """Lines of train_log.jsonl."""
    plots: Mapping[str, Plot]
    """By the name of the PNG."""
    cases: Mapping[str, Sequence[ShownCase]]
    """By kind."""
    ensemble: EnsembleInfo | None = None
    """None where the run is no ensemble."""


def write(run: str) -> str:
    """Write an evaluated run's report.html and plots/*.png; returns the page's path or address.

    Raises:
        UserError: the run has not been evaluated, or its files belong to other weights, thresholds or datasets.
    """
    thresholds, test = stored_thresholds(run), stored_test_metrics(run)
    scores = predictions.read_predictions(predictions.predictions_path(run, "test"))
    log = tracking.read_log(run)
    if any(line["kind"] == "val" and line.get("epoch") is None for line in log):
        raise UserError(
            f"{storage.join(run, tracking.TRAIN_LOG)}: a line of a validation has no epoch; remove that line"
        )
    figures = metric_plots(scores, test, thresholds)
    if storage.exists(predictions.predictions_path(run, "val")):
        scores_val = predictions.read_predictions(predictions.predictions_path(run, "val"))
        figures |= threshold_plots(scores_val, thresholds)
    if any(line["kind"] == "val" for line in log):
        best = best_epoch(log, test.recipe.train.monitor)
        figure = plots.history(log, best["epoch"] if best else None)
        figures["history"] = Plot(figure, "Loss and validation metrics over epochs")
    write_plots(run, figures)
    rule = thresholds.mask_rule
    kinds = gallery.classification_cases(scores) if rule is None else gallery.segmentation_cases(scores, rule)
    cases = gallery.show_cases(run, scores, kinds, manifest.load(*test.recipe.data.shards), rule)
    address = storage.join(run, artifacts.REPORT)
    report = Report(run, thresholds, test, run_info.read_run_info(run), log, figures, cases, read_ensemble(run))
    storage.write(address, seal.closed_text(render(report), "<!-- {} -->"))
    return address


def stored_test_metrics(run: str) -> TestMetrics:
    """The run's test_metrics.json.

    Raises:
        UserError: there is none, it is damaged, or thresholds.json has changed since.
    """
    address = storage.join(run, artifacts.TEST_METRICS)
    test = read_artifact(TestMetrics, address, f"run `cxrscale evaluate {run}`")
    if test.thresholds != storage.digest(storage.read(storage.join(run, artifacts.THRESHOLDS))):
        raise UserError(f"{address} is of other thresholds than thresholds.json; run `cxrscale evaluate {run}` again")
    return test


def write_plots(run: str, figures: Mapping[str, Plot]) -> None:
    """Write plots/NAME.png of each figure."""
    for name, plot in figures.items():
        storage.write(storage.join(run, artifacts.PLOTS, f"{name}.png"), style.png(plot.figure))


def render(report: Report) -> str:
    """The page, the same for the same report."""
    test = report.test
    recipe, reference = test.recipe.model_dump(mode="json"), test.recipe.reference
    comparable, why_none = published.comparable_results(list(test.findings), test.data)
    return html.render(
        TEMPLATE,
        name=report.run.rstrip("/").rsplit("/", 1)[-1],
        recipe=recipe,
        test=test,
        thresholds=report.thresholds,
        info=report.info,
        ensemble=report.ensemble,
        best=best_epoch(report.log, test.recipe.train.monitor),
        differences=differences(recipe),
        comparable=comparable,
        why_none=why_none,
        seed_sd=published.SEED_SD,
        reference=reference,
        figures=[(figure, published.own_estimate(figure, test)) for figure in reference.figures],
        rates=metrics.RATES,
        plots={name: plot.on_page() for name, plot in report.plots.items()},
        cases={gallery.HEADINGS[kind]: shown for kind, shown in report.cases.items() if shown},
    )


# Figures


def metric_plots(scores: Scores, test: TestMetrics, thresholds: Thresholds) -> dict[str, Plot]:
    """ROC, precision and recall, calibration, confusion, subgroups and Dice of the test split."""
    result = {
        **_curves(scores, test),
        "calibration": Plot(plots.calibration(_reliability(scores, thresholds)), "Calibration"),
    }
    matrices = _matrices(test)
    if matrices:
        points = max(len(row.report_at) for row in test.findings.values())
        columns = min(plots.COLUMNS, 1 + points) if points else plots.COLUMNS
        result["confusion"] = Plot(plots.confusion(matrices, columns), "Confusion matrices")
    groups = {
        name: {f"{by} {group}": values for by, rows in row.subgroups.items() for group, values in rows.items()}
        for name, row in test.findings.items()
    }
    if any(values.auroc.defined for rows in groups.values() for values in rows.values()):
        overall = {name: row.auroc for name, row in test.findings.items()}
        result["subgroups"] = Plot(plots.forest(groups, overall), "AUROC by subgroup")
    if scores.maps is not None and test.dice and test.dice.positives:
        rule = test.dice.mask_rule
        dice_N = metrics.map_dice(scores.maps, rule.top, rule.min_area, rule.bottom)
        dice_P = dice_N[metrics.has_mask(scores.maps)]
        result["dice"] = Plot(plots.overlap(dice_P.tolist()), "Dice of the images with a mask")
    return result


def threshold_plots(scores: Scores, chosen: artifacts.ChosenThresholds) -> dict[str, Plot]:
    """How the thresholds were chosen on the validation split."""
    thresholds = {name: row.threshold for name, row in chosen.thresholds.items()}
    figure = plots.threshold_curves(summary.threshold_curves(scores, chosen), thresholds)
    result = {"thresholds": Plot(figure, "Recall, precision and F1 against the threshold")}
    if scores.maps is not None and chosen.mask_rule is not None:
        curve = summary.mask_threshold_curve(scores, chosen.mask_rule)
        figure = plots.mask_threshold_curve(curve, chosen.mask_rule)
        result["mask_rule"] = Plot(figure, "Dice against the threshold of the pixels")
    return result


def _curves(scores: Scores, test: TestMetrics) -> dict[str, Plot]:
    rows = test.findings
    columns = {name: (scores.logit_NF[:, f], scores.label_NF[:, f]) for f, name in enumerate(scores.findings)}
    cells = {name: row.at_threshold.confusion for name, row in rows.items() if row.at_threshold}
    present = {name: row.positives / max(1, row.positives + row.negatives) for name, row in rows.items()}
    roc = plots.roc(
        {name: metrics.roc_curve(*column) for name, column in columns.items()},
        {name: (metrics.ratio(c["fp"], c["tn"]), _recall(c)) for name, c in cells.items() if _has_both_classes(c)},
        {name: f"AUROC {html.estimate(row.auroc)}" if row.auroc.defined else "" for name, row in rows.items()},
    )
    precision_recall = plots.precision_recall(
        {name: metrics.pr_curve(*column) for name, column in columns.items()},
        {name: (_recall(c), metrics.ratio(c["tp"], c["fp"])) for name, c in cells.items() if _has_calls(c)},
        present,
        {name: f"AUPRC {html.estimate(row.auprc)}" if row.auprc.defined else "" for name, row in rows.items()},
    )
    return {
        "roc": Plot(roc, "ROC curves"),
        "precision-recall": Plot(precision_recall, "Precision against recall"),
    }


def _reliability(
    scores: Scores, thresholds: Thresholds
) -> dict[str, dict[artifacts.CalibrationStep, metrics.Reliability]]:
    """Bins of equally many images: for a rare finding nearly all would fall into the first bin of equal width."""
    rule, result = thresholds.rule, {}
    for f, name in enumerate(scores.findings):
        fitted = thresholds.calibration[name]
        probabilities = summary.final_probabilities(scores.logit_NF[:, f], fitted, rule, rule.priors.get(name))
        result[name] = {
            step: metrics.reliability(step_N, scores.label_NF[:, f], 10, equal_mass=True)
            for step, step_N in summary.calibration_steps(probabilities, fitted).items()
        }
    return result


def _matrices(test: TestMetrics) -> dict[str, Mapping[str, int]]:
    """Heading -> confusion matrix: each finding at the stored threshold, then at those of threshold.report_at."""
    result = {}
    for name, row in test.findings.items():
        if row.at_threshold:
            result[f"{name} at {row.at_threshold.threshold:.3f}"] = row.at_threshold.confusion
        result |= {f"{name} at {point.threshold:g}": point.confusion for point in row.report_at}
    return result


def _recall(cells: Mapping[str, int]) -> float:
    return metrics.ratio(cells["tp"], cells["fn"])


def _has_both_classes(cells: Mapping[str, int]) -> bool:
    return cells["tp"] + cells["fn"] > 0 and cells["fp"] + cells["tn"] > 0


def _has_calls(cells: Mapping[str, int]) -> bool:
    return cells["tp"] + cells["fn"] > 0 and cells["tp"] + cells["fp"] > 0


# The recipe and the log


def differences(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The dotted fields in which a recipe differs from the defaults, as far as they change what is learned."""
    defaults = Recipe().model_dump(mode="json")
    return {
        f"{section}.{field}": value
        for section, fields in recipe.items()
        if section not in NOT_LEARNED
        for field, value in fields.items()
        if defaults[section].get(field) != value and (section, field) != ("data", "shards")
    }


def best_epoch(log: Sequence[Mapping[str, Any]], metric: str) -> Mapping[str, Any] | None:
    """The log line of the epoch whose weights were kept: the first of the best, as in training."""
    known = [line for line in log if line["kind"] == "val" and line.get(metric) is not None]
    sign = -1 if metric in LOWER_IS_BETTER else 1
    return max(known, key=lambda line: sign * line[metric]) if known else None
