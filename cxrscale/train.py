"""The loop, straight-line: batches in, checkpoints and metrics out. It knows neither Ray nor DALI."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from cxrscale import checkpoint, losses, models, optimizer, scoring, splits, storage
from cxrscale.batches import feed, plan
from cxrscale.checkpoint import Learner, Progress, Writer
from cxrscale.config import LOWER_IS_BETTER, Recipe
from cxrscale.losses import ClassWeights
from cxrscale.schema import Batch, InputError
from cxrscale.shards import manifest
from cxrscale.shards.manifest import Manifest
from cxrscale.tracking import Tracker
from cxrscale.worker import Worker, add_up, any_asks, gather, without_averaging, wrap

SAMPLES = 16
"""Pictures of the first batch that are kept to look at."""


class Diverged(InputError):
    """The loss is infinite or no number any more."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a training ended."""

    finished: bool
    """False where it was asked to stop; the same command goes on."""
    progress: Progress


@dataclass(frozen=True, slots=True)
class Loop:
    """What stays the same from step to step."""

    recipe: Recipe
    worker: Worker
    data: Manifest
    net: nn.Module
    """The learner's net, averaging gradients over the workers."""
    fast: nn.Module
    """The same, compiled where the recipe says so: what the steps call."""
    weights: ClassWeights
    steps: int
    """Steps an epoch."""
    tracker: Tracker | None
    """Rank 0's."""


def train(recipe: Recipe, run: str, worker: Worker) -> Outcome:
    """Train, or go on training, the recipe's net; every rank of a run calls this with the same arguments.

    Leaves under `run`, a folder or address: metrics.jsonl, samples.png, checkpoints/step-*.pt, and best.pt (the weights
    that `train.metric` chose on the validation split).

    Raises:
        InputError: shards, labels or splits do not fit the recipe, or the workers do not see the same run folder.
    """
    data = manifest.load(*recipe.data.shards)
    splits.refuse_leaks(data.split, data.patient.tolist(), recipe.data)
    learner = build(recipe, worker)
    checkpoint.resume(storage.join(run, checkpoint.FOLDER), learner, data.digest)
    progress = learner.progress
    steps = plan.steps_per_epoch(feed.training_rows(data, recipe.data, recipe.plan), recipe.plan)
    begun = progress.epoch * steps + progress.step
    _check_same_start(begun, run, worker)
    about: dict[str, Any] = {
        "recipe": recipe.model_dump(mode="json"),
        "manifest": data.digest,
        "pixels": stored_pixels(data),
    }
    writer = Writer(storage.join(run, checkpoint.FOLDER), recipe.train.keep)
    tracker = Tracker(run, recipe.tracking, about["recipe"], begun) if worker.rank == 0 else None
    where = (worker.rank, worker.world, worker.device)
    batches = feed.training(data, recipe.data, recipe.plan, recipe.augment, *where, progress.epoch, progress.step)
    loop = make_loop(recipe, worker, data, learner, steps, tracker)

    def keep(step: int) -> None:
        if tracker:  # rank 0's
            # A run that goes on from this checkpoint does not write the lines before it again.
            tracker.flush()
            writer.save(step, {**learner.state(), **about})

    try:
        while progress.epoch < recipe.train.epochs and not _out_of_patience(progress, recipe):
            for step in epoch(loop, learner, batches):
                stop, save = any_asks(worker) if step % recipe.tracking.log_steps == 0 else (False, False)
                if stop or save or (recipe.train.checkpoint_steps and step % recipe.train.checkpoint_steps == 0):
                    keep(step)
                if stop:
                    return Outcome(False, progress)
            found = validate(learner.chosen, loop)
            if advance(progress, found, recipe) and worker.rank == 0:
                best = {"model": learner.chosen.state_dict(), "metrics": found, "epoch": progress.epoch, **about}
                writer.write(storage.join(run, checkpoint.BEST), checkpoint.on_host(best))
            if tracker:
                tracker.log("val", progress.epoch * steps, {"epoch": progress.epoch, **found})
            keep(progress.epoch * steps)
            worker.report({"epoch": progress.epoch, **found})
    finally:
        batches.close()
        writer.close()
        if tracker:
            tracker.close()
    return Outcome(True, progress)


def build(recipe: Recipe, worker: Worker) -> Learner:
    """A learner at the start of a run: every rank has the same weights."""
    # The seed of each step (see `_step`) keeps dropout resumable; this one makes the initial weights.
    torch.manual_seed(recipe.plan.seed)
    net = models.build(recipe.model, recipe.data)
    layout = torch.channels_last if recipe.train.channels_last else torch.contiguous_format
    net = net.to(worker.device).to(memory_format=layout)
    if worker.device.type == "cuda":
        # Inputs have one shape: trying the convolutions' algorithms once pays. TF32 where fp32 is asked for.
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    return Learner(net, optimizer.build(net, recipe.optim), optimizer.average(net, recipe.optim), Progress())


def make_loop(
    recipe: Recipe, worker: Worker, data: Manifest, learner: Learner, steps: int, tracker: Tracker | None
) -> Loop:
    """Wrap and compile the learner's net, and weigh the classes of the training split."""
    rows = feed.usable_rows(data, recipe.data.train_split, recipe.data)
    weights = losses.class_weights(recipe.loss, data.labels(recipe.data.findings)[rows], worker.device)
    net = wrap(learner.net, worker)
    mode = recipe.train.compile
    if mode == "auto":
        mode = "default" if worker.device.type == "cuda" else "never"
    # Around DDP, not inside: the compiler then cuts the graph where gradients are sent, so that both overlap.
    fast: Any = net if mode == "never" else torch.compile(net, mode=mode)
    if _adds_to_own_gradients(recipe):
        for parameter in learner.net.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    return Loop(recipe, worker, data, net, fast, weights, steps, tracker)


def epoch(loop: Loop, learner: Learner, batches: Iterator[Batch]) -> Iterator[int]:
    """Run the rest of the epoch; yields the number of optimizer steps done so far, after each of them.

    Between two log lines nothing waits for the GPU.

    Raises:
        Diverged: the mean loss since the last log line is not finite.
    """
    recipe, worker, progress = loop.recipe, loop.worker, learner.progress
    models.train_mode(learner.net)
    window = torch.zeros(2, device=worker.device)
    since, waited, done = time.perf_counter(), 0.0, 0
    while progress.step < loop.steps:
        step = progress.epoch * loop.steps + progress.step
        logs = (step + 1) % recipe.tracking.log_steps == 0 or progress.step + 1 == loop.steps
        began = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - began
        if step == 0 and loop.tracker:
            loop.tracker.samples(batch.image_BCHW[:SAMPLES].float().cpu().numpy())
        loss, norm = _step(loop, learner, batch, step, logs)
        progress.step += 1
        done += 1
        window += torch.stack([loss, torch.ones_like(loss)])
        if logs:
            # DDP averages gradients of world x (rank's share): the mean over ranks is the loss of the global batch.
            mean = add_up(window, worker)
            value = float(mean[0] / mean[1])
            if not math.isfinite(value):
                raise Diverged(f"the loss is {value} at step {step + 1}: lower optim.lr or set optim.clip_norm=1")
            seconds = time.perf_counter() - since
            if loop.tracker:
                speed = {"images_per_second": done * recipe.plan.batch / seconds, "data_wait": waited / seconds}
                rate = learner.optimizer.param_groups[0]["lr"]
                line = {"epoch": progress.epoch, "loss": value, "lr": rate, "gradient_norm": float(norm), **speed}
                line["steps"] = loop.steps * recipe.train.epochs
                loop.tracker.log("train", step + 1, line | _gpu_memory(worker.device))
            window = torch.zeros_like(window)
            since, waited, done = time.perf_counter(), 0.0, 0
        yield step + 1
    progress.epoch, progress.step = progress.epoch + 1, 0


def _step(loop: Loop, learner: Learner, batch: Batch, step: int, logs: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step: (loss of this rank, norm of the gradient, 0 where nobody asked for it)."""
    recipe, worker = loop.recipe, loop.worker
    torch.manual_seed(_mix(recipe.plan.seed, step, worker.rank))
    rate = optimizer.learning_rate(recipe.optim, step, loop.steps * recipe.train.epochs) * learner.progress.rate_scale
    for group in learner.optimizer.param_groups:
        group["lr"] = rate
    # The loss is divided by what counts in the global batch, so that neither world size nor pieces change it.
    everywhere = add_up(losses.counts(batch, recipe.loss), worker).clamp_min(1)
    parts = pieces(batch, recipe.optim.accumulate)
    total = torch.zeros((), device=worker.device)
    for number, part in enumerate(parts, 1):
        with without_averaging(loop.net, number < len(parts)):
            with scoring.autocast(recipe.train, worker.device):
                logits = loop.fast(scoring.images_for(part, recipe.train))
            loss = (losses.terms(logits, part, recipe.loss, loop.weights) / everywhere).sum() * worker.world
            torch.autograd.backward(loss)
        total += loss.detach()
    norm = torch.zeros(())
    if recipe.optim.clip_norm:
        norm = nn.utils.clip_grad_norm_(learner.net.parameters(), recipe.optim.clip_norm)
    elif logs:
        norm = nn.utils.get_total_norm([p.grad for p in learner.net.parameters() if p.grad is not None])
    learner.optimizer.step()
    learner.optimizer.zero_grad(set_to_none=not _adds_to_own_gradients(recipe))
    if learner.average is not None:
        learner.average.update_parameters(learner.net)
    return total, norm


def pieces(batch: Batch, count: int) -> list[Batch]:
    """The batch's rows in at most `count` consecutive pieces of nearly the same size."""
    if count == 1:
        return [batch]
    parts = [
        torch.tensor_split(each, min(count, len(batch.row_B)))
        for each in (batch.image_BCHW, batch.label_BF, batch.row_B, batch.valid_B)
    ]
    masks: Any = [None] * len(parts[0])
    if batch.mask_B1HW is not None:
        masks = torch.tensor_split(batch.mask_B1HW, len(parts[0]))
    return [Batch(image, label, mask, row, valid) for image, label, row, valid, mask in zip(*parts, masks, strict=True)]


def validate(net: nn.Module, loop: Loop) -> dict[str, float]:
    """The loss and `scoring.summary` of the validation split, each picture once whatever the world size."""
    recipe, worker = loop.recipe, loop.worker
    batches = feed.evaluation(
        loop.data,
        recipe.data.val_split,
        recipe.data,
        recipe.plan,
        recipe.augment,
        worker.rank,
        worker.world,
        worker.device,
    )
    rows = scoring.score(net, batches, recipe.train, worker, recipe.loss, loop.weights)
    label_NF = loop.data.labels(recipe.data.findings)[rows.row_N]
    return {"loss": rows.loss, **scoring.summary(rows, label_NF, recipe.data.findings)}


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


def stored_pixels(data: Manifest) -> dict[str, int | str]:
    """How the training pictures were stored: prediction on new files goes through the same size and codec."""
    pack = data.about[0]["pack"]
    return {name: pack[name] for name in ("codec", "size", "quality")}


def _check_same_start(step: int, run: str, worker: Worker) -> None:
    """Ranks that resumed from different checkpoints would wait for each other for ever."""
    starts = gather(np.array([step]), worker)
    if len(set(starts.tolist())) > 1:
        raise InputError(
            f"tracking.root: the workers do not see the same {run}; give a shared folder or an s3:// address"
        )


def _out_of_patience(progress: Progress, recipe: Recipe) -> bool:
    return recipe.train.patience is not None and progress.bad_epochs >= recipe.train.patience


def _adds_to_own_gradients(recipe: Recipe) -> bool:
    """CUDA graphs hand out gradients in memory that the next piece overwrites (pytorch issue 169545): these modes get
    gradients that outlive a step, to which the pieces are added."""
    return recipe.optim.accumulate > 1 and recipe.train.compile in ("reduce-overhead", "max-autotune")


def _gpu_memory(device: torch.device) -> dict[str, float]:
    return {"gpu_memory_gb": torch.cuda.max_memory_allocated(device) / 1e9} if device.type == "cuda" else {}


def _mix(seed: int, step: int, rank: int) -> int:
    """A seed of its own for every step and rank (a prime stride keeps ranks and steps apart)."""
    return (seed * 1_000_003 + step) * 4_099 + rank
