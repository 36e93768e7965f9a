"""The audit as a page: one HTML file with its plots and images inside, for screen and print, light and dark."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cxrscale.config import ABSENT, NO_FINDING, PRESENT, has_no_finding
from cxrscale.io import decode_mask, load_image, storage, write_artifact
from cxrscale.reporting import html
from cxrscale.reporting.overlay import Thumbnail, thumbnail
from cxrscale.reporting.style import BLUE, COLORS, LINE, SPLIT_COLORS, WIDE, styled, svg
from cxrscale.shards import (
    UNLABELED,
    Audit,
    JoinedDatasets,
    Manifest,
    MaskStatistics,
    leakage,
    manifest,
    splits,
    stored_pixels,
)
from cxrscale.types import UnreadableImageError, UserError

TEMPLATE = "audit.html.jinja"
PLOT_TITLES = {
    "findings": "Images with each finding by split, and their share of the labeled images",
    "patients": "Images by sex, view and age, splits stacked",
    "masks": "Masks by the share of the image that they cover",
}
EXAMPLES = 16
"""Example images on the page."""
SIDE = 192
"""Their height and width in pixels, at most."""
MAX_ROWS = 50
"""Rows of a table on the page; the JSON file has them all."""


@dataclass(frozen=True, slots=True)
class Example:
    """One example image of the page."""

    image_id: str
    title: str
    """Its findings."""
    caption: str
    thumbnail: Thumbnail
    """With the mask's outline where there is one."""


def write(audit: Audit, out_html: str) -> str:
    """Write the page with its plots and example images, and the JSON file beside it.

    Args:
        audit: of the datasets; the example images are read from their tar files.
        out_html: path or address of the page; its suffix may be left out, or be .json.

    Returns:
        The page's path or address.

    Raises:
        UserError: the files cannot be written.
    """
    stem = out_html.removesuffix(".html").removesuffix(".json")
    page = render(audit)
    write_artifact(f"{stem}.json", audit)
    storage.write(f"{stem}.html", page)
    return f"{stem}.html"


def render(audit: Audit) -> str:
    """The page of an audit, the same for the same datasets."""
    table = _prevalence(audit)
    figures = {
        "findings": _findings_plot(audit) if audit.findings else None,
        "patients": _patients_plot(audit),
        "masks": _mask_plot(audit.masks) if audit.masks.with_pixels else None,
    }
    return html.render(
        TEMPLATE,
        audit=audit,
        plots={name: "" if figure is None else svg(figure, PLOT_TITLES[name]) for name, figure in figures.items()},
        prevalence=table,
        labeled_splits=[name for name in audit.splits if any(row.share[name] is not None for row in table)],
        examples=examples(leakage.join_datasets(*(dataset.root for dataset in audit.datasets))),
        max_rows=MAX_ROWS,
    )


# Example images


def examples(joined: JoinedDatasets) -> list[Example]:
    """The example images: each finding in turn gives the next image that shows it."""
    area_N = joined.data.column("mask_pixels").astype(float) / stored_pixels(joined)
    return [_example(joined.data, row, float(area_N[row])) for row in example_rows(joined.data)]


def example_rows(data: Manifest, count: int = EXAMPLES) -> list[int]:
    """Rows of the example images, ordered by hash: up to a quarter with masks, then findings in turn.

    Training images come before others, since nobody should look at the test split. Each patient is shown once.
    """
    names = data.findings()
    label_NF = data.labels(names) if names else np.zeros((len(data), 0), dtype=np.float32)
    filled = np.nan_to_num(data.column("mask_pixels").astype(float)) > 0
    order = np.lexsort((data.key.view(np.uint64), ~filled, data.split != splits.TRAIN))
    wanted = [*(label_NF[:, f] == PRESENT for f in range(len(names))), has_no_finding(label_NF)]
    queues = [[int(row) for row in order[has[order]][:count]] for has in wanted]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*queues))
    outlined = order[filled[order]][: count // 4].tolist()
    rows: dict[str, int] = {}
    for row in itertools.chain(outlined, (row for row in turns if row is not None), order[:count].tolist()):
        rows.setdefault(data.patient[row], row)  # one image per patient
    return list(rows.values())[:count]


def _example(data: Manifest, row: int, area: float) -> Example:
    line = {name: data.table[name][row].as_py() for name in data.table.column_names}
    states = {name: line[manifest.LABEL + name] for name in data.findings()}
    present = [name for name, state in states.items() if state == PRESENT]
    absent = [name for name, state in states.items() if state == ABSENT]
    # "No Finding" means that NIH's whole vocabulary is absent; a source of one or two findings cannot tell.
    healthy = NO_FINDING if len(absent) == len(states) > 3 else "no " + ", ".join(absent[:3])
    facts = [line["split"], line["sex"], line["age"] and f"{line['age']} years", line["view"]]
    if area > 0:
        facts.append(f"mask {html.share(area)}")
    shown = Thumbnail()
    try:
        image_HW = load_image(read_member(line, "image")).image_HW
        has_mask = line["mask_offset"] is not None
        masks = {"mask": decode_mask(read_member(line, "mask"))} if has_mask else {}
        shown = thumbnail(image_HW, SIDE, masks)
    except (UnreadableImageError, UserError):
        facts.append("cannot be read: run `cxrscale verify`")
    title = ", ".join(present) or (healthy if absent else "unlabeled")
    return Example(line["image_id"], title, ", ".join(str(fact) for fact in facts if fact), shown)


def read_member(line: Mapping[str, Any], kind: str) -> bytes:
    """The bytes of an image or mask, read alone from its position in the tar file.

    Raises:
        UnreadableImageError: the tar file is missing, or other bytes than the packed ones are at that position.
    """
    address = storage.join(line["root"], line["shard"])
    try:
        with fsspec.open(address, "rb") as tar:
            tar.seek(line[f"{kind}_offset"])
            data: bytes = tar.read(line[f"{kind}_length"])
    except OSError as error:
        raise UnreadableImageError(f"{address}: {error}") from None
    if zlib.crc32(data) != line[f"{kind}_crc"]:
        raise UnreadableImageError(f"{address}: {kind} of {line['image_id']} differs from its CRC-32")
    return data


# Plots


@styled
def _findings_plot(audit: Audit) -> Figure:
    """Images with each finding, and their share of the labeled ones, by split."""
    table, names = _prevalence(audit), [name for name in audit.splits if name != UNLABELED]
    figure = Figure(figsize=(WIDE, 1.0 + 0.3 * len(table)), layout="constrained")
    counts, shares = figure.subplots(1, 2, sharey=True)
    position_F = np.arange(len(table))
    _stack(counts, position_F, {name: [row.present[name] for row in table] for name in names}, horizontal=True)
    shares.hlines(
        position_F,
        [min(row.percents(names), default=0) for row in table],
        [max(row.percents(names), default=0) for row in table],
        color=LINE,
        linewidth=1,
    )
    for marker, name in zip("osD^v" * len(names), names, strict=False):
        values = [math.nan if (share := row.share[name]) is None else share * 100 for row in table]
        shares.plot(values, position_F, marker, color=_color(name, names), label=name, markersize=5, clip_on=False)
    counts.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    counts.set_yticks(position_F, [row.finding for row in table])
    counts.invert_yaxis()
    counts.set_xlabel("images with the finding")
    shares.set_xlabel("% of the split's labeled images")
    shares.set_xlim(left=0)
    for axes in (counts, shares):
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
    figure.legend(*shares.get_legend_handles_labels(), loc="outside upper right", ncols=len(names))
    return figure


@styled
def _patients_plot(audit: Audit) -> Figure:
    """Images by sex, view and age band, splits stacked."""
    names = list(audit.splits)
    figure = Figure(figsize=(WIDE, 2.6), layout="constrained")
    panels = figure.subplots(1, 3, width_ratios=[1, 1, 3])
    tables = {"sex": audit.sex, "view": audit.view, "age in years": audit.age}
    for axes, (heading, table) in zip(panels, tables.items(), strict=True):
        positions = np.arange(len(table))
        _stack(axes, positions, {name: [row[name] for row in table.values()] for name in names}, horizontal=False)
        axes.set_xticks(positions, [value.replace("-", "–") for value in table], fontsize=8)
        axes.set_xlabel(heading)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.grid(axis="y")
        axes.set_axisbelow(True)
    panels[0].set_ylabel("images")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=len(names))
    return figure


@styled
def _mask_plot(masks: MaskStatistics) -> Figure:
    """Masks by the share of the image that they cover."""
    edges = [f"{edge * 100:g}" for edge in masks.area_edges]
    figure = Figure(figsize=(WIDE, 2.2), layout="constrained")
    axes = figure.subplots()
    positions = np.arange(len(masks.area_counts))
    bars = axes.bar(positions, masks.area_counts, color=BLUE, width=0.94)
    axes.bar_label(bars, labels=[html.thousands(n) if n else "" for n in masks.area_counts], padding=2)
    axes.set_xticks(positions, [f"{low}–{high}" for low, high in itertools.pairwise(edges)])
    axes.set_xlabel("% of the image inside the mask")
    axes.set_ylabel("masks")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.margins(y=0.15)
    return figure


def _stack(axes: Axes, positions: npt.NDArray[Any], counts: Mapping[str, Sequence[int]], *, horizontal: bool) -> None:
    """Stacked bars, one color per split."""
    base = np.zeros(len(positions))
    for name, values in counts.items():
        color = _color(name, list(counts))
        if horizontal:
            axes.barh(positions, values, left=base, color=color, label=name, height=0.7)
        else:
            axes.bar(positions, values, bottom=base, color=color, label=name, width=0.8)
        base += values


def _color(name: str, names: Sequence[str]) -> str:
    others = [other for other in names if other not in SPLIT_COLORS]
    return SPLIT_COLORS.get(name) or COLORS[others.index(name) % len(COLORS)]


# Numbers


@dataclass(frozen=True, slots=True)
class Prevalence:
    """How many images of each split have a finding."""

    finding: str
    present: Mapping[str, int]
    share: Mapping[str, float | None]
    """Of the images that are labeled for it; None without any."""

    def percents(self, splits: Iterable[str]) -> list[float]:
        """The shares that are known, in percent."""
        return [share * 100 for name in splits if (share := self.share[name]) is not None]


def _prevalence(audit: Audit) -> list[Prevalence]:
    rows = []
    for finding, by_split in audit.findings.items():
        shares: dict[str, float | None] = {}
        for name, images in by_split.items():
            labeled = images.present + images.absent
            shares[name] = images.present / labeled if labeled else None
        rows.append(Prevalence(finding, {name: images.present for name, images in by_split.items()}, shares))
    return rows
