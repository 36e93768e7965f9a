"""What a run is worth, as a page: one HTML file with its plots and images inside, for screen and paper."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from cxrscale import __version__, config
from cxrscale.config import LOWER_IS_BETTER, Recipe, Threshold
from cxrscale.evaluation import MaskRule, metrics, summary
from cxrscale.evaluation.artifacts import PLOTS, TEST_METRICS, THRESHOLDS
from cxrscale.inference import predictions, stored_thresholds
from cxrscale.io import storage
from cxrscale.reporting import gallery, plots, published, tables
from cxrscale.reporting.gallery import ShownCase
from cxrscale.shards import manifest
from cxrscale.training import run_info, tracking
from cxrscale.types import Scores, UserError

PAGE = "report.html"
TEMPLATE = "run_report.html.jinja"
HEADINGS = {
    "misses": "Worst misses",
    "alarms": "Loudest false alarms",
    "hits": "Clearest hits",
    "worst": "Masks of lowest Dice",
    "false": "Largest masks where there is none",
    "best": "Masks of highest Dice",
}
RATES = ("f1", "precision", "recall", "specificity", "accuracy")


@dataclass(frozen=True, slots=True)
class Plot:
    """A figure of the page, which plots/ has as a PNG."""

    figure: Figure
    title: str

    def on_page(self) -> Markup:
        """The SVG, as wide beside the others as it was drawn."""
        share = float(self.figure.get_size_inches()[0]) / plots.WIDE
        return Markup('<div class="plot" style="width: {:.1f}%">{}</div>').format(
            100 * share, plots.svg(self.figure, self.title)
        )


def write(run: str) -> str:
    """Write an evaluated run's report.html and plots/*.png; returns the page's path or address.

    Raises:
        UserError: the run has not been evaluated, or what it holds belongs to other weights, thresholds or shards.
    """
    chosen, found = stored_thresholds(run), evaluated(run)
    scores = predictions.read_predictions(predictions.predictions_path(run, "test"))
    recipe = config.parse(Recipe, found["recipe"], where=run)
    lines = tracking.read_log(run)
    drawn = curves(scores, found, chosen) | on_masks(scores, chosen)
    if storage.exists(predictions.predictions_path(run, "val")):
        drawn |= on_validation(predictions.read_predictions(predictions.predictions_path(run, "val")), chosen)
    if any(line["kind"] == "val" for line in lines):
        best = best_epoch(lines, recipe.train.monitor)
        figure = plots.history(lines, best["epoch"] if best else None)
        drawn["history"] = Plot(figure, "Loss and validation metrics over epochs")
    for name, plot in drawn.items():
        storage.write(storage.join(run, PLOTS, f"{name}.png"), plots.png(plot.figure))
    rule = MaskRule(**chosen["triplet"]) if scores.maps is not None else None
    kinds = gallery.of_calls(scores) if rule is None else gallery.of_masks(scores, rule)
    images = gallery.show_cases(run, scores, kinds, manifest.load(*recipe.data.shards), rule)
    address = storage.join(run, PAGE)
    storage.write(address, render(run, found, chosen, run_info.read_run_info(run), lines, drawn, images))
    return address


def evaluated(run: str) -> dict[str, Any]:
    """The run's metrics.json.

    Raises:
        UserError: there is none, or thresholds.json has changed since.
    """
    address = storage.join(run, TEST_METRICS)
    if not storage.exists(address):
        raise UserError(f"{address} does not exist; make it with `cxrscale evaluate {run}`")
    found: dict[str, Any] = json.loads(storage.read(address))
    if found.get("thresholds") != storage.digest(storage.read(storage.join(run, THRESHOLDS))):
        raise UserError(f"{address} is of other thresholds than thresholds.json; run `cxrscale evaluate {run}` again")
    return found


def render(
    run: str,
    found: Mapping[str, Any],
    chosen: Mapping[str, Any],
    about: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    drawn: Mapping[str, Plot],
    images: Mapping[str, Sequence[ShownCase]],
) -> str:
    """The page, the same for the same run.

    Args:
        found: metrics.json.
        chosen: thresholds.json.
        about: run.json.
        lines: of metrics.jsonl.
        drawn: the figures by name.
        images: the cases by kind.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "thousands": lambda count: f"{count:,}",
        "share": lambda share: f"{share:.1%}",
        "estimate": _estimate,
        "stacked": _stacked,
        "interval": _interval,
        "number": _number,
        "plain": lambda name: name.replace("_", " "),
        "duration": duration,
        "compact": lambda value: json.dumps(value) if isinstance(value, list | dict | bool | None) else value,
    }
    template = environment.from_string(
        resources.files("cxrscale.reporting").joinpath("templates").joinpath(TEMPLATE).read_text("utf-8")
    )
    name = run.rstrip("/").rsplit("/", 1)[-1]
    peers, silent = published.of_split(list(found["findings"]), found["data"])
    made_after = published.system(str(about.get("recipe", name)))
    return template.render(
        name=name,
        recipe=found["recipe"],
        found=found,
        chosen=chosen,
        about=about,
        best=best_epoch(lines, found["recipe"]["train"]["monitor"]),
        differences=differences(found["recipe"]),
        peers=peers,
        silent=silent,
        noise=published.NOISE,
        system=made_after,
        headlines=[(each, published.ours(each, found)) for each in made_after.headlines] if made_after else [],
        rates=RATES,
        plots={key: plot.on_page() for key, plot in drawn.items()},
        images={HEADINGS[kind]: each for kind, each in images.items() if each},
        version=__version__,
    )


# Figures


def curves(scores: Scores, found: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Plot]:
    """ROC, precision and recall, calibration, confusion and subgroups of the test split."""
    rows, names = found["findings"], scores.findings
    column = {name: (scores.score_NF[:, f], scores.label_NF[:, f]) for f, name in enumerate(names)}
    roc = {name: metrics.roc_curve(*column[name]) for name in names}
    precision = {name: metrics.pr_curve(*column[name]) for name in names}
    at = {name: row["confusion"] for name, row in rows.items() if "confusion" in row}
    alarm = {n: (c["fp"] / (c["fp"] + c["tn"]), c["tp"] / (c["tp"] + c["fn"])) for n, c in at.items() if _both(c)}
    exact = {n: (c["tp"] / (c["tp"] + c["fn"]), c["tp"] / (c["tp"] + c["fp"])) for n, c in at.items() if _called(c)}
    share = {n: row["positives"] / max(1, row["positives"] + row["negatives"]) for n, row in rows.items()}
    area, average = ({n: _headed(key, row) for n, row in rows.items()} for key in ("auroc", "auprc"))
    drawn = {
        "roc": Plot(plots.roc(roc, alarm, area), "ROC curves"),
        "precision-recall": Plot(plots.precision_recall(precision, exact, share, average), "Precision against recall"),
        "calibration": Plot(plots.calibration(_reliability(scores, chosen)), "Calibration"),
    }
    matrices = _matrices(rows)
    if matrices:
        further = max(len(row["report_at"]) for row in rows.values())
        columns = min(plots.COLUMNS, 1 + further) if further else plots.COLUMNS
        drawn["confusion"] = Plot(plots.confusion(matrices, columns), "Confusion matrices")
    groups = {
        name: {f"{by} {group}": {**each["auroc"], **_counts(each)} for by, parts in row["subgroups"].items()
               for group, each in parts.items()}
        for name, row in rows.items()
    }  # fmt: skip
    if any(group["value"] is not None for each in groups.values() for group in each.values()):
        overall = {name: row["auroc"] for name, row in rows.items()}
        drawn["subgroups"] = Plot(plots.forest(groups, overall), "AUROC by subgroup")
    return drawn


def on_validation(scores: Scores, chosen: Mapping[str, Any]) -> dict[str, Plot]:
    """How the thresholds were chosen."""
    figure = plots.threshold_curves(summary.threshold_curves(scores, chosen), chosen["thresholds"])
    drawn = {"thresholds": Plot(figure, "Recall, precision and F1 against the threshold")}
    if scores.maps is not None:
        swept = summary.mask_threshold_curve(scores, MaskRule(**chosen["triplet"]))
        drawn["triplet"] = Plot(
            plots.mask_threshold_curve(swept, chosen["triplet"]), "Dice against the threshold of the pixels"
        )
    return drawn


def on_masks(scores: Scores, chosen: Mapping[str, Any]) -> dict[str, Plot]:
    """How Dice is spread over the images with a mask."""
    if scores.maps is None or not metrics.has_mask(scores.maps).any():
        return {}
    rule = MaskRule(**chosen["triplet"])
    dice = metrics.map_dice(scores.maps, rule.top, rule.min_area, rule.bottom)[metrics.has_mask(scores.maps)]
    return {"dice": Plot(plots.overlap(dice.tolist()), "Dice of the images with a mask")}


def _reliability(scores: Scores, chosen: Mapping[str, Any]) -> dict[str, dict[str, metrics.Reliability]]:
    """Bins of equally many images: with a rare finding nearly all would fall into the first of equal widths."""
    rule = Threshold.model_validate(chosen["rule"])
    found = {}
    for f, name in enumerate(scores.findings):
        score, label, fitted = scores.score_NF[:, f], scores.label_NF[:, f], chosen["calibration"][name]
        calibrated, final, shift, _ = summary.final_probabilities(score, fitted, rule, rule.priors.get(name))
        steps = {"raw": np.asarray(score, dtype=np.float64)}
        if fitted["calibrator"]["kind"] != "none":
            steps["calibrated"] = calibrated
        if shift is not None:
            steps["corrected"] = final
        found[name] = {step: metrics.reliability(each, label, 10, equal_mass=True) for step, each in steps.items()}
    return found


def _matrices(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Heading -> confusion matrix: each finding at the stored threshold, then at the further ones."""
    found: dict[str, dict[str, int]] = {}
    for name, row in rows.items():
        if "confusion" in row:
            found[f"{name} at {row['threshold']:.3f}"] = row["confusion"]
        found |= {f"{name} at {each['threshold']:g}": each["confusion"] for each in row["report_at"]}
    return found


def _headed(key: str, row: Mapping[str, Any]) -> str:
    return "" if row[key]["value"] is None else f"{key.upper()} {_estimate(row[key])}"


def _counts(group: Mapping[str, Any]) -> dict[str, int]:
    return {name: group[name] for name in ("images", "positives")}


def _both(cells: Mapping[str, int]) -> bool:
    return cells["tp"] + cells["fn"] > 0 and cells["fp"] + cells["tn"] > 0


def _called(cells: Mapping[str, int]) -> bool:
    return cells["tp"] + cells["fn"] > 0 and cells["tp"] + cells["fp"] > 0


# Words and numbers


def differences(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The fields in which a recipe differs from the defaults, dotted; of what is learned alone."""
    plain = Recipe().model_dump(mode="json")
    return {
        f"{section}.{field}": value
        for section, fields in recipe.items()
        if section not in ("tracking", "pack", "tune", "threshold")
        for field, value in fields.items()
        if plain[section].get(field) != value and (section, field) != ("data", "shards")
    }


def best_epoch(lines: Sequence[Mapping[str, Any]], metric: str) -> Mapping[str, Any] | None:
    """The validation line whose weights were kept: the first of the best, as training counts."""
    known = [line for line in lines if line["kind"] == "val" and line.get(metric) is not None]
    sign = -1 if metric in LOWER_IS_BETTER else 1
    return max(known, key=lambda line: sign * line[metric]) if known else None


def duration(seconds: float) -> str:
    """3 d 4 h, 2 h 5 min, 7 min, 12 s."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    hours, days = minutes // 60, minutes // 1440
    if days:
        return f"{days} d {hours % 24} h"
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min"


def _estimate(value: Mapping[str, Any] | None) -> str:
    return "–" if value is None else tables.estimate(dict(value)).replace("-", "–")


def _interval(value: Mapping[str, Any]) -> str:
    """What a threshold's interval is, without the threshold."""
    return "" if value["low"] is None else f"{value['low']:.3f}–{value['high']:.3f}"


def _stacked(value: Mapping[str, Any]) -> Markup:
    """The value over its interval or, where there is none, a dash over the reason: for tables with many columns."""
    between = value.get("reason", "") if value["value"] is None else _interval(value)
    return Markup("{}<br><small>{}</small>").format(_number(value["value"]), between)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
