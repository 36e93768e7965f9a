"""The run that every beginner should start with: few images, no augmentation, and it must learn them by heart.

A model that cannot overfit a hundred images will not learn from a hundred thousand; this says so in minutes, and why.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from torch import nn

from cxrscale.config import ABSENT, PRESENT, Recipe
from cxrscale.io import storage
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
from cxrscale.reporting import SPLIT_COLORS, STYLE
from cxrscale.shards import Manifest, manifest, splits
from cxrscale.training import loop, scoring, tracking
from cxrscale.training.checkpoint import TrainState
from cxrscale.training.distributed import LocalWorker
from cxrscale.training.tracking import Tracker
from cxrscale.types import UserError

RESULT, PLOT, FOLDER = "ablation.json", "ablation.png", "ablation"
FELL = 0.8
"""The training loss of the last epoch must be below this share of the first step's."""
PASS_RULES = {"classify": ("auroc", 0.95), "segment": ("dice_positives", 0.8)}
"""The metric of the very images that were trained on, and what it must reach."""
STILL = 1e-4
"""Weights that moved by less than this share of their norm have not moved: fp32 resolves 6e-8."""
STEPS = 6
"""Steps an epoch at least: a recipe's batch of 256 would see 100 images in less than one."""

Shown = Callable[[int, int, str], None]
"""Called with the steps done, their number and a note."""


@dataclass(frozen=True, slots=True)
class LearningCurve:
    """What was seen while training."""

    losses: tuple[float, ...]
    """The training loss of each step."""
    scores: tuple[float, ...]
    """The metric of the trained images, before the first epoch and after each."""
    eval_loss: float
    """The loss of the same images in evaluation, at the end."""
    steps: int
    """Steps an epoch."""
    moved: float
    """Norm of the change of the trained weights, as a share of the weights' norm."""
    gradient: float
    """The largest norm of a gradient."""
    trained: float
    """Share of the model's parameters that are trained."""
    diverged: bool
    """The loss became infinite or no number."""

    @property
    def start(self) -> float:
        """The loss before the first update."""
        return self.losses[0] if self.losses else float("nan")

    @property
    def end(self) -> float:
        """The mean loss of the last epoch."""
        return float(np.mean(self.losses[-self.steps :])) if self.losses else float("nan")


def overfit(recipe: Recipe, stem: str, images: int = 100, epochs: int = 30, shown: Shown | None = None) -> str:
    """Train on a few images until the model knows them by heart, in this process; say whether it does.

    Args:
        recipe: tracking.name, or else the stem, names the folder under tracking.runs_dir.
        stem: the recipe file's stem.
        images: how many training images; half of them with a finding where there are as many.
        epochs: the most passes over them; it ends sooner where the rule is met.
        shown: is told of the progress.

    Returns:
        The address of ablation.json; the learning curve lies beside it as ablation.png.

    Raises:
        UserError: shards, labels or model do not fit the recipe, or no finding has images both with and without it.
    """
    folder = storage.join(recipe.tracking.runs_dir, recipe.tracking.name or f"{stem}-ablation")
    whole = manifest.load(*recipe.data.shards)
    data = choose_images(whole, recipe, images)
    recipe = plain_recipe(recipe, len(data), epochs)
    course, labeled = _trained(recipe, data, storage.join(folder, FOLDER), shown)
    name, least = PASS_RULES[recipe.data.task]
    ok = passed(course, recipe)
    found = {
        "passed": ok,
        "verdict": verdict(course, recipe, len(data)),
        "diagnosis": "" if ok else diagnosis(course, recipe),
        "rule": f"the last epoch's training loss below {FELL} of the first step's, and {name} of the trained images "
        f"at least {least}",
        "images": len(data),
        "findings": labeled,
        "loss": {"start": course.start, "end": course.end, "evaluation": course.eval_loss},
        name: course.scores[-1],
        "moved": course.moved,
        "trained": course.trained,
        "curve": {"loss": course.losses, name: course.scores, "steps_per_epoch": course.steps},
        "image_ids": data.image_id.tolist(),
        "recipe": recipe.model_dump(mode="json"),
        "manifest": whole.digest,
    }
    storage.write(storage.join(folder, PLOT), plot(course, recipe))
    address = storage.join(folder, RESULT)
    storage.write(address, json.dumps(_without_nan(found), indent=2) + "\n")
    return address


def choose_images(whole: Manifest, recipe: Recipe, images: int) -> Manifest:
    """A manifest of the chosen training images alone.

    Raises:
        UserError: the training split is empty, or no finding has images both with and without it.
    """
    rows = usable_rows(whole, recipe.data.train_split, recipe.data)
    label_NF = whole.labels(recipe.data.findings)[rows]
    hash_N = hash64(recipe.sampler.seed, SUBSET, whole.key[rows])
    chosen = choose(label_NF, hash_N, images)
    label_CF = label_NF[chosen]
    if not ((label_CF == PRESENT).any(axis=0) & (label_CF == ABSENT).any(axis=0)).any():
        raise UserError(
            f"data.findings: none of {', '.join(recipe.data.findings)} is present in some and absent in others of "
            f"{len(chosen)} training images: nothing to tell apart; check the findings or raise --images"
        )
    return Manifest(whole.table.take(rows[chosen]), whole.digest, whole.about)


def choose(label_NF: npt.NDArray[np.float32], hash_N: npt.NDArray[np.uint64], count: int) -> Rows:
    """Ascending indices of `count` of N labeled images, or of all where there are fewer.

    Half of them have a finding present, each finding in turn giving one; where either half is short, the other fills
    it. Within a kind the lowest hashes come first, as in sampler.max_images.
    """
    order = np.argsort(hash_N)
    order = order[~np.isnan(label_NF[order]).all(axis=1)]
    present_NF = label_NF[order] == PRESENT
    without = order[~present_NF.any(axis=1)].tolist()
    turns = itertools.zip_longest(*(order[present_F].tolist() for present_F in present_NF.T))
    with_one = list(dict.fromkeys(index for turn in turns for index in turn if index is not None))
    with_one = with_one[: max(count // 2, count - len(without))]
    return np.sort(np.array(with_one + without[: count - len(with_one)], np.int64))


def plain_recipe(recipe: Recipe, images: int, epochs: int) -> Recipe:
    """The recipe at its plainest: each image once an epoch as it is, a constant learning rate, no average."""
    changes: dict[str, dict[str, Any]] = {
        "sampler": {
            "batch_size": min(recipe.sampler.batch_size, max(2, images // STEPS)),
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


def _trained(
    recipe: Recipe, data: Manifest, folder: str, shown: Shown | None
) -> tuple[LearningCurve, dict[str, dict[str, int]]]:
    worker = LocalWorker()
    learner = loop.build_state(recipe, worker)
    before = _weights(learner.net)
    steps = sampler.steps_per_epoch(training_epoch_length(data, recipe.data, recipe.sampler), recipe.sampler)
    tracker = Tracker(folder, recipe.tracking, {}, 0)
    batches = training_batches(data, recipe.data, recipe.sampler, recipe.augment, device=worker.device)
    context = loop.make_context(recipe, worker, data, learner, steps, tracker)
    name, least = PASS_RULES[recipe.data.task]
    rows, scores = _scored(context, learner)
    values, diverged = [scores[name]], False
    try:
        while learner.progress.epoch < recipe.train.epochs:
            for step in loop.train_epoch(context, learner, batches):
                if shown:
                    shown(step, recipe.train.epochs * steps, f"training {name} {values[-1]:.3f}")
            rows, scores = _scored(context, learner)
            values.append(scores[name])
            if values[-1] >= least and passed(_course(folder, values, rows.loss, steps), recipe):
                break
    except loop.DivergedError:
        diverged = True
    finally:
        batches.close()
        tracker.close()
    after = _weights(learner.net)
    moved = float((after - before).norm() / before.norm().clamp_min(1e-12))
    trained = count_trainable(learner.net) / sum(each.numel() for each in learner.net.parameters())
    label_NF = data.labels(recipe.data.findings)
    states = {"present": PRESENT, "absent": ABSENT}
    counted = {
        finding: {state: int((label_NF[:, f] == value).sum()) for state, value in states.items()}
        for f, finding in enumerate(recipe.data.findings)
    }
    return _course(folder, values, rows.loss, steps, moved, trained, diverged), counted


def _scored(context: loop.TrainContext, learner: TrainState) -> tuple[scoring.ScoredRows, dict[str, float]]:
    recipe, data = context.recipe, context.data
    batches = evaluation_batches(
        data, recipe.data.train_split, recipe.data, recipe.sampler, recipe.augment, device=context.worker.device
    )
    rows = scoring.score(learner.chosen, batches, recipe.train, context.worker, recipe.loss, context.weights)
    label_NF = data.labels(recipe.data.findings)[rows.row_N]
    return rows, scoring.summary(rows, label_NF, recipe.data.findings)


def _course(
    folder: str,
    scores: Sequence[float],
    eval_loss: float,
    steps: int,
    moved: float = 1.0,
    trained: float = 1.0,
    diverged: bool = False,
) -> LearningCurve:
    lines = tracking.read_log(folder)
    losses = tuple(float(line["loss"]) for line in lines)
    gradient = max((float(line["gradient_norm"] or 0) for line in lines), default=0.0)
    return LearningCurve(losses, tuple(scores), eval_loss, steps, moved, gradient, trained, diverged)


def _weights(net: nn.Module) -> torch.Tensor:
    """What is trained, as one vector on the host."""
    trained = [each.detach().flatten() for each in net.parameters() if each.requires_grad]
    return torch.cat(trained).double().cpu()


def passed(course: LearningCurve, recipe: Recipe) -> bool:
    """The rule."""
    return not course.diverged and course.end < FELL * course.start and course.scores[-1] >= _least(recipe)


def _least(recipe: Recipe) -> float:
    return PASS_RULES[recipe.data.task][1]


def verdict(course: LearningCurve, recipe: Recipe, images: int) -> str:
    """One line: whether the set-up can learn at all."""
    name, least = PASS_RULES[recipe.data.task]
    said = "PASSED: the set-up can learn" if passed(course, recipe) else "FAILED: the set-up does not learn"
    what = {"auroc": "AUROC", "dice_positives": "Dice on the positives"}[name]
    return (
        f"{said}: {what} of {images} trained images {course.scores[-1]:.3f} (must reach {least}) after "
        f"{len(course.scores) - 1} epochs, training loss {course.start:.3g} -> {course.end:.3g} "
        f"(must fall below {FELL:.0%} of its start)"
    )


def diagnosis(course: LearningCurve, recipe: Recipe) -> str:
    """One line: what most likely hinders a set-up that failed, and what to try."""
    rate = f"optim.lr={recipe.optim.lr:g}"
    frozen = f"only {course.trained:.1%} of the weights are trained: lower model.freeze_children, or give more --epochs"
    if course.diverged:
        return (
            f"the loss is no number after step {len(course.losses)}: {rate} is too high, or set optim.max_grad_norm=1"
        )
    if course.end >= FELL * course.start:
        if course.gradient == 0:
            return "no gradient reaches the weights: check the weights of the loss's terms and model.freeze_children"
        if course.moved < STILL:
            return f"the loss does not move, for the weights moved by {course.moved:.1e} of their size: raise {rate}"
        if course.end > 1.2 * course.start:
            return f"the loss rises: {rate} is too high, or set optim.max_grad_norm=1"
        if course.trained < 0.5:
            return frozen
        return f"the weights move but the loss does not fall: try {rate} ten times higher, then ten times lower"
    best = int(np.argmax(np.nan_to_num(course.scores)))
    if course.scores[best] > course.scores[-1] + 0.1:
        return f"unsteady: {course.scores[best]:.3f} after {best} epochs was lost again; {rate} is too high"
    if course.eval_loss > max(2 * course.end, course.start):
        return (
            f"learnt in training (loss {course.end:.3g}) but not in evaluation ({course.eval_loss:.3g}) on the same "
            "images: batch normalization's averages lag behind; give more --epochs, or lower " + rate
        )
    quarter = max(1, len(course.losses) // 4)
    if np.mean(course.losses[-quarter:]) < 0.9 * np.mean(course.losses[-2 * quarter : -quarter]):
        return f"the loss is still falling: give more --epochs, or raise {rate}"
    if course.trained < 0.5:
        return frozen
    if recipe.data.task == "segment":
        return "the loss falls but Dice does not: set loss.dice=1, and look at the masks with `cxrscale batches`"
    return "the loss falls but AUROC does not: do labels and images belong together? look with `cxrscale batches`"


def plot(course: LearningCurve, recipe: Recipe) -> bytes:
    """The learning curve as a PNG: the loss of each step, the metric of each epoch and what it must reach."""
    name, least = PASS_RULES[recipe.data.task]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        step = np.arange(1, len(course.losses) + 1)
        left.plot(step, course.losses, color=SPLIT_COLORS[splits.TRAIN], linewidth=1, label="a step")
        if course.losses:
            left.axhline(
                FELL * course.start, color=SPLIT_COLORS[splits.TEST], linestyle="--", linewidth=1, label="rule"
            )
        left.set_xlabel("optimizer step")
        left.set_ylabel("training loss")
        left.set_ylim(bottom=0)
        left.legend(loc="best")
        right.plot(
            range(len(course.scores)), course.scores, color=SPLIT_COLORS[splits.TRAIN], marker=".", label="an epoch"
        )
        right.axhline(least, color=SPLIT_COLORS[splits.TEST], linestyle="--", linewidth=1, label="rule")
        right.set_xlabel("epoch")
        right.set_ylabel(f"{name} of the trained images")
        right.set_ylim(0, 1.02)
        right.legend(loc="best")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: null says undefined."""
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
