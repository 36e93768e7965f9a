"""Thresholds and calibrators from validation scores; metrics with intervals from test scores."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cxrscale import assessment, checkpoint, config, metrics, predict, storage
from cxrscale.batches import feed
from cxrscale.config import Recipe, Threshold
from cxrscale.schema import InputError
from cxrscale.shards import leaks
from cxrscale.shards.leaks import Sets
from cxrscale.thresholds import Triplet

THRESHOLDS = "thresholds.json"
METRICS = "metrics.json"
PLOTS = "plots"
RESAMPLES = 1000
"""Bootstrap resamples of the patients, for thresholds and for metrics."""
Told = Callable[[int], None]
"""Is told how many more pictures have been scored."""


def threshold(run: str, overrides: Sequence[str] = (), resamples: int = RESAMPLES, progress: Told | None = None) -> str:
    """Choose a run's thresholds and fit its calibrators on its validation split; writes thresholds.json and a plot.

    Args:
        overrides: `threshold.field=value` over the recipe's own section.

    Raises:
        InputError: an override of something else, a prior of an unknown finding, fewer than two patients, a NaN score.
    """
    scores = predict.split(run, "val", progress)
    address = predict.address(run, "val")
    metrics.require(scores, address)
    rule = _rule(predict.described(address)["recipe"], overrides, scores.findings)
    found = assessment.choose(scores, rule, metrics.patient_draws(scores.patient, resamples, seed=0))
    from cxrscale import plots  # only here: matplotlib takes half a second

    drawn = {"thresholds": plots.trade_off(assessment.trade_off(scores, found), found["thresholds"])}
    if scores.maps is not None:
        drawn["triplet"] = plots.sweep(assessment.sweep(scores, Triplet(**found["triplet"])), found["triplet"])
    for name, figure in drawn.items():
        storage.write(storage.join(run, PLOTS, f"{name}.png"), plots.png(figure))
    about = {"split": "val", "images": len(scores.image_id), "patients": len(set(scores.patient.tolist()))}
    return _write(run, THRESHOLDS, {**about, "resamples": resamples, **found}, "val")


def evaluate(run: str, resamples: int = RESAMPLES, progress: Told | None = None) -> str:
    """Metrics of the test split at the stored thresholds, with 95% intervals over patients; writes metrics.json.

    Raises:
        InputError: no thresholds yet, or they belong to other weights; the shards have changed; fewer than two
            patients; a NaN score.
    """
    chosen = stored_thresholds(run)
    scores = predict.split(run, "test", progress)
    metrics.require(scores, predict.address(run, "test"))
    recipe = config.parse(Recipe, predict.described(predict.address(run, "test"))["recipe"], where=run)
    sets = leaks.join(*recipe.data.shards)
    draws = metrics.patient_draws(scores.patient, resamples, seed=0)
    found = {
        "split": "test",
        **assessment.assess(scores, chosen, draws, assessment.groups(scores, sets.data)),
        "data": _described(sets, recipe),
        "thresholds": storage.digest(storage.read(storage.join(run, THRESHOLDS))),
    }
    return _write(run, METRICS, found, "test")


def stored_thresholds(run: str) -> dict[str, Any]:
    """The run's thresholds.json.

    Raises:
        InputError: there is none, it is of an earlier version, or the run's weights have changed since.
    """
    path = storage.join(run, THRESHOLDS)
    if not storage.exists(path):
        raise InputError(f"{path} does not exist; make it with `cxrscale threshold {run}`")
    found: dict[str, Any] = json.loads(storage.read(path))
    weights = storage.digest(storage.read(storage.join(run, checkpoint.BEST)))
    if found["checkpoint"] != weights:
        raise InputError(f"{path} belongs to other weights than best.pt; run `cxrscale threshold {run}` again")
    if "rule" not in found:
        raise InputError(f"{path} is of an earlier version of cxrscale; run `cxrscale threshold {run}` again")
    return found


def _rule(recipe: Mapping[str, Any], overrides: Sequence[str], findings: Sequence[str]) -> Threshold:
    for item in overrides:
        if not item.startswith("threshold."):
            raise InputError(f"override {item!r}: a trained run takes threshold.* alone, e.g. threshold.goal=recall")
    tree = config.override({"threshold": recipe.get("threshold", {})}, overrides)
    rule = config.parse(Recipe, tree, where="threshold").threshold
    unknown = [name for name in rule.priors if name not in findings]
    if unknown:
        raise InputError(f"threshold.priors: the run has no finding {unknown[0]!r}; it has {', '.join(findings)}")
    if rule.prior_shift == "known" and not rule.priors:
        raise InputError("threshold.prior_shift=known wants the prevalences: threshold.priors={FINDING: 0.1}")
    return rule


def _described(sets: Sets, recipe: Recipe) -> dict[str, Any]:
    """What was trained on: the shard sets, pictures and patients of each part, and what they share."""
    roles = {"train": recipe.data.train_split, "val": recipe.data.val_split, "test": recipe.data.test_split}
    looked = leaks.look(sets)
    parts = {}
    for role, names in roles.items():
        rows = feed.usable_rows(sets.data, names, recipe.data)
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
            "pictures_in_two_splits": len(looked["twins"]["between_splits"]),
        },
    }


def _write(run: str, name: str, found: dict[str, Any], split: str) -> str:
    about = predict.described(predict.address(run, split))
    path = storage.join(run, name)
    storage.write(path, json.dumps({**found, **about}, indent=2, allow_nan=False) + "\n")
    return path
