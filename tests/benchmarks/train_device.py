"""The step on its device: each setting of the fast path against fp32 eager, and each recipe's loader and step."""

from __future__ import annotations

import io
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from cxrscale import config
from cxrscale.config import Recipe
from cxrscale.loader.loader import training_batches, usable_rows
from cxrscale.loader.reader import ShardReader
from cxrscale.models.networks import build_model, train_mode
from cxrscale.shards import manifest
from cxrscale.shards.manifest import Manifest
from cxrscale.training import loop, tracking
from cxrscale.training.distributed import LocalWorker
from cxrscale.training.state import Progress
from cxrscale.training.tracking import Tracker
from cxrscale.types import Batch, DistContext

PEAK_TFLOPS = {
    "H200": 989.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10G": 70.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}
"""Dense bf16 with fp32 accumulation, by the makers' data sheets."""
PLAIN = {"precision": "fp32", "channels_last": False, "compile": "never"}
SETTINGS: dict[str, dict[str, Any]] = {
    "fp32 eager, no TF32, plain Adam": PLAIN,
    "TF32": PLAIN,
    "channels_last": PLAIN | {"channels_last": True},
    "bf16": PLAIN | {"precision": "bf16"},
    "bf16, channels_last": PLAIN | {"precision": "bf16", "channels_last": True},
    "compile": PLAIN | {"compile": "default"},
    "all, plain Adam": {"precision": "bf16", "channels_last": True, "compile": "default"},
    "all": {"precision": "bf16", "channels_last": True, "compile": "default"},
    "all, CUDA graphs": {"precision": "bf16", "channels_last": True, "compile": "reduce-overhead"},
}
"""Settings of the train section; Adam is fused and TF32 on unless the name says otherwise."""

Steps = Callable[[], None]
"""Does a stretch of steps and waits for the device."""


def stepper(
    recipe: Recipe, data: Manifest, device: torch.device, batch: Batch, steps: int, fused: bool = True
) -> Steps:
    """Our loop over one batch that already lies on the device."""
    worker = LocalWorker(str(device))
    state = loop.build_state(recipe, worker.dist.device)
    if not fused:
        trained = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
        state.optimizer = torch.optim.Adam(trained, recipe.optim.lr, foreach=False, fused=False)
    context = loop.make_context(recipe, worker, data, state, steps, None)

    def run() -> None:
        state.progress = Progress()
        for _ in loop.train_epoch(context, state, itertools.repeat(batch)):
            pass

    return run


def time_settings(recipe: Recipe, device: torch.device, steps: int, rounds: int, peak: float | None) -> dict[str, Any]:
    """Each setting's images per second, memory and share of the device's peak; a first, untimed round compiles."""
    data = manifest.load(*recipe.data.shards)
    batch = first_batch(recipe, data, device)
    name = torch.cuda.get_device_name(device)
    peak = peak or next((value for key, value in PEAK_TFLOPS.items() if key in name), None)
    work = flops(recipe, batch, device)
    runs: dict[str, Steps] = {}
    own: dict[str, int] = {}
    for setting, changes in SETTINGS.items():
        before = torch.cuda.memory_allocated(device)
        quiet = recipe.tracking.model_copy(update={"log_steps": steps})
        sections = {"train": recipe.train.model_copy(update=changes), "tracking": quiet}
        changed = recipe.model_copy(update=sections)
        runs[setting] = stepper(changed, data, device, batch, steps, "plain Adam" not in setting)
        own[setting] = torch.cuda.memory_allocated(device) - before
    seconds: dict[str, list[float]] = {setting: [] for setting in runs}
    memory: dict[str, int] = {}
    for number in range(rounds + 1):
        for setting, run in runs.items():
            _tf32("no TF32" not in setting)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            start = time.perf_counter()
            run()
            torch.cuda.synchronize(device)
            if number:
                seconds[setting].append((time.perf_counter() - start) / steps)
            # The other contenders' models lie there too: what this one adds, and its own weights and moments.
            memory[setting] = torch.cuda.max_memory_allocated(device) - before + own[setting]
    _tf32(True)
    result: dict[str, Any] = {"gflop_per_step": work / 1e9, "peak_tflops": peak, "settings": {}}
    slowest = statistics.median(seconds[next(iter(SETTINGS))])
    for setting, times in seconds.items():
        middle = statistics.median(times)
        row = {
            "ms_per_step": 1000 * middle,
            "images_per_second": recipe.sampler.batch_size / middle,
            "speed_up": slowest / middle,
            "memory_gb": memory[setting] / 1e9,
            "flops_utilization": None if peak is None else work / middle / (peak * 1e12),
        }
        result["settings"][setting] = row
        share = "" if peak is None else f"  {row['flops_utilization']:.1%} of peak"
        print(
            f"{setting:34} {row['ms_per_step']:8.2f} ms per step  {row['images_per_second']:9.1f} images/s  "
            f"x{row['speed_up']:.2f}  {row['memory_gb']:.2f} GB{share}"
        )
    return result


def _tf32(on: bool) -> None:
    torch.backends.cudnn.allow_tf32 = on
    torch.set_float32_matmul_precision("high" if on else "highest")


def flops(recipe: Recipe, batch: Batch, device: torch.device) -> int:
    """Floating-point operations of a step's forward and backward pass."""
    model = build_model(recipe.model, recipe.data).to(device)
    with FlopCounterMode(display=False) as counter:
        model(batch.image_BCHW.float()).square().mean().backward()
    return int(counter.get_total_flops())


def first_batch(recipe: Recipe, data: Manifest, device: torch.device) -> Batch:
    """A batch of the recipe's own loader."""
    batches = training_batches(data, recipe, DistContext(device=device))
    batch = next(batches)
    batches.close()
    return batch


class Images(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """The usual dataset: PIL decodes, torchvision resizes, normalizes and flips, one image at a time."""

    def __init__(self, data: Manifest, recipe: Recipe) -> None:
        rows = usable_rows(data, recipe.data.train_split, recipe.data)
        segment = recipe.data.task == "segment"
        encoded = ShardReader(data).read(rows, segment)
        self.images = [image.tobytes() for image in encoded.images]
        self.masks = [mask.tobytes() for mask in encoded.masks] if encoded.masks else []
        self.label_NF = torch.from_numpy(np.nan_to_num(data.labels(recipe.data.findings)[rows]))
        self.augment, self.hflip = recipe.augment, recipe.augment.hflip

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        from PIL import Image
        from torchvision.transforms import functional

        def opened(content: bytes) -> torch.Tensor:
            loaded = Image.open(io.BytesIO(content)).convert("L")
            tensor: torch.Tensor = functional.to_tensor(functional.resize(loaded, [self.augment.size] * 2))
            return tensor

        image = (opened(self.images[index]) - self.augment.mean) / self.augment.std
        target = (opened(self.masks[index]) > 0.5).float() if self.masks else self.label_NF[index]
        if torch.rand(()) < self.hflip:
            image = image.flip(-1)
            target = target.flip(-1) if self.masks else target
        return image, target


def peer(data: Manifest, recipe: Recipe, device: torch.device, steps: int) -> Steps:
    """A plain DataLoader over `Images`, fp32, eager, plain Adam."""
    model = build_model(recipe.model, recipe.data).to(device)
    train_mode(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], recipe.optim.lr)
    criterion = nn.BCEWithLogitsLoss()
    loader = DataLoader(
        Images(data, recipe),
        recipe.sampler.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=max(1, torch.get_num_threads()),
        pin_memory=device.type == "cuda",
        persistent_workers=True,
    )
    batches: Iterator[Any] = itertools.chain.from_iterable(itertools.repeat(loader))

    def run() -> None:
        for _ in range(steps):
            image, target = next(batches)
            loss = criterion(model(image.to(device)), target.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return run


def recipe_alone(path: str, shards: tuple[str, str], device: torch.device, steps: int, rounds: int) -> dict[str, float]:
    """Images per second of a recipe's loader alone, step alone and both, and of the peer; share of data wait."""
    tree = config.load_recipe(path)
    chosen = shards[1] if tree.data.task == "segment" else shards[0]
    data = manifest.load(chosen)
    available = len(usable_rows(data, tree.data.train_split, tree.data))
    changes: dict[str, dict[str, Any]] = {
        "data": {"shards": (chosen,)},
        # Neither needs another run's files; a small dataset must fill a batch of the peer, which drops the rest.
        "model": {"weights": "none", "reset_head": False},
        "sampler": {
            "sampling": "all",
            "hard_predictions": None,
            "dataset_weights": (),
            "batch_size": min(tree.sampler.batch_size, available),
        },
        "tracking": {"log_steps": steps, "wandb": "disabled"},
    }
    recipe = tree.model_copy(
        update={section: getattr(tree, section).model_copy(update=fields) for section, fields in changes.items()}
    )
    batches = training_batches(data, recipe, DistContext(device=device))
    worker = LocalWorker(str(device))
    state = loop.build_state(recipe, worker.dist.device)
    waits: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        tracker = Tracker(folder, recipe.tracking, {})
        context = loop.make_context(recipe, worker, data, state, steps, tracker)

        def both() -> None:
            state.progress = Progress()
            for _ in loop.train_epoch(context, state, batches):
                pass
            waits.append(tracking.read_log(folder)[-1]["data_wait"])

        def loader() -> None:
            for _ in range(steps):
                next(batches)

        contenders: dict[str, Steps] = {
            "loader": loader,
            "step": stepper(recipe, data, device, first_batch(recipe, data, device), steps),
            "both": both,
            "plain": peer(data, recipe, device, steps),
        }
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for number in range(rounds + 1):
            for name, run in contenders.items():
                start = time.perf_counter()
                run()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if number:
                    seconds[name].append((time.perf_counter() - start) / steps)
        tracker.close()
    batches.close()
    result = {name: recipe.sampler.batch_size / statistics.median(times) for name, times in seconds.items()}
    result["data_wait"] = statistics.median(waits[1:])
    if device.type == "cuda":
        result["memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    shown = "  ".join(f"{name} {value:.1f}" for name, value in result.items() if name in contenders)
    print(f"{path}: images/s {shown}  waiting for data {result['data_wait']:.1%}", flush=True)
    return result
