"""Sharding and training over machines that share no disk, by jobs sent to the head; a machine is lost in the middle."""

import json

import pytest

from cxrscale.io import storage
from cxrscale.training import resume, run_info, tracking
from tests.multinode.conftest import HEAD, LONG_S, STEPS, WORKERS, Cluster, Store, newest, tell_waits, training
from tests.training.test_survival import assert_equal

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_a_run_that_loses_a_machine_ends_like_one_that_does_not(
    cluster: Cluster, store: Store, shards: str, undisturbed: str, s3: str
) -> None:
    hurt, begun = f"{s3}/site/runs/hurt", len(store.asked)
    job = cluster.start(*training(shards, s3, "hurt"))
    cluster.until(lambda: newest(hurt) >= 12, job)
    # The worst to lose: the one that writes the checkpoints of this run; rank 0 may have been elsewhere before.
    (writer,) = store.who("PUT", ".pt", begun) - {HEAD}
    (waiting,) = set(WORKERS) - {writer}
    before = cluster.training()
    cluster.kill(writer)
    cluster.until(lambda: before[waiting] not in cluster.training().values(), job)
    stood = newest(hurt)
    assert 12 <= stood < 2 * STEPS
    told = len(store.asked)
    cluster.up(writer)
    out, _ = job.communicate(timeout=LONG_S)
    assert job.returncode == 0, out
    tell_waits(hurt)
    # Ray itself may say something about the lost machine after the command's last line.
    assert hurt in out.splitlines()
    assert_equal(hurt, undisturbed)
    assert run_info.read_run_info(hurt).finished
    # Nothing was left of its cache of shards.
    assert writer in store.who("GET", ".tar", told)


def test_an_elastic_run_goes_on_without_the_machine_that_nobody_hears_of(
    cluster: Cluster, shards: str, s3: str
) -> None:
    """Its cable is pulled: no connection closes. One worker trains until it is back, then two again."""
    run = f"{s3}/site/runs/elastic"
    long = (
        "scaling.num_workers=[1, 2]",
        "scaling.elastic_check_seconds=2",
        "sampler.steps_per_epoch=20000",
        "train.epochs=1",
    )
    job = cluster.start("--name", "elastic", *training(shards, s3, "elastic"), *long)
    cluster.until(lambda: newest(run) >= 12, job)
    before = cluster.training()
    assert set(before) == set(WORKERS)
    left, away = WORKERS
    cluster.unplug(away)
    cluster.until(lambda: cluster.training().get(left, before[left]) != before[left], job)
    alone = newest(run)
    cluster.until(lambda: newest(run) >= alone + 12, job)
    cluster.up(away)
    cluster.until(lambda: away in cluster.training(), job)
    together = newest(run)
    cluster.until(lambda: newest(run) >= together + 12, job)
    assert set(cluster.training()) == set(WORKERS)
    cluster.stop("elastic")
    out, _ = job.communicate(timeout=LONG_S)
    tell_waits(run)
    assert "stopped with a checkpoint; resume with tracking.name=elastic" in out
    assert [line["step"] for line in tracking.read_log(run)] == list(range(1, newest(run) + 1))


def test_a_search_that_loses_a_machine_ends(cluster: Cluster, shards: str, s3: str) -> None:
    """Two trials of two workers each, one after the other; a machine in the middle of the first is lost and is back."""
    run = f"{s3}/site/runs/search"
    words = ["tune", *training(shards, s3, "search")[1:]]
    space = (
        "tune.space={optim.lr: 'loguniform(1e-4, 1e-2)'}",
        "tune.method=random",
        "tune.trials=2",
        "tune.baseline_seeds=0",
    )
    job = cluster.start(*words, *space, "tune.workers=2", "sampler.steps_per_epoch=12")
    cluster.until(lambda: newest(f"{run}/trials/trial-000") >= 4, job)
    left, away = WORKERS
    before = cluster.training()
    cluster.kill(away)
    cluster.until(lambda: before[left] not in cluster.training().values(), job)
    cluster.up(away)
    out, _ = job.communicate(timeout=LONG_S)
    assert job.returncode == 0, out
    assert json.loads(storage.read(f"{run}/{resume.SEARCH_INFO}"))["finished"]
    for number in range(2):
        trial = f"{run}/trials/trial-{number:03d}"
        tell_waits(trial)
        assert newest(trial) == 24
        assert run_info.read_run_info(trial).finished
    assert storage.exists(f"{run}/best.yaml")
