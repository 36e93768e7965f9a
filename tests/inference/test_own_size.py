"""Dice at the images' own sizes, against a computation that shares no code with it: lists of runs, sets of pixels."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from cxrscale import sources
from cxrscale.evaluation import MaskRule, metrics, score_maps, summary
from cxrscale.inference import Predictor, apply_mask_rule, predictions, split_scores
from cxrscale.io import rle_masks
from cxrscale.shards import manifest
from cxrscale.sources.synthetic.archive import SyntheticPaths
from cxrscale.types import Scores, UserError
from tests.conftest import keyed

SIDE = 96
"""Of the synthetic images; shards and model have 64."""
Pixels = set[tuple[int, int]]


@pytest.fixture(scope="module")
def truth(drawn: SyntheticPaths) -> dict[str, Pixels]:
    """Image -> the pixels (column, row) of all of its rows in the mask table."""
    masks: dict[str, Pixels] = {}
    with (drawn.siim / "train-rle.csv").open() as file:
        for uid, text in list(csv.reader(file))[1:]:
            pixels, at = masks.setdefault(keyed("siim", uid), set()), 0
            numbers = [int(word) for word in text.split() if text.strip() != "-1"]
            for skip, length in zip(numbers[::2], numbers[1::2], strict=True):
                pixels |= {divmod(index, SIDE) for index in range(at + skip, at + skip + length)}
                at += skip + length
    return masks


@pytest.fixture(scope="module")
def scores(segmenter_run: str) -> Scores:
    return split_scores.predict_split(segmenter_run, "test")


@pytest.fixture(scope="module")
def rule(scores: Scores) -> MaskRule:
    """A rule under which this hardly trained model predicts masks."""
    assert scores.maps is not None
    above_T = scores.maps.all_NT.sum(axis=0)[::-1].cumsum()[::-1] / scores.maps.all_NT.sum()
    threshold = int((above_T > 0.1).sum() - 1) / score_maps.BINS
    return MaskRule(threshold, 40, threshold, own_size=True)


def dice(predicted: Pixels, true: Pixels) -> float:
    return 2 * len(predicted & true) / (len(predicted) + len(true)) if predicted or true else 1.0


def enlarged(score_HW: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    big = torch.nn.functional.interpolate(
        torch.from_numpy(score_HW)[None, None], size=(SIDE, SIDE), mode="bilinear", align_corners=False
    )
    return np.asarray(big[0, 0].numpy())


def test_dice_is_that_of_enlarged_probabilities_and_the_tables_masks(
    segmenter_run: str, siim_shards: str, truth: dict[str, Pixels], scores: Scores, rule: MaskRule
) -> None:
    assert scores.maps is not None
    assert scores.maps.own_size
    assert set(scores.maps.all_NT.sum(axis=1).tolist()) == {SIDE * SIDE}
    data = manifest.load(siim_shards)
    row_of = {name: row for row, name in enumerate(data.image_id.tolist())}
    rows = [row_of[name] for name in scores.image_id.tolist()]
    expected, sizes = {}, []
    for row, score_HW, _ in split_scores.score_maps(segmenter_run, data, rows):
        assert score_HW.shape == (64, 64)
        called_HW = enlarged(score_HW) >= rule.bottom
        called_HW &= bool(called_HW.sum() >= rule.min_area)
        name = data.image_id[row]
        expected[name] = dice({(int(x), int(y)) for y, x in np.argwhere(called_HW)}, truth[name])
        sizes.append(int(called_HW.sum()))
    found = metrics.map_dice(scores.maps, rule.top, rule.min_area, rule.bottom)
    assert max(sizes) > 0
    assert {name: len(pixels) for name, pixels in truth.items() if name in expected} == dict(
        zip(scores.image_id.tolist(), scores.maps.true_NT.sum(axis=1).tolist(), strict=True)
    )
    # Pixels within an ulp of the threshold may fall on either side.
    assert dict(zip(scores.image_id.tolist(), found.tolist(), strict=True)) == pytest.approx(expected, abs=5e-3)


def test_the_mask_that_is_predicted_is_the_mask_that_is_scored(
    segmenter_run: str, drawn: SyntheticPaths, truth: dict[str, Pixels], scores: Scores, rule: MaskRule
) -> None:
    assert scores.maps is not None
    paths = {keyed("siim", record.image_id): record.path for record in sources.read("siim", str(drawn.siim)).records}
    predictor = Predictor(segmenter_run, "cpu", rule)
    found = metrics.map_dice(scores.maps, rule.top, rule.min_area, rule.bottom)
    for index in range(6):
        name = scores.image_id[index]
        encoding = predictor(paths[name]).mask_rle
        assert encoding is not None
        mask_HW = rle_masks.decode(encoding, (SIDE, SIDE))
        own = dice({(int(x), int(y)) for y, x in np.argwhere(mask_HW)}, truth[name])
        assert own == pytest.approx(float(found[index]), abs=5e-3)


def test_probabilities_are_enlarged_and_then_cut() -> None:
    score_HW = np.zeros((4, 4), dtype=np.float32)
    score_HW[1:3, 1:3] = 1
    mask_HW = apply_mask_rule(score_HW, MaskRule(0.5, 0, 0.5, own_size=True), (16, 16))
    assert mask_HW.sum() == 60  # a square of 8 x 8 without its four corners: nearest neighbors would keep them
    assert not mask_HW[4, 4]
    assert mask_HW[4, 5]
    assert np.array_equal(mask_HW, mask_HW.T)


def test_the_minimum_area_counts_the_pixels_that_it_was_chosen_on() -> None:
    score_HW = np.zeros((4, 4), dtype=np.float32)
    score_HW[1:3, 1:3] = 1
    for own_size, area, empty in ((True, 60, False), (True, 61, True), (False, 4, False), (False, 5, True)):
        mask_HW = apply_mask_rule(score_HW, MaskRule(0.5, area, 0.5, own_size=own_size), (16, 16))
        assert mask_HW.any() != empty


def test_a_rule_of_another_size_is_refused(scores: Scores, rule: MaskRule) -> None:
    assert scores.maps is not None
    with pytest.raises(UserError, match="chosen at the model's input size, and the predictions are at the images' own"):
        summary.refuse_other_size(replace(rule, own_size=False), scores.maps)
    with pytest.raises(UserError, match="chosen at the images' own size, and the predictions are at the model's input"):
        summary.refuse_other_size(rule, replace(scores.maps, own_size=False))
    summary.refuse_other_size(replace(rule, own_size=False, min_area=1), scores.maps)


def test_stored_histograms_keep_their_size(scores: Scores, segmenter_run: str, tmp_path: Path) -> None:
    assert scores.maps is not None
    info = predictions.read_info(predictions.predictions_path(segmenter_run, "test"))
    for own_size in (True, False):
        stored = replace(scores, maps=replace(scores.maps, own_size=own_size))
        predictions.write_predictions(tmp_path / "p.parquet", stored, info)
        read = predictions.read_predictions(tmp_path / "p.parquet").maps
        assert read is not None
        assert read.own_size == own_size
        assert np.array_equal(read.true_NT, scores.maps.true_NT)
