"""Inside a group of workers: what a step computes, and what it costs to average its gradients.

The same backward pass with DistributedDataParallel's averaging and without it (`no_sync`), an all-reduce of as many
bytes alone, and the pass over half of the images, take turns, so that a machine whose speed varies treats them
alike.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from cxrscale import config
from cxrscale.config import Recipe
from cxrscale.loader import sampler
from cxrscale.loader.loader import training_batches, training_epoch_length
from cxrscale.models import losses
from cxrscale.models.forward import forward
from cxrscale.shards import manifest
from cxrscale.training import loop
from cxrscale.training.distributed import RayWorker, Worker, no_sync
from cxrscale.training.loop import TrainContext
from cxrscale.types import Batch

WARM_UP = 2


def passes(context: TrainContext, batch: Batch, averaging: bool) -> None:
    """Forward and backward over a batch, as a step of `train` does them."""
    with no_sync(context.ddp_model, not averaging):
        logits = forward(context.compiled_model, batch, context.recipe.train, context.worker.dist.device)
        torch.autograd.backward(losses.terms(logits, batch, context.recipe.loss, context.weights).sum())


def timed(work: Callable[[], object], worker: Worker) -> float:
    """Milliseconds of the work on this rank, begun by all ranks together."""
    if worker.dist.world > 1:
        torch.distributed.barrier()
    start = time.perf_counter()
    work()
    if worker.dist.device.type == "cuda":
        torch.cuda.synchronize(worker.dist.device)
    return 1000 * (time.perf_counter() - start)


def probe(recipe: Recipe, worker: Worker, rounds: int) -> dict[str, Any]:
    """Milliseconds of each kind of work, round by round, and the bytes that a step sends."""
    data = manifest.load(*recipe.data.shards)
    state = loop.build_state(recipe, worker.dist.device)
    steps = sampler.steps_per_epoch(training_epoch_length(data, recipe), recipe.sampler)
    context = loop.make_context(recipe, worker, data, state, steps, None)
    batches = training_batches(data, recipe, worker.dist)
    batch = next(batches)
    batches.close()
    half = loop.microbatches(batch, 2)[0]
    gradients = [p for p in state.model.parameters() if p.requires_grad]
    flat = torch.zeros(sum(p.numel() for p in gradients), device=worker.dist.device)
    kinds: dict[str, Callable[[], object]] = {
        "whole": lambda: passes(context, batch, True),
        "half": lambda: passes(context, half, worker.dist.world == 1),
        "update": state.optimizer.step,
    }
    if worker.dist.world > 1:
        kinds |= {
            "unaveraged": lambda: passes(context, batch, False),
            "all_reduce": lambda: torch.distributed.all_reduce(flat),
        }
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(rounds + WARM_UP):
        for name, work in kinds.items():
            milliseconds = timed(work, worker)
            if name != "update":
                state.optimizer.zero_grad(set_to_none=False)
            if number >= WARM_UP:
                times[name].append(milliseconds)
    return {
        "rank_images": len(batch.row_B),
        "half_images": len(half.row_B),
        "gradient_bytes": flat.numel() * flat.element_size(),
        "buffer_bytes": sum(b.numel() * b.element_size() for b in state.model.buffers()),
        "ms": times,
    }


def on_ray(recipe: Recipe, folder: Path, workers: int, rounds: int, gpu: bool) -> dict[str, Any]:
    """`probe` in a group of Ray Train workers of the connected cluster; the figures of rank 0."""
    import ray.train
    from ray.train.torch import TorchTrainer

    out = folder / f"probe-{workers}.json"
    TorchTrainer(
        _loop,
        train_loop_config={"recipe": recipe.model_dump(mode="json"), "rounds": rounds, "out": str(out)},
        scaling_config=ray.train.ScalingConfig(num_workers=workers, use_gpu=gpu),
        run_config=ray.train.RunConfig(name=f"probe-{workers}", storage_path=str(folder / "ray")),
    ).fit()
    figures: dict[str, Any] = json.loads(out.read_text())
    return figures


def _loop(settings: dict[str, Any]) -> None:
    recipe = config.parse(Recipe, settings["recipe"], where="the benchmark's recipe")
    worker = RayWorker(settings["out"], f"{settings['out']}.stop")
    figures = probe(recipe, worker, settings["rounds"])
    if worker.dist.rank == 0:
        Path(settings["out"]).write_text(json.dumps(figures))


def summary(figures: dict[str, Any]) -> dict[str, float]:
    """Medians of a probe: the cost of a step, and the share of it that averaging takes.

    `fixed_ms` and `image_ms` are the line through the whole and the half batch; where noise makes the line rise
    towards nothing, all of it counts as the images'.
    """
    ms = {name: statistics.median(times) for name, times in figures["ms"].items()}
    whole = ms.get("unaveraged", ms["whole"])
    image = (whole - ms["half"]) / (figures["rank_images"] - figures["half_images"])
    image = min(image, whole / figures["rank_images"]) if image > 0 else whole / figures["rank_images"]
    result = {
        "passes_ms": ms["whole"],
        "update_ms": ms["update"],
        "image_ms": image,
        "fixed_ms": whole - image * figures["rank_images"] + ms["update"],
        "gradient_bytes": figures["gradient_bytes"],
        "buffer_bytes": figures["buffer_bytes"],
    }
    if "all_reduce" in ms:
        pairs = list(zip(figures["ms"]["whole"], figures["ms"]["unaveraged"], figures["ms"]["all_reduce"], strict=True))
        updates = figures["ms"]["update"]
        steps = [whole + update for (whole, _, _), update in zip(pairs, updates, strict=True)]
        result |= {
            "all_reduce_ms": ms["all_reduce"],
            "all_reduce_share": statistics.median(a / step for (_, _, a), step in zip(pairs, steps, strict=True)),
            "averaging_ms": statistics.median(whole - alone for whole, alone, _ in pairs),
            "averaging_share": statistics.median(
                (w - alone) / s for (w, alone, _), s in zip(pairs, steps, strict=True)
            ),
        }
    return result
