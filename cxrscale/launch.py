"""A recipe -> a run: on Ray Train workers, or in this very process."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from cxrscale import __version__, config, models, session, storage
from cxrscale.batches import feed
from cxrscale.config import Recipe
from cxrscale.schema import InputError
from cxrscale.shards import leaks, manifest
from cxrscale.train import refuse_leaks, train
from cxrscale.worker import LocalWorker, RayWorker

RECIPE = "recipe.yaml"
ABOUT = "run.json"
MISTAKE = "mistake.txt"
"""What a worker found wrong with the input, for the driver to say."""
FREE_TO_CHANGE = frozenset({"scaling", "tracking", "pack", "threshold", "tune"})
"""Sections that may differ when an unfinished run goes on: they do not change what is learned."""

Watcher = Callable[[Path, Recipe], Any]
"""Makes a context manager that shows the progress of a run while it is entered."""


def launch(recipe: Recipe, stem: str, watch: Watcher, *, local: bool = False) -> Path:
    """Train a recipe; an unfinished run of the same tracking.name goes on where it stopped.

    Args:
        stem: the recipe file's stem, for the name of a new run.
        watch: shows progress.
        local: in this process, without Ray (as scaling.num_workers=0 does).

    Returns:
        The run's folder.

    Raises:
        InputError: shards, weights or an earlier run of that name do not fit.
    """
    local = local or recipe.scaling.num_workers == 0
    recipe = _absolute(recipe)
    about = preflight(recipe)
    run = prepare(recipe, stem, about)
    began = time.time()
    with watch(run, recipe):
        finished = _here(recipe, run) if local else _on_ray(recipe, run)
    about |= {"finished": finished, "seconds": round(time.time() - began, 1)}
    storage.write(str(run / ABOUT), json.dumps(about, indent=2) + "\n")
    return run


def preflight(recipe: Recipe) -> dict[str, Any]:
    """Find a user's mistakes before any worker starts; returns what run.json says of inputs and versions.

    Raises:
        InputError: shards, labels, splits or model do not fit the recipe.
    """
    data = manifest.load(*recipe.data.shards)
    if not recipe.data.allow_leaks:
        refuse_leaks(data, recipe, leaks.persons(leaks.join(*recipe.data.shards)))
    data.labels(recipe.data.findings)
    feed.training(data, recipe.data, recipe.plan, recipe.augment).close()
    feed.evaluation(data, recipe.data.val_split, recipe.data, recipe.plan, recipe.augment).close()
    if recipe.model.weights in ("imagenet", "none"):
        with torch.device("meta"):  # shapes and names without the memory
            models.build(recipe.model.model_copy(update={"weights": "none"}), recipe.data)
    else:
        models.build(recipe.model, recipe.data)
    workers = recipe.scaling.workers[1]
    if workers and recipe.plan.batch < workers:
        raise InputError(f"plan.batch={recipe.plan.batch} is less than scaling.num_workers={workers}; raise plan.batch")
    return {
        "shards": list(recipe.data.shards),
        "manifest": data.digest,
        "inputs": [about["input"] for about in data.about],
        "cxrscale": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "git": _git_commit(),
        "finished": False,
    }


def prepare(recipe: Recipe, stem: str, about: dict[str, Any]) -> Path:
    """Make the run's folder, or find the unfinished one of that name.

    Raises:
        InputError: the name is that of a finished run, or of one with another recipe or other shards.
    """
    name = recipe.tracking.name or f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    run = Path(recipe.tracking.root).resolve() / name
    if (run / RECIPE).exists():
        before = yaml.safe_load((run / RECIPE).read_text())
        now = yaml.safe_load(config.to_yaml(recipe))
        changed = [s for s in now if s not in FREE_TO_CHANGE and now[s] != before.get(s)]
        old = json.loads((run / ABOUT).read_text())
        if changed:
            raise InputError(
                f"run {name} exists with other settings in {', '.join(changed)}; give another tracking.name"
            )
        if old["manifest"] != about["manifest"]:
            raise InputError(f"run {name} was trained on other shards; give another tracking.name")
        if old["finished"]:
            raise InputError(f"run {name} is finished; give another tracking.name, or `cxrscale evaluate {run}`")
    storage.write(str(run / ABOUT), json.dumps(about, indent=2) + "\n")
    storage.write(str(run / RECIPE), config.to_yaml(recipe))
    (run / MISTAKE).unlink(missing_ok=True)
    return run


def _here(recipe: Recipe, run: Path) -> bool:
    worker = LocalWorker()
    worker.obey_signals()
    return train(recipe, run, worker).finished


def _on_ray(recipe: Recipe, run: Path) -> bool:
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    session.connect()
    import ray.train
    from ray.train.torch import TorchTrainer

    use_gpu = recipe.scaling.use_gpu if recipe.scaling.use_gpu is not None else session.gpus() > 0
    workers = recipe.scaling.workers[0]
    have, want = session.cpus(), workers * recipe.scaling.cpus_per_worker
    if want > have or (use_gpu and workers > session.gpus()):
        kind = f"{session.gpus()} GPUs" if use_gpu else f"{have} CPUs"
        raise InputError(f"scaling.num_workers={workers} does not fit the cluster's {kind}; lower it or use --local")
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    trainer = TorchTrainer(
        _ray_loop,
        train_loop_config={"recipe": recipe.model_dump(mode="json"), "run": str(run)},
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": recipe.scaling.cpus_per_worker, **({"GPU": 1} if use_gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            # Our own checkpoints carry the resume, so each launch is a new run to Ray: a name that Ray has finished
            # would train nothing and return the old metrics.
            name=f"{run.name}-{time.time_ns()}",
            storage_path=str(run / "ray"),
            failure_config=ray.train.FailureConfig(max_failures=recipe.scaling.max_failures),
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise InputError(_reason(error)) from error
    if (run / MISTAKE).exists():
        raise InputError((run / MISTAKE).read_text())
    return True


def _ray_loop(settings: dict[str, Any]) -> None:
    recipe, run = config.parse(Recipe, settings["recipe"], where="the driver's recipe"), Path(settings["run"])
    mistake = run / MISTAKE
    # Ray starts a failed group again. A lost worker is worth that, a user's mistake is not: the new group leaves.
    if mistake.exists():
        return
    try:
        train(recipe, run, RayWorker())
    except InputError as error:
        storage.write(str(mistake), str(error))
        raise


def _reason(error: Exception) -> str:
    """The innermost line of a worker's failure; Ray wraps it in pages."""
    failures = getattr(error, "worker_failures", None) or {}
    for failure in failures.values():
        cause: BaseException = failure
        while (deeper := getattr(cause, "cause", None) or cause.__cause__) is not None:
            cause = deeper
        lines = [line for line in str(cause).splitlines() if line.strip()]
        if lines:
            return (
                f"training failed on a worker: {lines[-1].strip()}; the same command goes on from its last checkpoint"
            )
    return f"training failed: {str(error).splitlines()[0]}"


def _absolute(recipe: Recipe) -> Recipe:
    """Ray's workers run in another directory, so every path becomes absolute."""
    shards = tuple(s if storage.is_remote(s) else str(storage.local_path(s).resolve()) for s in recipe.data.shards)
    weights = recipe.model.weights
    if weights not in ("imagenet", "none"):
        weights = str(Path(weights).resolve())
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"shards": shards}),
            "model": recipe.model.model_copy(update={"weights": weights}),
        }
    )


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
