"""Boxes from maps, overlaps, baselines and their intervals, against brute force and the figures of NIH's own boxes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxrscale.evaluation import BASELINES, localization, metrics
from cxrscale.evaluation.localization import IOBB_ABOVE, MEASURES, BoxedFinding, Detection
from cxrscale.evaluation.metrics import Floats
from cxrscale.sources import nih
from cxrscale.types import Box

CELLS = 12
corner = st.integers(0, CELLS - 1)
side = st.integers(1, CELLS)


@st.composite
def boxes(draw: st.DrawFn, most: int = 4) -> Floats:
    """(K, 4) boxes on a grid of CELLS, as shares."""
    rows = []
    for _ in range(draw(st.integers(1, most))):
        left, top = draw(corner), draw(corner)
        right, bottom = min(CELLS, left + draw(side)), min(CELLS, top + draw(side))
        rows.append((left, top, right, bottom))
    return np.array(rows, dtype=np.float64) / CELLS


def drawn(box_4: Floats) -> npt.NDArray[np.bool_]:
    """A box as cells."""
    left, top, right, bottom = (box_4 * CELLS).round().astype(int)
    cells = np.zeros((CELLS, CELLS), dtype=bool)
    cells[top:bottom, left:right] = True
    return cells


@given(boxes(), boxes())
def test_overlaps_count_cells(a_D4: Floats, b_K4: Floats) -> None:
    iou_DK, iobb_DK = localization.overlaps(a_D4, b_K4)
    for d, a in enumerate(a_D4):
        for k, b in enumerate(b_K4):
            common, either = (drawn(a) & drawn(b)).sum(), (drawn(a) | drawn(b)).sum()
            assert iou_DK[d, k] == pytest.approx(common / either)
            assert iobb_DK[d, k] == pytest.approx(common / drawn(a).sum())


@given(boxes())
def test_what_a_random_point_hits_is_the_area_of_the_union(box_K4: Floats) -> None:
    union = np.logical_or.reduce([drawn(box) for box in box_K4])
    assert localization.covered(box_K4) == pytest.approx(union.mean())


def test_boxes_become_shares_of_their_image_and_those_without_area_are_left_out() -> None:
    given_boxes = [Box("Mass", 50, 20, 100, 30), Box("Mass", -10, 0, 20, 50), Box("Mass", 200, 0, 9, 9)]
    found = localization.shares(given_boxes, 200, 100)
    np.testing.assert_allclose(found, [[0.25, 0.2, 0.75, 0.5], [0, 0, 0.05, 0.5]])


def test_a_map_gets_a_box_around_each_region_at_60_and_at_180() -> None:
    map_HW = np.zeros((256, 256), np.float32)
    map_HW[20:60, 30:90] = 100  # a region above 60 alone
    map_HW[150:200, 100:140] = 255  # above both
    found = localization.detect(map_HW)
    expected = [(30, 20, 90, 60), (100, 150, 140, 200), (100, 150, 140, 200)]
    assert sorted(map(tuple, (found.box_D4 * 256).round().astype(int).tolist())) == sorted(expected)
    assert found.point is not None
    np.testing.assert_allclose(found.point, (120 / 256, 175 / 256), atol=0.01)


@given(st.floats(0.1, 50), st.floats(-100, 100), st.integers(0, 1000))
def test_scale_and_offset_of_a_map_change_nothing(scale: float, offset: float, seed: int) -> None:
    map_hw = np.random.default_rng(seed).normal(size=(6, 6)).astype(np.float32)
    plain, other = localization.detect(map_hw), localization.detect(map_hw * scale + offset)
    assert other.point == pytest.approx(plain.point, abs=0.01)
    assert abs(len(other.box_D4) - len(plain.box_D4)) <= 1  # a rounding may join two regions


def test_a_map_without_contrast_points_nowhere() -> None:
    for map_hw in (np.ones((4, 4)), np.full((4, 4), np.nan)):
        found = localization.detect(map_hw)
        assert (len(found.box_D4), found.point) == (0, None)


def test_a_small_map_is_highest_in_the_middle_of_its_cell() -> None:
    map_hw = np.zeros((4, 4))
    map_hw[1, 2] = 1
    point = localization.detect(map_hw).point
    assert point is not None
    np.testing.assert_allclose(point, (2.5 / 4, 1.5 / 4), atol=0.003)


def test_measures_of_a_worked_example() -> None:
    """Two true boxes; one detected box lies half in the first, another in no box."""
    truth = np.array([[0.0, 0.0, 0.5, 0.5], [0.8, 0.8, 1.0, 1.0]])
    found = Detection(np.array([[0.25, 0.0, 0.75, 0.5], [0.5, 0.6, 0.6, 0.7]]), (0.9, 0.85))
    counts = localization.judge([found, None], [BoxedFinding("Mass", "a", truth)] * 2)
    value = dict(zip(MEASURES, counts.part_NM[0].tolist(), strict=True))
    total = dict(zip(MEASURES, counts.total_NM[0].tolist(), strict=True))
    assert (value["pointing"], total["pointing"]) == (1, 1)
    assert (value["iobb 0.25"], value["iobb 0.5"], total["iobb 0.25"]) == (1, 0, 2)  # exactly 0.5 is not above it
    assert (value["iou 0.3"], value["iou 0.4"]) == (1, 0)  # 0.125 / 0.375
    assert (value["false iobb 0.25"], value["false iobb 0.5"], total["false iobb 0.5"]) == (1, 2, 1)
    assert not counts.total_NM[1].any()


def test_baselines_of_a_worked_example() -> None:
    truths = [np.array([[0.0, 0.0, 0.5, 0.5]]), np.array([[0.25, 0.25, 0.5, 0.5]]), np.array([[0.5, 0.5, 1.0, 1.0]])]
    median = localization.baseline("median", truths)
    assert median[0] is not None
    assert median[2] is not None
    # Of (0.25, 0.25, 0.25, 0.25) and (0.5, 0.5, 0.5, 0.5) as left, top, width, height.
    np.testing.assert_allclose(median[0].box_D4, [[0.375, 0.375, 0.75, 0.75]])
    peak = localization.baseline("peak", truths)[2]
    assert peak is not None
    assert peak.point is not None
    # Both cover 0.25 to 0.5; of the four cells in the middle the first.
    np.testing.assert_allclose(peak.point, (0.375 - 1 / 128, 0.375 - 1 / 128))
    np.testing.assert_allclose(peak.box_D4 + 1 / 128, [[0.1875, 0.1875, 0.5625, 0.5625]])
    assert localization.baseline("median", truths[:1]) == [None]
    whole = localization.baseline("whole", truths)[0]
    assert whole is not None
    assert whole.hit == 0.25


def test_the_peak_of_a_finding_on_either_side_is_on_one_of_them() -> None:
    left, right = np.array([[0.1, 0.6, 0.3, 0.9]]), np.array([[0.7, 0.6, 0.9, 0.9]])
    one = localization.baseline("peak", [left, right, left, right, np.array([[0.4, 0.1, 0.5, 0.2]])])[-1]
    assert one is not None
    assert one.point is not None
    assert 0.1 < one.point[0] < 0.3


def test_a_map_that_is_the_box_beats_every_baseline_and_one_of_noise_does_not() -> None:
    rng = np.random.default_rng(0)
    boxed = []
    for n in range(60):
        left, top = rng.uniform(0, 0.8, 2)
        boxed.append(BoxedFinding("Mass", f"p{n // 2}", np.array([[left, top, left + 0.15, top + 0.15]])))
    good, noise = [], []
    for one in boxed:
        map_HW = np.zeros((64, 64), np.float32)
        left, top, right, bottom = (one.truth_K4[0] * 64).round().astype(int)
        map_HW[top:bottom, left:right] = 1
        good.append(localization.detect(map_HW))
        noise.append(localization.detect(rng.normal(size=(4, 4)).astype(np.float32)))
    weights_RN = metrics.bootstrap_weights([one.patient for one in boxed], 200, seed=0)
    found, mean = localization.score(good, boxed, weights_RN)
    assert mean is not None
    assert mean.map == found["Mass"].map
    assert (mean.images, mean.boxes, mean.patients) == (60, 60, 30)
    assert mean.map.pointing.value == 1.0
    for name in BASELINES:
        assert mean.gain[name].pointing.low > 0
        assert mean.gain[name].iobb["0.5"].low > 0
        expected = mean.map.pointing.value - mean.baselines[name].pointing.value
        assert mean.gain[name].pointing.value == pytest.approx(expected)
    _, mean = localization.score(noise, boxed, weights_RN)
    assert mean is not None
    assert any(mean.gain[name].pointing.low <= 0 for name in BASELINES)


def test_the_mean_counts_each_finding_once() -> None:
    hit = Detection(np.array([[0.0, 0.0, 0.5, 0.5]]), (0.1, 0.1))
    miss = Detection(np.array([[0.5, 0.5, 1.0, 1.0]]), (0.9, 0.9))
    truth = np.array([[0.0, 0.0, 0.5, 0.5]])
    boxed = [BoxedFinding("Mass", f"p{n}", truth) for n in range(9)] + [BoxedFinding("Nodule", "p9", truth)]
    weights_RN = metrics.bootstrap_weights([one.patient for one in boxed], 50, seed=0)
    found, mean = localization.score([hit] * 9 + [miss], boxed, weights_RN)
    assert mean is not None
    assert (found["Mass"].map.pointing.value, found["Nodule"].map.pointing.value) == (1, 0)
    assert mean.map.pointing.value == 0.5
    assert found["Nodule"].baselines["median"].pointing.reason == "no other image has a box"


KNOWN_PEAK = ((0.472, 0.428, 0.320), (0.416, 0.265, 0.134), 0.372)
"""IoBB above 0.1, 0.25, 0.5; IoU above 0.1, 0.3, 0.5; pointing game."""


def boxes_of_chestxray14(real: Path) -> list[BoxedFinding]:
    """All of them, one finding of one image each."""
    given_boxes = nih.read_boxes(str(real / "nih" / "BBox_List_2017.csv"))
    return [
        BoxedFinding(box.finding, name[:8], localization.shares([box], 1024, 1024))
        for name, own in given_boxes.items()
        for box in own
    ]


def test_the_baselines_on_all_boxes_of_chestxray14_are_the_known_ones(real: Path) -> None:
    """Means over the 8 findings, computed once with code of its own. The figures of the peak are up to 0.015 apart from
    ours: see the next test."""
    boxed = boxes_of_chestxray14(real)
    assert len(boxed) == 984
    blind = [Detection(np.zeros((0, 4)), None)] * len(boxed)
    weights_RN = metrics.bootstrap_weights([one.patient for one in boxed], 20, seed=0)
    found, mean = localization.score(blind, boxed, weights_RN)
    assert mean is not None
    assert len(found) == 8
    expected = {
        "whole": ((0.261, 0.038, 0.001), (0.261, 0.021, 0.001), 0.071, 0.0006),
        "center": ((0.453, 0.243, 0.120), (0.426, 0.185, 0.087), 0.193, 0.0006),
        "median": ((0.414, 0.365, 0.271), (0.378, 0.198, 0.121), None, 0.0006),
        "peak": (*KNOWN_PEAK, 0.015),
    }
    for name in BASELINES:
        iobb, iou, pointing, exact = expected[name]
        scores = mean.baselines[name]
        assert [scores.iobb[t].value for t in ("0.1", "0.25", "0.5")] == pytest.approx(iobb, abs=exact)
        assert [scores.iou[t].value for t in ("0.1", "0.3", "0.5")] == pytest.approx(iou, abs=exact)
        assert pointing is None or scores.pointing.value == pytest.approx(pointing, abs=exact)
    peak = {name: row.baselines["peak"].iobb["0.5"].value for name, row in found.items()}
    assert peak["Cardiomegaly"] == pytest.approx(0.966, abs=0.001)
    assert peak["Mass"] == pytest.approx(0.200, abs=0.013)
    assert peak["Pneumothorax"] == pytest.approx(0.224, abs=0.011)
    assert [str(t) for t in IOBB_ABOVE] == list(mean.map.iobb)


def test_the_peak_of_chestxray14_is_a_plateau_that_leaves_its_figures_open(real: Path) -> None:
    """Why the known figures of the peak are not ours to the last digit, and neither are wrong.

    Where most of the others' boxes lie is a region, and the definition does not say which of its points to take. Over
    all of them the mean pointing game goes from 0.36 to 0.40 and IoU above 0.5 from 0.06 to 0.18. Ours, of the
    middle of its largest part, and the known figures lie between. None of the grids (16 to 1024 cells) and points
    (first, centroid) that were tried gives all known digits. The centroid itself, which may be no peak, comes within
    0.007 of them, and is the weaker guess.
    """
    by_finding: dict[str, list[BoxedFinding]] = {}
    for one in boxes_of_chestxray14(real):
        by_finding.setdefault(one.finding, []).append(one)
    low, high, own = [], [], []
    for boxed in by_finding.values():
        low_NM, high_NM = plateau_range(np.concatenate([one.truth_K4 for one in boxed]))
        low.append(low_NM.mean(axis=0))
        high.append(high_NM.mean(axis=0))
        counts = localization.judge(localization.baseline("peak", [one.truth_K4 for one in boxed]), boxed)
        own.append((counts.part_NM.sum(axis=0) / counts.total_NM.sum(axis=0))[SEVEN])
    low_M, high_M, own_M = (np.mean(rows, axis=0) for rows in (low, high, own))
    assert ((low_M <= own_M) & (own_M <= high_M)).all()
    known_M = np.array([*KNOWN_PEAK[0], *KNOWN_PEAK[1], KNOWN_PEAK[2]])
    assert ((low_M <= known_M) & (known_M <= high_M)).all()


SEVEN = [MEASURES.index(name) for name in ("iobb 0.1", "iobb 0.25", "iobb 0.5", "iou 0.1", "iou 0.3", "iou 0.5")]
SEVEN.append(MEASURES.index("pointing"))


def plateau_range(box_N4: Floats, cells: int = 256) -> tuple[Floats, Floats]:
    """(N, 7) the least and the most that any point of the leave-one-out plateau gives, one box per image."""
    edge_N4 = np.ceil(box_N4 * cells - 0.5).astype(int)  # cells whose middle is in the box
    count_GG = np.zeros((cells, cells), np.int16)
    for left, top, right, bottom in edge_N4:
        count_GG[top:bottom, left:right] += 1
    low, high = [], []
    for n, (left, top, right, bottom) in enumerate(edge_N4):
        count_GG[top:bottom, left:right] -= 1
        y_P, x_P = (np.nonzero(count_GG == count_GG.max()) + np.array(0.5)) / cells
        count_GG[top:bottom, left:right] += 1
        others_N4 = np.delete(box_N4, n, axis=0)
        width, height = np.median(others_N4[:, 2:] - others_N4[:, :2], axis=0)
        box_P4 = np.stack([x_P - width / 2, y_P - height / 2, x_P + width / 2, y_P + height / 2], axis=1)
        iou_P1, iobb_P1 = localization.overlaps(box_P4, box_N4[n : n + 1])
        left_, top_, right_, bottom_ = box_N4[n]
        hit_P = (left_ <= x_P) & (x_P <= right_) & (top_ <= y_P) & (y_P <= bottom_)
        above = [iobb_P1[:, 0] > t for t in (0.1, 0.25, 0.5)] + [iou_P1[:, 0] > t for t in (0.1, 0.3, 0.5)]
        measure_PM = np.stack([*above, hit_P], axis=1).astype(np.float64)
        low.append(measure_PM.min(axis=0))
        high.append(measure_PM.max(axis=0))
    return np.array(low), np.array(high)
