"""The worst and the best cases of a split, with their images: they show what a metric hides."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cxrscale.evaluation import MaskRule, metrics
from cxrscale.inference import apply_mask_rule, maps_of_rows, split_scores
from cxrscale.io import load_image, resize_mask
from cxrscale.loader import ShardReader
from cxrscale.reporting import html
from cxrscale.reporting.overlay import Thumbnail, thumbnail, with_heat
from cxrscale.shards import Manifest
from cxrscale.types import Scores, UnreadableImageError, UserError

CASES_PER_KIND = 8
"""Images of each kind; there are three kinds."""
SIDE = 256
"""Their height and width in pixels on the page, at most."""
HEADINGS = {
    "false_negatives": "Worst false negatives",
    "false_positives": "Highest-scoring false positives",
    "true_positives": "Clearest true positives",
    "lowest_dice": "Masks with the lowest Dice",
    "false_masks": "Largest masks where there is none",
    "highest_dice": "Masks with the highest Dice",
}
"""Kind of case -> its heading on the page."""


@dataclass(frozen=True, slots=True)
class Case:
    """One image and the reason why it is shown."""

    row: int
    """Of the scores."""
    title: str
    reason: str
    finding: str = ""
    """Whose map is shown over it; empty: none."""


@dataclass(frozen=True, slots=True)
class ShownCase:
    """A case as the page shows it."""

    case: Case
    image_id: str
    caption: str
    """Facts of the patient and image."""
    thumbnail: Thumbnail
    """With the outlines `truth` and `predicted` of the masks in segmentation."""


def classification_cases(scores: Scores, count: int = CASES_PER_KIND) -> dict[str, list[Case]]:
    """False negatives, false positives and true positives: of each finding in turn the most extreme, each image once.

    A false negative is ranked by the share of images without the finding that score higher (1 is the worst): unlike the
    score itself, this compares common with rare findings. A false positive is ranked by the images with the finding.
    """
    ranked: dict[str, list[tuple[float, int, Case]]] = {
        "false_negatives": [],
        "false_positives": [],
        "true_positives": [],
    }
    for f, name in enumerate(scores.findings):
        score_N, label_N = scores.logit_NF[:, f], scores.label_NF[:, f]
        probability_N = scores.probability_NF[:, f]
        positives, negatives = np.flatnonzero(label_N == 1), np.flatnonzero(label_N == 0)
        if not len(positives) or not len(negatives):
            continue
        score_P, score_M = score_N[positives], score_N[negatives]
        above_P = 1 - np.searchsorted(np.sort(score_M), score_P, side="right") / len(negatives)
        below_M = np.searchsorted(np.sort(score_P), score_M, side="left") / len(positives)
        worst, best = np.argsort(-above_P, kind="stable"), np.lexsort((-score_P, above_P))
        highest = np.lexsort((-score_M, -below_M))
        higher, lower = "{:.0%} of the images without it score higher", "{:.0%} of the images with it score lower"
        for kind, rows, share, order, text in (
            ("false_negatives", positives, above_P, worst, higher),
            ("false_positives", negatives, below_M, highest, lower),
            ("true_positives", positives, above_P, best, higher),
        ):
            for rank, index in enumerate(order[:count]):
                row, extent = int(rows[index]), float(share[index])
                title = html.plain(name) if kind != "false_positives" else f"no {html.plain(name)}"
                case = Case(row, title, f"scores {probability_N[row]:.3f}; {text.format(extent)}", name)
                ranked[kind].append((rank + (extent if kind == "true_positives" else 1 - extent), row, case))
    return {kind: _unique(sorted(cases, key=lambda entry: entry[:2]), count) for kind, cases in ranked.items()}


def segmentation_cases(scores: Scores, rule: MaskRule, count: int = CASES_PER_KIND) -> dict[str, list[Case]]:
    """The masks with the lowest and the highest Dice, and the largest masks where there should be none."""
    assert scores.maps is not None
    dice_N = metrics.map_dice(scores.maps, rule.top, rule.min_area, rule.bottom)
    positive_N = metrics.has_mask(scores.maps)
    above_NT = scores.maps.all_NT[:, ::-1].cumsum(axis=1)[:, ::-1]
    bins, pixels_N = above_NT.shape[1], above_NT[:, 0]
    has_mask_N = above_NT[:, metrics.bin_of(rule.top, bins)] >= max(1, rule.min_area)
    area_N = np.where(has_mask_N, above_NT[:, metrics.bin_of(rule.bottom, bins)], 0) / pixels_N
    true_N = scores.maps.true_NT.sum(axis=1) / pixels_N
    name = html.plain(scores.findings[0])

    def with_mask(row: int) -> Case:
        reason = f"Dice {dice_N[row]:.3f}; mask {true_N[row]:.2%} of the image, predicted {area_N[row]:.2%}"
        return Case(row, name, reason)

    positives = np.flatnonzero(positive_N)
    order = positives[np.lexsort((-true_N[positives], dice_N[positives]))].tolist()
    false = np.flatnonzero(~positive_N & (area_N > 0))
    largest = false[np.argsort(-area_N[false], kind="stable")].tolist()
    lowest = order[: min(count, (len(order) + 1) // 2)]

    def false_mask(row: int) -> Case:
        return Case(row, f"no {name}", f"predicted {area_N[row]:.2%} of the image")

    return {
        "lowest_dice": [with_mask(row) for row in lowest],
        "false_masks": [false_mask(row) for row in largest[:count]],
        "highest_dice": [with_mask(row) for row in reversed(order[len(lowest) :][-count:])],
    }


def show_cases(
    run: str,
    scores: Scores,
    kinds: Mapping[str, Sequence[Case]],
    data: Manifest,
    rule: MaskRule | None = None,
) -> dict[str, list[ShownCase]]:
    """The cases with their stored images, scored once more: with the map of the finding where the model has one,
    for segmentation with the outlines of both masks."""
    row_of = {image_id: row for row, image_id in enumerate(data.image_id.tolist())}
    wanted = sorted({case.row for cases in kinds.values() for case in cases})
    manifest_row = {row: row_of[scores.image_id[row]] for row in wanted}
    masks: dict[int, dict[str, npt.NDArray[np.bool_]]] = {}
    if rule is not None and wanted:
        for row, score_HW, mask_HW in split_scores.score_maps(run, data, sorted(manifest_row.values())):
            shape = data.table["height"][row].as_py(), data.table["width"][row].as_py()
            predicted_HW = resize_mask(apply_mask_rule(score_HW, rule, shape), len(score_HW))
            masks[row] = {"truth": mask_HW, "predicted": predicted_HW}
    reader = ShardReader(data)
    maps = maps_of_rows(run, data, sorted(manifest_row.values())) if rule is None and wanted else {}

    def show(case: Case) -> ShownCase:
        row = manifest_row[case.row]
        shown = _thumbnail(reader, row, masks.get(row, {}), maps.get(row, {}).get(case.finding))
        return ShownCase(case, str(scores.image_id[case.row]), _caption(data, row, scores.findings), shown)

    return {kind: [show(case) for case in cases] for kind, cases in kinds.items()}


def _unique(ranked: Iterable[tuple[float, int, Case]], count: int) -> list[Case]:
    """The first cases, each image once."""
    cases: dict[int, Case] = {}
    for _, row, case in ranked:
        cases.setdefault(row, case)
    return list(cases.values())[:count]


def _caption(data: Manifest, row: int, findings: Sequence[str]) -> str:
    line: dict[str, Any] = {name: data.table[name][row].as_py() for name in ("sex", "age", "view")}
    parts = [line["sex"], None if line["age"] is None else f"{line['age']} years", line["view"]]
    label_F = data.labels(findings)[row]
    present = [html.plain(name) for name, label in zip(findings, label_F, strict=True) if label == 1]
    if len(findings) > 1:
        parts.append("has " + ", ".join(present) if present else "has none of the findings")
    return ", ".join(part for part in parts if part)


def _thumbnail(
    reader: ShardReader,
    row: int,
    masks: Mapping[str, npt.NDArray[np.bool_]],
    map_hw: npt.NDArray[np.float32] | None,
) -> Thumbnail:
    """The stored image; an empty thumbnail where it cannot be read."""
    encoded = reader.read(np.array([row]), masks=False)
    if not encoded.valid_B[0]:
        return Thumbnail()
    try:
        image_HW = load_image(encoded.images[0].tobytes()).image_HW
    except (UnreadableImageError, UserError):
        return Thumbnail()
    shown = thumbnail(image_HW, SIDE, masks)
    return shown if map_hw is None else with_heat(shown, image_HW, SIDE, map_hw)
