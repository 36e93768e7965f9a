"""Sharding and training over machines that share no disk, by jobs sent to the head; a machine is lost in the middle."""

import json

import fsspec
import pytest

from cxrscale import account, checkpoint, storage
from cxrscale.archives.phantom import PhantomPaths
from tests.conftest import TINY_CLASSIFIER
from tests.multinode.conftest import HEAD, WORKERS, Cluster, Store
from tests.test_survival import assert_equal

pytestmark = pytest.mark.timeout(1200)

STEPS = 40
RECIPE = (
    "jobs/demo.yaml",
    *TINY_CLASSIFIER,
    "tracking.wandb=disabled",
    "scaling.num_workers=2",
    f"plan.steps_per_epoch={STEPS}",
    "train.epochs=2",
    "train.checkpoint_steps=4",
)


@pytest.fixture(scope="module")
def shards(cluster: Cluster, store: Store, drawn: PhantomPaths, s3: str) -> str:
    """An archive in the bucket, sharded into the bucket by a job."""
    fsspec.filesystem("s3").put(str(drawn.nih), f"{s3}/site/archive", recursive=True)
    out = f"{s3}/site/shards"
    cluster.run("shard", "nih", f"{s3}/site/archive", "pack.size=64", "pack.samples_per_shard=4", "--out", out)
    assert store.who("PUT", ".tar") == set(WORKERS)
    assert store.who("GET", ".png") >= set(WORKERS)
    return out


def newest(run: str) -> int:
    """The step of a run's last checkpoint, 0 before the first."""
    names = storage.listing(storage.join(run, checkpoint.FOLDER), ".pt")
    return int(names[-1][5:14]) if names else 0


def test_a_run_that_loses_a_machine_ends_like_one_that_does_not(
    cluster: Cluster, store: Store, shards: str, s3: str
) -> None:
    words = ["train", *RECIPE, f"data.shards=[{shards}]", f"tracking.root={s3}/site/runs"]
    whole, hurt = f"{s3}/site/runs/whole", f"{s3}/site/runs/hurt"
    assert cluster.run(*words, "tracking.name=whole").splitlines()[-1] == whole

    job = cluster.start(*words, "tracking.name=hurt")
    cluster.until(lambda: newest(hurt) >= 12, job)
    # The worst to lose: the one that writes the checkpoints.
    (writer,) = store.who("PUT", ".pt") - {HEAD}
    cluster.kill(writer)
    cluster.until(lambda: not cluster.training(), job)
    stood = newest(hurt)
    assert 12 <= stood < 2 * STEPS
    told = len(store.asked)
    cluster.up(writer)
    out, _ = job.communicate(timeout=300)
    assert job.returncode == 0, out
    assert out.splitlines()[-1] == hurt
    assert_equal(hurt, whole)
    assert account.read(hurt)["finished"]
    # Nothing was left of its cache of shards.
    assert writer in store.who("GET", ".tar", told)
    assert json.loads(storage.read(storage.join(hurt, account.ABOUT)))["finished"]
