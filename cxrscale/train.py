"""The loop, straight-line: batches in, checkpoints and metrics out. It knows neither Ray nor DALI."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cxrscale import checkpoint, losses, metrics, models, scoring, storage
from cxrscale.batches import feed, plan
from cxrscale.checkpoint import Progress
from cxrscale.config import LOWER_IS_BETTER, Optim, Recipe
from cxrscale.losses import ClassWeights
from cxrscale.schema import Batch, InputError
from cxrscale.shards import manifest
from cxrscale.shards.manifest import Manifest
from cxrscale.splits import crossing
from cxrscale.tracking import Tracker
from cxrscale.worker import Worker, add_up, any_asks, wrap

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a training ended."""

    finished: bool
    """False where it was asked to stop; the same command goes on."""
    progress: Progress


def train(recipe: Recipe, run: Path, worker: Worker) -> Outcome:
    """Train, or go on training, the recipe's net; every rank of a run calls this with the same arguments.

    Leaves in `run`: metrics.jsonl, checkpoints/step-*.pt, and best.pt (the weights that `train.metric` chose on the
    validation split).

    Raises:
        InputError: shards, labels or splits do not fit the recipe.
    """
    data = manifest.load(*recipe.data.shards)
    refuse_leaks(data, recipe, data.patient.tolist())
    # Every rank starts from the same weights; the seed of each step below keeps dropout resumable.
    torch.manual_seed(recipe.plan.seed)
    net = _place(models.build(recipe.model, recipe.data), recipe, worker)
    optimizer = make_optimizer(net, recipe.optim, worker.device)
    folder = str(run / CHECKPOINTS)
    progress = checkpoint.resume(folder, net, optimizer, data.digest) or Progress()
    steps = plan.steps_per_epoch(feed.training_rows(data, recipe.data, recipe.plan), recipe.plan)
    start = progress.epoch * steps + progress.step
    about: dict[str, Any] = {"recipe": recipe.model_dump(mode="json"), "manifest": data.digest, "pixels": _pixels(data)}
    tracker = Tracker(run, recipe.tracking, about["recipe"], start) if worker.rank == 0 else None
    rows = feed.usable_rows(data, recipe.data.train_split, recipe.data)
    weights = losses.class_weights(recipe.loss, data.labels(recipe.data.findings)[rows], worker.device)
    batches = feed.training(
        data,
        recipe.data,
        recipe.plan,
        recipe.augment,
        worker.rank,
        worker.world,
        worker.device,
        progress.epoch,
        progress.step,
    )
    fast: nn.Module = torch.compile(net) if recipe.train.compile not in ("auto", "never") else net  # type: ignore[assignment]
    wrapped = wrap(fast, worker)

    def keep(step: int) -> None:
        if worker.rank == 0:
            checkpoint.save(folder, step, net, optimizer, progress, about, recipe.train.keep)

    try:
        while progress.epoch < recipe.train.epochs and not _out_of_patience(progress, recipe):
            for step in _epoch(wrapped, optimizer, batches, progress, steps, recipe, weights, worker, tracker):
                if recipe.train.checkpoint_steps and step % recipe.train.checkpoint_steps == 0:
                    keep(step)
                if step % recipe.tracking.log_steps == 0 and any_asks(worker):
                    keep(step)
                    return Outcome(False, progress)
            found = validate(net, data, recipe, weights, worker)
            improved = advance(progress, found, recipe)
            if improved and worker.rank == 0:
                content = checkpoint.dump(
                    {"model": net.state_dict(), "metrics": found, "epoch": progress.epoch, **about}
                )
                storage.write(str(run / checkpoint.BEST), content)
            keep(progress.epoch * steps)
            if tracker:
                tracker.log("val", progress.epoch * steps, {"epoch": progress.epoch, **found})
            worker.report({"epoch": progress.epoch, **found})
    finally:
        batches.close()
        if tracker:
            tracker.close()
    return Outcome(True, progress)


def _epoch(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Batch],
    progress: Progress,
    steps: int,
    recipe: Recipe,
    weights: ClassWeights,
    worker: Worker,
    tracker: Tracker | None,
) -> Iterator[int]:
    """Run the rest of the epoch; yields the number of optimizer steps done so far, after each of them."""
    net.train()
    window = torch.zeros(2, device=worker.device)
    since, waited, done = time.perf_counter(), 0.0, 0
    while progress.step < steps:
        step = progress.epoch * steps + progress.step
        began = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - began
        torch.manual_seed(_mix(recipe.plan.seed, step, worker.rank))
        rate = learning_rate(recipe.optim, step, steps * recipe.train.epochs) * progress.rate_scale
        for group in optimizer.param_groups:
            group["lr"] = rate
        with scoring.autocast(recipe.train, worker.device):
            logits = net(scoring.images_for(batch, recipe.train))
        loss = _mean_loss(logits, batch, recipe, weights, worker)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        if recipe.optim.clip_norm:
            nn.utils.clip_grad_norm_(net.parameters(), recipe.optim.clip_norm)
        optimizer.step()
        progress.step += 1
        done += 1
        window += torch.stack([loss.detach(), torch.ones_like(loss)])
        if (step + 1) % recipe.tracking.log_steps == 0 or progress.step == steps:
            # DDP averages gradients of world x (rank's share): the mean over ranks is the loss of the global batch.
            mean = add_up(window, worker)
            value = float(mean[0] / mean[1])
            if not math.isfinite(value):
                raise InputError(f"the loss is {value} at step {step + 1}: lower optim.lr or set optim.clip_norm=1")
            seconds = time.perf_counter() - since
            if tracker:
                speed = done * recipe.plan.batch / seconds
                tracker.log(
                    "train",
                    step + 1,
                    {
                        "epoch": progress.epoch,
                        "loss": value,
                        "lr": rate,
                        "images_per_second": speed,
                        "data_wait": waited / seconds,
                    },
                )
            window = torch.zeros_like(window)
            since, waited, done = time.perf_counter(), 0.0, 0
        yield step + 1
    progress.epoch, progress.step = progress.epoch + 1, 0


def _mean_loss(
    logits: torch.Tensor, batch: Batch, recipe: Recipe, weights: ClassWeights, worker: Worker
) -> torch.Tensor:
    """The loss of this rank, scaled so that DDP's mean over ranks is the mean over the global batch's labels."""
    everywhere = add_up(losses.counts(batch, recipe.loss), worker).clamp_min(1)
    return (losses.terms(logits, batch, recipe.loss, weights) / everywhere).sum() * worker.world


def validate(net: nn.Module, data: Manifest, recipe: Recipe, weights: ClassWeights, worker: Worker) -> dict[str, float]:
    """The metrics of the validation split, each picture once: loss, auroc, and for segmentation dice."""
    batches = feed.evaluation(
        data, recipe.data.val_split, recipe.data, recipe.plan, recipe.augment, worker.rank, worker.world, worker.device
    )
    rows = scoring.score(net, batches, recipe.train, worker, recipe.loss, weights)
    label_NF = data.labels(recipe.data.findings)[rows.row_N]
    found = {"loss": rows.loss, "auroc": metrics.macro_auroc(rows.score_NF, label_NF)}
    if rows.maps is not None:
        dice = metrics.map_dice(rows.maps, top=0.5, min_area=0, bottom=0.5)
        positive = rows.maps.true_NT.sum(axis=1) > 0
        found["dice"] = float(dice.mean())
        found["dice_positives"] = float(dice[positive].mean()) if positive.any() else float("nan")
    return found


def advance(progress: Progress, found: dict[str, float], recipe: Recipe) -> bool:
    """Count an epoch's metrics into the progress; returns whether they are the best so far. NaN never is."""
    progress.history.append(found)
    value = found[recipe.train.metric]
    sign = -1.0 if recipe.train.metric in LOWER_IS_BETTER else 1.0
    improved = math.isfinite(value) and (progress.best is None or sign * value > sign * progress.best)
    if improved or (progress.best is None and len(progress.history) == 1):
        progress.best = value if math.isfinite(value) else None
        progress.bad_epochs = progress.plateau_epochs = 0
        return True
    progress.bad_epochs += 1
    progress.plateau_epochs += 1
    if recipe.optim.schedule == "plateau" and progress.plateau_epochs > recipe.optim.plateau_patience:
        progress.rate_scale *= recipe.optim.plateau_factor
        progress.plateau_epochs = 0
    return False


def learning_rate(optim: Optim, step: int, total: int) -> float:
    """The rate at an optimizer step, before plateaus: linear warm-up, then constant or a half cosine to 0."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule != "cosine":
        return optim.lr
    done = (step - optim.warmup_steps) / max(1, total - optim.warmup_steps)
    return optim.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def make_optimizer(net: nn.Module, optim: Optim, device: torch.device) -> torch.optim.Optimizer:
    """The recipe's optimizer, fused on a GPU."""
    fused = device.type == "cuda"
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    if optim.name == "sgd":
        return torch.optim.SGD(
            trained, optim.lr, momentum=optim.betas[0], weight_decay=optim.weight_decay, nesterov=True, fused=fused
        )
    kind = torch.optim.AdamW if optim.name == "adamw" else torch.optim.Adam
    return kind(trained, optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=fused)


def refuse_leaks(data: Manifest, recipe: Recipe, persons: Sequence[str]) -> None:
    """Refuse to train where a patient stands in more than one of the recipe's three parts: train, val and test.

    Args:
        persons: (N,) who each picture of the manifest shows; its patients, or `leaks.persons`, which knows of twins.

    Raises:
        InputError: names one such patient and how many there are.
    """
    who = np.array(persons, dtype=object)
    parts = {"train": recipe.data.train_split, "val": recipe.data.val_split, "test": recipe.data.test_split}
    rows = {part: np.flatnonzero(np.isin(data.split.astype(str), names)) for part, names in parts.items()}
    shared = crossing(
        [name for part in parts for name in who[rows[part]].tolist()],
        [part for part in parts for _ in rows[part]],
    )
    if shared and not recipe.data.allow_leaks:
        raise InputError(
            f"data.shards: {len(shared)} patients stand in more than one of train, val and test, e.g. {shared[0]}; "
            "look with `cxrscale audit`, shard again (SIIM with --twins), or say data.allow_leaks=true"
        )


def _place(net: nn.Module, recipe: Recipe, worker: Worker) -> nn.Module:
    layout = torch.channels_last if recipe.train.channels_last else torch.contiguous_format
    return net.to(worker.device).to(memory_format=layout)


def _out_of_patience(progress: Progress, recipe: Recipe) -> bool:
    return recipe.train.patience is not None and progress.bad_epochs >= recipe.train.patience


def _pixels(data: Manifest) -> dict[str, int | str]:
    """How the training pictures were stored: prediction on new files goes through the same size and codec."""
    pack = data.about[0]["pack"]
    return {name: pack[name] for name in ("codec", "size", "quality")}


def _mix(seed: int, step: int, rank: int) -> int:
    """A seed of its own for every step and rank (a prime stride keeps ranks and steps apart)."""
    return (seed * 1_000_003 + step) * 4_099 + rank
