"""A recipe -> a run: on Ray Train workers, or in this very process."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import yaml

from cxrscale import config
from cxrscale.cluster import nodes, ray_session
from cxrscale.config import Recipe
from cxrscale.io import storage
from cxrscale.loader import evaluation_batches, training_batches
from cxrscale.models import build_model
from cxrscale.shards import leakage, manifest, refuse_leaks
from cxrscale.training import run_info
from cxrscale.training.distributed import LocalWorker, RayWorker, handle_sigterm
from cxrscale.training.loop import train
from cxrscale.types import UserError

RECIPE = "recipe.yaml"
ERROR_FILE = "mistake.txt"
"""What a worker found wrong with the input, for the driver to say."""
STOP = "stop"
"""The file by which the driver, which gets the signals, asks the workers to leave with a checkpoint."""
FREE_TO_CHANGE = frozenset({"scaling", "tracking", "pack", "threshold", "tune"})
"""Sections that may differ when an unfinished run goes on: they do not change what is learned."""

MALLOC_ENV = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
}
"""glibc hands a step's activations back to the kernel and takes them anew: 15,000 page faults, 7% of a CPU step."""

Watcher = Callable[[str], Any]
"""Makes a context manager that shows the progress of a run while it is entered."""


def launch(recipe: Recipe, stem: str, watch: Watcher, *, local: bool = False) -> str:
    """Train a recipe; an unfinished run of the same tracking.name goes on where it stopped.

    Args:
        stem: the recipe file's stem, for the name of a new run.
        watch: shows progress.
        local: in this process, without Ray (as scaling.num_workers=0 does).

    Returns:
        The run's folder or address.

    Raises:
        UserError: shards, weights, the cluster or an earlier run of that name do not fit.
    """
    local = local or recipe.scaling.workers[1] == 0
    recipe = absolute_paths(recipe)
    inputs = {"recipe": stem, **preflight(recipe)}
    if not local:
        os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
        ray_session.connect()
        nodes.preflight(recipe.scaling, reads=recipe.data.shards, writes=[recipe.tracking.runs_dir])
    run = prepare(recipe, stem, inputs)
    workers = 1 if local else recipe.scaling.workers[1]
    with run_info.record_session(run, inputs, workers, recipe.tracking.gpu_hour_price), watch(run):
        (_in_process if local else _on_ray)(recipe, run)
    return run


def preflight(recipe: Recipe) -> dict[str, Any]:
    """Find a user's mistakes before any worker starts; returns what run.json says of the inputs.

    Raises:
        UserError: shards, labels, splits or model do not fit the recipe.
    """
    data = manifest.load(*recipe.data.shards)
    if not recipe.data.allow_leaks:
        refuse_leaks(data.split, leakage.merged_patients(leakage.join_datasets(*recipe.data.shards)), recipe.data)
    data.labels(recipe.data.findings)
    training_batches(data, recipe.data, recipe.sampler, recipe.augment).close()
    evaluation_batches(data, recipe.data.val_split, recipe.data, recipe.sampler, recipe.augment).close()
    if recipe.model.weights in ("imagenet", "none"):
        with torch.device("meta"):  # shapes and names without the memory
            build_model(recipe.model.model_copy(update={"weights": "none"}), recipe.data)
    else:
        build_model(recipe.model, recipe.data)
    workers = recipe.scaling.workers[1]
    if recipe.sampler.batch_size < workers:
        raise UserError(
            f"sampler.batch_size={recipe.sampler.batch_size} is less than scaling.num_workers={workers}; raise sampler.batch_size"
        )
    return {
        "shards": list(recipe.data.shards),
        "manifest": data.digest,
        "inputs": [about["input"] for about in data.about],
        # The recipe only names these files: another file under the name would be another training.
        "files": {name: storage.digest(storage.read(name)) for name in _files(recipe)},
    }


def prepare(recipe: Recipe, stem: str, inputs: dict[str, Any]) -> str:
    """Make the run's folder, or find the unfinished one of that name.

    Raises:
        UserError: the name is that of a finished run, or of one with another recipe or other inputs.
    """
    name = recipe.tracking.name or f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    run = storage.join(recipe.tracking.runs_dir, name)
    address = storage.join(run, RECIPE)
    if storage.exists(address):
        before = yaml.safe_load(storage.read(address))
        now = yaml.safe_load(config.to_yaml(recipe))
        changed = [s for s in now if s not in FREE_TO_CHANGE and now[s] != before.get(s)]
        old = run_info.read_run_info(run)
        if changed:
            raise UserError(
                f"run {name} exists with other settings in {', '.join(changed)}; give another tracking.name"
            )
        if old["manifest"] != inputs["manifest"]:
            raise UserError(f"run {name} was trained on other shards; give another tracking.name")
        if old.get("files", {}) != inputs["files"]:
            raise UserError(f"run {name} was begun with other files in {', '.join(inputs['files'])}; rename the run")
        if old["finished"]:
            raise UserError(f"run {name} is finished; give another tracking.name, or `cxrscale evaluate {run}`")
    storage.write(address, config.to_yaml(recipe))
    for leftover in (ERROR_FILE, STOP, run_info.RESULT):
        storage.remove(storage.join(run, leftover))
    return run


def _in_process(recipe: Recipe, run: str) -> None:
    worker = LocalWorker()
    with worker.obeying_sigterm():
        train_here(recipe, run, worker)


def train_here(recipe: Recipe, run: str, worker: LocalWorker | RayWorker) -> None:
    """Train as this worker of the run, and leave the outcome for `account.session` to find.

    Raises:
        UserError: as `train.train`.
    """
    outcome = train(recipe, run, worker)
    if worker.rank == 0:
        said = {"finished": outcome.finished, "epochs": outcome.progress.epoch, "best": outcome.progress.best}
        device = torch.cuda.get_device_name(worker.device) if worker.device.type == "cuda" else "CPU"
        storage.write(
            storage.join(run, run_info.RESULT), json.dumps(said | {"device": device, "workers": worker.world})
        )


def _on_ray(recipe: Recipe, run: str) -> None:
    fit(recipe, run, nodes.gpus_wanted(recipe.scaling) > 0)


def fit(recipe: Recipe, run: str, use_gpu: bool, callbacks: Sequence[Any] = ()) -> None:
    """Train a run on `scaling.num_workers` workers of Ray Train; also from inside a trial of Ray Tune.

    Args:
        callbacks: Ray Train's, told of every epoch.

    Raises:
        UserError: training failed; says why.
    """
    import ray.train
    from ray.train.torch import TorchTrainer

    fewest, most = recipe.scaling.workers
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    trainer = TorchTrainer(
        _ray_loop,
        train_loop_config={"recipe": recipe.model_dump(mode="json"), "run": run},
        scaling_config=ray.train.ScalingConfig(  # type: ignore[call-arg]
            num_workers=fewest if fewest == most else (fewest, most),  # type: ignore[arg-type]
            elastic_resize_monitor_interval_s=recipe.scaling.elastic_check_seconds,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": recipe.scaling.cpus_per_worker, **({"GPU": 1} if use_gpu else {})},
        ),
        run_config=ray.train.RunConfig(  # type: ignore[call-arg]
            # Our own checkpoints carry the resume, so each launch is a new run to Ray: a name that Ray has finished
            # would train nothing and return the old metrics.
            name=f"{run.rsplit('/', 1)[-1]}-{time.time_ns()}",
            storage_path=_ray_folder(run),
            failure_config=ray.train.FailureConfig(max_failures=recipe.scaling.max_failures),
            callbacks=list(callbacks),
            worker_runtime_env={} if use_gpu else {"env_vars": MALLOC_ENV},
        ),
    )
    try:
        with handle_sigterm(lambda: storage.write(storage.join(run, STOP), "")):
            trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise UserError(_reason(error)) from error
    mistake = storage.join(run, ERROR_FILE)
    if storage.exists(mistake):
        raise UserError(storage.read(mistake).decode())


def _ray_loop(settings: dict[str, Any]) -> None:
    recipe, run = config.parse(Recipe, settings["recipe"], where="the driver's recipe"), str(settings["run"])
    mistake = storage.join(run, ERROR_FILE)
    # Ray starts a failed group again. A lost worker is worth that, a user's mistake is not: the new group leaves.
    if storage.exists(mistake):
        return
    try:
        train_here(recipe, run, RayWorker(storage.join(run, STOP)))
    except UserError as error:
        storage.write(mistake, str(error))
        raise


def _ray_folder(run: str) -> str:
    """Where Ray keeps its notes of a run: beside ours, or, as no checkpoint of ours is Ray's, on any local disk."""
    return tempfile.mkdtemp(prefix="cxrscale-ray-") if storage.is_remote(run) else storage.join(run, "ray")


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


def _files(recipe: Recipe) -> list[str]:
    """Files whose content the training hangs on."""
    weights = [recipe.model.weights] if recipe.model.weights not in ("imagenet", "none") else []
    return weights + ([recipe.sampler.hard_predictions] if recipe.sampler.hard_predictions else [])


def absolute_paths(recipe: Recipe) -> Recipe:
    """Ray's workers run in another directory, so every path becomes absolute."""
    changes: dict[str, dict[str, Any]] = {
        "data": {"shards": tuple(storage.absolute(shards) for shards in recipe.data.shards)},
        "tracking": {"runs_dir": storage.absolute(recipe.tracking.runs_dir)},
    }
    if recipe.model.weights not in ("imagenet", "none"):
        changes["model"] = {"weights": storage.absolute(recipe.model.weights)}
    if recipe.sampler.hard_predictions:
        changes["sampler"] = {"hard_predictions": storage.absolute(recipe.sampler.hard_predictions)}
    return recipe.model_copy(
        update={name: getattr(recipe, name).model_copy(update=fields) for name, fields in changes.items()}
    )
