"""Which images are shown. Milliseconds."""

from __future__ import annotations

import numpy as np

from cxrscale.evaluation.thresholds import MaskRule
from cxrscale.reporting import gallery
from cxrscale.types import ScoreHistograms, Scores, logits_of


def scores(score: list[list[float]], label: list[list[float]], maps: ScoreHistograms | None = None) -> Scores:
    names = np.array([f"p{n}" for n in range(len(score))], dtype=object)
    columns = ("Mass", "Pleural_Thickening")[: len(score[0])]
    return Scores(names, names, logits_of(score), np.array(label, np.float32), columns, maps)


def test_each_finding_gives_its_worst_errors_and_its_clearest_true_positive() -> None:
    score = [[0.1, 0.2], [0.9, 0.1], [0.5, 0.3], [0.8, 0.4], [0.2, 0.9], [0.05, 0.8]]
    label = [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 1.0]]
    cases = gallery.classification_cases(scores(score, label))
    assert [case.row for case in cases["false_negatives"]][:2] == [0, 3]  # 2 of 3 score higher than p0, 1 of 4 than p3
    assert cases["false_negatives"][0].reason == "scores 0.100; 67% of the images without it score higher"
    assert cases["false_negatives"][1].title == "Pleural Thickening"
    assert [case.row for case in cases["false_positives"]][:2] == [4, 3]
    assert cases["false_positives"][1].title == "no Mass"
    assert [case.row for case in cases["true_positives"]][:2] == [1, 5]
    for kind in cases.values():
        assert len({case.row for case in kind}) == len(kind) <= gallery.CASES_PER_KIND


def test_a_finding_without_positives_has_no_cases() -> None:
    assert gallery.classification_cases(scores([[0.3], [0.4]], [[0], [0]])) == {
        "false_negatives": [],
        "false_positives": [],
        "true_positives": [],
    }
    assert gallery.classification_cases(scores([[0.3], [0.4]], [[0], [np.nan]])) == {
        "false_negatives": [],
        "false_positives": [],
        "true_positives": [],
    }


def test_masks_with_the_lowest_and_highest_dice_and_false_masks() -> None:
    # Two bins of 10 pixels in total, the upper one positive. p0: half of the mask, p1: all, p2: none, p3: a false mask.
    everything = np.array([[6, 4], [6, 4], [10, 0], [7, 3], [10, 0]], np.int32)
    inside = np.array([[0, 2], [0, 4], [5, 0], [0, 0], [0, 0]], np.int32)
    cases = gallery.segmentation_cases(
        scores([[0.9]] * 5, [[1], [1], [1], [0], [0]], ScoreHistograms(everything, inside)), MaskRule(0.5, 1, 0.5, 0)
    )
    assert [case.row for case in cases["lowest_dice"]] == [2, 0]
    assert [case.row for case in cases["highest_dice"]] == [1]
    assert [case.row for case in cases["false_masks"]] == [3]
    assert cases["false_masks"][0].reason == "predicted 30.00% of the image"
    assert cases["lowest_dice"][0].reason.startswith("Dice 0.000; mask 50.00% of the image, predicted 0.00%")
