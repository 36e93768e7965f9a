"""The worst and the best cases of a split, with their images: what a number hides is seen here."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cxrscale.evaluation import MaskRule, metrics
from cxrscale.inference import predictions
from cxrscale.io import encode_jpeg, load_image, resize_image
from cxrscale.loader import ShardReader
from cxrscale.reporting.overlay import outline
from cxrscale.shards import Manifest
from cxrscale.types import Scores, UnreadableImageError, UserError

EACH = 8
"""Images of each kind; there are three kinds."""
SIDE = 256
"""Their side in pixels on the page."""


@dataclass(frozen=True, slots=True)
class Case:
    """One image and why it is shown."""

    row: int
    """Of the scores."""
    title: str
    why: str


@dataclass(frozen=True, slots=True)
class ShownCase:
    """A case as the page has it."""

    case: Case
    image_id: str
    facts: str
    jpeg: str
    """Base64, SIDE x SIDE; empty where the image cannot be read."""
    side: int = 1
    """Of the grid that the outlines are counted in."""
    truth: str = ""
    """The true mask's outline as an SVG path; empty for none."""
    predicted: str = ""
    """The predicted mask's."""


def of_calls(scores: Scores, each: int = EACH) -> dict[str, list[Case]]:
    """Misses, alarms and hits: of each finding in turn the worst miss and alarm and the best hit, each image once.

    How bad a miss is, is the share of images without the finding that score higher (1 is the worst): unlike the
    score itself, it compares between common and rare findings. An alarm is measured by the images with it.
    """
    ranked: dict[str, list[tuple[float, int, Case]]] = {"misses": [], "alarms": [], "hits": []}
    for f, name in enumerate(scores.findings):
        score, label = scores.score_NF[:, f], scores.label_NF[:, f]
        with_it, without = np.flatnonzero(label == 1), np.flatnonzero(label == 0)
        if not len(with_it) or not len(without):
            continue
        above_P = 1 - np.searchsorted(np.sort(score[without]), score[with_it], side="right") / len(without)
        below_N = np.searchsorted(np.sort(score[with_it]), score[without], side="left") / len(with_it)
        title = name.replace("_", " ")
        worst, best = np.argsort(-above_P, kind="stable"), np.lexsort((-score[with_it], above_P))
        loud = np.lexsort((-score[without], -below_N))
        for kind, rows, share, order, text in (
            ("misses", with_it, above_P, worst, "{:.0%} of the images without it score higher"),
            ("alarms", without, below_N, loud, "{:.0%} of the images with it score lower"),
            ("hits", with_it, above_P, best, "{:.0%} of the images without it score higher"),
        ):
            for turn, place in enumerate(order[:each]):
                row, how = int(rows[place]), float(share[place])
                heading = title if kind != "alarms" else f"no {title}"
                case = Case(row, heading, f"scores {score[row]:.3f}; {text.format(how)}")
                ranked[kind].append((turn + (how if kind == "hits" else 1 - how), row, case))
    return {kind: _once(sorted(found, key=lambda entry: entry[:2]), each) for kind, found in ranked.items()}


def of_masks(scores: Scores, rule: MaskRule, each: int = EACH) -> dict[str, list[Case]]:
    """The masks of lowest and of highest Dice, and the largest masks where there should be none."""
    assert scores.maps is not None
    dice = metrics.map_dice(scores.maps, rule.top, rule.min_area, rule.bottom)
    positive = metrics.has_mask(scores.maps)
    above = scores.maps.all_NT[:, ::-1].cumsum(axis=1)[:, ::-1]
    bins, pixels = above.shape[1], int(above[0, 0])
    strong = above[:, metrics.bin_of(rule.top, bins)] >= max(1, rule.min_area)
    area = np.where(strong, above[:, metrics.bin_of(rule.bottom, bins)], 0) / pixels
    true = scores.maps.true_NT.sum(axis=1) / pixels
    name = scores.findings[0].replace("_", " ")

    def with_mask(row: int) -> Case:
        why = f"Dice {dice[row]:.3f}; mask {true[row]:.2%} of the image, predicted {area[row]:.2%}"
        return Case(row, name, why)

    with_it = np.flatnonzero(positive)
    order = with_it[np.lexsort((-true[with_it], dice[with_it]))].tolist()
    false = np.flatnonzero(~positive & (area > 0))
    largest = false[np.argsort(-area[false], kind="stable")].tolist()
    worst = order[: min(each, (len(order) + 1) // 2)]
    return {
        "worst": [with_mask(row) for row in worst],
        "false": [Case(row, f"no {name}", f"predicted {area[row]:.2%} of the image") for row in largest[:each]],
        "best": [with_mask(row) for row in reversed(order[len(worst) :][-each:])],
    }


def show_cases(
    run: str,
    scores: Scores,
    kinds: Mapping[str, Sequence[Case]],
    data: Manifest,
    rule: MaskRule | None = None,
) -> dict[str, list[ShownCase]]:
    """The cases with their images as stored; for segmentation scored once more, with the outlines of both masks."""
    row_of = {image: row for row, image in enumerate(data.image_id.tolist())}
    wanted = sorted({case.row for cases in kinds.values() for case in cases})
    place = {row: row_of[scores.image_id[row]] for row in wanted}
    outlines: dict[int, tuple[int, str, str]] = {}
    if rule is not None and wanted:
        for row, probability_HW, mask_HW in predictions.score_maps(run, data, sorted(place.values())):
            predicted = predictions.apply_mask_rule(probability_HW, rule)
            outlines[row] = len(mask_HW), outline(mask_HW), outline(predicted)
    source = ShardReader(data)
    return {
        kind: [
            ShownCase(
                case,
                str(scores.image_id[case.row]),
                _facts(data, place[case.row], scores.findings),
                _jpeg(source, place[case.row]),
                *outlines.get(place[case.row], ()),
            )
            for case in cases
        ]
        for kind, cases in kinds.items()
    }


def _once(ranked: Iterable[tuple[float, int, Case]], each: int) -> list[Case]:
    found: dict[int, Case] = {}
    for _, row, case in ranked:
        found.setdefault(row, case)
    return list(found.values())[:each]


def _facts(data: Manifest, row: int, findings: Sequence[str]) -> str:
    line: dict[str, Any] = {name: data.table[name][row].as_py() for name in ("sex", "age", "view")}
    parts = [line["sex"], None if line["age"] is None else f"{line['age']} years", line["view"]]
    label_F = data.labels(findings)[row]
    present = [name.replace("_", " ") for name, label in zip(findings, label_F, strict=True) if label == 1]
    if len(findings) > 1:
        parts.append("has " + ", ".join(present) if present else "has none of the findings")
    return ", ".join(part for part in parts if part)


def _jpeg(source: ShardReader, row: int) -> str:
    encoded = source.read(np.array([row]), masks=False)
    if not encoded.ok_B[0]:
        return ""
    try:
        gray = load_image(encoded.images[0].tobytes()).image_HW
    except (UnreadableImageError, UserError):
        return ""
    return base64.b64encode(encode_jpeg(resize_image(gray, SIDE), 82)).decode()
