"""How well maps find what radiologists boxed, and how well one finds it without looking at the image.

Boxes are (left, top, right, bottom) as shares of the image's width and height, so that images of any size go together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from cxrscale.evaluation.localization_models import BASELINES, Baseline, Localization, LocalizationScores
from cxrscale.evaluation.metrics import BootstrapWeights, Estimate, Floats, divide, interval, undefined, weighted_sums
from cxrscale.types import Box

IOBB_ABOVE = (0.1, 0.25, 0.5, 0.75, 0.9)
"""T of the intersection over the detected box, as in table 4 of Wang et al. 2017."""
IOU_ABOVE = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
"""T of the intersection over union, as in their supplement."""
LEVELS = (60.0, 180.0)
"""At which Wang et al. threshold a map that is scaled to 0..255."""
GRID = 256
"""Maps are enlarged to (GRID, GRID) before anything is read from them."""
PRIOR_GRID = 64
"""Cells per side of the map that adds up other images' boxes."""
MEASURES = (
    "pointing",
    *(f"iobb {t}" for t in IOBB_ABOVE),
    *(f"iou {t}" for t in IOU_ABOVE),
    *(f"false iobb {t}" for t in IOBB_ABOVE),
    *(f"false iou {t}" for t in IOU_ABOVE),
)
"""Names of the M measures of a detection: the columns of `Counts`."""


@dataclass(frozen=True, slots=True)
class BoxedFinding:
    """One finding of one image, with its boxes."""

    finding: str
    patient: str
    truth_K4: Floats
    """K >= 1 boxes."""


@dataclass(frozen=True, slots=True)
class Detection:
    """What is pointed at: by a map, or without looking."""

    box_D4: Floats
    point: tuple[float, float] | None
    """(x, y); None points nowhere, which is a miss."""
    hit: float | None = None
    """Instead of a point: the probability of hitting."""


NOTHING = Detection(np.zeros((0, 4)), None)


@dataclass(frozen=True, slots=True)
class Counts:
    """Numerators and denominators per image: a measure is the sum of the one over the sum of the other."""

    part_NM: Floats
    total_NM: Floats
    """0 where a measure is undefined, such as a baseline of others' boxes where there are no others."""


def shares(boxes: Sequence[Box], width: int, height: int) -> Floats:
    """(K, 4) boxes of an image of that size, cut to it; those without area are left out."""
    rows = [(box.x, box.y, box.x + box.width, box.y + box.height) for box in boxes]
    box_K4 = np.array(rows, dtype=np.float64).reshape(-1, 4) / (width, height, width, height)
    box_K4 = np.clip(box_K4, 0.0, 1.0)
    return np.asarray(box_K4[(box_K4[:, 2] > box_K4[:, 0]) & (box_K4[:, 3] > box_K4[:, 1])], dtype=np.float64)


def overlaps(box_D4: Floats, truth_K4: Floats) -> tuple[Floats, Floats]:
    """((D, K) intersection over union, (D, K) intersection over the detected box) of boxes with area."""
    low_DK2 = np.maximum(box_D4[:, None, :2], truth_K4[None, :, :2])
    high_DK2 = np.minimum(box_D4[:, None, 2:], truth_K4[None, :, 2:])
    common_DK = np.clip(high_DK2 - low_DK2, 0, None).prod(axis=2)
    own_D, true_K = (np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) for boxes in (box_D4, truth_K4))
    return divide(common_DK, own_D[:, None] + true_K[None] - common_DK), divide(common_DK, own_D[:, None])


def detect(map_hw: npt.NDArray[np.floating]) -> Detection:
    """What a map over the whole image points at: its highest place, and boxes as Wang et al. 2017 (arXiv 1705.02315,
    section 4.1) draw them.

    They scale a map to 0..255, threshold it at 60 and at 180, each by itself, and put a box around every isolated
    region. The map is enlarged to (GRID, GRID) first, since boxes of whole cells of a small map are far too large.
    Of equally high places the one nearest to their centroid counts. A map without any contrast points nowhere.
    """
    map_HW = cv2.resize(np.asarray(map_hw, np.float32), (GRID, GRID), interpolation=cv2.INTER_LINEAR)
    low, high = float(map_HW.min()), float(map_HW.max())
    if not np.isfinite(high - low) or high <= low:
        return NOTHING
    scaled_HW = (map_HW - low) * (255 / (high - low))
    boxes = []
    for level in LEVELS:
        _, _, stats, _ = cv2.connectedComponentsWithStats((scaled_HW > level).astype(np.uint8), connectivity=8)
        x, y, width, height = stats[1:, :4].T
        boxes.append(np.stack([x, y, x + width, y + height], axis=1) / GRID)
    row, column = _middle(map_HW == map_HW.max())
    return Detection(np.concatenate(boxes), ((column + 0.5) / GRID, (row + 0.5) / GRID))


def reduced(map_hw: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """A map that is larger than (GRID, GRID) at that size."""
    if max(map_hw.shape) <= GRID:
        return map_hw
    return np.asarray(cv2.resize(map_hw, (GRID, GRID), interpolation=cv2.INTER_AREA), dtype=np.float32)


def judge(detections: Sequence[Detection | None], boxed: Sequence[BoxedFinding]) -> Counts:
    """The measures of one detection per boxed finding; None is undefined.

    Pointing game (Zhang et al. 2016, arXiv 1608.00507, without their tolerance): whether the point is in a true box. A
    true box is found above T if the IoBB (IoU) of any detected box with it is above T. A detected box that is not above
    T with any true box is a false positive; these are counted per image that has a box of the finding.
    """
    part_NM, total_NM = np.zeros((2, len(boxed), len(MEASURES)))
    for part_M, total_M, detection, one in zip(part_NM, total_NM, detections, boxed, strict=True):
        if detection is None:
            continue
        iou_DK, iobb_DK = overlaps(detection.box_D4, one.truth_K4)
        above = [(iobb_DK > t) for t in IOBB_ABOVE] + [(iou_DK > t) for t in IOU_ABOVE]
        found = [float(above_DK.any(axis=0).sum()) for above_DK in above]
        false = [float((~above_DK.any(axis=1)).sum()) for above_DK in above]
        part_M[:] = [_pointing(detection, one.truth_K4), *found, *false]
        total_M[:] = [1.0, *[float(len(one.truth_K4))] * len(above), *[1.0] * len(above)]
    return Counts(part_NM, total_NM)


def _pointing(detection: Detection, truth_K4: Floats) -> float:
    if detection.hit is not None:
        return detection.hit
    if detection.point is None:
        return 0.0
    x, y = detection.point
    left_K, top_K, right_K, bottom_K = truth_K4.T
    return float(((left_K <= x) & (x <= right_K) & (top_K <= y) & (y <= bottom_K)).any())


# Without looking at the image


def baseline(name: Baseline, truths: Sequence[Floats]) -> list[Detection | None]:
    """What one would say of each image without seeing it.

    whole: the whole image, and a random point. center: the box in the middle with half the width and height, and its
    center. median: the median (left, top, width, height) of the other images' boxes. peak: a box of the median size of
    the others around the place that most of the others' boxes cover; of equally covered cells the middle
    of their largest region. The centroid of all may lie between two regions, as of a finding on either side.

    Args:
        truths: the (K, 4) boxes of each image that has a box of the finding.
    """
    if name == "whole":
        return [Detection(np.array([[0.0, 0.0, 1.0, 1.0]]), None, covered(truth_K4)) for truth_K4 in truths]
    if name == "center":
        return [Detection(np.array([[0.25, 0.25, 0.75, 0.75]]), (0.5, 0.5)) for _ in truths]
    image_B = np.repeat(np.arange(len(truths)), [len(truth_K4) for truth_K4 in truths])
    all_B4 = np.concatenate(truths) if truths else np.zeros((0, 4))
    extent_B4 = np.concatenate([all_B4[:, :2], all_B4[:, 2:] - all_B4[:, :2]], axis=1)
    covered_NGG = [_cells(truth_K4) for truth_K4 in truths]
    total_GG = np.sum(covered_NGG, axis=0, dtype=np.int64)
    result: list[Detection | None] = []
    for n, own_GG in enumerate(covered_NGG):
        others_B4 = extent_B4[image_B != n]
        if not len(others_B4):
            result.append(None)
            continue
        left, top, width, height = np.median(others_B4, axis=0).tolist()
        x, y = left + width / 2, top + height / 2
        if name == "peak":
            x, y = _peak(total_GG - own_GG)
        box_14 = np.array([[x - width / 2, y - height / 2, x + width / 2, y + height / 2]])
        result.append(Detection(box_14, (x, y)))
    return result


def covered(truth_K4: Floats) -> float:
    """The share of the image that lies in any of its boxes: what a random point hits."""
    x_, y_ = (np.unique(truth_K4[:, [axis, axis + 2]]) for axis in (0, 1))
    middle_x, middle_y = ((edges[1:] + edges[:-1]) / 2 for edges in (x_, y_))
    inside = (
        (truth_K4[:, 0, None, None] < middle_x[None, None])
        & (middle_x[None, None] < truth_K4[:, 2, None, None])
        & (truth_K4[:, 1, None, None] < middle_y[None, :, None])
        & (middle_y[None, :, None] < truth_K4[:, 3, None, None])
    ).any(axis=0)
    return float((inside * np.outer(np.diff(y_), np.diff(x_))).sum())


def _cells(truth_K4: Floats) -> npt.NDArray[np.bool_]:
    """(G, G) the cells that any of the boxes touches."""
    cells_GG = np.zeros((PRIOR_GRID, PRIOR_GRID), dtype=bool)
    low_K2 = np.floor(truth_K4[:, :2] * PRIOR_GRID).astype(int)
    high_K2 = np.ceil(truth_K4[:, 2:] * PRIOR_GRID).astype(int)
    for (left, top), (right, bottom) in zip(low_K2.tolist(), high_K2.tolist(), strict=True):
        cells_GG[top:bottom, left:right] = True
    return cells_GG


def _peak(count_GG: npt.NDArray[np.int64]) -> tuple[float, float]:
    _, region_GG, stats, _ = cv2.connectedComponentsWithStats((count_GG == count_GG.max()).astype(np.uint8))
    row, column = _middle(region_GG == 1 + stats[1:, cv2.CC_STAT_AREA].argmax())
    return (column + 0.5) / PRIOR_GRID, (row + 0.5) / PRIOR_GRID


def _middle(chosen_HW: npt.NDArray[np.bool_]) -> tuple[int, int]:
    """(row, column) of the chosen place that is nearest to the centroid of all."""
    place_T2 = np.argwhere(chosen_HW)
    row, column = place_T2[np.square(place_T2 - place_T2.mean(axis=0)).sum(axis=1).argmin()].tolist()
    return row, column


# With intervals over patients


def score(
    detections: Sequence[Detection], boxed: Sequence[BoxedFinding], weights_RN: BootstrapWeights
) -> tuple[dict[str, Localization], Localization | None]:
    """Maps beside every baseline, by finding and as the mean over the findings.

    Args:
        detections: of the maps, one per boxed finding.
        boxed: every finding of every image that has a box.
        weights_RN: (R, N) bootstrap weights of the N boxed findings: patients are resampled.

    Returns:
        (finding -> localization, the mean over findings; None without any).
    """
    findings = list(dict.fromkeys(one.finding for one in boxed))
    values: dict[str, dict[str, tuple[Floats, Floats]]] = {}
    result = {}
    for finding in findings:
        rows = [n for n, one in enumerate(boxed) if one.finding == finding]
        own = [boxed[n] for n in rows]
        truths = [one.truth_K4 for one in own]
        by_name: dict[str, Sequence[Detection | None]] = {"map": [detections[n] for n in rows]}
        by_name |= {name: baseline(name, truths) for name in BASELINES}
        values[finding] = {name: _resampled(judge(found, own), weights_RN[:, rows]) for name, found in by_name.items()}
        result[finding] = _localization(own, values[finding])
    if not findings:
        return {}, None
    mean = {
        name: (
            np.mean([values[finding][name][0] for finding in findings], axis=0),
            np.mean([values[finding][name][1] for finding in findings], axis=0),
        )
        for name in ("map", *BASELINES)
    }
    return result, _localization(boxed, mean)


def _resampled(counts: Counts, weights_RN: BootstrapWeights) -> tuple[Floats, Floats]:
    """((M,) measures, (R, M) the same in each resample)."""
    return (
        divide(counts.part_NM.sum(axis=0), counts.total_NM.sum(axis=0)),
        divide(weighted_sums(counts.part_NM, weights_RN), weighted_sums(counts.total_NM, weights_RN)),
    )


def _localization(boxed: Sequence[BoxedFinding], values: dict[str, tuple[Floats, Floats]]) -> Localization:
    own_M, own_RM = values["map"]
    return Localization(
        images=len(boxed),
        boxes=sum(len(one.truth_K4) for one in boxed),
        patients=len({one.patient for one in boxed}),
        map=_scores(own_M, own_RM),
        baselines={name: _scores(*values[name]) for name in BASELINES},
        gain={name: _scores(own_M - values[name][0], own_RM - values[name][1]) for name in BASELINES},
    )


def _scores(value_M: Floats, resampled_RM: Floats) -> LocalizationScores:
    def estimate(measure: str) -> Estimate:
        m = MEASURES.index(measure)
        value = float(value_M[m])
        return interval(value, resampled_RM[:, m]) if np.isfinite(value) else undefined("no other image has a box")

    return LocalizationScores(
        pointing=estimate("pointing"),
        iobb={str(t): estimate(f"iobb {t}") for t in IOBB_ABOVE},
        iou={str(t): estimate(f"iou {t}") for t in IOU_ABOVE},
        false_positives_iobb={str(t): estimate(f"false iobb {t}") for t in IOBB_ABOVE},
        false_positives_iou={str(t): estimate(f"false iou {t}") for t in IOU_ABOVE},
    )
