"""Runs on Ray that lose a worker, their driver or a node end in the weights of an undisturbed run."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from cxrscale import config
from cxrscale.config import Recipe
from cxrscale.io import storage
from cxrscale.training import checkpoint, launch, run_info, tracking
from tests.conftest import TWO_WORKERS, tiny


def final_state(run: str) -> dict[str, Any]:
    name = storage.listing(storage.join(run, checkpoint.FOLDER), ".pt")[-1]
    return checkpoint.read(storage.read(storage.join(run, checkpoint.FOLDER, name)), name)


def assert_equal(run: str, other: str) -> None:
    one, two = final_state(run), final_state(other)
    for name, value in one["model"].items():
        assert torch.equal(value, two["model"][name]), name
    assert repr(one["progress"]) == repr(two["progress"])
    steps = [[(line["kind"], line["step"]) for line in tracking.read_log(path)] for path in (run, other)]
    assert steps[0] == steps[1]


def when_logged(run: str, step: int, act: Callable[[], None]) -> threading.Thread:
    """Call `act` once so many steps are logged."""

    def wait() -> None:
        while max((line["step"] for line in tracking.read_log(run)), default=0) < step:
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def worker_pids() -> list[int]:
    """The processes of the training workers of this cluster."""
    import ray._private.state

    actors = ray._private.state.actors().values()
    return [a["Pid"] for a in actors if a["State"] == "ALIVE" and "RayTrainWorker" in a["ActorClassName"]]


def drive(recipe: Recipe, folder: Path, address: str) -> subprocess.Popen[str]:
    """The driver as a process of its own, on the cluster of the test session."""
    (folder / "recipe.yaml").write_text(config.to_yaml(recipe))
    command = [sys.executable, "-W", "ignore", "-m", "cxrscale", "train", str(folder / "recipe.yaml")]
    return subprocess.Popen(
        command, env=os.environ | {"RAY_ADDRESS": address}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_a_killed_worker_costs_only_the_steps_since_the_last_checkpoint(
    two_worker_run: str, nih_shards: str, tmp_path: Path
) -> None:
    recipe = tiny(nih_shards, tmp_path, *TWO_WORKERS)
    killed: list[int] = []

    def kill() -> None:
        killed.append(worker_pids()[-1])
        os.kill(killed[0], signal.SIGKILL)

    thread = when_logged(str(tmp_path / "tiny"), 40, kill)
    run = launch.launch(recipe, "tiny", lambda *_: nullcontext())
    thread.join()
    assert killed
    assert_equal(run, two_worker_run)
    assert run_info.read_run_info(run).finished


@pytest.mark.slow
def test_a_worker_that_hangs_costs_only_the_steps_since_the_last_checkpoint(
    two_worker_run: str, nih_shards: str, tmp_path: Path
) -> None:
    """It is stopped, not killed: no connection closes, and the other one waits for it in a collective."""
    recipe = tiny(nih_shards, tmp_path, *TWO_WORKERS, "scaling.hang_seconds=10")
    stopped: list[int] = []

    def stop() -> None:
        stopped.append(worker_pids()[-1])
        os.kill(stopped[0], signal.SIGSTOP)

    thread = when_logged(str(tmp_path / "tiny"), 40, stop)
    began = time.monotonic()
    run = launch.launch(recipe, "tiny", lambda *_: nullcontext())
    thread.join()
    assert stopped
    # Ray alone would take ten minutes to see it.
    assert time.monotonic() - began < 280
    assert_equal(run, two_worker_run)
    # The hang and the restart are one wait, which is in the log soon after the run has gone on.
    wait = tracking.read_waits(run)[-1]
    assert wait["what"].startswith("all workers to do a step")
    # That of what was said last of the restart: the new workers to start, or to load, which may be too fast to be said.
    assert wait["limit"] in ("scaling.start_seconds=1800", "scaling.hang_seconds=10")
    assert 36 <= wait["step"] <= 60
    assert wait["seconds"] >= 10
    assert run_info.read_run_info(run).finished
    # Nothing of it is left to write, should it ever go on.
    with pytest.raises(ProcessLookupError):
        os.kill(stopped[0], 0)


@pytest.mark.slow
def test_the_same_command_resumes_after_the_driver_is_killed(
    ray_cluster: Any, two_worker_run: str, nih_shards: str, tmp_path: Path
) -> None:
    recipe = tiny(nih_shards, tmp_path, *TWO_WORKERS)
    driver = drive(recipe, tmp_path, ray_cluster.address)
    when_logged(str(tmp_path / "tiny"), 40, driver.kill).join(timeout=120)
    assert driver.wait() == -signal.SIGKILL
    driver.stdout.close() if driver.stdout else None
    assert not run_info.read_run_info(str(tmp_path / "tiny")).finished
    run = launch.launch(recipe, "tiny", lambda *_: nullcontext())
    assert_equal(run, two_worker_run)
    sessions = run_info.read_run_info(run).sessions
    assert len(sessions) == 2
    assert (sessions[0].ended or 0) > sessions[0].began


@pytest.mark.slow  # on every push tests/cluster/test_jobs.py stops a training with SIGTERM
def test_sigterm_writes_a_checkpoint_also_in_a_bucket(
    ray_cluster: Any, two_worker_run: str, nih_shards: str, s3: str, tmp_path: Path
) -> None:
    recipe = tiny(nih_shards, tmp_path, *TWO_WORKERS, "train.checkpoint_steps=null", f"tracking.runs_dir={s3}/runs")
    run = f"{s3}/runs/tiny"
    driver = drive(recipe, tmp_path, ray_cluster.address)
    # In a bucket train_log.jsonl comes late; the first batch's images come with the first step.
    while not storage.exists(storage.join(run, tracking.SAMPLES)):
        assert driver.poll() is None
        time.sleep(0.02)
    driver.terminate()
    out, _ = driver.communicate(timeout=120)
    assert driver.returncode == 0, out
    assert "stopped with a checkpoint; resume with tracking.name=tiny" in out
    assert 0 < max(checkpoint.steps(storage.join(run, checkpoint.FOLDER)).values()) < 60
    assert not run_info.read_run_info(run).finished
    assert launch.launch(recipe, "tiny", lambda *_: nullcontext()) == run
    assert_equal(run, two_worker_run)


@pytest.mark.slow
def test_after_a_lost_node_fewer_workers_train_until_it_is_back(
    ray_cluster: Any, nih_shards: str, tmp_path: Path
) -> None:
    """One worker per node, [1, 2] of them: two, then one while the second node is gone, then two again.

    No step is lost or done twice, and the stop at the end writes a checkpoint as always.
    """
    # More steps than will be done: the run must not end before the second node is back.
    more = ("train.epochs=2", "sampler.steps_per_epoch=10000", "train.checkpoint_steps=10", "tracking.log_steps=5")
    scaling = ("scaling.num_workers=[1, 2]", "scaling.cpus_per_worker=2", "scaling.elastic_check_seconds=2")
    run = str(tmp_path / "tiny")
    # Nodes come and go on the main thread: Ray sets signal handlers there.
    second = ray_cluster.add_node(num_cpus=2)
    driver = drive(tiny(nih_shards, tmp_path, *more, *scaling), tmp_path, ray_cluster.address)
    wait_until(lambda: newest_step(run) >= 30, driver)
    assert len(worker_pids()) == 2
    ray_cluster.remove_node(second, allow_graceful=False)
    before = newest_step(run)
    wait_until(lambda: newest_step(run) > before + 20, driver)
    assert len(worker_pids()) == 1
    second = ray_cluster.add_node(num_cpus=2)
    try:
        wait_until(lambda: len(worker_pids()) == 2, driver)
        grown = newest_step(run)
        wait_until(lambda: newest_step(run) > grown, driver)
        driver.terminate()
        out, _ = driver.communicate(timeout=120)
    finally:
        ray_cluster.remove_node(second)
    assert driver.returncode == 0, out
    steps = [line["step"] for line in tracking.read_log(run) if line["kind"] == "train"]
    assert steps == list(range(5, steps[-1] + 1, 5))


def newest_step(run: str) -> int:
    return max((line["step"] for line in tracking.read_log(run)), default=0)


def wait_until(condition: Callable[[], bool], driver: subprocess.Popen[str]) -> None:
    while not condition():
        assert driver.poll() is None, driver.stdout.read() if driver.stdout else ""
        time.sleep(0.1)
