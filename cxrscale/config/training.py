"""What is learned, and how: model, loss, optimizer, loop."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from cxrscale.config.section import Section

METRICS = ("loss", "auroc", "auprc", "accuracy", "f1", "brier", "dice", "dice_positives", "iou")
"""What validation reports: means over findings, or over images for dice and iou."""
LOWER_IS_BETTER = frozenset({"loss", "brier"})
"""The metrics of which less is better."""


class Model(Section):
    """The model."""

    arch: str = "densenet121"
    """classify: a timm model name; segment: Unet, UnetPlusPlus, FPN, ... of segmentation_models_pytorch."""
    encoder: str = "resnet34"
    """segment only: the encoder, by segmentation_models_pytorch's name."""
    weights: str = "imagenet"
    """imagenet, none, or a file to start from: a run's best.pt or a public CheXNet checkpoint."""
    reset_head: bool = False
    """Leave the last layer of the file in `weights` out and start a new one: for other findings than its own."""
    freeze_children: int = Field(0, ge=0)
    """How many of the model's first children keep their weights, in the order in which the model applies them."""
    freeze_prefixes: tuple[str, ...] = ()
    """Parameters whose names begin with one of these keep their weights, e.g. [encoder]."""
    options: dict[str, Any] = Field({})
    """Further arguments of the model's constructor, e.g. {growth_rate: 16}."""


class Loss(Section):
    """A weighted sum of terms; a term at 0 is not computed."""

    bce: float = Field(1.0, ge=0)
    """Weight of binary cross-entropy."""
    positive_weight: float = Field(1.0, gt=0)
    """Factor on the term of images (or pixels) with the finding in binary cross-entropy."""
    negative_weight: float = Field(1.0, gt=0)
    """Factor on the term of those without it."""
    class_balance: bool = False
    """Also weight the two terms of each finding by the other's share in the training split: with, by the share of
    images without it; without, by the share with it (CheXNet's pneumonia loss)."""
    cost_matrix_weight: float = Field(0.0, ge=0)
    """Weight of penalty-matrix cross-entropy: cross-entropy times an entry chosen by (truth, call at 0.5)."""
    cost_matrix: tuple[tuple[float, float], tuple[float, float]] = ((1.0, 5.0), (5.0, 1.0))
    """Row: truth absent, present; column: call absent, present."""
    focal: float = Field(0.0, ge=0)
    """Weight of the focal loss."""
    focal_gamma: float = Field(2.0, ge=0)
    """Exponent that turns easy examples down in the focal loss."""
    focal_alpha: float | None = Field(None, ge=0, le=1)
    """Weight of positives in the focal loss, 1 - alpha that of negatives; None: both 1."""
    asymmetric: float = Field(0.0, ge=0)
    """Weight of the asymmetric loss."""
    asymmetric_gammas: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]] = (0.0, 4.0)
    """Its exponents for positives and for negatives."""
    asymmetric_clip: float = Field(0.05, ge=0, lt=1)
    """Probability by which negatives are shifted down: those below it cost nothing."""
    dice: float = Field(0.0, ge=0)
    """Weight of soft Dice (1 - Dice coefficient of the probabilities), per image; segmentation only."""
    lovasz: float = Field(0.0, ge=0)
    """Weight of the Lovasz hinge, per image; segmentation only."""


class Optim(Section):
    """Optimizer and learning-rate schedule."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    """The optimizer; sgd uses Nesterov momentum betas[0]."""
    lr: float = Field(1e-3, gt=0)
    """Learning rate at its highest."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates of the first and second moment."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay (decoupled for adamw)."""
    schedule: Literal["constant", "cosine", "plateau"] = "constant"
    """cosine falls to 0 over the run; plateau divides when validation no longer improves."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the rate rises from 0."""
    plateau_factor: float = Field(0.1, gt=0, lt=1)
    """Factor on the rate at a plateau."""
    plateau_patience: int = Field(0, ge=0)
    """Epochs without improvement that are borne before the rate falls; 0: the first one, as in CheXNet."""
    max_grad_norm: float | None = Field(None, gt=0)
    """Gradients are scaled down to this norm; None: never."""
    grad_accum_steps: int = Field(1, ge=1)
    """Forward and backward passes an optimizer step: each worker's share of sampler.batch_size is cut into so many pieces,
    which saves memory and leaves the gradient as it is (batch normalization sees the pieces)."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Decay a step of the moving average of the weights, which is then what is validated and kept; None: no average."""


class Train(Section):
    """The loop."""

    epochs: int = Field(10, ge=1)
    """Epochs in all, counting those before a resume."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on a GPU, fp32 on a CPU."""
    channels_last: bool = True
    """NHWC memory layout, which convolutions prefer."""
    compile: Literal["auto", "never", "default", "reduce-overhead", "max-autotune"] = "auto"
    """torch.compile's mode; reduce-overhead replays CUDA graphs. auto: default on a GPU, never on a CPU."""
    monitor: str = "auroc"
    """The validation metric that chooses the best checkpoint, drives the plateau and stops early: loss, auroc, auprc,
    accuracy, f1, brier, dice, dice_positives, iou, or auroc.FINDING and the like for one finding."""
    patience: int | None = Field(None, ge=1)
    """Stop after so many epochs without a better metric; None: never."""
    checkpoint_steps: int | None = Field(None, ge=1)
    """Also write a checkpoint every so many steps; None: only at the end of each epoch."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many of the newest checkpoints stay on disk beside the best one."""

    @field_validator("monitor")
    @classmethod
    def _check_metric(cls, value: str) -> str:
        if value not in METRICS and not re.fullmatch(r"(auroc|auprc|f1)\..+", value):
            raise ValueError(
                f"no such metric; there are {', '.join(METRICS)}, and auroc.FINDING, auprc.FINDING, f1.FINDING"
            )
        return value
