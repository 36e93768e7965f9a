"""How much a second worker helps, what starting costs, and what 8 to 512 GPUs would bring.

    python -m tests.benchmarks.scaling [--rounds 3] [--out results/scaling.json] [--plot scaling.png]
    python -m tests.benchmarks.scaling --project [--step-ms 95 --step-images 64] [--network-gbs 50] ...

Measured are real jobs, started as a user would, taking turns: on Ray Train workers, with a cluster, without one and
through the job API; `--local`; and the same loop under plain torchrun. Then, inside a group of Ray Train workers, the
backward pass with and without averaging of gradients and an all-reduce of their bytes alone. The projection is
arithmetic over those costs, or over those of a GPU that are given, and over assumptions, each an argument.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cxrscale import config
from cxrscale.cluster import ray_session
from cxrscale.config import Pack, Recipe
from cxrscale.models.networks import build_model
from cxrscale.shards import build, manifest
from cxrscale.sources.synthetic import archive
from tests.benchmarks import scaling_probe, scaling_projection, scaling_start
from tests.benchmarks.scaling_projection import Cluster, Cost, Job, Point
from tests.benchmarks.scaling_start import Launcher

STEP_MS, STEP_IMAGES = 278.353, 256
"""Of DenseNet-121 at 224 pixels with AMP and channels_last on an RTX 3090, as timm published it:
results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv."""
FIXED_MS = 20.0
"""Assumed: what its some thousand kernels and the optimizer take however few the images, without CUDA graphs."""
SETTINGS = ("recipe", "job", "workers", "rounds", "steps", "warm_up", "probes", "batch", "size")
HERE, GIVEN = "workers as measured here", "GPUs as given"


def shards(folder: Path) -> str:
    """A small synthetic archive as shards, which the jobs train on."""
    drawn = archive.write(str(folder / "archive"), images=160, size=96)
    out = str(folder / "shards")
    build.build_shards("nih", str(drawn.nih), Pack(size=96, samples_per_shard=40), out, local=True)
    return out


def overrides(given: argparse.Namespace, source: str, root: Path) -> list[str]:
    """What the measured jobs change in the recipe."""
    return [
        f"data.shards=[{source}]",
        "data.allow_leaks=true",
        f"tracking.runs_dir={root}",
        "tracking.log_steps=1",
        "tracking.wandb=disabled",
        "model.weights=none",
        f"augment.size={given.size}",
        f"sampler.batch_size={given.batch}",
        f"sampler.steps_per_epoch={given.steps}",
        "train.epochs=1",
    ]


def jobs(given: argparse.Namespace, changes: Sequence[str], resolved: Path, root: Path) -> dict[str, Any]:
    """Rounds of all launchers, taking turns, and the ratios between Ray and torchrun."""
    launchers = scaling_start.launchers(given.job, changes, resolved, given.workers)
    rounds: dict[str, list[dict[str, float]]] = {launcher.name: [] for launcher in launchers}
    with scaling_start.cluster(given.workers) as address:
        for number in range(given.rounds):
            for launcher in launchers:
                environment = scaling_start.environment(address if launcher.cluster else None)
                seconds = try_twice(launcher, root, f"{number}-{launchers.index(launcher)}", environment, given.warm_up)
                rounds[launcher.name].append(seconds)
                print(
                    f"round {number + 1}, {launcher.name}: first step after {seconds['step']:.1f} s, then "
                    f"{seconds['steps_per_s']:.2f} steps/s, load {seconds['load']:.1f}",
                    flush=True,
                )
    figures = {"start": {name: scaling_start.stages(item) for name, item in rounds.items()}, "rounds": rounds}
    return figures | {"ratios": ratios(rounds, given.workers)}


def try_twice(launcher: Launcher, root: Path, name: str, environment: dict[str, str], warm_up: int) -> dict[str, float]:
    """`scaling_start.started`, once more where it failed: a crowded machine makes Ray's nodes miss their deadlines."""
    try:
        return scaling_start.started(launcher, root, f"{name}-0", environment, warm_up)
    except SystemExit as failed:
        print(failed, flush=True)
        return scaling_start.started(launcher, root, f"{name}-1", environment, warm_up)


def ratios(rounds: Mapping[str, Sequence[Mapping[str, float]]], workers: int) -> dict[str, float]:
    """Medians over rounds of the ratio within a round."""
    ray, bare = "Ray, a cluster at hand", "torchrun"

    def ratio(above: str, below: str, key: str) -> float:
        return statistics.median(a[key] / b[key] for a, b in zip(rounds[above], rounds[below], strict=True))

    figures = {}
    for count in dict.fromkeys((1, workers)):
        figures[f"step on Ray / torchrun, {count}"] = ratio(f"{bare}, {count}", f"{ray}, {count}", "steps_per_s")
        figures[f"first step on Ray / torchrun, {count}"] = ratio(f"{ray}, {count}", f"{bare}, {count}", "step")
    for name in (ray, bare):
        figures[f"speed-up of {workers}: {name}"] = ratio(f"{name}, {workers}", f"{name}, 1", "steps_per_s")
    return figures


def probes(given: argparse.Namespace, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """The costs of a step inside groups of 1 and of more Ray Train workers."""
    os.environ[scaling_start.NICENESS] = "0"
    ray_session.connect()
    counts = list(dict.fromkeys((1, given.workers)))
    raw = [scaling_probe.on_ray(recipe, folder, count, given.probes, ray_session.gpus() > 0) for count in counts]
    return {str(count): scaling_probe.summary(item) for count, item in zip(counts, raw, strict=True)}


def measured(given: argparse.Namespace) -> dict[str, Any]:
    """Everything that is measured, printed as it is measured."""
    with tempfile.TemporaryDirectory(prefix="scaling-") as name:
        folder = Path(name)
        source = given.shards or shards(folder)
        changes = overrides(given, source, folder / "runs")
        resolved = folder / "resolved.yaml"
        resolved.write_text(config.to_yaml(config.load_recipe(given.job, changes)))
        figures = jobs(given, changes, resolved, folder / "runs")
        scaling_start.show(figures["start"])
        for name, value in figures["ratios"].items():
            print(f"{name:60}{value:8.3f}")
        figures["probe"] = probes(given, config.load_recipe(given.recipe, changes), folder)
        for count, item in figures["probe"].items():
            print(f"\ninside a group of {count}: " + ", ".join(f"{k} {v:,.3f}" for k, v in item.items()))
        return figures | {"load": os.getloadavg()[0]}


def sent_bytes(recipe: Recipe) -> tuple[int, int]:
    """Bytes of the model's gradients and of its buffers, counted without its memory."""
    with torch.device("meta"):
        model = build_model(recipe.model.without_weights(), recipe.data)
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return gradients, sum(b.numel() * b.element_size() for b in model.buffers())


def costs(given: argparse.Namespace, figures: Mapping[str, Any] | None) -> dict[str, Cost]:
    """The steps to project from: one worker's as measured, and a GPU's as given or published."""
    gradients, buffers = sent_bytes(config.load_recipe(given.recipe))
    image = (given.step_ms - given.fixed_ms) / given.step_images
    if image <= 0:
        raise SystemExit(f"--fixed-ms {given.fixed_ms} is no part of --step-ms {given.step_ms}; lower it")
    result = {GIVEN: Cost(given.fixed_ms, image, gradients, buffers)}
    if figures:
        one = figures["probe"]["1"]
        result[HERE] = Cost(one["fixed_ms"], one["image_ms"], one["gradient_bytes"], one["buffer_bytes"])
    return result


def image_kb(root: str) -> float:
    """Mean kB of a stored image."""
    return float(manifest.load(root).column("image_length").mean()) / 1000


def projected(given: argparse.Namespace, figures: Mapping[str, Any] | None) -> dict[str, Any]:
    """All projections: what is assumed, and the points of each."""
    named = vars(given)
    cluster = Cluster(**{name: named[name] for name in meanings(Cluster)})
    job = Job(**{name: named[name] for name in meanings(Job)})
    tables: dict[str, list[Point]] = {}
    bases = costs(given, figures)
    for base, cost in bases.items():
        for batch in given.plan_batch:
            label = f"{base}, {batch} images per step"
            tables[label] = scaling_projection.fixed_batch(batch, given.gpus, cost, cluster, job)
        label = f"{base}, {given.share} images per GPU"
        tables[label] = scaling_projection.fixed_share(given.share, given.gpus, cost, cluster, job)
    return {
        "assumed": {
            name: {"value": named[name], "meaning": meaning}
            for kind in (Cluster, Job)
            for name, (_, meaning) in meanings(kind).items()
        },
        "costs": {base: asdict(cost) for base, cost in bases.items()},
        "tables": {label: [asdict(item) for item in points] for label, points in tables.items()},
        "stops": {label: show(label, points, given.gpus) for label, points in tables.items()},
    }


def show(label: str, points: Sequence[Point], counts: Sequence[int]) -> dict[str, Any]:
    """Print a projection; returns where it stops."""
    print(f"\nprojected: {label}")
    heads = ("GPUs", "work", "gradients", "waited", "messages", "loader", "disk", "step ms")
    print("".join(f"{head:>10}" for head in heads) + f"{'images/s':>12}{'eff.':>7}{'run h':>8}{'GPU h':>8}  bound by")
    for p in points:
        times = (p.work_ms, p.gradients_ms, p.exposed_ms, p.messages_ms, p.loader_ms, p.disk_ms, p.step_ms)
        print(
            f"{p.gpus:10}"
            + "".join(f"{item:10.2f}" for item in times)
            + f"{p.per_second:12,.0f}{100 * p.efficiency:6.0f}%{p.run_h:8.2f}{p.gpus * p.run_h:8.1f}  {p.bound}"
        )
    figures = {}
    for name, end in (
        ("a step", scaling_projection.stop(points, counts)),
        ("the run", scaling_projection.stop_of_run(points, counts)),
    ):
        figures[name] = end
        message = f"stops scaling at {end[0]}: {end[1]}" if end else f"scales to {points[-1].gpus}"
        print(f"  {name} {message}")
    return figures


def meanings(section: type[Cluster] | type[Job]) -> dict[str, tuple[float, str]]:
    """Field -> (default, meaning)."""
    return scaling_projection.meanings(section)


def arguments() -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="jobs/chexnet14.yaml", help="whose model is probed and projected")
    parser.add_argument("--shards", help="a dataset to train on and to take image-kb from; else a synthetic archive")
    jobs = parser.add_argument_group("measured")
    jobs.add_argument("--job", default="jobs/demo.yaml", help="what the started jobs train: small, so that Ray shows")
    jobs.add_argument("--workers", type=int, default=2, help="beside 1")
    jobs.add_argument("--rounds", type=int, default=3, help="rounds of all launchers")
    jobs.add_argument("--steps", type=int, default=30, help="optimizer steps of a job")
    jobs.add_argument("--warm-up", type=int, default=5, help="steps that do not count for its speed")
    jobs.add_argument("--probes", type=int, default=15, help="rounds of the probe inside the workers")
    jobs.add_argument("--batch", type=int, default=16, help="images per step, over all workers")
    jobs.add_argument("--size", type=int, default=64, help="input side in pixels")
    base = parser.add_argument_group("projected: the step of a GPU")
    base.add_argument("--project", action="store_true", help="measure nothing")
    base.add_argument("--measured", type=Path, metavar="JSON", help="take what is measured from an earlier --out")
    base.add_argument("--step-ms", type=float, default=STEP_MS, help="ms of a step of one GPU (default: timm's, 3090)")
    base.add_argument("--step-images", type=int, default=STEP_IMAGES, help="images of that step")
    base.add_argument("--fixed-ms", type=float, default=FIXED_MS, help="of it, however few the images; assumed")
    base.add_argument("--plan-batch", type=int, nargs="+", default=[128, 2048], help="images per step, strong scaling")
    base.add_argument("--share", type=int, default=64, help="images per GPU, weak scaling")
    base.add_argument("--gpus", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64, 128, 256, 512])
    assumed = parser.add_argument_group("projected: assumptions")
    for kind in (Cluster, Job):
        for name, (default, meaning) in meanings(kind).items():
            option = f"--{name.replace('_', '-')}"
            assumed.add_argument(option, type=type(default), default=default, help=f"{meaning} (default {default})")
    parser.add_argument("--out", type=Path, help="JSON of the figures")
    parser.add_argument("--plot", type=Path, help="PNG of the projection")
    return parser.parse_args()


def main() -> None:
    """Measure, project, print, and keep the figures where --out and --plot say."""
    given = arguments()
    # A kill must not leave the benchmark's cluster behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    given.gpus = sorted(set(given.gpus))
    if given.shards:
        given.image_kb = image_kb(given.shards)
    figures: dict[str, Any] = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "settings": {name: getattr(given, name) for name in SETTINGS},
    }
    if given.measured:
        figures |= {name: json.loads(given.measured.read_text())[name] for name in ("machine", "settings", "measured")}
    elif not given.project:
        figures["measured"] = measured(given)
    figures["projected"] = projected(given, figures.get("measured"))
    if given.out:
        scaling_start.keep(given.out, figures)
    if given.plot:
        from tests.benchmarks import scaling_plot

        scaling_plot.draw(figures["projected"], given.plot)
        print(given.plot.resolve())


if __name__ == "__main__":
    main()
