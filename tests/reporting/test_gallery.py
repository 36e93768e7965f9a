"""Which images are shown. Milliseconds."""

from __future__ import annotations

import numpy as np

from cxrscale.evaluation.thresholds import MaskRule
from cxrscale.reporting import gallery
from cxrscale.reporting.overlay import outline
from cxrscale.types import ScoreHistograms, Scores


def scores(score: list[list[float]], label: list[list[float]], maps: ScoreHistograms | None = None) -> Scores:
    names = np.array([f"p{n}" for n in range(len(score))], dtype=object)
    columns = ("Mass", "Pleural_Thickening")[: len(score[0])]
    return Scores(names, names, np.array(score, np.float32), np.array(label, np.float32), columns, maps)


def test_each_finding_gives_its_worst_miss_its_loudest_alarm_and_its_clearest_hit() -> None:
    score = [[0.1, 0.2], [0.9, 0.1], [0.5, 0.3], [0.8, 0.4], [0.2, 0.9], [0.05, 0.8]]
    label = [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 1.0]]
    found = gallery.of_calls(scores(score, label))
    assert [case.row for case in found["misses"]][:2] == [0, 3]  # 2 of 3 score higher than p0, 1 of 4 than p3
    assert found["misses"][0].why == "scores 0.100; 67% of the images without it score higher"
    assert found["misses"][1].title == "Pleural Thickening"
    assert [case.row for case in found["alarms"]][:2] == [4, 3]
    assert found["alarms"][1].title == "no Mass"
    assert [case.row for case in found["hits"]][:2] == [1, 5]
    for kind in found.values():
        assert len({case.row for case in kind}) == len(kind) <= gallery.EACH


def test_a_finding_that_nobody_has_shows_nothing() -> None:
    assert gallery.of_calls(scores([[0.3], [0.4]], [[0], [0]])) == {"misses": [], "alarms": [], "hits": []}
    assert gallery.of_calls(scores([[0.3], [0.4]], [[0], [np.nan]])) == {"misses": [], "alarms": [], "hits": []}


def test_masks_from_the_worst_to_the_best_and_the_false_ones() -> None:
    # Two bins of 10 pixels in all; the upper one is called. p0 hits half, p1 all, p2 misses, p3 is a false mask.
    everything = np.array([[6, 4], [6, 4], [10, 0], [7, 3], [10, 0]], np.int32)
    inside = np.array([[0, 2], [0, 4], [5, 0], [0, 0], [0, 0]], np.int32)
    found = gallery.of_masks(
        scores([[0.9]] * 5, [[1], [1], [1], [0], [0]], ScoreHistograms(everything, inside)), MaskRule(0.5, 1, 0.5, 0)
    )
    assert [case.row for case in found["worst"]] == [2, 0]
    assert [case.row for case in found["best"]] == [1]
    assert [case.row for case in found["false"]] == [3]
    assert found["false"][0].why == "predicted 30.00% of the image"
    assert found["worst"][0].why.startswith("Dice 0.000; mask 50.00% of the image, predicted 0.00%")


def test_an_outline_goes_round_the_pixels() -> None:
    mask = np.zeros((8, 8), dtype=bool)
    assert outline(mask) == ""
    mask[2:5, 3:6] = True
    path = outline(mask)
    assert path.startswith("M")
    assert path.endswith("Z")
    assert {"3.5,2.5", "5.5,4.5"} <= set(path.strip("MZ").split())
