"""Losses against references and cases computed by hand, and masks that let nothing through."""

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.loss import AsymmetricLossMultiLabel
from torchvision.ops import sigmoid_focal_loss

from cxrscale import config
from cxrscale.config import LOSS_WEIGHTS, Loss, Recipe
from cxrscale.models import losses
from cxrscale.models.losses import ClassWeights
from cxrscale.types import Batch, UserError

NAN = float("nan")
CPU = torch.device("cpu")
ELEMENTS = [
    Loss(),
    Loss(positive_weight=3, negative_weight=0.5),
    Loss(bce=0, cost_matrix_weight=1),
    Loss(bce=0, focal=1),
    Loss(bce=0, focal=1, focal_gamma=0.5, focal_alpha=0.25),
    Loss(bce=0, asymmetric=1),
    Loss(bce=0, asymmetric=1, asymmetric_gammas=(0.5, 0.5), asymmetric_clip=0),
    Loss(bce=0.5, cost_matrix_weight=1, focal=2, asymmetric=0.25),
]
IMAGES = [Loss(bce=0, dice=1), Loss(bce=0, lovasz=1), Loss(bce=1, dice=2, focal=0.5, lovasz=0.25)]


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    torch.manual_seed(0)


def batch(label_BF: list[list[float]], valid_B: list[bool], mask_B1HW: torch.Tensor | None = None) -> Batch:
    count = len(valid_B)
    return Batch(
        image_BCHW=torch.zeros(count, 1, 2, 2),
        label_BF=torch.tensor(label_BF),
        mask_B1HW=mask_B1HW,
        row_B=torch.arange(count),
        valid_B=torch.tensor(valid_B),
    )


def factors(positive: float = 1.0, negative: float = 1.0, findings: int = 1) -> ClassWeights:
    return ClassWeights(torch.full((findings,), positive), torch.full((findings,), negative))


def masks(count: int, side: int, seed: int = 0) -> torch.Tensor:
    """Random masks (count, 1, side, side), the first of them empty."""
    random = (torch.rand(count, 1, side, side, generator=torch.Generator().manual_seed(seed)) < 0.3).float()
    random[0] = 0
    return random


def test_bce_is_the_formula() -> None:
    logits, target = torch.tensor([0.3, -1.2]), torch.tensor([1.0, 0.0])
    p = 1 / (1 + np.exp(-logits.numpy()))
    expected = [-2.5 * np.log(p[0]), -0.5 * np.log(1 - p[1])]
    assert losses.bce(logits, target, factors(2.5, 0.5)).numpy() == pytest.approx(expected, rel=1e-6)


def test_chexnets_weights_are_the_other_classs_share_of_the_labeled() -> None:
    # 1 of 4 labeled images has the first finding, 2 of 2 the second; the third is labeled nowhere.
    label_NF = np.array([[1, 1, NAN], [0, NAN, NAN], [0, 1, NAN], [0, NAN, NAN], [NAN, NAN, NAN]], np.float32)
    weights = losses.class_weights(Loss(class_balance=True), label_NF, CPU)
    assert weights.positive_F.tolist() == [0.75, 0.0, 1.0]
    assert weights.negative_F.tolist() == [0.25, 1.0, 1.0]
    both = losses.class_weights(Loss(class_balance=True, positive_weight=2, negative_weight=4), label_NF, CPU)
    assert (both.positive_F.tolist(), both.negative_F.tolist()) == ([1.5, 0.0, 2.0], [1.0, 4.0, 4.0])
    plain = losses.class_weights(Loss(positive_weight=2), label_NF, CPU)
    assert (plain.positive_F.tolist(), plain.negative_F.tolist()) == ([2.0] * 3, [1.0] * 3)


def test_chexnets_pneumonia_loss_by_hand() -> None:
    # p = 0.8, 0.4, 0.5; one of three is present: -(2/3 ln 0.8 + 1/3 ln 0.6 + 1/3 ln 0.5).
    logits = torch.tensor([[0.8], [0.4], [0.5]]).logit()
    rows = batch([[1.0], [0.0], [0.0]], [True] * 3)
    weights = losses.class_weights(Loss(class_balance=True), rows.label_BF.numpy(), CPU)
    expected = -(2 / 3 * np.log(0.8) + 1 / 3 * np.log(0.6) + 1 / 3 * np.log(0.5))
    assert losses.terms(logits, rows, Loss(class_balance=True), weights).item() == pytest.approx(expected, rel=1e-6)


def test_cost_matrix_by_hand() -> None:
    # p = 0.9, 0.2, 0.7, 0.4 for truth 1, 1, 0, 0: TP, FN, FP, TN.
    logits, target = torch.tensor([0.9, 0.2, 0.7, 0.4]).logit(), torch.tensor([1.0, 1.0, 0.0, 0.0])
    expected = [-np.log(0.9), -5 * np.log(0.2), -5 * np.log(0.3), -np.log(0.6)]
    assert losses.cost_matrix(logits, target, Loss().cost_matrix).numpy() == pytest.approx(expected, rel=1e-5)
    # Rows are the label, columns the prediction.
    table = ((2.0, 3.0), (5.0, 7.0))
    by_entry = losses.cost_matrix(logits, target, table) / losses.bce(logits, target, factors())
    assert by_entry.numpy() == pytest.approx([7.0, 5.0, 3.0, 2.0])


def test_the_cost_matrix_is_softmax_cross_entropy_over_two_classes_times_the_entry() -> None:
    logits, target = torch.randn(50) * 3, (torch.rand(50) < 0.4).float()
    two = torch.stack([torch.zeros_like(logits), logits], dim=1)
    plain = torch.nn.functional.cross_entropy(two, target.long(), reduction="none")
    entry = torch.tensor(Loss().cost_matrix)[target.long(), two.argmax(dim=1)]
    torch.testing.assert_close(losses.cost_matrix(logits, target, Loss().cost_matrix), plain * entry)


@pytest.mark.parametrize(("gamma", "alpha"), [(2.0, None), (2.0, 0.25), (0.0, None), (0.5, 0.9)])
def test_focal_agrees_with_torchvision_and_smp(gamma: float, alpha: float | None) -> None:
    logits, target = torch.linspace(-9, 9, 60), (torch.arange(60) % 3 == 0).float()
    ours = losses.focal(logits, target, gamma, alpha)
    theirs = sigmoid_focal_loss(logits, target, alpha=-1 if alpha is None else alpha, gamma=gamma)
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-6)  # theirs loses digits of 1 - p
    smps = smp.losses.FocalLoss("binary", alpha=alpha, gamma=gamma)(logits, target)
    torch.testing.assert_close(ours.mean(), smps, rtol=1e-4, atol=0)


def test_focal_by_the_formula_and_plain_bce_at_gamma_0() -> None:
    logits, target = torch.tensor([0.3, -1.2, 4.0, 12.0]), torch.tensor([1.0, 0.0, 0.0, 1.0])
    p = 1 / (1 + np.exp(-logits.numpy().astype(np.float64)))
    at = np.where(target.numpy() == 1, p, 1 - p)
    assert losses.focal(logits, target, 2.0).numpy() == pytest.approx(-((1 - at) ** 2) * np.log(at), rel=1e-4)
    assert losses.focal(logits, target, 0.0).numpy() == pytest.approx(losses.bce(logits, target, factors()).numpy())


@pytest.mark.parametrize("gammas", [(0.0, 4.0), (1.0, 4.0), (0.0, 0.0), (2.0, 1.0)])
@pytest.mark.parametrize("clip", [0.0, 0.05, 0.2])
def test_asymmetric_and_its_gradient_agree_with_timm(gammas: tuple[float, float], clip: float) -> None:
    logits = torch.linspace(-7, 7, 60).double()[:, None].requires_grad_()
    target = (torch.arange(60) % 3 == 0).double()[:, None]
    # timm's takes its powers of 1 - p without the shift, which is another loss unless the shift or power is 0.
    ours = losses.asymmetric(logits, target, gammas, clip)
    p = logits.sigmoid()
    shifted = (p - clip).clamp_min(0)
    formula = torch.where(
        target > 0.5, -((1 - p) ** gammas[0]) * p.log(), -(shifted ** gammas[1]) * (1 - shifted).log()
    )
    torch.testing.assert_close(ours, formula, rtol=1e-6, atol=1e-9)
    if clip == 0 or gammas[1] == 0:
        theirs = AsymmetricLossMultiLabel(gammas[1], gammas[0], clip, reduction="none")(logits, target)
        torch.testing.assert_close(ours.float(), theirs, rtol=1e-3, atol=1e-5)
        mine = torch.autograd.grad(ours.sum(), logits, retain_graph=True)[0]
        other = torch.autograd.grad(theirs.sum(), logits)[0]
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)


def test_asymmetric_ignores_the_easiest_negatives() -> None:
    logits = torch.tensor([0.04, 0.06]).logit()
    easy, less = losses.asymmetric(logits, torch.zeros(2), (0.0, 1.0), 0.05).tolist()
    assert easy == 0
    assert less == pytest.approx(-0.01 * np.log(0.99), rel=1e-3)


def test_soft_dice_of_a_hand_made_case() -> None:
    # p = (1, 1, 0, 0), m = (1, 0, 0, 0): 1 - (2 x 1 + 1) / (2 + 1 + 1)
    logits = torch.tensor([[[[50.0, 50.0], [-50.0, -50.0]]]])
    mask = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    assert losses.soft_dice(logits, mask).item() == pytest.approx(0.25)
    assert losses.soft_dice(-50 * torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)).item() == pytest.approx(0.0)


def test_soft_dice_agrees_with_smp_image_by_image() -> None:
    logits, mask = torch.randn(4, 1, 8, 8) * 4, masks(4, 8)
    theirs = smp.losses.DiceLoss("binary", smooth=0.5)  # theirs counts it twice in both sums
    for i, ours in enumerate(losses.soft_dice(logits, mask)):
        if mask[i].any():  # smp's is 0 for an empty mask whatever was predicted
            torch.testing.assert_close(ours, theirs(logits[i : i + 1], mask[i : i + 1]))
    assert losses.soft_dice(logits, mask)[0] > 0.9


def test_lovasz_of_a_hand_made_case() -> None:
    # Errors 1 - z y: 1.5 (outside), 0.5 (inside), 0.2 (inside). Jaccard loss as they join: 1/3, 2/3, 1.
    logits, mask = torch.tensor([[[[0.5, 0.5, 0.8]]]]), torch.tensor([[[[0.0, 1.0, 1.0]]]])
    assert losses.lovasz(logits, mask).item() == pytest.approx((1.5 + 0.5 + 0.2) / 3)


def test_lovasz_and_its_gradient_agree_with_smp_image_by_image() -> None:
    logits, mask = (torch.randn(5, 1, 9, 9) * 3).requires_grad_(), masks(5, 9)
    ours = losses.lovasz(logits, mask)
    theirs = smp.losses.LovaszLoss("binary", per_image=True)(logits, mask)
    torch.testing.assert_close(ours.mean(), theirs)
    mine = torch.autograd.grad(ours.mean(), logits)[0]
    torch.testing.assert_close(mine, torch.autograd.grad(theirs, logits)[0])


@pytest.mark.parametrize("loss", ELEMENTS)
def test_unlabeled_and_invalid_rows_count_nothing(loss: Loss) -> None:
    logits = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], requires_grad=True)
    rows = batch([[1.0, NAN], [0.0, 1.0], [1.0, 1.0]], [True, True, False])
    assert losses.counts(rows, loss).tolist() == [3.0] * len(losses.active(loss))
    torch.autograd.backward(losses.terms(logits, rows, loss, factors(2.0, findings=2)).sum())
    assert logits.grad is not None
    assert logits.grad[0, 1] == 0
    assert (logits.grad[2] == 0).all()
    assert (logits.grad[1] != 0).all()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("loss", [*IMAGES, *ELEMENTS])
def test_invalid_images_count_nothing(loss: Loss) -> None:
    logits, mask = torch.randn(3, 1, 4, 4, requires_grad=True), masks(3, 4)
    rows = batch([[0.0], [1.0], [1.0]], [True, True, False], mask)
    counted = dict(zip(losses.active(loss), losses.counts(rows, loss).tolist(), strict=True))
    assert counted == {name: 2.0 if name in ("dice", "lovasz") else 32.0 for name in losses.active(loss)}
    torch.autograd.backward(losses.terms(logits, rows, loss, factors()).sum())
    assert logits.grad is not None
    assert (logits.grad[2] == 0).all()
    assert (logits.grad[1] != 0).any()


@pytest.mark.parametrize("loss", [*IMAGES, *ELEMENTS])
@pytest.mark.parametrize("size", [1.0, 30.0, 1e4, 1e30])
def test_gradients_are_finite_in_bf16_however_extreme_the_logits(loss: Loss, size: float) -> None:
    logits = (torch.randn(3, 1, 8, 8) * size).bfloat16()
    logits[:, :, 0, :4] = torch.tensor([0.0, size, -size, size / 2])
    logits.requires_grad_()
    rows = batch([[1.0], [0.0], [0.0]], [True] * 3, masks(3, 8))
    sums = losses.terms(logits, rows, loss, factors(2.0))
    torch.autograd.backward((sums / losses.counts(rows, loss)).sum())
    assert torch.isfinite(sums).all()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


@given(
    loss=st.sampled_from([*ELEMENTS, *IMAGES]),
    boundary=st.integers(0, 6),
    seed=st.integers(0, 2**32 - 1),
    valid=st.lists(st.booleans(), min_size=6, max_size=6),
)
@settings(deadline=None, max_examples=60)
def test_sums_and_counts_of_the_parts_give_the_mean_of_the_total(
    loss: Loss, boundary: int, seed: int, valid: list[bool]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    segments = loss in IMAGES
    label = torch.tensor([NAN, 0.0, 1.0])[torch.randint(3, (6, 3), generator=generator)]
    logits = torch.randn((6, 1, 4, 4) if segments else (6, 3), generator=generator) * 4
    mask = masks(6, 4, seed % 1000)

    def sums(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        rows = batch(label[part].tolist(), valid[part], mask[part] if segments else None)
        weights = factors(2.0, 0.5, 1 if segments else 3)
        return losses.terms(logits[part], rows, loss, weights), losses.counts(rows, loss)

    parts = [sums(part) for part in (slice(boundary), slice(boundary, None)) if len(label[part])]
    complete, count = sums(slice(None))
    torch.testing.assert_close(sum(total for total, _ in parts), complete, rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.stack([number for _, number in parts]).sum(0), count)


@pytest.mark.parametrize("loss", [*IMAGES, *ELEMENTS])
def test_no_value_is_read_in_between(loss: Loss) -> None:
    # Tensors on the meta device have no values: whatever would wait for a GPU's result raises on them.
    segments = loss in IMAGES
    with torch.device("meta"):
        rows = Batch(
            image_BCHW=torch.empty(2, 1, 8, 8),
            label_BF=torch.empty(2, 1),
            mask_B1HW=torch.empty(2, 1, 8, 8) if segments else None,
            row_B=torch.empty(2, dtype=torch.int64),
            valid_B=torch.empty(2, dtype=torch.bool),
        )
        logits = torch.empty((2, 1, 8, 8) if segments else (2, 1), requires_grad=True)
        weights = ClassWeights(torch.empty(1), torch.empty(1))
        mean = (losses.terms(logits, rows, loss, weights) / losses.counts(rows, loss).clamp_min(1)).sum()
        torch.autograd.backward(mean)
        with pytest.raises(RuntimeError):
            mean.item()


def test_a_term_without_a_weight_or_a_weight_without_a_term_is_refused() -> None:
    losses.check_terms(["bce", "focal"], ["focal", "bce"])
    with pytest.raises(RuntimeError, match=r"weights without a term \['tversky'\], terms without a weight \[\]"):
        losses.check_terms([*LOSS_WEIGHTS, "tversky"], losses.TERMS)
    with pytest.raises(RuntimeError, match=r"weights without a term \[\], terms without a weight \['lovasz'\]"):
        losses.check_terms(set(LOSS_WEIGHTS) - {"lovasz"}, losses.TERMS)


@pytest.mark.parametrize("name", losses.TERMS)
def test_each_weight_of_the_configuration_computes_its_own_term(name: str) -> None:
    only = Loss.model_validate({"bce": 0, name: 3})
    assert losses.active(only) == [name]
    rows = batch([[1.0], [0.0]], [True, True], masks(2, 4))
    logits = torch.randn(2, 1, 4, 4)
    values = {
        "bce": losses.bce(logits, masks(2, 4), factors()),
        "cost_matrix_weight": losses.cost_matrix(logits, masks(2, 4), only.cost_matrix),
        "focal": losses.focal(logits, masks(2, 4), only.focal_gamma, only.focal_alpha),
        "asymmetric": losses.asymmetric(logits, masks(2, 4), only.asymmetric_gammas, only.asymmetric_clip),
        "dice": losses.soft_dice(logits, masks(2, 4)),
        "lovasz": losses.lovasz(logits, masks(2, 4)),
    }
    torch.testing.assert_close(losses.terms(logits, rows, only, factors()), 3 * values[name].sum()[None])
    assert losses.TERMS[name].per_image == (values[name].ndim == 1)


def test_terms_over_pixels_are_refused_for_classification() -> None:
    pixels = [name for name, weight in LOSS_WEIGHTS.items() if weight.segment_only]
    assert pixels == ["dice", "lovasz"]
    for name in pixels:
        with pytest.raises(UserError, match=f"loss.{name} needs pixels"):
            config.parse(Recipe, {"loss": {name: 1}}, where="test")
