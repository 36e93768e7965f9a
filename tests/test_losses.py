"""Losses against formulas, and masks that let nothing through."""

import numpy as np
import pytest
import torch

from cxrscale import losses
from cxrscale.config import Loss
from cxrscale.losses import ClassWeights
from cxrscale.schema import Batch


def batch(label_BF: list[list[float]], valid_B: list[bool]) -> Batch:
    count = len(valid_B)
    return Batch(
        image_BCHW=torch.zeros(count, 1, 2, 2),
        label_BF=torch.tensor(label_BF),
        mask_B1HW=None,
        row_B=torch.arange(count),
        valid_B=torch.tensor(valid_B),
    )


def factors(positive: float = 1.0, negative: float = 1.0, findings: int = 1) -> ClassWeights:
    return ClassWeights(torch.full((findings,), positive), torch.full((findings,), negative))


def test_bce_is_the_formula() -> None:
    logits, target = torch.tensor([0.3, -1.2]), torch.tensor([1.0, 0.0])
    p = 1 / (1 + np.exp(-logits.numpy()))
    expected = [-2.5 * np.log(p[0]), -np.log(1 - p[1])]
    assert losses.bce(logits, target, factors(positive=2.5)).numpy() == pytest.approx(expected, rel=1e-6)


def test_focal_is_the_formula_and_plain_bce_at_gamma_0() -> None:
    logits, target = torch.tensor([0.3, -1.2, 4.0]), torch.tensor([1.0, 0.0, 0.0])
    p = 1 / (1 + np.exp(-logits.numpy().astype(np.float64)))
    at = np.where(target.numpy() == 1, p, 1 - p)
    assert losses.focal(logits, target, 2.0).numpy() == pytest.approx(-((1 - at) ** 2) * np.log(at), rel=1e-4)
    assert losses.focal(logits, target, 0.0).numpy() == pytest.approx(losses.bce(logits, target, factors()).numpy())


def test_soft_dice_of_a_hand_made_case() -> None:
    # p = (1, 1, 0, 0), m = (1, 0, 0, 0): 1 - (2 x 1 + 1) / (2 + 1 + 1)
    logits = torch.tensor([[[[50.0, 50.0], [-50.0, -50.0]]]])
    mask = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    assert losses.soft_dice(logits, mask).item() == pytest.approx(0.25)
    assert losses.soft_dice(-50 * torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)).item() == pytest.approx(0.0)


def test_unlabelled_and_invalid_rows_count_nothing() -> None:
    logits = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], requires_grad=True)
    rows = batch([[1.0, float("nan")], [0.0, 1.0], [1.0, 1.0]], [True, True, False])
    assert losses.counts(rows, Loss()).tolist() == [3.0]
    torch.autograd.backward(losses.terms(logits, rows, Loss(), factors()).sum())
    assert logits.grad is not None
    assert logits.grad[0, 1] == 0
    assert (logits.grad[2] == 0).all()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("loss", [Loss(bce=0, dice=1), Loss(bce=1, dice=2, focal=0.5)])
def test_segmentation_gradients_are_finite_in_bf16(loss: Loss) -> None:
    logits = (torch.randn(2, 1, 8, 8) * 30).bfloat16().requires_grad_()
    rows = batch([[1.0], [0.0]], [True, True])
    rows.mask_B1HW = torch.zeros(2, 1, 8, 8)
    rows.mask_B1HW[0, 0, :3] = 1
    torch.autograd.backward((losses.terms(logits, rows, loss, factors()) / losses.counts(rows, loss)).sum())
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_sums_and_counts_of_two_halves_give_the_mean_of_the_whole() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 3)
    labels = [[1.0, 0.0, float("nan")], [0.0] * 3, [1.0] * 3, [float("nan")] * 3, [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    parts = [
        (losses.terms(logits[part], rows, Loss(), factors()), losses.counts(rows, Loss()))
        for part in (slice(None), slice(2), slice(2, None))
        for rows in [batch(labels[part], [True] * len(labels[part]))]
    ]
    (whole, count), (first, one), (rest, other) = parts
    assert ((first + rest) / (one + other)).item() == pytest.approx((whole / count).item())
