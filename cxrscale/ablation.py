"""The run that every beginner should start with: few pictures, no augmentation, and it must learn them by heart.

A net that cannot overfit a hundred pictures will not learn from a hundred thousand; this says so in minutes, and why.
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

from cxrscale import labels, models, scoring, splits, storage, tracking, train
from cxrscale.batches import feed, plan
from cxrscale.batches.plan import Rows
from cxrscale.checkpoint import Learner
from cxrscale.config import Recipe
from cxrscale.schema import InputError
from cxrscale.shards import manifest
from cxrscale.shards.audit_page import COLOURS, STYLE
from cxrscale.shards.manifest import Manifest
from cxrscale.tracking import Tracker
from cxrscale.worker import LocalWorker

RESULT, PLOT, FOLDER = "ablation.json", "ablation.png", "ablation"
FELL = 0.8
"""The training loss of the last epoch must be below this share of the first step's."""
LEARNT = {"classify": ("auroc", 0.95), "segment": ("dice_positives", 0.8)}
"""The metric of the very pictures that were trained on, and what it must reach."""
STILL = 1e-4
"""Weights that moved by less than this share of their norm have not moved: fp32 resolves 6e-8."""
STEPS = 6
"""Steps an epoch at least: a recipe's batch of 256 would see 100 pictures in less than one."""

Shown = Callable[[int, int, str], None]
"""Called with the steps done, their number and a note."""


@dataclass(frozen=True, slots=True)
class Course:
    """What was seen while training."""

    losses: tuple[float, ...]
    """The training loss of each step."""
    scores: tuple[float, ...]
    """The metric of the trained pictures, before the first epoch and after each."""
    eval_loss: float
    """The loss of the same pictures in evaluation, at the end."""
    steps: int
    """Steps an epoch."""
    moved: float
    """Norm of the change of the trained weights, as a share of the weights' norm."""
    gradient: float
    """The largest norm of a gradient."""
    trained: float
    """Share of the net's parameters that are trained."""
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


def ablation(recipe: Recipe, stem: str, images: int = 100, epochs: int = 30, shown: Shown | None = None) -> str:
    """Train on a few pictures until the net knows them by heart, in this process; say whether it does.

    Args:
        recipe: tracking.name, or else the stem, names the folder under tracking.root.
        stem: the recipe file's stem.
        images: how many training pictures; half of them with a finding where there are as many.
        epochs: the most passes over them; it ends sooner where the rule is met.
        shown: is told of the progress.

    Returns:
        The address of ablation.json; the learning curve lies beside it as ablation.png.

    Raises:
        InputError: shards, labels or net do not fit the recipe, or no finding has pictures both with and without it.
    """
    folder = storage.join(recipe.tracking.root, recipe.tracking.name or f"{stem}-ablation")
    whole = manifest.load(*recipe.data.shards)
    data = pictures(whole, recipe, images)
    recipe = plain(recipe, len(data), epochs)
    course, labelled = _trained(recipe, data, storage.join(folder, FOLDER), shown)
    name, least = LEARNT[recipe.data.task]
    passed = learnt(course, recipe)
    found = {
        "passed": passed,
        "verdict": verdict(course, recipe, len(data)),
        "diagnosis": "" if passed else diagnosis(course, recipe),
        "rule": f"the last epoch's training loss below {FELL} of the first step's, and {name} of the trained pictures "
        f"at least {least}",
        "images": len(data),
        "findings": labelled,
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


def pictures(whole: Manifest, recipe: Recipe, images: int) -> Manifest:
    """A manifest of the chosen training pictures alone.

    Raises:
        InputError: the training split is empty, or no finding has pictures both with and without it.
    """
    rows = feed.usable_rows(whole, recipe.data.train_split, recipe.data)
    label_NF = whole.labels(recipe.data.findings)[rows]
    hash_N = plan.hashed(recipe.plan.seed, plan.SUBSET, whole.key[rows])
    chosen = choose(label_NF, hash_N, images)
    label_CF = label_NF[chosen]
    if not ((label_CF == labels.PRESENT).any(axis=0) & (label_CF == labels.ABSENT).any(axis=0)).any():
        raise InputError(
            f"data.findings: none of {', '.join(recipe.data.findings)} is present in some and absent in others of "
            f"{len(chosen)} training pictures: nothing to tell apart; check the findings or raise --images"
        )
    return Manifest(whole.table.take(rows[chosen]), whole.digest, whole.about)


def choose(label_NF: npt.NDArray[np.float32], hash_N: npt.NDArray[np.uint64], count: int) -> Rows:
    """Ascending indices of `count` of N labelled pictures, or of all where there are fewer.

    Half of them have a finding present, each finding in turn giving one; where either half is short, the other fills
    it. Within a kind the lowest hashes come first, as in plan.subset.
    """
    order = np.argsort(hash_N)
    order = order[~np.isnan(label_NF[order]).all(axis=1)]
    present_NF = label_NF[order] == labels.PRESENT
    without = order[~present_NF.any(axis=1)].tolist()
    turns = itertools.zip_longest(*(order[present_F].tolist() for present_F in present_NF.T))
    with_one = list(dict.fromkeys(index for turn in turns for index in turn if index is not None))
    with_one = with_one[: max(count // 2, count - len(without))]
    return np.sort(np.array(with_one + without[: count - len(with_one)], np.int64))


def plain(recipe: Recipe, images: int, epochs: int) -> Recipe:
    """The recipe at its plainest: each picture once an epoch as it is, a constant learning rate, no average."""
    changes: dict[str, dict[str, Any]] = {
        "plan": {
            "batch": min(recipe.plan.batch, max(2, images // STEPS)),
            "sampling": "all",
            "mix": (),
            "subset": None,
            "weights": {},
            "hard_scores": None,
            "steps_per_epoch": None,
        },
        "augment": {"probability": 0.0},
        "optim": {"schedule": "constant", "warmup_steps": 0, "ema": None},
        "train": {"epochs": epochs, "patience": None},
        "tracking": {"wandb": "disabled", "log_steps": 1},
    }
    return recipe.model_copy(
        update={name: getattr(recipe, name).model_copy(update=fields) for name, fields in changes.items()}
    )


def _trained(
    recipe: Recipe, data: Manifest, folder: str, shown: Shown | None
) -> tuple[Course, dict[str, dict[str, int]]]:
    worker = LocalWorker()
    learner = train.build(recipe, worker)
    before = _weights(learner.net)
    steps = plan.steps_per_epoch(feed.training_rows(data, recipe.data, recipe.plan), recipe.plan)
    tracker = Tracker(folder, recipe.tracking, {}, 0)
    batches = feed.training(data, recipe.data, recipe.plan, recipe.augment, device=worker.device)
    loop = train.make_loop(recipe, worker, data, learner, steps, tracker)
    name, least = LEARNT[recipe.data.task]
    rows, scores = _scored(loop, learner)
    values, diverged = [scores[name]], False
    try:
        while learner.progress.epoch < recipe.train.epochs:
            for step in train.epoch(loop, learner, batches):
                if shown:
                    shown(step, recipe.train.epochs * steps, f"training {name} {values[-1]:.3f}")
            rows, scores = _scored(loop, learner)
            values.append(scores[name])
            if values[-1] >= least and learnt(_course(folder, values, rows.loss, steps), recipe):
                break
    except train.Diverged:
        diverged = True
    finally:
        batches.close()
        tracker.close()
    after = _weights(learner.net)
    moved = float((after - before).norm() / before.norm().clamp_min(1e-12))
    trained = models.parameters(learner.net) / sum(each.numel() for each in learner.net.parameters())
    label_NF = data.labels(recipe.data.findings)
    states = {"present": labels.PRESENT, "absent": labels.ABSENT}
    counted = {
        finding: {state: int((label_NF[:, f] == value).sum()) for state, value in states.items()}
        for f, finding in enumerate(recipe.data.findings)
    }
    return _course(folder, values, rows.loss, steps, moved, trained, diverged), counted


def _scored(loop: train.Loop, learner: Learner) -> tuple[scoring.Rows, dict[str, float]]:
    recipe, data = loop.recipe, loop.data
    batches = feed.evaluation(
        data, recipe.data.train_split, recipe.data, recipe.plan, recipe.augment, device=loop.worker.device
    )
    rows = scoring.score(learner.chosen, batches, recipe.train, loop.worker, recipe.loss, loop.weights)
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
) -> Course:
    lines = tracking.read(folder)
    losses = tuple(float(line["loss"]) for line in lines)
    gradient = max((float(line["gradient_norm"] or 0) for line in lines), default=0.0)
    return Course(losses, tuple(scores), eval_loss, steps, moved, gradient, trained, diverged)


def _weights(net: nn.Module) -> torch.Tensor:
    """What is trained, as one vector on the host."""
    trained = [each.detach().flatten() for each in net.parameters() if each.requires_grad]
    return torch.cat(trained).double().cpu()


def learnt(course: Course, recipe: Recipe) -> bool:
    """The rule."""
    return not course.diverged and course.end < FELL * course.start and course.scores[-1] >= _least(recipe)


def _least(recipe: Recipe) -> float:
    return LEARNT[recipe.data.task][1]


def verdict(course: Course, recipe: Recipe, images: int) -> str:
    """One line: whether the set-up can learn at all."""
    name, least = LEARNT[recipe.data.task]
    said = "PASSED: the set-up can learn" if learnt(course, recipe) else "FAILED: the set-up does not learn"
    what = {"auroc": "AUROC", "dice_positives": "Dice on the positives"}[name]
    return (
        f"{said}: {what} of {images} trained pictures {course.scores[-1]:.3f} (must reach {least}) after "
        f"{len(course.scores) - 1} epochs, training loss {course.start:.3g} -> {course.end:.3g} "
        f"(must fall below {FELL:.0%} of its start)"
    )


def diagnosis(course: Course, recipe: Recipe) -> str:
    """One line: what most likely hinders a set-up that failed, and what to try."""
    rate = f"optim.lr={recipe.optim.lr:g}"
    frozen = f"only {course.trained:.1%} of the weights are trained: lower model.freeze, or give more --epochs"
    if course.diverged:
        return f"the loss is no number after step {len(course.losses)}: {rate} is too high, or set optim.clip_norm=1"
    if course.end >= FELL * course.start:
        if course.gradient == 0:
            return "no gradient reaches the weights: check the weights of the loss's terms and model.freeze"
        if course.moved < STILL:
            return f"the loss does not move, for the weights moved by {course.moved:.1e} of their size: raise {rate}"
        if course.end > 1.2 * course.start:
            return f"the loss rises: {rate} is too high, or set optim.clip_norm=1"
        if course.trained < 0.5:
            return frozen
        return f"the weights move but the loss does not fall: try {rate} ten times higher, then ten times lower"
    best = int(np.argmax(np.nan_to_num(course.scores)))
    if course.scores[best] > course.scores[-1] + 0.1:
        return f"unsteady: {course.scores[best]:.3f} after {best} epochs was lost again; {rate} is too high"
    if course.eval_loss > max(2 * course.end, course.start):
        return (
            f"learnt in training (loss {course.end:.3g}) but not in evaluation ({course.eval_loss:.3g}) on the same "
            "pictures: batch normalisation's averages lag behind; give more --epochs, or lower " + rate
        )
    quarter = max(1, len(course.losses) // 4)
    if np.mean(course.losses[-quarter:]) < 0.9 * np.mean(course.losses[-2 * quarter : -quarter]):
        return f"the loss is still falling: give more --epochs, or raise {rate}"
    if course.trained < 0.5:
        return frozen
    if recipe.data.task == "segment":
        return "the loss falls but Dice does not: set loss.dice=1, and look at the masks with `cxrscale batches`"
    return "the loss falls but AUROC does not: do labels and pictures belong together? look with `cxrscale batches`"


def plot(course: Course, recipe: Recipe) -> bytes:
    """The learning curve as a PNG: the loss of each step, the metric of each epoch and what it must reach."""
    name, least = LEARNT[recipe.data.task]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        step = np.arange(1, len(course.losses) + 1)
        left.plot(step, course.losses, color=COLOURS[splits.TRAIN], linewidth=1, label="a step")
        if course.losses:
            left.axhline(FELL * course.start, color=COLOURS[splits.TEST], linestyle="--", linewidth=1, label="rule")
        left.set_xlabel("optimizer step")
        left.set_ylabel("training loss")
        left.set_ylim(bottom=0)
        left.legend(loc="best")
        right.plot(range(len(course.scores)), course.scores, color=COLOURS[splits.TRAIN], marker=".", label="an epoch")
        right.axhline(least, color=COLOURS[splits.TEST], linestyle="--", linewidth=1, label="rule")
        right.set_xlabel("epoch")
        right.set_ylabel(f"{name} of the trained pictures")
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
