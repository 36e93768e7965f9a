"""The page of maps that were scored against boxes: tables beside the baselines, hits and misses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from cxrscale.evaluation import (
    BASELINES,
    Baseline,
    BoxedFinding,
    Detection,
    ExplainReport,
    Localization,
    localization,
)
from cxrscale.io import load_image, seal, storage
from cxrscale.loader import ShardReader
from cxrscale.reporting import html, published
from cxrscale.reporting.overlay import Thumbnail, box_path, thumbnail, with_heat
from cxrscale.shards import Manifest
from cxrscale.types import UnreadableImageError, UserError

TEMPLATE = "explain.html.jinja"
SIDE = 256
"""Height and width of an image on the page in pixels, at most."""
SHOWN = 4
"""Hits, and misses, of each finding."""
LINES = 1000
"""Units per side that boxes are drawn in."""
BASELINE_WORDS: Mapping[Baseline, str] = {
    "whole": "whole image, random point",
    "center": "center box",
    "median": "median box of the others",
    "peak": "peak of the others' boxes",
}


@dataclass(frozen=True, slots=True)
class Example:
    """One finding of one image, with its map."""

    row: int
    """Of the manifest."""
    boxed: BoxedFinding
    map_hw: npt.NDArray[np.float32]
    detection: Detection
    probability: float
    """Of the finding."""

    @property
    def hit(self) -> bool:
        """Whether the map is highest in a box."""
        return bool(localization.judge([self.detection], [self.boxed]).part_NM[0, 0])

    @property
    def iou(self) -> float:
        """Of the best pair of a detected and a true box."""
        iou_DK, _ = localization.overlaps(self.detection.box_D4, self.boxed.truth_K4)
        return float(iou_DK.max(initial=0.0))


@dataclass(frozen=True, slots=True)
class ShownExample:
    """An example as the page shows it."""

    image_id: str
    reason: str
    thumbnail: Thumbnail


def write(address: str, report: ExplainReport, examples: Sequence[Example], data: Manifest) -> None:
    """Write the page.

    Args:
        examples: every boxed finding that was scored.
        data: the datasets that they are of.
    """
    storage.write(address, seal.closed_text(render(report, show(examples, data, list(report.findings))), "<!-- {} -->"))


def render(report: ExplainReport, shown: Mapping[str, Mapping[str, Sequence[ShownExample]]]) -> str:
    """The page, the same for the same report and examples.

    Args:
        shown: finding -> hits or misses -> examples.
    """
    wang = published.WANG_LOCALIZATION
    known = [name for name in report.findings if name in wang.accuracy["0.1"]]
    same = abs(report.boxes - wang.boxes) <= published.MISSING_SHARE * wang.boxes and len(known) == len(report.findings)
    return html.render(
        TEMPLATE,
        name=report.run.rstrip("/").rsplit("/", 1)[-1],
        report=report,
        shown=shown,
        baselines=BASELINE_WORDS,
        best={name: best_baseline(row) for name, row in (*report.findings.items(), ("", report.mean))},
        wang=wang,
        known=known,
        same=same,
        iobb_above=[str(t) for t in localization.IOBB_ABOVE],
        iou_above=[str(t) for t in localization.IOU_ABOVE],
        wang_mean=_mean_of_wang(report) if known and len(known) == len(report.findings) else {},
    )


def best_baseline(row: Localization) -> Baseline:
    """The baseline that the map has most trouble with: of the highest pointing game."""
    return max(BASELINES, key=lambda name: np.nan_to_num(row.baselines[name].pointing.value, nan=-1.0))


def _mean_of_wang(report: ExplainReport) -> dict[str, float]:
    accuracy = published.WANG_LOCALIZATION.accuracy
    return {t: float(np.mean([row[name] for name in report.findings])) for t, row in accuracy.items()}


def show(
    examples: Sequence[Example], data: Manifest, findings: Sequence[str]
) -> dict[str, dict[str, list[ShownExample]]]:
    """Of each finding the hits with the best boxes, and the misses with the highest probabilities."""
    reader, result = ShardReader(data), dict[str, dict[str, list[ShownExample]]]()
    for finding in findings:
        own = [example for example in examples if example.boxed.finding == finding]
        hits = sorted((one for one in own if one.hit), key=lambda one: (-one.iou, one.row))[:SHOWN]
        misses = sorted((one for one in own if not one.hit), key=lambda one: (-one.probability, one.row))[:SHOWN]
        result[finding] = {
            "hits": [_shown(one, reader, data) for one in hits],
            "misses": [_shown(one, reader, data) for one in misses],
        }
    return result


def _shown(example: Example, reader: ShardReader, data: Manifest) -> ShownExample:
    words = "highest in a box" if example.hit else "highest outside of the boxes"
    reason = f"scores {example.probability:.3f}; {words}; best IoU {example.iou:.2f}"
    return ShownExample(str(data.image_id[example.row]), reason, _thumbnail(example, reader))


def _thumbnail(example: Example, reader: ShardReader) -> Thumbnail:
    encoded = reader.read(np.array([example.row]), masks=False)
    if not encoded.valid_B[0]:
        return Thumbnail()
    try:
        image_HW = load_image(encoded.images[0].tobytes()).image_HW
    except (UnreadableImageError, UserError):
        return Thumbnail()
    boxes = {"truth": example.boxed.truth_K4, "predicted": example.detection.box_D4}
    outlines = {kind: box_path(box_D4, LINES) for kind, box_D4 in boxes.items() if len(box_D4)}
    shown = with_heat(thumbnail(image_HW, SIDE), image_HW, SIDE, example.map_hw)
    return replace(shown, width=LINES, height=LINES, outlines=outlines)
