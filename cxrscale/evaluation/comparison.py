"""Two runs on the same images: what differs, and by more than chance?"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from cxrscale.evaluation import metrics
from cxrscale.evaluation.metrics import BootstrapWeights, Floats
from cxrscale.evaluation.thresholds import MaskRule
from cxrscale.io import storage
from cxrscale.types import Scores, UserError

HALF = MaskRule(0.5, 0, 0.5, float("nan"))
"""The mask rule of a run without thresholds."""


def compare_scores(
    run_a: Scores,
    run_b: Scores,
    resamples: int = 2000,
    seed: int = 0,
    names: tuple[str, str] = ("A", "B"),
    triplets: tuple[MaskRule, MaskRule] = (HALF, HALF),
) -> dict[str, Any]:
    """What run A scores minus what run B scores, on the same images, as JSON has it.

    A finding: both AUROCs and their difference. Its 95% interval and `p_bootstrap` come from resampled patients, the
    same ones for both runs; `p_delong` takes images for independent (DeLong et al. 1988), `p_delong_patients` only
    patients (Obuchowski 1997), and `p_holm` adjusts the latter for the number of findings (Holm 1979). The mean over
    findings and, for segmentation, Dice over all images and on positives have interval and `p_bootstrap`. What is
    undefined is null, with the reason.

    Args:
        names: what the runs are called in messages and in the result.
        triplets: each run's own mask thresholds.

    Raises:
        UserError: the runs do not hold the same images and labels, share no finding, a score is NaN, or there are
            fewer than two patients.
    """
    for scores, name in ((run_a, names[0]), (run_b, names[1])):
        metrics.require(scores, name)
    common = [name for name in run_a.findings if name in run_b.findings]
    if not common:
        lists = f"{', '.join(run_a.findings)} and {', '.join(run_b.findings)}"
        raise UserError(f"{names[0]} and {names[1]} share no finding ({lists}); compare runs of one task")
    peer_N = _peers(run_a, run_b, names)
    draws = metrics.bootstrap_weights(run_a.patient, resamples, seed)
    rows: dict[str, dict[str, Any]] = {}
    area_2FR = np.empty((2, len(common), resamples))
    for f, name in enumerate(common):
        a, b = run_a.findings.index(name), run_b.findings.index(name)
        label = run_a.label_NF[:, a]
        _refuse_other_labels(run_a, label, run_b.label_NF[peer_N, b], name, names)
        score_2N = np.stack([run_a.score_NF[:, a], run_b.score_NF[peer_N, b]]).astype(np.float64)
        area_2FR[:, f] = [metrics.bootstrap_auroc(score, label, draws) for score in score_2N]
        rows[name] = _finding(score_2N, label, run_a.patient, area_2FR[:, f])
    tests = [np.nan if row["p_delong_patients"] is None else row["p_delong_patients"] for row in rows.values()]
    for row, p in zip(rows.values(), metrics.holm(tests), strict=True):
        row["p_holm"] = metrics.json_number(p)
    found: dict[str, Any] = {
        "a": {"name": names[0]},
        "b": {"name": names[1]},
        "images": len(run_a.image_id),
        "patients": len(set(run_a.patient.tolist())),
        "resamples": resamples,
        "seed": seed,
        "findings": rows,
        "only_in_a": [name for name in run_a.findings if name not in common],
        "only_in_b": [name for name in run_b.findings if name not in common],
        "mean_auroc": _mean(rows, area_2FR),
    }
    if run_a.maps is not None and run_b.maps is not None:
        found["dice"] = _dice(run_a, run_b, peer_N, triplets, draws)
    return found


def _peers(run_a: Scores, run_b: Scores, names: tuple[str, str]) -> npt.NDArray[np.intp]:
    """(N,) the row of run B that holds each image of run A."""
    row_of = {image: row for row, image in enumerate(run_b.image_id.tolist())}
    own = set(run_a.image_id.tolist())
    lacking = [image for image in run_a.image_id.tolist() if image not in row_of]
    beyond = [image for image in row_of if image not in own]
    if lacking or beyond:
        parts = [
            f"{len(images)} images of {one} are missing from {other} (e.g. {images[0]})"
            for images, one, other in ((lacking, *names), (beyond, *names[::-1]))
            if images
        ]
        raise UserError(f"{' and '.join(parts)}; compare runs on the same split of the same shards")
    return np.array([row_of[image] for image in run_a.image_id.tolist()], dtype=np.intp)


def _refuse_other_labels(
    run_a: Scores, label_a_N: npt.ArrayLike, label_b_N: npt.ArrayLike, finding: str, names: tuple[str, str]
) -> None:
    a, b = np.asarray(label_a_N, dtype=np.float64), np.asarray(label_b_N, dtype=np.float64)
    other = np.flatnonzero(~((a == b) | (np.isnan(a) & np.isnan(b))))
    if len(other):
        row = other[0]
        raise UserError(
            f"{finding} of image {run_a.image_id[row]} is {a[row]:g} in {names[0]} and {b[row]:g} in {names[1]} "
            f"({len(other)} such labels); compare runs over the same shards"
        )


def _finding(
    score_2N: Floats, label: npt.ArrayLike, patient: npt.NDArray[np.object_], area_2R: Floats
) -> dict[str, Any]:
    value = [metrics.auroc(score, label) for score in score_2N]
    labels = np.asarray(label)
    p_images, why = metrics.delong_test(score_2N[0], score_2N[1], label)
    p_patients, why_patients = metrics.delong_test(score_2N[0], score_2N[1], label, patient)
    return {
        "positives": int((labels == 1).sum()),
        "negatives": int((labels == 0).sum()),
        "a": metrics.json_number(value[0].value),
        "b": metrics.json_number(value[1].value),
        **_difference(value[0].value - value[1].value, area_2R[0] - area_2R[1], value[0].reason),
        "p_delong": metrics.json_number(p_images),
        "p_delong_patients": metrics.json_number(p_patients),
        **({"p_reason": why or why_patients} if why or why_patients else {}),
    }


def _mean(rows: Mapping[str, Mapping[str, Any]], area_2FR: Floats) -> dict[str, Any]:
    defined = [f for f, row in enumerate(rows.values()) if row["a"] is not None]
    if not defined:
        return {"findings": 0, "a": None, "b": None, **_difference(np.nan, np.zeros(0), "no finding has both classes")}
    chosen = [row for row in rows.values() if row["a"] is not None]
    a, b = (float(np.mean([row[side] for row in chosen])) for side in ("a", "b"))
    mean_2R = area_2FR[:, defined].mean(axis=1)
    return {"findings": len(defined), "a": a, "b": b, **_difference(a - b, mean_2R[0] - mean_2R[1])}


def _dice(
    run_a: Scores,
    run_b: Scores,
    peer_N: npt.NDArray[np.intp],
    triplets: tuple[MaskRule, MaskRule],
    draws: BootstrapWeights,
) -> dict[str, Any]:
    """Dice of both runs, each at its own triplet and on its own grid."""
    assert run_a.maps is not None
    assert run_b.maps is not None
    a, b = (
        metrics.map_dice(run.maps, rule.top, rule.min_area, rule.bottom)
        for run, rule in ((run_a, triplets[0]), (run_b, triplets[1]))
        if run.maps is not None
    )
    b = b[peer_N]
    # A tiny mask can vanish on the coarser grid of one run: then the image is a positive of neither.
    positive = metrics.has_mask(run_a.maps) & metrics.has_mask(run_b.maps)[peer_N]
    found: dict[str, Any] = {"positives": int(positive.sum())}
    for part, chosen in (("all", np.ones(len(a), dtype=bool)), ("on_positives", positive)):
        if not chosen.any():
            found[part] = {"a": None, "b": None, **_difference(np.nan, np.zeros(0), "no image with a mask")}
            continue
        gap_R = metrics.weighted_means(np.where(chosen, a - b, np.nan), draws)
        means = float(a[chosen].mean()), float(b[chosen].mean())
        found[part] = {"a": means[0], "b": means[1], **_difference(means[0] - means[1], gap_R)}
    return found


def _difference(value: float, resampled_R: Floats, reason: str = "") -> dict[str, Any]:
    estimate = metrics.undefined(reason) if reason else metrics.interval(value, resampled_R)
    return {"difference": estimate.plain(), "p_bootstrap": metrics.json_number(metrics.bootstrap_p(resampled_R))}


def write(found: Mapping[str, Any], path: str) -> str:
    """Publish a comparison as JSON."""
    storage.write(path, json.dumps(found, indent=2, allow_nan=False) + "\n")
    return path
