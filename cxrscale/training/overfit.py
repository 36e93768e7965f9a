"""Overfitting a few images on purpose, the first run of every new setup: few images, no augmentation.

A model that cannot learn a hundred images by heart will not learn from a hundred thousand; this shows it in minutes,
and names the likely cause.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from cxrscale.config import ABSENT, PRESENT, Recipe
from cxrscale.io import Artifact, ArtifactPart, Number, storage, write_artifact
from cxrscale.loader import (
    SUBSET,
    Rows,
    evaluation_batches,
    hash64,
    sampler,
    training_batches,
    training_epoch_length,
    usable_rows,
)
from cxrscale.models import count_trainable
from cxrscale.shards import Manifest, manifest
from cxrscale.training import loop, scoring, tracking
from cxrscale.training.distributed import LocalWorker
from cxrscale.training.state import TrainState
from cxrscale.training.tracking import Tracker
from cxrscale.types import NonFiniteError, UserError

RESULT, PLOT, FOLDER = "overfit.json", "overfit.png", "overfit"
LOSS_SHARE = 0.8
"""The training loss of the last epoch must be below this share of the first step's."""
PASS_RULES = {"classify": ("auroc", 0.95), "segment": ("dice_positives", 0.8)}
"""Task -> the metric of the very images that were trained on, and the value that it must reach."""
UNCHANGED = 1e-4
"""Weights that changed by less than this share of their norm count as unchanged: fp32 resolves 6e-8."""
MIN_STEPS = 6
"""The fewest steps per epoch: a recipe's batch of 256 would see 100 images in less than one."""

OnStep = Callable[[int, int, str], None]
"""Called with the steps done, the total, and a note."""


@dataclass(frozen=True, slots=True)
class LearningCurve:
    """What was measured while training."""

    losses: tuple[float, ...]
    """The training loss of each step."""
    metric: str
    """The metric of `scores`."""
    scores: tuple[float, ...]
    """The metric of the trained images, before the first epoch and after each."""
    steps: int
    """Steps per epoch."""
    eval_loss: float = float("nan")
    """The loss of the same images in evaluation mode, at the end."""
    weight_change: float = float("nan")
    """Norm of the change of the trainable weights, as a share of the weights' norm."""
    gradient_norm: float = float("nan")
    """The largest of all steps."""
    trainable: float = 1.0
    """Share of the model's parameters that are trainable."""
    diverged: bool = False
    """Whether the loss became infinite or NaN."""

    @property
    def max_loss(self) -> float:
        """The rule's bound on `end_loss`."""
        return LOSS_SHARE * self.start_loss

    @property
    def required_score(self) -> float:
        """The rule's bound on the last score."""
        return dict(PASS_RULES.values())[self.metric]

    @property
    def passed(self) -> bool:
        """Whether the rule is met: the loss fell and the metric is high enough."""
        return not self.diverged and self.end_loss < self.max_loss and self.scores[-1] >= self.required_score

    @property
    def start_loss(self) -> float:
        """The loss before the first update."""
        return self.losses[0] if self.losses else float("nan")

    @property
    def end_loss(self) -> float:
        """The mean loss of the last epoch."""
        return float(np.mean(self.losses[-self.steps :])) if self.losses else float("nan")


class Losses(ArtifactPart):
    """The loss of the trained images."""

    start: Number
    """Before the first update."""
    end: Number
    """Mean of the last epoch."""
    evaluation: Number
    """In evaluation mode, at the end."""


class Curve(ArtifactPart):
    """The learning curve."""

    loss: tuple[Number, ...]
    """Of each step."""
    score: tuple[Number, ...]
    """Before the first epoch and after each."""
    steps_per_epoch: int


class OverfitReport(Artifact):
    """The content of overfit.json."""

    schema_version: int = 1
    passed: bool
    verdict: str
    """One line: whether the setup can learn at all."""
    diagnosis: str
    """One line: the likely cause and what to try; empty where it passed."""
    rule: str
    """When it passes."""
    images: int
    findings: Mapping[str, Mapping[str, int]]
    """Finding -> how many of the images are labeled present, and absent."""
    loss: Losses
    metric: str
    """The metric of the rule: auroc or dice_positives."""
    score: Number
    """Its value for the trained images, at the end."""
    weight_change: Number
    """Norm of the change of the trainable weights, as a share of the weights' norm."""
    trainable: float
    """Share of the model's parameters that are trainable."""
    curve: Curve
    image_ids: tuple[str, ...]
    recipe: Recipe
    """The recipe that was trained: the given one, simplified."""
    manifest: str
    """Digest of the datasets' manifests."""


@dataclass(frozen=True, slots=True)
class OverfitResult:
    """How it ended, and where its files are."""

    report: OverfitReport
    curve: LearningCurve
    address: str
    """Of overfit.json."""
    plot: str
    """Where the caller may write the learning curve: overfit.png beside it."""


def overfit(
    recipe: Recipe, stem: str, images: int = 100, epochs: int = 30, on_step: OnStep | None = None
) -> OverfitResult:
    """Train on a few images until the model knows them by heart, in this process; writes overfit.json.

    Args:
        recipe: tracking.name, or else the stem, names the folder under tracking.runs_dir.
        stem: the stem of the recipe's file.
        images: how many training images; half of them with a finding where there are as many.
        epochs: the most passes over them; it ends as soon as the rule is met.
        on_step: called after every step.

    Raises:
        UserError: shards, labels or model do not fit the recipe, or no finding has images both with and without it.
    """
    folder = storage.join(recipe.tracking.runs_dir, recipe.tracking.name or f"{stem}-overfit")
    dataset = manifest.load(*recipe.data.shards)
    data = choose_images(dataset, recipe, images)
    recipe = simplify_recipe(recipe, len(data), epochs)
    curve = _train(recipe, data, storage.join(folder, FOLDER), on_step)
    name, required = PASS_RULES[recipe.data.task]
    report = OverfitReport(
        passed=curve.passed,
        verdict=verdict(curve, len(data)),
        diagnosis="" if curve.passed else diagnosis(curve, recipe),
        rule=f"the last epoch's training loss below {LOSS_SHARE} of the first step's, and {name} of the trained images "
        f"at least {required}",
        images=len(data),
        findings=_label_counts(data, recipe),
        loss=Losses(start=_finite(curve.start_loss), end=_finite(curve.end_loss), evaluation=_finite(curve.eval_loss)),
        metric=name,
        score=curve.scores[-1],
        weight_change=_finite(curve.weight_change),
        trainable=curve.trainable,
        curve=Curve(loss=tuple(map(_finite, curve.losses)), score=curve.scores, steps_per_epoch=curve.steps),
        image_ids=tuple(data.image_id.tolist()),
        recipe=recipe,
        manifest=dataset.digest,
    )
    address = storage.join(folder, RESULT)
    write_artifact(address, report)
    return OverfitResult(report, curve, address, storage.join(folder, PLOT))


def choose_images(dataset: Manifest, recipe: Recipe, images: int) -> Manifest:
    """A manifest of the chosen training images alone.

    Raises:
        UserError: the training split is empty, or no finding has images both with and without it.
    """
    rows = usable_rows(dataset, recipe.data.train_split, recipe.data)
    label_NF = dataset.labels(recipe.data.findings)[rows]
    hash_N = hash64(recipe.sampler.seed, SUBSET, dataset.key[rows])
    chosen = choose(label_NF, hash_N, images)
    label_CF = label_NF[chosen]
    if not ((label_CF == PRESENT).any(axis=0) & (label_CF == ABSENT).any(axis=0)).any():
        raise UserError(
            f"data.findings: none of {', '.join(recipe.data.findings)} is present in some and absent in others of "
            f"{len(chosen)} training images: nothing to tell apart; check the findings or raise --images"
        )
    return Manifest(dataset.table.take(rows[chosen]), dataset.digest, dataset.metadata)


def choose(label_NF: npt.NDArray[np.float32], hash_N: npt.NDArray[np.uint64], count: int) -> Rows:
    """Ascending indices of `count` of N labeled images, or of all where there are fewer.

    Half of them have a finding present, and the findings take turns in giving one; where either half is short, the
    other fills it. Within a kind the lowest hashes come first, as in sampler.max_images.
    """
    order = np.argsort(hash_N)
    order = order[~np.isnan(label_NF[order]).all(axis=1)]
    present_NF = label_NF[order] == PRESENT
    negatives = order[~present_NF.any(axis=1)].tolist()
    rounds = itertools.zip_longest(*(order[present_N].tolist() for present_N in present_NF.T))
    positives = list(dict.fromkeys(index for indices in rounds for index in indices if index is not None))
    positives = positives[: max(count // 2, count - len(negatives))]
    return np.sort(np.array(positives + negatives[: count - len(positives)], np.int64))


def simplify_recipe(recipe: Recipe, images: int, epochs: int) -> Recipe:
    """The recipe at its simplest: each image once per epoch as it is, a constant learning rate, no moving average."""
    changes: dict[str, dict[str, Any]] = {
        "sampler": {
            "batch_size": min(recipe.sampler.batch_size, max(2, images // MIN_STEPS)),
            "sampling": "all",
            "dataset_weights": (),
            "max_images": None,
            "weights": {},
            "hard_predictions": None,
            "steps_per_epoch": None,
        },
        "augment": {"probability": 0.0},
        "optim": {"schedule": "constant", "warmup_steps": 0, "ema_decay": None},
        "train": {"epochs": epochs, "patience": None},
        "tracking": {"wandb": "disabled", "log_steps": 1},
    }
    return recipe.model_copy(
        update={name: getattr(recipe, name).model_copy(update=fields) for name, fields in changes.items()}
    )


def _train(recipe: Recipe, data: Manifest, folder: str, on_step: OnStep | None) -> LearningCurve:
    worker = LocalWorker()
    state = loop.build_state(recipe, worker.dist.device)
    initial = _trainable_weights(state.model)
    steps = sampler.steps_per_epoch(training_epoch_length(data, recipe), recipe.sampler)
    tracker = Tracker(folder, recipe.tracking, {})
    batches = training_batches(data, recipe, worker.dist)
    context = loop.make_context(recipe, worker, data, state, steps, tracker)
    name, _ = PASS_RULES[recipe.data.task]
    eval_loss, score = _evaluate(context, state, name)
    scores, diverged = [score], False
    try:
        while state.progress.epoch < recipe.train.epochs:
            for step in loop.train_epoch(context, state, batches):
                if on_step:
                    on_step(step, recipe.train.epochs * steps, f"training {name} {scores[-1]:.3f}")
            eval_loss, score = _evaluate(context, state, name)
            scores.append(score)
            curve = LearningCurve(losses=_logged(folder, "loss"), metric=name, scores=tuple(scores), steps=steps)
            if curve.passed:
                break
    except NonFiniteError:
        diverged = True
    finally:
        batches.close()
        tracker.close()
    final = _trainable_weights(state.model)
    return LearningCurve(
        losses=_logged(folder, "loss"),
        metric=name,
        scores=tuple(scores),
        eval_loss=eval_loss,
        steps=steps,
        weight_change=float((final - initial).norm() / initial.norm().clamp_min(1e-12)),
        gradient_norm=max(_logged(folder, "gradient_norm"), default=0.0),
        trainable=count_trainable(state.model) / sum(parameter.numel() for parameter in state.model.parameters()),
        diverged=diverged,
    )


def _evaluate(context: loop.TrainContext, state: TrainState, metric: str) -> tuple[float, float]:
    """(loss, metric) of the trained images in evaluation mode."""
    recipe, data, dist = context.recipe, context.data, context.worker.dist
    batches = evaluation_batches(data, recipe.data.train_split, recipe, dist)
    rows = scoring.score(state.eval_model, batches, recipe, dist, context.weights)
    label_NF = data.labels(recipe.data.findings)[rows.row_N]
    return rows.loss, scoring.summary(rows, label_NF, recipe.data.findings)[metric]


def _logged(folder: str, name: str) -> tuple[float, ...]:
    """A value of each step; what was not finite is 0."""
    return tuple(float(line[name] or 0) for line in tracking.read_log(folder))


def _label_counts(data: Manifest, recipe: Recipe) -> dict[str, dict[str, int]]:
    label_NF = data.labels(recipe.data.findings)
    states = {"present": PRESENT, "absent": ABSENT}
    return {
        finding: {state: int((label_NF[:, f] == value).sum()) for state, value in states.items()}
        for f, finding in enumerate(recipe.data.findings)
    }


def _trainable_weights(model: nn.Module) -> torch.Tensor:
    """All trainable weights as one vector in host memory."""
    trainable = [parameter.detach().flatten() for parameter in model.parameters() if parameter.requires_grad]
    return torch.cat(trainable).double().cpu()


def verdict(curve: LearningCurve, images: int) -> str:
    """One line: whether the setup can learn at all."""
    message = "PASSED: the setup can learn" if curve.passed else "FAILED: the setup does not learn"
    metric = {"auroc": "AUROC", "dice_positives": "Dice on the positives"}[curve.metric]
    return (
        f"{message}: {metric} of {images} trained images {curve.scores[-1]:.3f} (must reach {curve.required_score}) "
        f"after {len(curve.scores) - 1} epochs, training loss {curve.start_loss:.3g} -> {curve.end_loss:.3g} "
        f"(must fall below {LOSS_SHARE:.0%} of its start)"
    )


def diagnosis(curve: LearningCurve, recipe: Recipe) -> str:
    """One line: the likely cause of a failure, and what to try."""
    lr = f"optim.lr={recipe.optim.lr:g}"
    frozen = f"only {curve.trainable:.1%} of the weights are trained: lower model.freeze_children, or raise --epochs"
    if curve.diverged:
        return (
            f"the loss is not a number after step {len(curve.losses)}: {lr} is too high, or set optim.max_grad_norm=1"
        )
    if not curve.end_loss < curve.max_loss:
        if curve.gradient_norm == 0:
            return "no gradient reaches the weights: check the weights of the loss's terms and model.freeze_children"
        if curve.weight_change < UNCHANGED:
            change = f"{curve.weight_change:.1e}"
            return f"the loss does not fall: the weights change by only {change} of their norm; raise {lr}"
        if curve.end_loss > 1.2 * curve.start_loss:
            return f"the loss rises: {lr} is too high, or set optim.max_grad_norm=1"
        if curve.trainable < 0.5:
            return frozen
        return f"the weights change but the loss does not fall: try {lr} ten times higher, then ten times lower"
    best = int(np.argmax(np.nan_to_num(curve.scores)))
    if curve.scores[best] > curve.scores[-1] + 0.1:
        return f"unstable: {curve.scores[best]:.3f} after {best} epochs was lost again; {lr} is too high"
    if curve.eval_loss > max(2 * curve.end_loss, curve.start_loss):
        return (
            f"the model fits the images in training mode (loss {curve.end_loss:.3g}) but not in evaluation mode "
            f"({curve.eval_loss:.3g}): the averages of batch normalization lag behind; raise --epochs, or lower {lr}"
        )
    quarter = max(1, len(curve.losses) // 4)
    if np.mean(curve.losses[-quarter:]) < 0.9 * np.mean(curve.losses[-2 * quarter : -quarter]):
        return f"the loss is still falling: raise --epochs, or raise {lr}"
    if curve.trainable < 0.5:
        return frozen
    if recipe.data.task == "segment":
        return "the loss falls but Dice does not rise: set loss.dice=1, and check the masks with `cxrscale preview`"
    return "the loss falls but AUROC does not rise: do the labels belong to the images? check with `cxrscale preview`"


def _finite(value: float) -> float:
    """Infinite values have no place in JSON: NaN, which becomes null."""
    return value if np.isfinite(value) else float("nan")
