"""Scores of several ranks: each image once, in manifest order, without padding and unreadable rows; their summary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing as mp
from sklearn.metrics import roc_auc_score
from torch import nn

from cxrscale import config
from cxrscale.config import Recipe
from cxrscale.evaluation import score_maps
from cxrscale.models import losses
from cxrscale.training import scoring
from cxrscale.training.scoring import ScoredRows
from cxrscale.types import Batch, DistContext, ScoreHistograms, logits_of

FINDINGS = ("Effusion", "Mass")
CLASSIFY = config.parse(Recipe, {"data": {"findings": FINDINGS}, "train": {"precision": "fp32"}}, where="test")
SEGMENT = config.parse(
    Recipe,
    {"data": {"findings": ["Pneumothorax"], "task": "segment"}, "loss": {"dice": 1}, "train": {"precision": "fp32"}},
    where="test",
)
BATCHES: Sequence[Sequence[tuple[int, bool]]] = (
    ((4, True), (0, True)),
    ((2, True), (1, False)),
    ((3, True), (0, False)),
)
"""(row, valid) of each batch: row 1 is unreadable, the last batch is padded with row 0."""


class Classifier(nn.Module):
    """The first two pixels are the logits."""

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        return image_BCHW.flatten(1)[:, :2]


def logits(row: int) -> tuple[float, float]:
    return row - 2.0, 1.5 - row


def labels(row: int) -> tuple[float, float]:
    return float(row > 1), math.nan if row == 3 else float(row == 0)


def batch(rows: Sequence[tuple[int, bool]], masked: bool = False) -> Batch:
    """4 x 4 images whose first pixels are `logits`; masks cover the pixels with a positive logit in odd rows."""
    image = torch.full((len(rows), 1, 4, 4), -3.0)
    for index, (row, _) in enumerate(rows):
        image[index, 0, 0, :2] = torch.tensor(logits(row))
    odd = torch.tensor([row % 2 == 1 for row, _ in rows])
    return Batch(
        image_BCHW=image,
        label_BF=torch.tensor([labels(row) for row, _ in rows]),
        mask_B1HW=((image > 0) & odd[:, None, None, None]).float() if masked else None,
        row_B=torch.tensor([row for row, _ in rows]),
        valid_B=torch.tensor([valid for _, valid in rows]),
    )


def score_classifier(batches: Sequence[Sequence[tuple[int, bool]]], dist: DistContext) -> ScoredRows:
    weights = losses.class_weights(CLASSIFY.loss, np.zeros((1, 2), np.float32), dist.device)
    return scoring.score(Classifier(), [batch(rows) for rows in batches], CLASSIFY, dist, weights)


def assert_scores_are_right(rows: ScoredRows) -> None:
    expected = [0, 2, 3, 4]
    assert rows.row_N.tolist() == expected
    logit_NF = torch.tensor([logits(row) for row in expected])
    np.testing.assert_array_equal(rows.logit_NF, logit_NF.numpy())
    assert rows.unreadable == 1
    assert rows.maps is None
    pairs = [
        (p, y)
        for ps, row in zip(logit_NF.sigmoid().numpy(), expected, strict=True)
        for p, y in zip(ps, labels(row), strict=True)
    ]
    entropy = [-math.log(p if y else 1 - p) for p, y in pairs if not math.isnan(y)]
    assert rows.loss == pytest.approx(sum(entropy) / len(entropy), rel=1e-5)


def test_one_rank_scores_each_valid_row_once_in_ascending_order() -> None:
    assert_scores_are_right(score_classifier(BATCHES, DistContext()))


def _score_on_a_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    address = f"file://{folder}/meet"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    # Every rank has as many rows: the second one's last batch is padding only.
    own = BATCHES[::2] if rank == 0 else (BATCHES[1], ((2, False), (2, False)))
    rows = score_classifier(own, DistContext(rank, 2))
    torch.distributed.destroy_process_group()
    assert_scores_are_right(rows)
    (Path(folder) / f"{rank}.txt").write_text("right")


def test_both_of_two_ranks_get_all_scores(tmp_path: Path) -> None:
    mp.spawn(_score_on_a_rank, args=(str(tmp_path),), nprocs=2)  # type: ignore[attr-defined,no-untyped-call]
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == ["right"] * 2


def test_maps_are_counted_in_histograms_and_scored_by_their_highest_pixel() -> None:
    rows = scoring.score(nn.Identity(), [batch(rows, masked=True) for rows in BATCHES], SEGMENT, DistContext())
    assert rows.row_N.tolist() == [0, 2, 3, 4]
    assert math.isnan(rows.loss)
    highest = [max(logits(row)) for row in (0, 2, 3, 4)]
    assert rows.logit_NF[:, 0].tolist() == highest
    assert rows.maps is not None
    assert rows.maps.all_NT.sum(axis=1).tolist() == [16] * 4
    # Of the odd rows only row 3 is valid; one of its pixels is above 0.5.
    assert rows.maps.true_NT.sum(axis=1).tolist() == [0, 0, 1, 0]
    assert rows.maps.true_NT[2].argmax() == int(score_maps.BINS / (1 + math.exp(-1)))


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_restored(training: bool) -> None:
    model = Classifier().train(training)
    scoring.score(model, [batch(BATCHES[0])], CLASSIFY, DistContext())
    assert model.training == training


def test_the_summary_is_the_mean_over_findings_with_both_classes() -> None:
    score_NF = np.array([[0.9, 0.2, 0.6], [0.4, 0.7, 0.7], [0.6, 0.9, 0.8], [0.1, 0.3, 0.1]])
    label_NF = np.array([[1, 0, 1], [1, 0, 1], [0, 1, 1], [0, math.nan, math.nan]], np.float32)
    rows = ScoredRows(np.arange(4), logits_of(score_NF).astype(np.float32), None, math.nan, 0)
    metrics = scoring.summary(rows, label_NF, ("A", "B", "C"))
    # A: of four pairs the positives win three; at 0.5 one true positive, false positive, miss and true negative.
    assert (metrics["auroc.A"], metrics["f1.A"]) == (0.75, 0.5)
    # B: an unlabeled image does not count; at 0.5 one true and one false positive, one true negative.
    assert metrics["auroc.B"] == 1
    assert metrics["f1.B"] == pytest.approx(2 / 3)
    # C has no negative: AUROC is undefined, and no metric of it is part of a mean.
    assert math.isnan(metrics["auroc.C"])
    assert metrics["auroc"] == pytest.approx(0.875)
    assert metrics["accuracy"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert metrics["f1"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    brier_B = (0.2**2 + 0.7**2 + 0.1**2) / 3
    assert metrics["brier"] == pytest.approx(((0.1**2 + 0.6**2 + 0.6**2 + 0.1**2) / 4 + brier_B) / 2)
    assert metrics["findings"] == 2


def test_a_finding_without_positives_is_in_no_mean() -> None:
    """Its F1 would be 0 and its accuracy 1, whatever the model has learned of the others."""
    rows = ScoredRows(np.arange(4), np.array([[3, -9], [1, -9], [-1, -9], [-3, -9]], np.float32), None, math.nan, 0)
    metrics = scoring.summary(rows, np.array([[1, 0], [0, 0], [0, 0], [0, 0]], np.float32), ("A", "B"))
    assert metrics["f1"] == metrics["f1.A"] == pytest.approx(2 / 3)
    assert math.isnan(metrics["f1.B"])
    assert metrics["accuracy"] == 0.75
    assert metrics["findings"] == 1


def test_logits_that_a_float32_sigmoid_cannot_tell_apart_are_ranked() -> None:
    """Logits of 16 to 24: the ranking of their float32 probabilities has an AUROC of 0.531, their own 0.875."""
    logit = np.array([[24], [23.5], [23], [18], [22.5], [17.5], [17], [16.5]], np.float32)
    label = np.array([[1], [1], [1], [1], [0], [0], [0], [0]], np.float32)
    rows = ScoredRows(np.arange(8), logit, None, math.nan, 0)
    assert scoring.summary(rows, label, ("A",))["auroc"] == 15 / 16
    squeezed = torch.from_numpy(logit).sigmoid().numpy()
    assert roc_auc_score(label, squeezed) < 0.7


def test_the_summary_of_one_finding_has_no_metrics_by_finding() -> None:
    rows = ScoredRows(np.arange(2), np.array([[2.0], [-2.0]], np.float32), None, math.nan, 0)
    metrics = scoring.summary(rows, np.array([[1], [0]], np.float32), ("A",))
    assert metrics.keys() == {"auroc", "auprc", "f1", "accuracy", "brier"}


def test_the_summary_of_maps_has_dice_and_iou_at_a_half() -> None:
    all_NT, true_NT = np.zeros((2, 2, 256), np.int32)
    low, high = 10, 200
    # Four pixels above 0.5, of which two lie in the mask of three pixels; then an empty mask, predicted empty.
    all_NT[0, [low, high]], true_NT[0, [low, high]] = (12, 4), (1, 2)
    all_NT[1, low] = 16
    rows = ScoredRows(
        np.arange(2), np.array([[1.4], [-2.2]], np.float32), ScoreHistograms(all_NT, true_NT), math.nan, 0
    )
    metrics = scoring.summary(rows, np.array([[1], [0]], np.float32), ("Pneumothorax",))
    assert metrics["dice_positives"] == pytest.approx(4 / 7)
    assert metrics["dice"] == pytest.approx((4 / 7 + 1) / 2)
    assert metrics["iou"] == pytest.approx((2 / 5 + 1) / 2)
