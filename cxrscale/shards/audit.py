"""What a shard set holds: counts, pixel statistics, leaks. Queries on the manifest alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from cxrscale.shards import manifest
from cxrscale.splits import crossing


def audit(*roots: str) -> dict[str, Any]:
    """Counts a finding, split, sex, view and age band; pixel statistics; patients that cross splits.

    Raises:
        InputError: a folder holds no shard set.
    """
    data = manifest.load(*roots)
    split = data.split.astype(str)
    names = sorted(set(split))
    label_NF = data.labels(data.findings())
    findings = {
        finding: {
            name: {
                "present": int((label_NF[split == name, f] == 1).sum()),
                "absent": int((label_NF[split == name, f] == 0).sum()),
                "unlabelled": int(np.isnan(label_NF[split == name, f]).sum()),
            }
            for name in names
        }
        for f, finding in enumerate(data.findings())
    }
    mask = data.column("mask_pixels").astype(float)
    shared = crossing(data.patient.tolist(), split.tolist())
    return {
        "shards": list(roots),
        "manifest": data.digest,
        "pictures": len(data),
        "patients": len(set(data.patient.tolist())),
        "splits": {name: int((split == name).sum()) for name in names},
        "findings": findings,
        "sex": _counts(data.column("sex")),
        "view": _counts(data.column("view")),
        "age": _ages(data.column("age").astype(float)),
        "pixel_mean": [about["pixel_mean"] for about in data.about],
        "pixel_std": [about["pixel_std"] for about in data.about],
        "masks": {"labelled": int(np.isfinite(mask).sum()), "with_pixels": int((np.nan_to_num(mask) > 0).sum())},
        "quarantined": [line for about in data.about for line in about["quarantined"]],
        "patients_in_two_splits": shared,
    }


def _counts(values: Any) -> dict[str, int]:
    names, counts = np.unique([str(value) if value else "unknown" for value in values], return_counts=True)
    return {str(name): int(count) for name, count in zip(names, counts, strict=True)}


def _ages(age_N: Any) -> dict[str, int]:
    bands = ((0, 18), (18, 40), (40, 60), (60, 80), (80, 121))
    counted = {f"{low}-{high - 1}": int(((age_N >= low) & (age_N < high)).sum()) for low, high in bands}
    return {**counted, "unknown": int(np.isnan(age_N).sum())}
