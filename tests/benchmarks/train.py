"""What training costs beside the plainest loop: ours in this process, and under Ray with one and two workers.

    python -m tests.benchmarks.train [--steps 25] [--rounds 3] [--out tests/benchmarks/results/train.json]
    python -m tests.benchmarks.train --device cuda --arch densenet121 --size 224 --batch 64 --recipe jobs/*.yaml

Without --shards synthetic data is drawn. The contenders take turns, a stretch of steps each, so that a machine whose
speed varies treats them alike; ratios are taken within a round and their median is shown. A stretch begins after its
first log line: start-up, compilation and Ray's own start are not steps. CPU seconds are those of the processes that
train; on a machine with other work they say more than the clock. On a GPU every setting of the fast path is compared
with fp32 eager, and with --recipe (on any device) loader and step alone and together, beside a plain DataLoader.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from cxrscale import config
from cxrscale.config import Pack, Recipe
from cxrscale.io import storage
from cxrscale.loader.loader import Batches, training_batches
from cxrscale.models.networks import build_model
from cxrscale.shards import build, manifest
from cxrscale.sources.synthetic import archive
from cxrscale.training import launch, optim, tracking
from cxrscale.types import Batch, DistContext
from tests.benchmarks import train_device

LOG = 5
"""Steps between two log lines; the first of them warm up."""
LIMIT = 1.03
"""What ours under one Ray worker may take of the bare loop's time on a CPU."""
Stretch = dict[str, float]
"""Wall and CPU seconds per step, and the share of the wall that waits for data."""


def bare(recipe: Recipe, device: torch.device, batches: Iterator[Batch], steps: int) -> Stretch:
    """The plainest loop: same model, optimizer, loss and batches as ours, nothing around them."""
    torch.manual_seed(recipe.sampler.seed)
    layout = torch.channels_last if recipe.train.channels_last else torch.contiguous_format
    model = build_model(recipe.model, recipe.data).to(device).to(memory_format=layout).train()
    optimizer = optim.build_optimizer(model, recipe.optim)
    criterion = nn.BCEWithLogitsLoss()
    start = used = waited = 0.0
    for step in range(steps):
        if step == LOG:
            _finish(device)
            start, used, waited = time.perf_counter(), _cpu([psutil.Process()]), 0.0
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        loss = criterion(model(batch.image_BCHW.contiguous(memory_format=layout)), batch.label_BF)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    _finish(device)
    wall = time.perf_counter() - start
    return {
        "wall": wall / (steps - LOG),
        "cpu": (_cpu([psutil.Process()]) - used) / (steps - LOG),
        "data_wait": waited / wall,
    }


def ours(recipe: Recipe, workers: int) -> Stretch:
    """A complete run by the launcher, 0 workers being this process; timed by its own log lines."""
    seen: list[tuple[int, float]] = []

    @contextmanager
    def metered(run: str) -> Iterator[None]:
        stop = threading.Event()
        thread = threading.Thread(target=_follow, args=(run, workers, seen, stop), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    number = {"num_workers": workers}
    recipe = recipe.model_copy(update={"scaling": recipe.scaling.model_copy(update=number)})
    run = launch.launch(recipe, f"benchmark-{time.time_ns()}", metered)
    lines = [line for line in tracking.read_log(run) if line["kind"] == "train"]
    first, last = lines[0], lines[-1]
    return {
        "wall": (last["time"] - first["time"]) / (last["step"] - first["step"]),
        "cpu": (seen[-1][1] - seen[0][1]) / max(1, seen[-1][0] - seen[0][0]),
        "data_wait": statistics.mean(line["data_wait"] for line in lines[1:]),
    }


def _follow(run: str, workers: int, seen: list[tuple[int, float]], stop: threading.Event) -> None:
    """Note the CPU time of the processes that train whenever a line has come: (step, seconds)."""
    training: list[psutil.Process] = []
    while not stop.wait(0.05):
        lines = [line["step"] for line in tracking.read_log(run) if line["kind"] == "train"]
        if not lines or (seen and seen[-1][0] == lines[-1]):
            continue
        training = training or (_train_workers() if workers else [psutil.Process()])
        try:
            seen.append((lines[-1], _cpu(training)))
        except psutil.NoSuchProcess:  # the last line was the end of the run
            return


def _train_workers() -> list[psutil.Process]:
    own_uid = psutil.Process().uids().real
    processes = psutil.process_iter(["cmdline", "uids"])
    return [
        item
        for item in processes
        if "TrainWorker" in " ".join(item.info["cmdline"] or ()) and item.info["uids"].real == own_uid
    ]


def _cpu(processes: list[psutil.Process]) -> float:
    return float(sum(sum(item.cpu_times()[:2]) for item in processes))


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def loops(recipe: Recipe, device: torch.device, steps: int, rounds: int) -> dict[str, list[Stretch]]:
    """Every contender's stretches, round by round; the order turns, so that none always comes first."""
    data = manifest.load(*recipe.data.shards)

    def our_batches() -> Batches:
        return training_batches(data, recipe, DistContext(device=device))

    stream = our_batches()
    ready = list(itertools.islice(stream, 4))
    stream.close()
    contenders: dict[str, Callable[[], Stretch]] = {
        "bare loop, batches in memory": lambda: bare(recipe, device, itertools.cycle(ready), steps),
        "bare loop, our batches": lambda: bare(recipe, device, our_batches(), steps),
        "ours, this process": lambda: ours(recipe, 0),
        "ours, 1 Ray worker": lambda: ours(recipe, 1),
    }
    if device.type == "cpu" or torch.cuda.device_count() > 1:
        contenders["ours, 2 Ray workers"] = lambda: ours(recipe, 2)
    measured: dict[str, list[Stretch]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            measured[name].append(contenders[name]())
            print(f"round {number + 1}: {name:30} {measured[name][-1]}", flush=True)
    return measured


def summary(measured: dict[str, list[Stretch]], batch: int) -> dict[str, dict[str, float]]:
    """Medians over the rounds, and the median of each round's ratio to the bare loop over our batches."""
    reference = measured["bare loop, our batches"]
    table = {}
    for name, stretches in measured.items():
        middle = {kind: statistics.median(item[kind] for item in stretches) for kind in ("wall", "cpu", "data_wait")}
        ratios = {
            f"{kind}_to_bare": statistics.median(
                item[kind] / other[kind] for item, other in zip(stretches, reference, strict=True)
            )
            for kind in ("wall", "cpu")
        }
        speed = {"steps_per_second": 1 / middle["wall"], "images_per_second": batch / middle["wall"]}
        table[name] = middle | ratios | speed
    return table


def synthetic_shards(folder: Path, images: int, size: int) -> tuple[str, str]:
    """Shards of a drawn archive: NIH's side, and SIIM's side with masks."""
    drawn = archive.write(str(folder / "archive"), images=images, size=size, seed=0)
    nih, siim = str(folder / "nih"), str(folder / "siim")
    build.build_shards("nih", str(drawn.nih), Pack(size=size), nih, local=True)
    build.build_shards(
        "siim", str(drawn.siim), Pack(size=size, masks=True), siim, patients_from_dataset=nih, local=True
    )
    return nih, siim


def recipe_of(given: argparse.Namespace, shards: str, folder: Path) -> Recipe:
    """The recipe that the loops share."""
    overrides = [
        f"data.shards=[{shards}]",
        f"loader.num_threads={given.threads}",
        f"augment.size={given.size}",
        "augment.preset=chexnet",
        f"model.arch={given.arch}",
        "model.weights=none",
        f"sampler.batch_size={given.batch}",
        f"sampler.steps_per_epoch={given.steps}",
        "train.epochs=1",
        "train.compile=never",
        "train.precision=fp32",
        f"tracking.log_steps={LOG}",
        f"tracking.runs_dir={folder / 'runs'}",
        f"scaling.cpus_per_worker={given.threads}",
        f"scaling.use_gpu={str(given.device == 'cuda').lower()}",
    ]
    return config.parse(Recipe, config.override({}, overrides), where="benchmark")


def arguments() -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=25, help=f"steps of a stretch, the first {LOG} of them warm up")
    parser.add_argument("--rounds", type=int, default=3, help="stretches of each contender")
    parser.add_argument("--arch", default="resnet18", help="timm's name of the model")
    parser.add_argument("--size", type=int, default=96, help="input side in pixels")
    parser.add_argument("--batch", type=int, default=16, help="images per step")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch and of DALI per worker")
    parser.add_argument("--shards", help="a dataset with the findings of ChestX-ray14; default: a synthetic archive")
    parser.add_argument("--masks", help="a dataset with masks, for recipes that segment; default: a synthetic archive")
    parser.add_argument("--recipe", nargs="*", default=[], help="recipes whose loader and step to time")
    parser.add_argument("--no-loops", action="store_true", help="leave the loops out: settings and recipes alone")
    parser.add_argument("--peak-tflops", type=float, help="the device's peak for bf16 where its name is not known")
    parser.add_argument("--out", type=Path, help="also write JSON")
    given = parser.parse_args()
    if given.steps <= LOG + 1 or given.steps % LOG:
        parser.error(f"--steps={given.steps}: a multiple of {LOG}, at least {2 * LOG}")
    return given


def main() -> None:
    """Run the benchmarks and print tables."""
    given = arguments()
    os.environ["OMP_NUM_THREADS"] = str(given.threads)
    torch.set_num_threads(given.threads)
    device = torch.device(given.device)
    result: dict[str, Any] = {
        "machine": {"cpus": os.cpu_count(), "processor": platform.processor() or platform.machine()},
        "gpu": torch.cuda.get_device_name() if given.device == "cuda" else None,
        "torch": torch.__version__,
        "arguments": {key: value for key, value in vars(given).items() if key not in ("out", "shards", "masks")},
        "load_before": os.getloadavg()[0],
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards, masks = given.shards, given.masks
        if not shards or not masks:
            drawn = synthetic_shards(folder, images=96, size=max(given.size, 288 if given.recipe else 0))
            shards, masks = shards or drawn[0], masks or drawn[1]
        recipe = recipe_of(given, shards, folder)
        if not given.no_loops:
            measured = loops(recipe, device, given.steps, given.rounds)
            result["loops"] = {"rounds": measured, "summary": summary(measured, given.batch)}
            _print_loops(result["loops"]["summary"], given.device)
        if given.device == "cuda":
            result["settings"] = train_device.time_settings(
                recipe, device, given.steps, given.rounds, given.peak_tflops
            )
        result["recipes"] = {
            Path(path).stem: train_device.recipe_alone(path, (shards, masks), device, given.steps, given.rounds)
            for path in given.recipe
        }
    result["load_after"] = os.getloadavg()[0]
    print(f"load {result['load_before']:.1f} before, {result['load_after']:.1f} after, on {os.cpu_count()} CPUs")
    if given.out:
        storage.write(str(given.out), json.dumps(result, indent=2) + "\n")


def _print_loops(table: dict[str, dict[str, float]], device: str) -> None:
    for name, row in table.items():
        print(
            f"{name:30} {row['steps_per_second']:7.2f} steps/s  {row['images_per_second']:8.1f} images/s  "
            f"x{row['wall_to_bare']:.3f} wall  x{row['cpu_to_bare']:.3f} CPU  waiting for data {row['data_wait']:.1%}"
        )
    row = table["ours, 1 Ray worker"]
    if device == "cpu":
        held = {kind: row[f"{kind}_to_bare"] <= LIMIT for kind in ("wall", "cpu")}
        print(
            f"ours + Ray at most {LIMIT - 1:.0%} over the bare loop: by the clock {held['wall']}, by CPU {held['cpu']}"
        )


if __name__ == "__main__":
    main()
