"""A recipe -> a run: on Ray Train workers, or in this process."""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch

from cxrscale import config
from cxrscale.cluster import nodes, ray_session
from cxrscale.config import Recipe
from cxrscale.io import lease, scratch, storage, write_artifact
from cxrscale.loader import evaluation_batches, training_batches
from cxrscale.models import initial_weights
from cxrscale.shards import Manifest, leakage, manifest, refuse_leaks
from cxrscale.training import checkpoint, resume, run_info, tracking, waiting
from cxrscale.training import preflight as preflight_checks
from cxrscale.training.distributed import LocalWorker, RayWorker, Worker, handle_stop_signals
from cxrscale.training.loop import train
from cxrscale.training.run_info import ERROR_FILE, STOP_FILE, Outcome, RunInputs
from cxrscale.training.tracking import require_wandb_key
from cxrscale.types import AccessError, NonFiniteError, UserError, last_line, one_line

LOG = logging.getLogger("cxrscale")

MALLOC_ENV = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
}
"""Environment of CPU workers: without it glibc returns each step's activations to the kernel and asks for them again,
15,000 page faults or 7% of a CPU step.
"""

Watcher = Callable[[str], AbstractContextManager[Any]]
"""Run folder -> a context manager that shows the run's progress inside."""


def launch(recipe: Recipe, stem: str, watch: Watcher, *, local: bool = False) -> str:
    """Train a recipe; an unfinished run of the same tracking.name is resumed.

    Args:
        stem: the recipe file's stem, for the name of a new run.
        watch: shows progress.
        local: train in this process, without Ray (as scaling.num_workers=0 does).

    Returns:
        The run's folder or address.

    Raises:
        UserError: shards, weights, the cluster or an earlier run of that name do not fit the recipe.
        NonFiniteError: training has diverged; the last checkpoint is from before.
        KeyboardInterrupt: Ctrl-C; a checkpoint is written.
    """
    local = local or recipe.scaling.workers[1] == 0
    recipe = absolute_paths(recipe)
    inputs = preflight(recipe, stem, 1 if local else None)
    if not local:
        os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
        ray_session.connect()
        nodes.preflight(recipe.scaling, reads=recipe.data.shards, writes=[recipe.tracking.runs_dir])
    run = run_address(recipe, inputs)
    workers = 1 if local else recipe.scaling.workers[1]
    patience = storage.waiting_for_stores(recipe.scaling.store_seconds)
    with patience, lease.held(run, f"run {run.rsplit('/', 1)[-1]}") as owned:
        for folder in (run, storage.join(run, checkpoint.FOLDER)):
            storage.remove_temporary_files(folder)
        for leftover in (ERROR_FILE, STOP_FILE, run_info.OUTCOME):
            storage.remove(storage.join(run, leftover))
        changed = resume.prepare(recipe, inputs, run)
        with run_info.record_session(run, inputs, workers, recipe.tracking.gpu_hour_price, changed), watch(run):
            if local:
                received = _in_process(recipe, run)
            else:
                received = fit(recipe, run, nodes.gpus_per_worker(recipe.scaling) > 0, owner=owned.owner)
    if signal.SIGINT in received and not run_info.read_run_info(run).finished:
        raise KeyboardInterrupt
    return run


def run_address(recipe: Recipe, inputs: RunInputs) -> str:
    """Where the run is or will be: in tracking.runs_dir, under its own name or that of its recipe and the time."""
    name = recipe.tracking.name or f"{inputs.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
    return storage.join(recipe.tracking.runs_dir, name)


def preflight(recipe: Recipe, stem: str = "", workers: int | None = None) -> RunInputs:
    """Find a user's mistakes before any worker starts; returns what the run is made from, and warns of what is odd.

    Args:
        stem: the recipe file's stem.
        workers: how many will train; None: the most that scaling.num_workers allows.

    Raises:
        UserError: shards, labels, splits or model do not fit the recipe (`training.preflight` has the list).
    """
    inputs, data = check_inputs(recipe, stem)
    for sentence in preflight_checks.check(recipe, data, workers or max(1, recipe.scaling.workers[1])):
        LOG.warning("%s", sentence)
    return inputs


def check_inputs(recipe: Recipe, stem: str = "") -> tuple[RunInputs, Manifest]:
    """Read what a recipe names: what the run is made from, and the datasets.

    Raises:
        UserError: shards, labels, splits or model do not fit the recipe.
    """
    require_wandb_key(recipe.tracking)
    data = manifest.load(*recipe.data.shards)
    if not recipe.data.allow_leaks:
        refuse_leaks(data.split, leakage.merged_patients(leakage.join_datasets(*recipe.data.shards)), recipe.data)
    data.labels(recipe.data.findings)
    training_batches(data, recipe).close()
    evaluation_batches(data, recipe.data.val_split, recipe).close()
    if recipe.model.weight_files():
        for line in initial_weights(recipe.model, recipe.data):
            LOG.warning("%s", line)
    inputs = RunInputs(
        recipe=stem,
        shards=recipe.data.shards,
        manifest=data.digest,
        inputs=tuple(metadata["input"] for metadata in data.metadata),
        # The recipe only names these files: another file under the name would be another training.
        files={name: storage.digest(storage.read(name)) for name in _files(recipe)},
    )
    return inputs, data


def _in_process(recipe: Recipe, run: str) -> list[int]:
    worker = LocalWorker()
    with worker.stop_on_signals() as received:
        train_here(recipe, run, worker)
    return received


def train_here(recipe: Recipe, run: str, worker: Worker) -> None:
    """Train as this worker of the run; rank 0 writes the outcome for `run_info.record_session`.

    Raises:
        UserError: as `loop.train`.
    """
    result = train(recipe, run, worker)
    device = worker.dist.device
    if worker.dist.rank == 0:
        outcome = Outcome(
            finished=result.finished,
            epochs=result.progress.epoch,
            best=result.progress.best,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
            workers=worker.dist.world,
            bad_rows=run_info.bad_rows(result.progress.history),
        )
        write_artifact(storage.join(run, run_info.OUTCOME), outcome)


def fit(
    recipe: Recipe,
    run: str,
    use_gpu: bool,
    callbacks: Sequence[Any] = (),
    *,
    owner: str | None = None,
    say: Callable[[str], None] | None = None,
) -> list[int]:
    """Train a run on `scaling.num_workers` workers of Ray Train; also from inside a trial of Ray Tune.

    Args:
        callbacks: callbacks of Ray Train, called after every epoch.
        owner: of the run's lease; the workers publish under it.
        say: says a line to the user; None: as a warning of this process.

    Returns:
        The signals that arrived.

    Raises:
        NonFiniteError: training has diverged.
        WaitLimitError: for longer than scaling.start_seconds no worker trained.
        UserError: training failed; the message is the reason.
    """
    import ray.train

    trainer = _trainer(recipe, run, use_gpu, callbacks, owner)
    watch = waiting.Watch(run, recipe.scaling, say)
    trainer.hold = watch.hold

    def stop() -> None:
        watch.stop()
        storage.write(storage.join(run, STOP_FILE), "")

    try:
        with handle_stop_signals(stop) as received, watch.watching():
            trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise _worker_error(run) or UserError(_reason(error)) from error
    finally:
        # No worker is left to write them. A store that cannot be written is not why the run has ended.
        with suppress(UserError, OSError):
            tracking.add_waits(run, watch.waits)
    if (written := _worker_error(run)) is not None:
        raise written
    return received


def _trainer(recipe: Recipe, run: str, use_gpu: bool, callbacks: Sequence[Any], owner: str | None) -> Any:
    """The trainer of `fit`, whose wait for workers can be watched."""
    import ray.train

    from cxrscale.training.process_group import GroupConfig, HeldTrainer

    fewest, most = recipe.scaling.workers
    # How long Ray waits for a worker's answer before it restarts all of them; it reads it where this process runs.
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(recipe.scaling.hang_seconds)
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    return HeldTrainer(
        _ray_loop,
        train_loop_config={"recipe": recipe.model_dump(mode="json"), "run": run, "owner": owner},
        torch_config=GroupConfig(timeout_s=math.ceil(recipe.scaling.hang_seconds)),
        scaling_config=ray.train.ScalingConfig(  # type: ignore[call-arg]
            num_workers=fewest if fewest == most else (fewest, most),  # type: ignore[arg-type]
            elastic_resize_monitor_interval_s=recipe.scaling.elastic_check_seconds,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": recipe.scaling.cpus_per_worker, **({"GPU": 1} if use_gpu else {})},
        ),
        run_config=ray.train.RunConfig(  # type: ignore[call-arg]
            # A run resumes from our own checkpoints, so each launch is a new run to Ray: under a name that Ray has
            # finished it would train nothing and return the old metrics.
            name=f"{run.rsplit('/', 1)[-1]}-{time.time_ns()}",
            storage_path=_ray_folder(run),
            failure_config=ray.train.FailureConfig(max_failures=recipe.scaling.max_failures),
            callbacks=list(callbacks),
            worker_runtime_env={} if use_gpu else {"env_vars": MALLOC_ENV},
        ),
    )


def _worker_error(run: str) -> UserError | None:
    """The user error that a worker has written down."""
    address = storage.join(run, ERROR_FILE)
    if not storage.exists(address):
        return None
    kind, _, message = storage.read(address).decode().partition(": ")
    kinds = {one.__name__: one for one in (NonFiniteError, lease.BusyError)}
    return kinds.get(kind, UserError)(message)


def _ray_loop(settings: dict[str, Any]) -> None:
    recipe, run = config.parse(Recipe, settings["recipe"], where="the driver's recipe"), str(settings["run"])
    with storage.waiting_for_stores(recipe.scaling.store_seconds):
        _train_here_once(recipe, run, settings["owner"])


def _train_here_once(recipe: Recipe, run: str, owner: str | None) -> None:
    error_file = storage.join(run, ERROR_FILE)
    # Ray restarts a failed group. That is right for a lost worker but not for a user's mistake: the new group returns.
    if storage.exists(error_file):
        return
    worker = RayWorker(run, storage.join(run, STOP_FILE))
    try:
        with lease.share(run, owner):
            train_here(recipe, run, worker)
    except AccessError:
        raise  # a worker whose bucket is away for a while is to fail and be started again
    except UserError as error:
        storage.write(error_file, f"{type(error).__name__}: {error}")
        # A worker alone ends without a restart. Of several, the others may wait in a collective: the group must fail.
        if worker.dist.world > 1:
            raise


def _ray_folder(run: str) -> str:
    """Where Ray keeps its state of a run: in the run's folder, or on the local disk for a remote run: a resume does
    not need it."""
    return str(scratch.make()) if storage.is_remote(run) else storage.join(run, "ray")


def _reason(error: Exception) -> str:
    """The innermost line of a worker's failure, which Ray wraps in pages."""
    failures = getattr(error, "worker_failures", None) or {}
    for failure in failures.values():
        cause: BaseException = failure
        while (deeper := getattr(cause, "cause", None) or cause.__cause__) is not None:
            cause = deeper
        if str(cause).strip():
            return f"training failed on a worker: {last_line(cause)}; re-run the command to resume"
    first, _, _ = str(error).partition("\n")
    return f"training failed: {one_line(first)}"


def _files(recipe: Recipe) -> list[str]:
    """Files whose content the training depends on."""
    return [*recipe.model.weight_files().values()] + (
        [recipe.sampler.hard_predictions] if recipe.sampler.hard_predictions else []
    )


def absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths: Ray's workers run in another directory."""
    changes: dict[str, dict[str, Any]] = {
        "data": {"shards": tuple(storage.absolute(shards) for shards in recipe.data.shards)},
        "tracking": {"runs_dir": storage.absolute(recipe.tracking.runs_dir)},
    }
    if files := recipe.model.weight_files():
        changes["model"] = {name: storage.absolute(path) for name, path in files.items()}
    if recipe.sampler.hard_predictions:
        changes["sampler"] = {"hard_predictions": storage.absolute(recipe.sampler.hard_predictions)}
    return recipe.model_copy(
        update={name: getattr(recipe, name).model_copy(update=fields) for name, fields in changes.items()}
    )
