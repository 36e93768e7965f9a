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

from cxrscale.config import LOWER_IS_BETTER, Recipe
from cxrscale.io import storage
from cxrscale.loader import evaluation_batches, sampler, training_batches, training_epoch_length, usable_rows
from cxrscale.models import ClassWeights, autocast, build_model, losses, model_input, train_mode
from cxrscale.shards import Manifest, manifest, splits
from cxrscale.training import checkpoint, optim, scoring
from cxrscale.training.checkpoint import CheckpointWriter, Progress, TrainState
from cxrscale.training.distributed import Worker, all_gather, all_reduce_sum, no_sync, sync_signals, wrap_ddp
from cxrscale.training.tracking import Tracker
from cxrscale.types import Batch, UserError

SAMPLES = 16
"""Images of the first batch that are kept to look at."""


class DivergedError(UserError):
    """The loss is infinite or no number any more."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How a training ended."""

    finished: bool
    """False where it was asked to stop; the same command goes on."""
    progress: Progress


@dataclass(frozen=True, slots=True)
class TrainContext:
    """What stays the same from step to step."""

    recipe: Recipe
    worker: Worker
    data: Manifest
    net: nn.Module
    """The learner's model, averaging gradients over the workers."""
    fast: nn.Module
    """The same, compiled where the recipe says so: what the steps call."""
    weights: ClassWeights
    steps: int
    """Steps an epoch."""
    tracker: Tracker | None
    """Rank 0's."""


def train(recipe: Recipe, run: str, worker: Worker) -> TrainResult:
    """Train, or go on training, the recipe's model; every rank of a run calls this with the same arguments.

    Leaves under `run`, a folder or address: metrics.jsonl, samples.png, checkpoints/step-*.pt, and best.pt (the weights
    that `train.monitor` chose on the validation split).

    Raises:
        UserError: shards, labels or splits do not fit the recipe, or the workers do not see the same run folder.
    """
    data = manifest.load(*recipe.data.shards)
    splits.refuse_leaks(data.split, data.patient.tolist(), recipe.data)
    learner = build_state(recipe, worker)
    checkpoint.resume(storage.join(run, checkpoint.FOLDER), learner, data.digest)
    progress = learner.progress
    steps = sampler.steps_per_epoch(training_epoch_length(data, recipe.data, recipe.sampler), recipe.sampler)
    begun = progress.epoch * steps + progress.step
    _check_same_start(begun, run, worker)
    about: dict[str, Any] = {
        "recipe": recipe.model_dump(mode="json"),
        "manifest": data.digest,
        "pixels": stored_pixels(data),
    }
    writer = CheckpointWriter(storage.join(run, checkpoint.FOLDER), recipe.train.keep_checkpoints)
    tracker = Tracker(run, recipe.tracking, about["recipe"], begun) if worker.rank == 0 else None
    where = (worker.rank, worker.world, worker.device)
    batches = training_batches(data, recipe.data, recipe.sampler, recipe.augment, *where, progress.epoch, progress.step)
    context = make_context(recipe, worker, data, learner, steps, tracker)

    def keep(step: int) -> None:
        if tracker:  # rank 0's
            # A run that goes on from this checkpoint does not write the lines before it again.
            tracker.flush()
            writer.save(step, {**learner.state(), **about})

    try:
        while progress.epoch < recipe.train.epochs and not _out_of_patience(progress, recipe):
            for step in train_epoch(context, learner, batches):
                stop, save = sync_signals(worker) if step % recipe.tracking.log_steps == 0 else (False, False)
                if stop or save or (recipe.train.checkpoint_steps and step % recipe.train.checkpoint_steps == 0):
                    keep(step)
                if stop:
                    return TrainResult(False, progress)
            found = validate(learner.chosen, context)
            if update_progress(progress, found, recipe) and worker.rank == 0:
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
    return TrainResult(True, progress)


def build_state(recipe: Recipe, worker: Worker) -> TrainState:
    """A learner at the start of a run: every rank has the same weights."""
    # The seed of each step (see `_step`) keeps dropout resumable; this one makes the initial weights.
    torch.manual_seed(recipe.sampler.seed)
    net = build_model(recipe.model, recipe.data)
    layout = torch.channels_last if recipe.train.channels_last else torch.contiguous_format
    net = net.to(worker.device).to(memory_format=layout)
    if worker.device.type == "cuda":
        # Inputs have one shape: trying the convolutions' algorithms once pays. TF32 where fp32 is asked for.
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    return TrainState(net, optim.build_optimizer(net, recipe.optim), optim.ema_model(net, recipe.optim), Progress())


def make_context(
    recipe: Recipe, worker: Worker, data: Manifest, learner: TrainState, steps: int, tracker: Tracker | None
) -> TrainContext:
    """Wrap and compile the learner's model, and weigh the classes of the training split."""
    rows = usable_rows(data, recipe.data.train_split, recipe.data)
    weights = losses.class_weights(recipe.loss, data.labels(recipe.data.findings)[rows], worker.device)
    net = wrap_ddp(learner.net, worker)
    mode = recipe.train.compile
    if mode == "auto":
        mode = "default" if worker.device.type == "cuda" else "never"
    # Around DDP, not inside: the compiler then cuts the graph where gradients are sent, so that both overlap.
    fast: Any = net if mode == "never" else torch.compile(net, mode=mode)
    if _adds_to_own_gradients(recipe):
        for parameter in learner.net.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    return TrainContext(recipe, worker, data, net, fast, weights, steps, tracker)


def train_epoch(context: TrainContext, learner: TrainState, batches: Iterator[Batch]) -> Iterator[int]:
    """Run the rest of the epoch; yields the number of optimizer steps done so far, after each of them.

    Between two log lines nothing waits for the GPU.

    Raises:
        Diverged: the mean loss since the last log line is not finite.
    """
    recipe, worker, progress = context.recipe, context.worker, learner.progress
    train_mode(learner.net)
    window = torch.zeros(2, device=worker.device)
    since, waited, done = time.perf_counter(), 0.0, 0
    while progress.step < context.steps:
        step = progress.epoch * context.steps + progress.step
        logs = (step + 1) % recipe.tracking.log_steps == 0 or progress.step + 1 == context.steps
        began = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - began
        if step == 0 and context.tracker:
            context.tracker.samples(batch.image_BCHW[:SAMPLES].float().cpu().numpy())
        loss, norm = _step(context, learner, batch, step, logs)
        progress.step += 1
        done += 1
        window += torch.stack([loss, torch.ones_like(loss)])
        if logs:
            # DDP averages gradients of world x (rank's share): the mean over ranks is the loss of the global batch.
            mean = all_reduce_sum(window, worker)
            value = float(mean[0] / mean[1])
            if not math.isfinite(value):
                raise DivergedError(
                    f"the loss is {value} at step {step + 1}: lower optim.lr or set optim.max_grad_norm=1"
                )
            seconds = time.perf_counter() - since
            if context.tracker:
                speed = {"images_per_second": done * recipe.sampler.batch_size / seconds, "data_wait": waited / seconds}
                rate = learner.optimizer.param_groups[0]["lr"]
                line = {"epoch": progress.epoch, "loss": value, "lr": rate, "gradient_norm": float(norm), **speed}
                line["steps"] = context.steps * recipe.train.epochs
                context.tracker.log("train", step + 1, line | _gpu_memory(worker.device))
            window = torch.zeros_like(window)
            since, waited, done = time.perf_counter(), 0.0, 0
        yield step + 1
    progress.epoch, progress.step = progress.epoch + 1, 0


def _step(
    context: TrainContext, learner: TrainState, batch: Batch, step: int, logs: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step: (loss of this rank, norm of the gradient, 0 where nobody asked for it)."""
    recipe, worker = context.recipe, context.worker
    torch.manual_seed(_mix(recipe.sampler.seed, step, worker.rank))
    rate = optim.learning_rate(recipe.optim, step, context.steps * recipe.train.epochs) * learner.progress.rate_scale
    for group in learner.optimizer.param_groups:
        group["lr"] = rate
    # The loss is divided by what counts in the global batch, so that neither world size nor pieces change it.
    everywhere = all_reduce_sum(losses.counts(batch, recipe.loss), worker).clamp_min(1)
    parts = microbatches(batch, recipe.optim.grad_accum_steps)
    total = torch.zeros((), device=worker.device)
    for number, part in enumerate(parts, 1):
        with no_sync(context.net, number < len(parts)):
            with autocast(recipe.train, worker.device):
                logits = context.fast(model_input(part, recipe.train))
            loss = (losses.terms(logits, part, recipe.loss, context.weights) / everywhere).sum() * worker.world
            torch.autograd.backward(loss)
        total += loss.detach()
    norm = torch.zeros(())
    if recipe.optim.max_grad_norm:
        norm = nn.utils.clip_grad_norm_(learner.net.parameters(), recipe.optim.max_grad_norm)
    elif logs:
        norm = nn.utils.get_total_norm([p.grad for p in learner.net.parameters() if p.grad is not None])
    learner.optimizer.step()
    learner.optimizer.zero_grad(set_to_none=not _adds_to_own_gradients(recipe))
    if learner.average is not None:
        learner.average.update_parameters(learner.net)
    return total, norm


def microbatches(batch: Batch, count: int) -> list[Batch]:
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


def validate(net: nn.Module, context: TrainContext) -> dict[str, float]:
    """The loss and `scoring.summary` of the validation split, each image once whatever the world size."""
    recipe, worker = context.recipe, context.worker
    batches = evaluation_batches(
        context.data,
        recipe.data.val_split,
        recipe.data,
        recipe.sampler,
        recipe.augment,
        worker.rank,
        worker.world,
        worker.device,
    )
    rows = scoring.score(net, batches, recipe.train, worker, recipe.loss, context.weights)
    label_NF = context.data.labels(recipe.data.findings)[rows.row_N]
    return {"loss": rows.loss, **scoring.summary(rows, label_NF, recipe.data.findings)}


def update_progress(progress: Progress, found: dict[str, float], recipe: Recipe) -> bool:
    """Count an epoch's metrics into the progress; returns whether they are the best so far. NaN never is."""
    progress.history.append(found)
    value = found[recipe.train.monitor]
    sign = -1.0 if recipe.train.monitor in LOWER_IS_BETTER else 1.0
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
    """How the training images were stored: prediction on new files goes through the same size and codec."""
    pack = data.about[0]["pack"]
    return {name: pack[name] for name in ("codec", "size", "quality")}


def _check_same_start(step: int, run: str, worker: Worker) -> None:
    """Ranks that resumed from different checkpoints would wait for each other for ever."""
    starts = all_gather(np.array([step]), worker)
    if len(set(starts.tolist())) > 1:
        raise UserError(
            f"tracking.runs_dir: the workers do not see the same {run}; give a shared folder or an s3:// address"
        )


def _out_of_patience(progress: Progress, recipe: Recipe) -> bool:
    return recipe.train.patience is not None and progress.bad_epochs >= recipe.train.patience


def _adds_to_own_gradients(recipe: Recipe) -> bool:
    """CUDA graphs hand out gradients in memory that the next piece overwrites (pytorch issue 169545): these modes get
    gradients that outlive a step, to which the pieces are added."""
    return recipe.optim.grad_accum_steps > 1 and recipe.train.compile in ("reduce-overhead", "max-autotune")


def _gpu_memory(device: torch.device) -> dict[str, float]:
    return {"gpu_memory_gb": torch.cuda.max_memory_allocated(device) / 1e9} if device.type == "cuda" else {}


def _mix(seed: int, step: int, rank: int) -> int:
    """A seed of its own for every step and rank (a prime stride keeps ranks and steps apart)."""
    return (seed * 1_000_003 + step) * 4_099 + rank
