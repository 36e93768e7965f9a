"""What is learned, and how: model, loss, optimizer, loop."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from cxrscale.config.findings import NIH14
from cxrscale.config.section import NOT_LEARNED, Section

METRICS = ("loss", "auroc", "auprc", "accuracy", "f1", "brier", "dice", "dice_positives", "iou")
"""The validation metrics: means over findings, or over images for dice and iou."""
LOWER_IS_BETTER = frozenset({"loss", "brier"})
"""The metrics for which a lower value is better."""


CHEXNET14 = "chexnet14"
"""The value of model.weights_findings that stands for the findings of a public CheXNet."""


class Model(Section):
    """The model."""

    arch: str = "densenet121"
    """classify: a timm model name; segment: Unet, UnetPlusPlus, FPN, ... of segmentation_models_pytorch."""
    encoder: str = "resnet34"
    """segment only: the encoder, by segmentation_models_pytorch's name."""
    weights: str = "imagenet"
    """Initial weights: imagenet, none, or a file: a run's best.pt or a public CheXNet checkpoint."""
    weights_findings: tuple[str, ...] | None = None
    """What the outputs of the last layer in the file of `weights` mean, in their order, for a file that does not say it
    itself; chexnet14: the 14 findings of ChestX-ray14 in CheXNet's order. A run's best.pt says it."""
    encoder_weights: str | None = None
    """segment only: a file whose weights start the encoder, instead of those of `weights`: ImageNet weights, a
    classifier's or another segmenter's best.pt. Encoders with timm's weights are called tu-NAME (tu-resnet18)."""
    reset_head: bool = False
    """Initialize the last layer anew instead of reading it from the file in `weights`, to train other findings."""
    freeze_children: int = Field(0, ge=0)
    """How many of the model's first child modules keep their weights, in the order in which the model applies them."""
    freeze_prefixes: tuple[str, ...] = ()
    """Parameters whose names start with one of these prefixes keep their weights, e.g. [encoder]."""
    options: dict[str, Any] = Field({})
    """More arguments of the model's constructor, e.g. {growth_rate: 16}."""

    @field_validator("weights_findings", mode="before")
    @classmethod
    def _check_weights_findings(cls, value: Any) -> Any:
        return NIH14 if value in (CHEXNET14, [CHEXNET14], (CHEXNET14,)) else value

    def weight_files(self) -> dict[str, str]:
        """The files that weights are read from, by field."""
        weights = {} if self.weights in ("imagenet", "none") else {"weights": self.weights}
        return weights | ({"encoder_weights": self.encoder_weights} if self.encoder_weights else {})

    def without_weights(self) -> Model:
        """The same model with random weights, which need no file and no network."""
        return self.model_copy(update={"weights": "none", "encoder_weights": None})


Weight = Annotated[float, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class TermWeight:
    """Marks a field of `Loss` as the weight of a term, which `models.losses.TERMS` has under the field's name."""

    segment_only: bool = False
    """The term needs pixels."""


class Loss(Section):
    """The loss is a weighted sum of terms; a term with weight 0 is not computed."""

    bce: Annotated[float, TermWeight()] = Field(1.0, ge=0)
    """Weight of binary cross-entropy."""
    positive_weight: float = Field(1.0, gt=0)
    """Factor on the binary cross-entropy of images (or pixels) with the finding."""
    negative_weight: float = Field(1.0, gt=0)
    """Factor on the binary cross-entropy of images (or pixels) without the finding."""
    class_balance: bool = False
    """Also multiply by the share of the opposite class in the training split, per finding: positives by the share of
    images without the finding, negatives by the share with it (CheXNet's pneumonia loss)."""
    cost_matrix_weight: Annotated[float, TermWeight()] = Field(0.0, ge=0)
    """Weight of cost-matrix cross-entropy: cross-entropy times the entry of `cost_matrix` for (label, prediction)."""
    cost_matrix: tuple[tuple[Weight, Weight], tuple[Weight, Weight]] = ((1.0, 5.0), (5.0, 1.0))
    """Rows: label absent, present; columns: prediction at threshold 0.5 absent, present."""
    focal: Annotated[float, TermWeight()] = Field(0.0, ge=0)
    """Weight of the focal loss."""
    focal_gamma: float = Field(2.0, ge=0)
    """Exponent of the focal loss; larger values reduce the loss of easy examples more."""
    focal_alpha: float | None = Field(None, ge=0, le=1)
    """Weight of positives in the focal loss; negatives get 1 - focal_alpha. null: both 1."""
    asymmetric: Annotated[float, TermWeight()] = Field(0.0, ge=0)
    """Weight of the asymmetric loss."""
    asymmetric_gammas: tuple[Weight, Weight] = (0.0, 4.0)
    """Exponents of the asymmetric loss for positives and for negatives."""
    asymmetric_clip: float = Field(0.05, ge=0, lt=1)
    """Probability margin of the asymmetric loss: negatives below it have no loss."""
    dice: Annotated[float, TermWeight(segment_only=True)] = Field(0.0, ge=0)
    """Weight of soft Dice (1 - Dice coefficient of the probabilities) per image; segmentation only."""
    lovasz: Annotated[float, TermWeight(segment_only=True)] = Field(0.0, ge=0)
    """Weight of the Lovasz hinge loss per image; segmentation only."""

    @model_validator(mode="after")
    def _check_any(self) -> Loss:
        if not any(getattr(self, name) for name in LOSS_WEIGHTS):
            raise ValueError(f"no term has a weight above 0: set one of {', '.join(LOSS_WEIGHTS)}, e.g. loss.bce=1")
        return self


LOSS_WEIGHTS: dict[str, TermWeight] = {
    name: mark for name, info in Loss.model_fields.items() for mark in info.metadata if isinstance(mark, TermWeight)
}
"""The fields of `Loss` that are weights of terms."""


class Optim(Section):
    """Optimizer and learning-rate schedule."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    """The optimizer; sgd uses Nesterov momentum of betas[0]."""
    lr: float = Field(1e-3, gt=0)
    """Highest learning rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Adam's decay rates of the first and the second moment."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay (decoupled for adamw)."""
    schedule: Literal["constant", "cosine", "plateau"] = "constant"
    """cosine: falls to 0 over the run; plateau: falls by `plateau_factor` when `train.monitor` stops improving."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises from 0."""
    plateau_factor: float = Field(0.1, gt=0, lt=1)
    """Factor on the learning rate at a plateau."""
    plateau_patience: int = Field(0, ge=0)
    """Epochs without improvement before the learning rate falls; 0: it falls after the first one, as in CheXNet."""
    max_grad_norm: float | None = Field(None, gt=0)
    """Gradients with a larger norm are scaled down to it; null: never."""
    grad_accum_steps: int = Field(1, ge=1, le=2**20)
    """Forward and backward passes per optimizer step: each worker's share of sampler.batch_size is split into this many
    microbatches, which saves memory. The gradient is the same, except that batch normalization sees microbatches."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Decay per step of the moving average of the weights, which is then validated and saved; null: no average."""


class Train(Section):
    """The training loop."""

    epochs: int = Field(10, ge=1, le=1_000_000)
    """Epochs in total, including those before a resume, at which it may grow. With optim.schedule=cosine the learning
    rate follows the cosine over the new total from there on, so that it rises again after a finished run."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on a GPU, fp32 on a CPU."""
    channels_last: Annotated[bool, NOT_LEARNED] = True
    """NHWC memory layout, which is faster for convolutions."""
    compile: Annotated[Literal["auto", "never", "default", "reduce-overhead", "max-autotune"], NOT_LEARNED] = "auto"
    """Mode of torch.compile; reduce-overhead uses CUDA graphs. auto: default on a GPU, never on a CPU."""
    monitor: str = "auroc"
    """The validation metric for the best checkpoint, the plateau schedule and early stopping: loss, auroc, auprc,
    accuracy, f1, brier, dice, dice_positives, iou, or for one finding auroc.FINDING, auprc.FINDING, f1.FINDING."""
    patience: Annotated[int | None, NOT_LEARNED] = Field(None, ge=1)
    """Stop after this many epochs without a better metric; null: never."""
    checkpoint_steps: Annotated[int | None, NOT_LEARNED] = Field(None, ge=1)
    """Also write a checkpoint after every this many steps; null: only at the end of each epoch."""
    keep_checkpoints: Annotated[int, NOT_LEARNED] = Field(2, ge=1)
    """How many of the newest checkpoints are kept besides the best one."""

    @field_validator("monitor")
    @classmethod
    def _check_metric(cls, value: str) -> str:
        if value not in METRICS and not re.fullmatch(r"(auroc|auprc|f1)\..+", value):
            raise ValueError(
                f"no such metric; there are {', '.join(METRICS)}, and auroc.FINDING, auprc.FINDING, f1.FINDING"
            )
        return value
