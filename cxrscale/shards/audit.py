"""Statistics of datasets: queries on their manifests and fingerprints; no tar is opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cxrscale import sources
from cxrscale.config import ABSENT, AGE_BANDS, PRESENT, UNKNOWN, age_band, has_no_finding
from cxrscale.io import read_artifact, storage
from cxrscale.shards import leakage
from cxrscale.shards.audit_models import (
    Audit,
    DatasetInfo,
    LabelCounts,
    MaskStatistics,
    PixelStatistics,
    QuarantinedImage,
)
from cxrscale.shards.build import UNLABELED
from cxrscale.shards.leakage import JoinedDatasets
from cxrscale.shards.manifest import Manifest
from cxrscale.shards.splits import TEST, TRAIN, VAL
from cxrscale.sources import LEDGER, Ledger

AREA_EDGES = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 1.0)
"""Bounds of the mask area histogram, as shares of the image."""


def audit(*roots: str) -> Audit:
    """Images by finding, split, sex, view and age; pixels and masks; patients and images that splits share.

    Args:
        roots: datasets that are meant to be used together, each a folder or an address.

    Returns:
        The content of `audit.json`. `leaks.verdict` summarizes it; `leaks.not_checked` lists what could not be checked
        and how it could be.

    Raises:
        UserError: a folder has no dataset, or two of them have an image of the same ID.
    """
    joined = leakage.join_datasets(*roots)
    data = joined.data
    split_N = data.split.astype(str)
    splits = dict(sorted(data.split_counts().items(), key=lambda item: _split_order(item[0])))
    findings, no_finding = _label_counts(data, list(splits))
    return Audit(
        datasets=tuple(_dataset_info(joined, index) for index in range(len(roots))),
        manifest=data.digest,
        images=len(data),
        leaks=leakage.find_leaks(joined),
        splits=splits,
        findings=findings,
        no_finding=no_finding,
        sex=_by_split(data.column("sex"), split_N, ("F", "M")),
        view=_by_split(data.column("view"), split_N, ("PA", "AP")),
        age=_by_split(age_band(data.column("age")), split_N, [name for _, name in AGE_BANDS]),
        pixels=_pixel_statistics(joined),
        masks=_mask_statistics(joined),
        quarantined=tuple(
            # Datasets of older versions have the file's path too, which can name the patient.
            QuarantinedImage(dataset=root, image_id=image["image_id"], reason=image["reason"])
            for root, metadata in zip(roots, data.metadata, strict=True)
            for image in metadata["quarantined"]
        ),
        notes=tuple(_notes(joined.roots)),
    )


def _notes(roots: Sequence[str]) -> list[str]:
    """What the datasets' ledgers say; datasets of versions before 0.3 have none."""
    addresses = {root: storage.join(root, LEDGER) for root in roots}
    ledgers = {
        root: read_artifact(Ledger, address, "shard again")
        for root, address in addresses.items()
        if storage.exists(address)
    }
    notes = [f"{root}: {note}" for root, ledger in ledgers.items() for note in ledger.notes]
    editions: dict[str, dict[str, str]] = {}
    for root, ledger in ledgers.items():
        for table in ledger.tables:
            if table.edition is not None:
                editions.setdefault(ledger.source, {})[root] = f"{table.edition} ({root}, {table.table})"
    for source, edition_of in editions.items():
        if len({text.split(" (")[0] for text in edition_of.values()}) > 1:
            caveat = sources.get(source).editions_differ if source in sources.names() else ""
            mixed = f"labels of several editions of {source} are mixed: {', '.join(edition_of.values())}"
            notes.append(f"{mixed}; {caveat}" if caveat else mixed)
    return notes


def stored_pixels(joined: JoinedDatasets) -> npt.NDArray[np.float64]:
    """(N,) number of pixels of each stored image; mask areas are shares of it."""
    packs = [metadata["pack"] for metadata in joined.data.metadata]
    side_N = np.array([0 if pack["codec"] == "source" else pack["size"] for pack in packs], dtype=float)[joined.index_N]
    original_N = joined.data.column("width").astype(float) * joined.data.column("height").astype(float)
    return np.where(side_N > 0, side_N**2, original_N)


def _label_counts(data: Manifest, splits: Sequence[str]) -> tuple[dict[str, dict[str, LabelCounts]], dict[str, int]]:
    """(finding -> split -> images by label, split -> images with every finding absent)."""
    names, split_N = data.findings(), data.split.astype(str)
    label_NF = data.labels(names) if names else np.empty((len(data), 0), dtype=np.float32)
    healthy_N = has_no_finding(label_NF) if names else np.zeros(len(data), dtype=bool)
    findings: dict[str, dict[str, LabelCounts]] = {name: {} for name in names}
    for f, name in enumerate(names):
        for split in splits:
            label_M = label_NF[split_N == split, f]
            findings[name][split] = LabelCounts(
                present=int((label_M == PRESENT).sum()),
                absent=int((label_M == ABSENT).sum()),
                unlabeled=int(np.isnan(label_M).sum()),
            )
    return findings, {split: int(healthy_N[split_N == split].sum()) for split in splits}


def _by_split(
    value_N: npt.NDArray[Any], split_N: npt.NDArray[Any], expected: Sequence[str]
) -> dict[str, dict[str, int]]:
    """Value -> split -> images. Expected values are listed even with 0 images, `unknown` only if there are some."""
    text_N = np.array([str(value) if value else UNKNOWN for value in value_N.tolist()], dtype=object)
    others = sorted(set(text_N.tolist()) - {*expected, UNKNOWN})
    order = [*expected, *others, *([UNKNOWN] if UNKNOWN in text_N else [])]
    splits = sorted(np.unique(split_N).tolist(), key=_split_order)
    return {value: {split: int(((text_N == value) & (split_N == split)).sum()) for split in splits} for value in order}


def _split_order(split: str) -> tuple[int, str]:
    """Sort key: train, val, test, then all others, and unlabeled images last."""
    known = (TRAIN, VAL, TEST)
    return (known.index(split) if split in known else len(known) + (split == UNLABELED), split)


def _pixel_statistics(joined: JoinedDatasets) -> PixelStatistics:
    """Mean and standard deviation of all stored pixels, from those that packing computed for each dataset."""
    pixels_N, metadata = stored_pixels(joined), joined.data.metadata
    weight_D = np.array([pixels_N[joined.index_N == index].sum() for index in range(len(metadata))])
    weight_D /= weight_D.sum()
    mean_D = np.array([item["pixel_mean"] for item in metadata])
    square_D = np.array([item["pixel_std"] for item in metadata]) ** 2 + mean_D**2
    mean = float(weight_D @ mean_D)
    return PixelStatistics(mean=mean, std=float(np.sqrt(max(0.0, float(weight_D @ square_D) - mean**2))))


def _mask_statistics(joined: JoinedDatasets) -> MaskStatistics:
    data = joined.data
    area_N = data.column("mask_pixels").astype(float)
    has_mask_N, filled_N = np.isfinite(area_N), np.nan_to_num(area_N) > 0
    share_M = area_N[filled_N] / stored_pixels(joined)[filled_N]
    names = data.findings()
    present_N = (data.labels(names) == PRESENT).any(axis=1) if names else np.zeros(len(data), dtype=bool)
    quantiles = np.quantile(share_M, (0.05, 0.5, 0.95)).tolist() if len(share_M) else [np.nan] * 3
    return MaskStatistics(
        labeled=int(has_mask_N.sum()),
        with_pixels=int(filled_N.sum()),
        area_edges=AREA_EDGES,
        area_counts=tuple(np.histogram(share_M, bins=AREA_EDGES)[0].tolist()),
        area_quantiles=dict(zip(("5%", "50%", "95%"), quantiles, strict=True)),
        present_but_empty=tuple(data.image_id[has_mask_N & present_N & ~filled_N].tolist()),
        absent_but_filled=tuple(data.image_id[filled_N & ~present_N].tolist()),
    )


def _dataset_info(joined: JoinedDatasets, index: int) -> DatasetInfo:
    metadata: Mapping[str, Any] = joined.data.metadata[index]
    rows_N = joined.index_N == index
    return DatasetInfo(
        root=joined.roots[index],
        source=metadata["source"],
        patient_namespace=joined.namespaces[index],
        images=int(rows_N.sum()),
        patients=len(set(joined.data.patient[rows_N].tolist())),
        quarantined=len(metadata["quarantined"]),
        tars=len(metadata["shards"]),
        bytes=sum(int(tar.get("bytes") or 0) for tar in metadata["shards"].values()),
        pixel_mean=metadata["pixel_mean"],
        pixel_std=metadata["pixel_std"],
        version=metadata["version"],
        input=metadata["input"],
        pack=metadata["pack"],
    )
