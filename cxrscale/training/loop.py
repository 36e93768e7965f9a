"""The training loop, straight-line: batches in, checkpoints and metrics out. It knows neither Ray nor DALI."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from cxrscale.config import LOWER_IS_BETTER, Pack, Recipe
from cxrscale.io import storage
from cxrscale.loader import evaluation_batches, sampler, training_batches, training_epoch_length, usable_rows
from cxrscale.models import ClassWeights, build_model, forward, losses, train_mode
from cxrscale.shards import Manifest, manifest, splits
from cxrscale.training import checkpoint, map_sheet, optim, scoring
from cxrscale.training.checkpoint import CheckpointWriter
from cxrscale.training.distributed import (
    CHECKPOINT,
    DATA,
    STEP,
    VALIDATION,
    Requests,
    Worker,
    all_gather,
    all_reduce_sum,
    no_sync,
    wrap_ddp,
)
from cxrscale.training.health import Window, bad_rows_error, check_weights
from cxrscale.training.state import Progress, TrainState, to_host
from cxrscale.training.tracking import Start, Tracker
from cxrscale.types import Batch, UserError

LOG = logging.getLogger("cxrscale")
SAMPLES = 16
"""Images of the first batch that are kept to look at."""


class StopRequested(Exception):
    """Raised in a validation that was asked to stop."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How a training ended."""

    finished: bool
    """False where it was asked to stop; re-run the same command to resume."""
    progress: Progress


@dataclass(frozen=True, slots=True)
class TrainContext:
    """What stays the same from step to step."""

    recipe: Recipe
    worker: Worker
    data: Manifest
    ddp_model: nn.Module
    """The state's model, which averages gradients over the workers."""
    compiled_model: nn.Module
    """The same, compiled where the recipe says so: what the steps call."""
    weights: ClassWeights
    steps: int
    """Steps per epoch."""
    tracker: Tracker | None
    """Rank 0's; None on other ranks."""
    requests: Requests
    """To stop, or to save."""

    def saves_after(self, step: int) -> bool:
        """Whether a checkpoint follows the step: it is time for one, or somebody has asked."""
        every = self.recipe.train.checkpoint_steps
        return self.requests.stop or self.requests.save or bool(every and step % every == 0)


def _metadata(recipe: Recipe, data: Manifest) -> dict[str, Any]:
    """What a checkpoint says of its training."""
    return {"recipe": recipe.model_dump(mode="json"), "manifest": data.digest, "pixels": pixel_format(data)}


def train(recipe: Recipe, run: str, worker: Worker) -> TrainResult:
    """Train, or resume training, the recipe's model; every rank of a run calls this with the same arguments.

    Writes under `run`, a folder or address: train_log.jsonl, samples.png, checkpoints/step-*.pt, and best.pt (the
    weights with the best `train.monitor` on the validation split).

    Raises:
        NonFiniteError: a loss, a weight or a score is infinite or NaN; the last checkpoint is from before.
        UserError: shards, labels or splits do not fit the recipe, the workers do not see the same run folder, or too
            many images cannot be read.
    """
    data = manifest.load(*recipe.data.shards)
    splits.refuse_leaks(data.split, data.patient.tolist(), recipe.data)
    state, dist = build_state(recipe, worker.dist.device), worker.dist
    resumed = checkpoint.resume(storage.join(run, checkpoint.FOLDER), state, data.digest)
    progress = state.progress
    steps = sampler.steps_per_epoch(training_epoch_length(data, recipe), recipe.sampler)
    start_step = progress.epoch * steps + progress.step
    _check_same_start(start_step, run, worker)
    metadata = _metadata(recipe, data)
    if resumed and dist.rank == 0:
        # A kill may have come between the writing of this one and the removal of those that it replaces.
        checkpoint.prune(storage.join(run, checkpoint.FOLDER), resumed, recipe.train.keep_checkpoints)
    writer = CheckpointWriter(storage.join(run, checkpoint.FOLDER), recipe.train.keep_checkpoints)
    start = Start(start_step, progress.epoch)
    tracker = Tracker(run, recipe.tracking, metadata["recipe"], start) if dist.rank == 0 else None
    batches = training_batches(data, recipe, dist, progress.epoch, progress.step)
    context = make_context(recipe, worker, data, state, steps, tracker)
    saver = _Saver(writer, state, metadata, tracker, steps)
    try:
        while progress.epoch < recipe.train.epochs and not _out_of_patience(progress, recipe):
            for step in train_epoch(context, state, batches):
                if context.saves_after(step):
                    check_weights(state, step, dist)
                    worker.doing = CHECKPOINT
                    saver.save(step)
                if tracker:
                    for wait in worker.waits():
                        tracker.log_wait(step, wait)
                if context.requests.stop:
                    return TrainResult(False, progress)
            check_weights(state, progress.epoch * steps, dist)
            try:
                metrics = validate(state.eval_model, context, saver.save_before_validation)
            except StopRequested:
                return TrainResult(False, progress)
            metrics["bad_rows_train"], progress.bad_rows = float(progress.bad_rows), 0
            if not math.isfinite(metrics[recipe.train.monitor]) and dist.rank == 0:
                LOG.warning("%s is undefined after epoch %d: no improvement", recipe.train.monitor, progress.epoch)
            if update_progress(progress, metrics, recipe):
                saver.save_best(storage.join(run, checkpoint.BEST), metrics)
            if tracker:
                tracker.log("val", progress.epoch * steps, {"epoch": progress.epoch, **metrics})
                if recipe.tracking.map_images:
                    sheet = map_sheet.draw(state.eval_model, data, recipe, dist.device)
                    tracker.maps(progress.epoch, progress.epoch * steps, sheet)
            saver.save(progress.epoch * steps)
            if worker.reports_when_written:
                writer.wait()
            worker.report({"epoch": progress.epoch, **metrics})
    finally:
        batches.close()
        writer.close()
        if tracker:
            tracker.close()
    return TrainResult(True, progress)


@dataclass(frozen=True, slots=True)
class _Saver:
    """Saves a run's state; every rank calls it, rank 0 writes."""

    writer: CheckpointWriter
    state: TrainState
    metadata: Mapping[str, Any]
    tracker: Tracker | None
    """Rank 0's; None on other ranks."""
    steps: int
    """Steps per epoch."""

    def save(self, step: int) -> None:
        """Write the checkpoint of an optimizer step."""
        if self.tracker:
            # A run that resumes from this checkpoint does not write the lines before it again.
            self.tracker.flush()
            self.writer.save(step, {**self.state.state_dict(), **self.metadata})

    def save_before_validation(self) -> None:
        """Write the checkpoint of an epoch's last step, from which a resume begins with the validation."""
        progress = self.state.progress
        progress.epoch, progress.step = progress.epoch - 1, self.steps
        self.save((progress.epoch + 1) * self.steps)
        progress.epoch, progress.step = progress.epoch + 1, 0

    def save_best(self, address: str, metrics: Mapping[str, float]) -> None:
        """Write the weights that were validated last, which are the best so far."""
        if self.tracker:
            epoch, model = self.state.progress.epoch, self.state.eval_model.state_dict()
            best = {"model": model, "metrics": dict(metrics), "epoch": epoch, **self.metadata}
            self.writer.write(address, to_host(best))


def build_state(recipe: Recipe, device: torch.device) -> TrainState:
    """The state at the start of a run: every rank has the same weights."""
    # The seed of each step (see `_step`) keeps dropout resumable; this one makes the initial weights.
    torch.manual_seed(recipe.sampler.seed)
    model = build_model(recipe.model, recipe.data)
    layout = torch.channels_last if recipe.train.channels_last else torch.contiguous_format
    model = model.to(device).to(memory_format=layout)
    if device.type == "cuda":
        # Inputs have one shape: trying the convolutions' algorithms once pays. TF32 where fp32 is asked for.
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    return TrainState(
        model, optim.build_optimizer(model, recipe.optim), optim.build_ema(model, recipe.optim), Progress()
    )


def make_context(
    recipe: Recipe, worker: Worker, data: Manifest, state: TrainState, steps: int, tracker: Tracker | None
) -> TrainContext:
    """Wrap and compile the state's model, and compute the class weights from the training split."""
    rows = usable_rows(data, recipe.data.train_split, recipe.data)
    weights = losses.class_weights(recipe.loss, data.labels(recipe.data.findings)[rows], worker.dist.device)
    ddp_model = wrap_ddp(state.model, worker.dist)
    mode = recipe.train.compile
    if mode == "auto":
        mode = "default" if worker.dist.device.type == "cuda" else "never"
    # Around DDP, not inside: the compiler then splits the graph where gradients are sent, so that both overlap.
    compiled_model: Any = ddp_model if mode == "never" else torch.compile(ddp_model, mode=mode)
    if _keeps_gradient_memory(recipe):
        for parameter in state.model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    return TrainContext(recipe, worker, data, ddp_model, compiled_model, weights, steps, tracker, Requests(worker))


def train_epoch(context: TrainContext, state: TrainState, batches: Iterator[Batch]) -> Iterator[int]:
    """Run the rest of the epoch; yields the number of optimizer steps done so far, after each of them.

    Between two log lines nothing waits for the GPU. After each step `context.requests` says whether any rank was asked
    to stop or to save.

    Raises:
        NonFiniteError: the loss of a step since the last log line is not finite.
        UserError: more rows than data.max_bad_rows could not be read, or none could.
    """
    recipe, dist, progress = context.recipe, context.worker.dist, state.progress
    train_mode(state.model)
    window = Window(progress, recipe, context.steps, dist)
    while progress.step < context.steps:
        step = progress.epoch * context.steps + progress.step
        logs = (step + 1) % recipe.tracking.log_steps == 0 or progress.step + 1 == context.steps
        context.worker.doing = DATA
        batch = window.timed(batches)
        context.worker.doing = STEP
        if step == 0 and context.tracker:
            context.tracker.samples(batch.image_BCHW[:SAMPLES].float().cpu().numpy())
        loss, norm, bad = _step(context, state, batch, step, logs)
        progress.step += 1
        window.add(loss, bad)
        if logs or context.saves_after(step + 1):
            window.settle(step + 1)
        if logs:
            line = window.line(state.optimizer.param_groups[0]["lr"], float(norm))
            if context.tracker:
                context.tracker.log("train", step + 1, line | _gpu_memory(dist.device))
        yield step + 1
    progress.epoch, progress.step = progress.epoch + 1, 0


def _step(
    context: TrainContext, state: TrainState, batch: Batch, step: int, logs: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One optimizer step: (loss of this rank, norm of the gradient, 0 where neither clipping nor the log needs it, rows
    of the global batch that were left out)."""
    recipe, dist = context.recipe, context.worker.dist
    torch.manual_seed(_mix(recipe.sampler.seed, step, dist.rank))
    lr = optim.learning_rate(recipe.optim, step, context.steps * recipe.train.epochs) * state.progress.lr_scale
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    # The loss is divided by the counts of the global batch, so that neither world size nor microbatches change it.
    global_counts, bad = _exchange(context, batch)
    parts = microbatches(batch, recipe.optim.grad_accum_steps)
    total = torch.zeros((), device=dist.device)
    for number, part in enumerate(parts, 1):
        with no_sync(context.ddp_model, number < len(parts)):
            logits = forward(context.compiled_model, part, recipe.train, dist.device)
            loss = (losses.terms(logits, part, recipe.loss, context.weights) / global_counts).sum() * dist.world
            torch.autograd.backward(loss)
        total += loss.detach()
    norm = torch.zeros(())
    if recipe.optim.max_grad_norm:
        norm = nn.utils.clip_grad_norm_(state.model.parameters(), recipe.optim.max_grad_norm)
    elif logs:
        norm = nn.utils.get_total_norm([p.grad for p in state.model.parameters() if p.grad is not None])
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=not _keeps_gradient_memory(recipe))
    if state.ema is not None:
        state.ema.update_parameters(state.model)
    return total, norm, bad


def _exchange(context: TrainContext, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """What a step adds up over all ranks in one collective, requests too: ((T,) counts of the loss, bad rows)."""
    recipe, dist, requests = context.recipe, context.worker.dist, context.requests
    counts = torch.cat([losses.counts(batch, recipe.loss), batch.valid_B.sum().float()[None]])
    if dist.world == 1:
        requests.local()
    else:
        counts = all_reduce_sum(torch.cat([counts, requests.flags()]), dist)
        requests.received(counts[-2:])
        counts = counts[:-2]
    return counts[:-1].clamp_min(1), recipe.sampler.batch_size - counts[-1]


def microbatches(batch: Batch, count: int) -> list[Batch]:
    """Split the batch's rows into at most `count` consecutive batches of nearly the same size."""
    if count == 1:
        return [batch]
    parts = [
        torch.tensor_split(tensor, min(count, len(batch.row_B)))
        for tensor in (batch.image_BCHW, batch.label_BF, batch.row_B, batch.valid_B)
    ]
    masks: Any = [None] * len(parts[0])
    if batch.mask_B1HW is not None:
        masks = torch.tensor_split(batch.mask_B1HW, len(parts[0]))
    return [Batch(image, label, mask, row, valid) for image, label, row, valid, mask in zip(*parts, masks, strict=True)]


def validate(model: nn.Module, context: TrainContext, save: Callable[[], None] = lambda: None) -> dict[str, float]:
    """The loss and `scoring.summary` of the validation split, each image once whatever the world size.

    Args:
        save: called where any rank is asked to save or to stop.

    Raises:
        StopRequested: any rank was asked to stop.
        NonFiniteError: a score or the loss is not finite.
        UserError: too many images could not be read.
    """
    recipe, dist = context.recipe, context.worker.dist
    batches = evaluation_batches(context.data, recipe.data.val_split, recipe, dist)
    rows = scoring.score(model, _interruptible(batches, context, save), recipe, dist, context.weights)
    total, limit = len(rows.row_N) + rows.unreadable, recipe.data.max_bad_rows
    if (limit is not None and rows.unreadable > limit) or not len(rows.row_N):
        raise bad_rows_error(rows.unreadable, total, "validation", recipe)
    label_NF = context.data.labels(recipe.data.findings)[rows.row_N]
    summary = scoring.summary(rows, label_NF, recipe.data.findings)
    return {"loss": rows.loss, **summary, "bad_rows_val": float(rows.unreadable)}


def _interruptible(batches: Iterable[Batch], context: TrainContext, save: Callable[[], None]) -> Iterator[Batch]:
    """The batches, until any rank is asked to stop."""
    context.worker.doing = VALIDATION
    for batch in batches:
        context.requests.ask()
        if context.requests.stop or context.requests.save:
            save()
        if context.requests.stop:
            raise StopRequested
        yield batch


def update_progress(progress: Progress, metrics: dict[str, float], recipe: Recipe) -> bool:
    """Add an epoch's metrics to the progress; returns whether they are the best so far. NaN is worse than a number."""
    progress.history.append(metrics)
    value = metrics[recipe.train.monitor]
    sign = -1.0 if recipe.train.monitor in LOWER_IS_BETTER else 1.0
    improved = math.isfinite(value) and (progress.best is None or sign * value > sign * progress.best)
    if improved or (progress.best is None and len(progress.history) == 1):
        progress.best = value if math.isfinite(value) else None
        progress.bad_epochs = progress.plateau_epochs = 0
        return True
    progress.bad_epochs += 1
    progress.plateau_epochs += 1
    if recipe.optim.schedule == "plateau" and progress.plateau_epochs > recipe.optim.plateau_patience:
        progress.lr_scale *= recipe.optim.plateau_factor
        progress.plateau_epochs = 0
    return False


def pixel_format(data: Manifest) -> dict[str, int | str]:
    """How the training images were stored: prediction brings new files to the same size and codec."""
    pack = data.metadata[0]["pack"]
    return {"codec": pack["codec"], "size": pack["size"], "quality": pack.get("quality", Pack().quality)}


def _check_same_start(step: int, run: str, worker: Worker) -> None:
    """Ranks that resumed from different checkpoints would wait for each other forever."""
    starts = all_gather(np.array([step]), worker.dist)
    if len(set(starts.tolist())) > 1:
        raise UserError(
            f"tracking.runs_dir: the workers do not see the same {run}; give a shared folder or an s3:// address"
        )


def _out_of_patience(progress: Progress, recipe: Recipe) -> bool:
    return recipe.train.patience is not None and progress.bad_epochs >= recipe.train.patience


def _keeps_gradient_memory(recipe: Recipe) -> bool:
    """CUDA graphs return gradients in memory that the next microbatch overwrites (pytorch issue 169545): with these
    modes gradients get memory that outlives a step, to which microbatches are added."""
    return recipe.optim.grad_accum_steps > 1 and recipe.train.compile in ("reduce-overhead", "max-autotune")


def _gpu_memory(device: torch.device) -> dict[str, float]:
    return {"gpu_memory_gb": torch.cuda.max_memory_allocated(device) / 1e9} if device.type == "cuda" else {}


def _mix(seed: int, step: int, rank: int) -> int:
    """A seed of its own for every step and rank (a prime stride keeps ranks and steps apart)."""
    return (seed * 1_000_003 + step) * 4_099 + rank
