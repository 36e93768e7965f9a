"""Thresholds and calibrators from validation scores; metrics with intervals from test scores."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cxrscale import config
from cxrscale.config import Recipe, Threshold
from cxrscale.evaluation import MaskRule, comparison, metrics, summary
from cxrscale.evaluation.artifacts import PLOTS, TEST_METRICS, THRESHOLDS
from cxrscale.inference import predictions, stored_thresholds
from cxrscale.io import storage
from cxrscale.loader import usable_rows
from cxrscale.shards import JoinedDatasets, leakage
from cxrscale.types import UserError

RESAMPLES = 1000
"""Bootstrap resamples of the patients, for thresholds and for metrics."""
Told = Callable[[int], None]
"""Is told how many more images have been scored."""


def choose_run_thresholds(
    run: str, overrides: Sequence[str] = (), resamples: int = RESAMPLES, progress: Told | None = None
) -> str:
    """Choose a run's thresholds and fit its calibrators on its validation split; writes thresholds.json and a plot.

    Args:
        overrides: `threshold.field=value` over the recipe's own section.

    Raises:
        UserError: an override of something else, a prior of an unknown finding, fewer than two patients, a NaN score.
    """
    scores = predictions.predict_split(run, "val", progress)
    address = predictions.predictions_path(run, "val")
    metrics.require(scores, address)
    rule = _rule(predictions.read_metadata(address)["recipe"], overrides, scores.findings)
    found = summary.choose_thresholds(scores, rule, metrics.bootstrap_weights(scores.patient, resamples, seed=0))
    from cxrscale.reporting import plots  # only here: matplotlib takes half a second

    drawn = {"thresholds": plots.threshold_curves(summary.threshold_curves(scores, found), found["thresholds"])}
    if scores.maps is not None:
        drawn["triplet"] = plots.mask_threshold_curve(
            summary.mask_threshold_curve(scores, MaskRule(**found["triplet"])), found["triplet"]
        )
    for name, figure in drawn.items():
        storage.write(storage.join(run, PLOTS, f"{name}.png"), plots.png(figure))
    about = {"split": "val", "images": len(scores.image_id), "patients": len(set(scores.patient.tolist()))}
    return _write(run, THRESHOLDS, {**about, "resamples": resamples, **found}, "val")


def evaluate_run(run: str, resamples: int = RESAMPLES, progress: Told | None = None) -> str:
    """Metrics of the test split at the stored thresholds, with 95% intervals over patients; writes metrics.json.

    Raises:
        UserError: no thresholds yet, or they belong to other weights; the shards have changed; fewer than two
            patients; a NaN score.
    """
    chosen = stored_thresholds(run)
    scores = predictions.predict_split(run, "test", progress)
    metrics.require(scores, predictions.predictions_path(run, "test"))
    recipe = config.parse(
        Recipe, predictions.read_metadata(predictions.predictions_path(run, "test"))["recipe"], where=run
    )
    sets = leakage.join_datasets(*recipe.data.shards)
    draws = metrics.bootstrap_weights(scores.patient, resamples, seed=0)
    found = {
        "split": "test",
        **summary.evaluate_scores(scores, chosen, draws, summary.subgroups_of(scores, sets.data)),
        "data": _described(sets, recipe),
        "thresholds": storage.digest(storage.read(storage.join(run, THRESHOLDS))),
    }
    return _write(run, TEST_METRICS, found, "test")


def _rule(recipe: Mapping[str, Any], overrides: Sequence[str], findings: Sequence[str]) -> Threshold:
    for item in overrides:
        if not item.startswith("threshold."):
            raise UserError(f"override {item!r}: a trained run takes threshold.* alone, e.g. threshold.goal=recall")
    tree = config.override({"threshold": recipe.get("threshold", {})}, overrides)
    rule = config.parse(Recipe, tree, where="threshold").threshold
    unknown = [name for name in rule.priors if name not in findings]
    if unknown:
        raise UserError(f"threshold.priors: the run has no finding {unknown[0]!r}; it has {', '.join(findings)}")
    if rule.prior_shift == "known" and not rule.priors:
        raise UserError("threshold.prior_shift=known wants the prevalences: threshold.priors={FINDING: 0.1}")
    return rule


def _described(sets: JoinedDatasets, recipe: Recipe) -> dict[str, Any]:
    """What was trained on: the datasets, images and patients of each part, and what they share."""
    roles = {"train": recipe.data.train_split, "val": recipe.data.val_split, "test": recipe.data.test_split}
    looked = leakage.find_leaks(sets)
    parts = {}
    for role, names in roles.items():
        rows = usable_rows(sets.data, names, recipe.data)
        patients = len(set(sets.data.patient[rows].tolist()))
        parts[role] = {"splits": list(names), "images": len(rows), "patients": patients}
    return {
        "parts": parts,
        "sets": [
            {"shards": root, "source": about["source"], "input": about["input"], "pack": about["pack"]}
            for root, about in zip(sets.roots, sets.data.about, strict=True)
        ],
        "leaks": {
            "verdict": looked["verdict"],
            "not_checked": looked["not_checked"],
            "patients_in_two_splits": len(looked["patients_in_two_splits"]),
            "pictures_in_two_splits": len(looked["duplicates"]["between_splits"]),
        },
    }


def _write(run: str, name: str, found: dict[str, Any], split: str) -> str:
    about = predictions.read_metadata(predictions.predictions_path(run, split))
    path = storage.join(run, name)
    storage.write(path, json.dumps({**found, **about}, indent=2, allow_nan=False) + "\n")
    return path


def compare_runs(run_a: str, run_b: str, split: str = "test", resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """`compare` of two run folders, with the digests of their weights; scores the split where that is yet to be done.

    Masks are cut at each run's own stored triplet, or at 0.5 where it has no thresholds.json.

    Raises:
        UserError: a folder is no trained run, its thresholds are of other weights, or what `compare` raises.
    """
    ends = tuple(run.rstrip("/").rpartition("/")[2] for run in (run_a, run_b))
    names = (ends[0], ends[1]) if ends[0] != ends[1] else (run_a, run_b)
    scores = tuple(predictions.predict_split(run, split) for run in (run_a, run_b))
    rules = tuple(_triplet(run) for run in (run_a, run_b))
    found = comparison.compare_scores(scores[0], scores[1], resamples, seed, names, (rules[0], rules[1]))
    for side, run in (("a", run_a), ("b", run_b)):
        about = predictions.read_metadata(storage.join(run, f"predictions-{split}.parquet"))
        found[side] |= {"run": run, **{key: about[key] for key in ("checkpoint", "manifest")}}
    return {"split": split, **found}


def _triplet(run: str) -> MaskRule:
    if not storage.exists(storage.join(run, THRESHOLDS)):
        return comparison.HALF
    stored = stored_thresholds(run)
    return MaskRule(**stored["triplet"]) if "triplet" in stored else comparison.HALF
