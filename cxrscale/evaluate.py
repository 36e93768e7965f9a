"""Thresholds from validation scores; metrics with intervals from test scores."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import numpy as np

from cxrscale import checkpoint, metrics, predict, storage
from cxrscale.metrics import Estimate
from cxrscale.schema import InputError, Scores
from cxrscale.thresholds import Triplet, best_f1, best_triplet

THRESHOLDS = "thresholds.json"
METRICS = "metrics.json"


def threshold(run: str) -> str:
    """Search the thresholds of a run on its validation split and write thresholds.json."""
    scores = predict.split(run, "val")
    cuts = {name: best_f1(scores.score_NF[:, f], scores.label_NF[:, f]) for f, name in enumerate(scores.findings)}
    found: dict[str, Any] = {
        "split": "val",
        "images": len(scores.image_id),
        "goal": "f1",
        "thresholds": {name: _plain(cut) for name, cut in cuts.items()},
    }
    if scores.maps is not None:
        found["triplet"] = asdict(best_triplet(scores.maps))
    return _write(run, THRESHOLDS, found, "val")


def evaluate(run: str, resamples: int = 1000) -> str:
    """Metrics of the test split at the stored thresholds, with 95% intervals over patients; writes metrics.json.

    Raises:
        InputError: no thresholds yet, or they belong to other weights.
    """
    chosen = stored_thresholds(run)
    scores = predict.split(run, "test")
    draws = metrics.patient_draws(scores.patient, resamples, seed=0)
    area_FR = np.stack(
        [metrics.auroc_draws(scores.score_NF[:, f], scores.label_NF[:, f], draws) for f in range(len(scores.findings))]
    )
    table = {
        name: _finding(scores, f, chosen["thresholds"][name]["value"], area_FR[f])
        for f, name in enumerate(scores.findings)
    }
    areas = [row["auroc"]["value"] for row in table.values()]
    defined = [area for area in areas if area is not None]
    per_draw = area_FR[[area is not None for area in areas]] if defined else np.full((1, resamples), np.nan)
    mean = float(np.mean(defined)) if defined else float("nan")
    found: dict[str, Any] = {
        "split": "test",
        "images": len(scores.image_id),
        "patients": len(set(scores.patient.tolist())),
        "resamples": resamples,
        "mean_auroc": _plain(metrics.interval(mean, per_draw.mean(axis=0))),
        "findings_in_mean": len(defined),
        "findings": table,
    }
    if scores.maps is not None:
        found["dice"] = _dice(scores, Triplet(**chosen["triplet"]), draws)
    return _write(run, METRICS, found, "test")


def stored_thresholds(run: str) -> dict[str, Any]:
    """The run's thresholds.json.

    Raises:
        InputError: there is none, or the run's weights have changed since.
    """
    path = storage.join(run, THRESHOLDS)
    if not storage.exists(path):
        raise InputError(f"{path} does not exist; make it with `cxrscale threshold {run}`")
    found: dict[str, Any] = json.loads(storage.read(path))
    weights = storage.digest(storage.read(storage.join(run, checkpoint.BEST)))
    if found["checkpoint"] != weights:
        raise InputError(f"{path} belongs to other weights than best.pt; run `cxrscale threshold {run}` again")
    return found


def _finding(scores: Scores, f: int, cut: float | None, area_R: metrics.Floats) -> dict[str, Any]:
    score, label = scores.score_NF[:, f], scores.label_NF[:, f]
    area = metrics.auroc(score, label)
    if np.isfinite(area.value):
        area = metrics.interval(area.value, area_R)
    row: dict[str, Any] = {
        "positives": int((label == 1).sum()),
        "negatives": int((label == 0).sum()),
        "auroc": _plain(area),
        "auprc": _plain(metrics.auprc(score, label)),
        "threshold": cut,
    }
    if cut is not None:
        counts = metrics.confusion(score, label, cut)
        row |= {
            "confusion": counts,
            "f1": _number(metrics.f1(counts)),
            "recall": _number(metrics.ratio(counts["tp"], counts["fn"])),
            "precision": _number(metrics.ratio(counts["tp"], counts["fp"])),
            "specificity": _number(metrics.ratio(counts["tn"], counts["fp"])),
        }
    return row


def _dice(scores: Scores, rule: Triplet, draws: Any) -> dict[str, Any]:
    """Dice as the challenge scored it, beside Dice on positives and beside what predicting nothing would get."""
    assert scores.maps is not None
    value = metrics.map_dice(scores.maps, rule.top, rule.min_area, rule.bottom)
    positive = scores.maps.true_NT.sum(axis=1) > 0
    on_positives = np.where(positive, value, np.nan)
    floor = 1.0 - float(positive.mean())
    mean_positive = float(np.nanmean(on_positives)) if positive.any() else float("nan")
    return {
        "triplet": asdict(rule),
        "positives": int(positive.sum()),
        "all": _plain(metrics.interval(float(value.mean()), metrics.mean_draws(value, draws))),
        "on_positives": _plain(metrics.interval(mean_positive, metrics.mean_draws(on_positives, draws))),
        "all_empty_floor": floor,
    }


def _write(run: str, name: str, found: dict[str, Any], split: str) -> str:
    about = predict.described(storage.join(run, f"predictions-{split}.parquet"))
    path = storage.join(run, name)
    storage.write(path, json.dumps({**found, **about}, indent=2, allow_nan=False) + "\n")
    return path


def _plain(estimate: Estimate) -> dict[str, Any]:
    return {
        "value": _number(estimate.value),
        "low": _number(estimate.low),
        "high": _number(estimate.high),
        **({"reason": estimate.reason} if estimate.reason else {}),
    }


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
