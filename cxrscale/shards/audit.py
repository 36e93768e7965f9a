"""What datasets hold: queries on their manifests and fingerprints, no tar is opened."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cxrscale.config import ABSENT, PRESENT, has_no_finding
from cxrscale.shards import leakage
from cxrscale.shards.build import UNLABELED
from cxrscale.shards.leakage import JoinedDatasets
from cxrscale.shards.manifest import Manifest
from cxrscale.shards.splits import TEST, TRAIN, VAL

AREA_EDGES = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 1.0)
"""Bounds of the mask area histogram, as shares of the image."""
AGE_BANDS = (*((low, low + 9) for low in range(0, 90, 10)), (90, 120))
"""First and last year of each age band."""


def audit(*roots: str) -> dict[str, Any]:
    """Counts a finding, split, sex, view and age band; pixels and masks; patients and images that splits share.

    Args:
        roots: datasets that are meant to be used together, each a folder or an address.

    Returns:
        What `audit.json` holds. `verdict` says it in words; `not_checked` is what could not be told, and how it could.

    Raises:
        UserError: a folder holds no dataset, or two of them hold an image of the same id.
    """
    sets = leakage.join_datasets(*roots)
    return {
        "shards": list(roots),
        "manifest": sets.data.digest,
        "images": len(sets.data),
        **leakage.find_leaks(sets),
        **_counts(sets.data),
        "pixels": _pixels(sets),
        "masks": _masks(sets),
        "sets": [_dataset_info(sets, s) for s in range(len(roots))],
        "quarantined": [
            {"shards": root, **line}
            for root, about in zip(roots, sets.data.about, strict=True)
            for line in about["quarantined"]
        ],
    }


def stored_pixels(sets: JoinedDatasets) -> npt.NDArray[np.float64]:
    """(N,) pixels of each stored image, which a mask's area is a share of."""
    sizes = [None if about["pack"]["codec"] == "source" else int(about["pack"]["size"]) for about in sets.data.about]
    original = sets.data.column("width").astype(float) * sets.data.column("height").astype(float)
    side_N = np.array([size or 0 for size in sizes], dtype=float)[sets.member_N]
    return np.where(side_N > 0, side_N**2, original)


# Counts


def _counts(data: Manifest) -> dict[str, Any]:
    """The tables: splits, findings, sexes, views and ages, each by split."""
    split = data.split.astype(str)
    names = data.findings()
    label_NF = data.labels(names) if names else np.empty((len(data), 0), dtype=np.float32)
    splits = dict(sorted(data.split_counts().items(), key=lambda item: _order(item[0])))
    findings = {
        finding: {
            name: {
                "present": int((label_NF[split == name, f] == PRESENT).sum()),
                "absent": int((label_NF[split == name, f] == ABSENT).sum()),
                "unlabelled": int(np.isnan(label_NF[split == name, f]).sum()),
            }
            for name in splits
        }
        for f, finding in enumerate(names)
    }
    healthy = has_no_finding(label_NF) if names else np.zeros(len(data), dtype=bool)
    age_N = data.column("age").astype(float)
    band_N = np.full(len(data), "unknown", dtype=object)
    for low, high in AGE_BANDS:
        band_N[(age_N >= low) & (age_N <= high)] = f"{low}-{high}"
    bands = [f"{low}-{high}" for low, high in AGE_BANDS]
    return {
        "splits": splits,
        "findings": findings,
        "no_finding": {name: int(healthy[split == name].sum()) for name in splits},
        "sex": _by_split(data.column("sex"), split, ("F", "M")),
        "view": _by_split(data.column("view"), split, ("PA", "AP")),
        "age": _by_split(band_N, split, bands),
    }


def _by_split(values: npt.NDArray[Any], split: npt.NDArray[Any], expected: Sequence[str]) -> dict[str, dict[str, int]]:
    """Value -> split -> images; the expected values are there even at 0, `unknown` where any is."""
    said = np.array([str(value) if value else "unknown" for value in values.tolist()], dtype=object)
    others = sorted(set(said.tolist()) - {*expected, "unknown"})
    order = [*expected, *others, *(["unknown"] if "unknown" in said else [])]
    return {
        value: {
            name: int(((said == value) & (split == name)).sum())
            for name in sorted(np.unique(split).tolist(), key=_order)
        }
        for value in order
    }


def _order(split: str) -> tuple[int, str]:
    """Sorts splits as one thinks of them: training first, what nobody trains on last."""
    known = (TRAIN, VAL, TEST)
    return (known.index(split) if split in known else len(known) + (split == UNLABELED), split)


def _pixels(sets: JoinedDatasets) -> dict[str, float]:
    """Mean and standard deviation of all stored pixels, 0..1: packing streamed those of each set."""
    area_N, abouts = stored_pixels(sets), sets.data.about
    weight = np.array([area_N[sets.member_N == s].sum() for s in range(len(abouts))])
    weight /= weight.sum()
    mean = np.array([about["pixel_mean"] for about in abouts])
    square = np.array([about["pixel_std"] for about in abouts]) ** 2 + mean**2
    whole = float(weight @ mean)
    return {"mean": whole, "std": float(np.sqrt(max(0.0, float(weight @ square) - whole**2)))}


def _masks(sets: JoinedDatasets) -> dict[str, Any]:
    """How many masks there are and what share of the image they cover; masks that contradict the labels."""
    data = sets.data
    mask_N = data.column("mask_pixels").astype(float)
    has = np.isfinite(mask_N)
    filled = np.nan_to_num(mask_N) > 0
    share = mask_N[filled] / stored_pixels(sets)[filled]
    names = data.findings()
    present = (data.labels(names) == PRESENT).any(axis=1) if names else np.zeros(len(data), dtype=bool)
    counts = np.histogram(share, bins=AREA_EDGES)[0]
    quantiles = np.quantile(share, (0.05, 0.5, 0.95)).tolist() if len(share) else [None] * 3
    return {
        "labeled": int(has.sum()),
        "with_pixels": int(filled.sum()),
        "area_edges": list(AREA_EDGES),
        "area_counts": counts.tolist(),
        "area_quantiles": dict(zip(("5%", "50%", "95%"), quantiles, strict=True)),
        "present_but_empty": data.image_id[has & present & ~filled].tolist(),
        "absent_but_filled": data.image_id[filled & ~present].tolist(),
    }


def _dataset_info(sets: JoinedDatasets, s: int) -> dict[str, Any]:
    """One dataset: where it is from and how it was packed."""
    about, own = sets.data.about[s], sets.member_N == s
    return {
        "shards": sets.roots[s],
        "source": about["source"],
        "patients_from": sets.spaces[s],
        "images": int(own.sum()),
        "patients": len(set(sets.data.patient[own].tolist())),
        "quarantined": len(about["quarantined"]),
        "tars": len(about["shards"]),
        "bytes": sum(int(tar["bytes"]) for tar in about["shards"].values()),
        "pixel_mean": about["pixel_mean"],
        "pixel_std": about["pixel_std"],
        "version": about["version"],
        "input": about["input"],
        "pack": about["pack"],
    }
