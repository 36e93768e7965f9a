"""The audit as a page: one HTML file with its plots and images inside, for screen and paper, light and dark."""

from __future__ import annotations

import base64
import itertools
import json
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import cv2
import fsspec
import jinja2
import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cxrscale import __version__
from cxrscale.config import ABSENT, NO_FINDING, PRESENT, has_no_finding
from cxrscale.io import decode_mask, encode_jpeg, load_image, resize_image, storage
from cxrscale.reporting.style import COLORS, LINE, SPLIT_COLORS, STYLE, svg
from cxrscale.shards import UNLABELED, JoinedDatasets, Manifest, leakage, manifest, splits, stored_pixels
from cxrscale.types import UnreadableImageError, UserError

TEMPLATE = "audit.html.jinja"
EXAMPLES = 16
"""Images on the contact sheet."""
SIDE = 192
"""Their side in pixels."""
LISTED = 50
"""Lines of a table on the page; the JSON has them all."""


@dataclass(frozen=True, slots=True)
class Example:
    """An image of the contact sheet."""

    image_id: str
    title: str
    """Its findings."""
    caption: str
    jpeg: str
    """Base64, SIDE x SIDE; empty where the image could not be read."""
    outline: str
    """The mask's border as an SVG path in pixels of the stored image; empty where there is none."""
    stored: tuple[int, int]
    """(width, height) of the stored image in pixels."""


def write(found: dict[str, Any], roots: Sequence[str], out_html: str) -> str:
    """Write the page with its plots and example images, and the JSON beside it.

    Args:
        found: what `audit.audit(*roots)` returned.
        roots: the same datasets; example images are read from their tars.
        out_html: path or address of the page; its suffix may be left out, or be .json.

    Returns:
        The page's path or address.

    Raises:
        UserError: the files cannot be written.
    """
    stem = out_html.removesuffix(".html").removesuffix(".json")
    page = render(found, roots)
    storage.write(f"{stem}.json", json.dumps(found, indent=2, allow_nan=False) + "\n")
    storage.write(f"{stem}.html", page)
    return f"{stem}.html"


def render(found: Mapping[str, Any], roots: Sequence[str]) -> str:
    """The page of an audit, the same for the same shards.

    Args:
        found: what `audit.audit(*roots)` returned.
        roots: the datasets, from whose tars the example images are read.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"thousands": _thousands, "share": _share, "code": _code}
    template = environment.from_string(
        resources.files("cxrscale.reporting").joinpath("templates").joinpath(TEMPLATE).read_text("utf-8")
    )
    table = _prevalence(found)
    with mpl.rc_context(STYLE):
        plots = {
            "findings": _findings_plot(found) if found["findings"] else "",
            "people": _people_plot(found),
            "masks": _mask_plot(found["masks"]) if found["masks"]["with_pixels"] else "",
        }
    return template.render(
        found=found,
        plots=plots,
        prevalence=table,
        shown=[name for name in found["splits"] if any(row["share"][name] is not None for row in table)],
        examples=examples(leakage.join_datasets(*roots)),
        listed=LISTED,
        version=__version__,
    )


# Example images


def examples(sets: JoinedDatasets) -> list[Example]:
    """The contact sheet: each finding in turn gives the next image that shows it."""
    area_N = sets.data.column("mask_pixels").astype(float) / stored_pixels(sets)
    return [_example(sets.data, row, float(area_N[row])) for row in chosen(sets.data)]


def chosen(data: Manifest, count: int = EXAMPLES) -> list[int]:
    """Rows for the contact sheet, by the images' numbers alone: up to a quarter with masks, then findings in turn.

    Training images come before others, since the test split is better not looked at. Each person is shown once.
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
        rows.setdefault(data.patient[row], row)  # one image a person
    return list(rows.values())[:count]


def _example(data: Manifest, row: int, area: float) -> Example:
    line = {name: data.table[name][row].as_py() for name in data.table.column_names}
    states = {name: line[manifest.LABEL + name] for name in data.findings()}
    present = [name for name, state in states.items() if state == PRESENT]
    absent = [name for name, state in states.items() if state == ABSENT]
    # NIH's name says that a whole vocabulary was looked for; an archive of one or two findings did not.
    healthy = NO_FINDING if len(absent) == len(states) > 3 else "no " + ", ".join(absent[:3])
    facts = [line["split"], line["sex"], line["age"] and f"{line['age']} years", line["view"]]
    if area > 0:
        facts.append(f"mask {_share(area)}")
    jpeg, outline, stored = "", "", (SIDE, SIDE)
    try:
        gray = load_image(_member(line, "image")).image_HW
        stored = (gray.shape[1], gray.shape[0])
        if line["mask_offset"] is not None:
            outline = _outline(decode_mask(_member(line, "mask")))
        jpeg = base64.b64encode(encode_jpeg(resize_image(gray, SIDE), 85)).decode()
    except (UnreadableImageError, UserError):
        facts.append("cannot be read: run `cxrscale verify`")
    title = ", ".join(present) or (healthy if absent else "unlabelled")
    return Example(line["image_id"], title, ", ".join(str(fact) for fact in facts if fact), jpeg, outline, stored)


def _member(line: Mapping[str, Any], kind: str) -> bytes:
    """A member's bytes, read from its place in the tar.

    Raises:
        UnreadableImageError: the tar is not there, or holds other bytes there than were packed.
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


def _outline(mask_HW: npt.NDArray[np.bool_]) -> str:
    contours, _ = cv2.findContours(mask_HW.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_TC89_L1)
    # A pixel's center lies half a pixel from its corner, from which SVG counts.
    return " ".join("M" + " ".join(f"{x + 0.5:g},{y + 0.5:g}" for (x, y) in c[:, 0].tolist()) + "Z" for c in contours)


# Plots


def _findings_plot(found: Mapping[str, Any]) -> Markup:
    """Images with each finding, and their share of the labeled ones, by split."""
    table, names = _prevalence(found), [name for name in found["splits"] if name != UNLABELED]
    figure = Figure(figsize=(9, 1.0 + 0.3 * len(table)), layout="constrained")
    counts, shares = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(table))
    _stack(counts, places, {name: [row["present"][name] for row in table] for name in names}, across=True)
    shares.hlines(
        places,
        [min(_known(row, names), default=0) for row in table],
        [max(_known(row, names), default=0) for row in table],
        color=LINE,
        linewidth=1,
    )
    for marker, name in zip("osD^v" * len(names), names, strict=False):
        values = [np.nan if row["share"][name] is None else row["share"][name] * 100 for row in table]
        shares.plot(values, places, marker, color=_color(name, names), label=name, markersize=5, clip_on=False)
    counts.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    counts.set_yticks(places, [row["finding"] for row in table])
    counts.invert_yaxis()
    counts.set_xlabel("images with the finding")
    shares.set_xlabel("% of the split's labeled images")
    shares.set_xlim(left=0)
    for axes in (counts, shares):
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
    figure.legend(*shares.get_legend_handles_labels(), loc="outside upper right", ncols=len(names))
    return svg(figure, "Images with each finding by split, and their share of the labeled images")


def _people_plot(found: Mapping[str, Any]) -> Markup:
    """Images by sex, view and age band, splits stacked."""
    names = list(found["splits"])
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    panels = figure.subplots(1, 3, width_ratios=[1, 1, 3])
    for axes, key, heading in zip(panels, ("sex", "view", "age"), ("sex", "view", "age in years"), strict=True):
        table = found[key]
        places = np.arange(len(table))
        _stack(axes, places, {name: [row[name] for row in table.values()] for name in names}, across=False)
        axes.set_xticks(places, [value.replace("-", "–") for value in table], fontsize=8)
        axes.set_xlabel(heading)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.grid(axis="y")
        axes.set_axisbelow(True)
    panels[0].set_ylabel("images")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=len(names))
    return svg(figure, "Images by sex, view and age, splits stacked")


def _mask_plot(masks: Mapping[str, Any]) -> Markup:
    """Masks by the share of the image that they cover."""
    edges = [f"{edge * 100:g}" for edge in masks["area_edges"]]
    figure = Figure(figsize=(9, 2.2), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(masks["area_counts"]))
    bars = axes.bar(places, masks["area_counts"], color=SPLIT_COLORS[splits.TRAIN], width=0.94)
    axes.bar_label(bars, labels=[_thousands(n) if n else "" for n in masks["area_counts"]], padding=2)
    axes.set_xticks(places, [f"{low}–{high}" for low, high in itertools.pairwise(edges)])
    axes.set_xlabel("% of the image inside the mask")
    axes.set_ylabel("masks")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.margins(y=0.15)
    return svg(figure, "Masks by the share of the image that they cover")


def _stack(axes: Axes, places: npt.NDArray[Any], parts: Mapping[str, Sequence[int]], *, across: bool) -> None:
    """Stacked bars, one color a split."""
    base = np.zeros(len(places))
    for name, counts in parts.items():
        color = _color(name, list(parts))
        if across:
            axes.barh(places, counts, left=base, color=color, label=name, height=0.7)
        else:
            axes.bar(places, counts, bottom=base, color=color, label=name, width=0.8)
        base += counts


def _color(name: str, names: Sequence[str]) -> str:
    others = [other for other in names if other not in SPLIT_COLORS]
    return SPLIT_COLORS.get(name) or COLORS[others.index(name) % len(COLORS)]


# Numbers


def _prevalence(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A line a finding: images with it, and their share of the labeled ones (None where there are none)."""
    rows = []
    for finding, states in found["findings"].items():
        shares = {}
        for name, state in states.items():
            labeled = state["present"] + state["absent"]
            shares[name] = state["present"] / labeled if labeled else None
        rows.append({"finding": finding, "present": {n: s["present"] for n, s in states.items()}, "share": shares})
    return rows


def _known(row: Mapping[str, Any], names: Iterable[str]) -> list[float]:
    return [row["share"][name] * 100 for name in names if row["share"][name] is not None]


def _thousands(count: int) -> str:
    return f"{count:,}"


def _code(text: str) -> Markup:
    """The text with what stands between `backticks` set as code."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def _share(value: float | None) -> str:
    """A share as a percentage of two digits, or a dash."""
    return "–" if value is None else f"{value * 100:.2g}%" if value < 0.1 else f"{value * 100:.0f}%"
