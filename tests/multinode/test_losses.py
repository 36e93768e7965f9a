"""What else a run over several machines can lose, or wait for: it ends in the same weights, or says why it stopped."""

import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest

from cxrscale.io import storage
from cxrscale.training import run_info, tracking
from tests.multinode.conftest import HEAD, LONG_S, STEPS, WORKERS, Cluster, Store, newest, saved, tell_waits, training
from tests.multinode.namespaces import BUCKET
from tests.training.test_survival import assert_equal

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

AWAY_S = 60.0
BUSY = 5
"""The exit code of a command whose run another process still holds, as far as anybody knows."""


def finish(job: subprocess.Popen[str], run: str, undisturbed: str) -> None:
    """Wait for a job that must end as the undisturbed run did."""
    out, _ = job.communicate(timeout=LONG_S)
    assert job.returncode == 0, out
    check(out, run, undisturbed)


def check(out: str, run: str, undisturbed: str) -> None:
    """The run has ended as the undisturbed one did: the same weights, no line of its log missing or there twice."""
    tell_waits(run)
    # Ray itself may say something about a lost machine after the command's last line.
    assert run in out.splitlines()
    assert_equal(run, undisturbed)
    assert run_info.read_run_info(run).finished


class Listener:
    """Reads what a job says while it runs."""

    def __init__(self, job: subprocess.Popen[str]) -> None:
        self.text = ""
        self._job = job
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._job.stdout is not None
        for line in iter(self._job.stdout.readline, ""):
            self.text += line

    def end(self) -> str:
        """All that it has said, once it has ended."""
        self._job.wait(LONG_S)
        self._thread.join()
        return self.text


def test_two_machines_lost_at_once(cluster: Cluster, shards: str, undisturbed: str, s3: str) -> None:
    run = f"{s3}/site/runs/two"
    job = cluster.start(*training(shards, s3, "two"))
    listener = Listener(job)
    cluster.until(saved(run, 12), job)
    for address in WORKERS:
        cluster.kill(address)
    assert newest(run) < 2 * STEPS
    cluster.until(lambda: "for room for 2 x CPU 1 (free: CPU 0 of 0)" in listener.text, job)
    cluster.up(*WORKERS)
    out = listener.end()
    assert job.returncode == 0, out
    check(out, run, undisturbed)
    (*_, wait) = tracking.read_waits(run)
    assert "room for 2 x CPU 1" in wait["what"]
    assert wait["seconds"] > 10


def test_a_new_cluster_and_the_same_command_after_the_loss_of_the_head(
    cluster: Cluster, shards: str, undisturbed: str, s3: str
) -> None:
    run, words = f"{s3}/site/runs/head", training(shards, s3, "head")
    job = cluster.start(*words)
    cluster.until(saved(run, 12), job)
    cluster.kill_head()
    assert newest(run) < 2 * STEPS
    cluster.mend()
    out, _ = job.communicate(timeout=LONG_S)
    assert job.returncode not in (0, None), out
    assert "submit it again to resume" in out
    stood = newest(run)
    # The driver was on the head: its lease is stale only some time after its last sign of life.
    job, end = cluster.start(*words), time.monotonic() + LONG_S
    while job.wait(LONG_S) == BUSY and time.monotonic() < end:
        job = cluster.start(*words)
    finish(job, run, undisturbed)
    assert stood < 2 * STEPS
    assert len(run_info.read_run_info(run).sessions) == 2


def test_a_slow_link_changes_no_weight(cluster: Cluster, shards: str, undisturbed: str, s3: str) -> None:
    """A tenth of a second each way, and one frame in a hundred lost, between a machine and all others."""
    run = f"{s3}/site/runs/slow"
    with cluster.site.slowed(cluster.workers[WORKERS[1]], seconds=0.1, loss=0.01):
        finish(cluster.start(*training(shards, s3, "slow")), run, undisturbed)


def test_a_link_that_comes_and_goes(cluster: Cluster, shards: str, undisturbed: str, s3: str) -> None:
    """Four times it is off for five seconds, which a connection outlives."""
    run = f"{s3}/site/runs/flapping"
    job = cluster.start(*training(shards, s3, "flapping"))
    before = 4
    for _ in range(4):
        cluster.until(saved(run, before + 8), job)
        cluster.site.unplug(cluster.workers[WORKERS[1]])
        time.sleep(5)
        cluster.site.plug(cluster.workers[WORKERS[1]])
        before = newest(run)
    finish(job, run, undisturbed)


def test_a_bucket_that_is_away_for_a_minute(cluster: Cluster, shards: str, undisturbed: str, s3: str) -> None:
    run = f"{s3}/site/runs/bucket"
    job = cluster.start(*training(shards, s3, "bucket"))
    cluster.until(saved(run, 12), job)
    with cluster.site.without(BUCKET):
        stood = newest(run)
        time.sleep(AWAY_S)
        assert newest(run) <= stood + 4 < 2 * STEPS
    finish(job, run, undisturbed)


def test_a_full_disk_is_a_stop_that_says_so(
    cluster: Cluster, store: Store, shards: str, undisturbed: str, s3: str
) -> None:
    """The machine that writes the checkpoints, which are made on its disk; with room again the same command goes on."""
    run, words, begun = f"{s3}/site/runs/full", training(shards, s3, "full"), len(store.asked)
    job = cluster.start(*words)
    cluster.until(saved(run, 12), job)
    (writer,) = store.who("PUT", ".pt", begun) - {HEAD}
    machine = cluster.workers[writer]
    filler = cluster.site.fill_disk(machine)
    try:
        out, _ = job.communicate(timeout=LONG_S)
    finally:
        cluster.site.on_machine(machine, "rm", str(filler))
    stood = newest(run)
    assert job.returncode == 2, out
    assert "no space left on the disk" in out
    info = run_info.read_run_info(run)
    assert (info.ending, info.finished, 12 <= stood < 2 * STEPS) == ("failed", False, True)
    finish(cluster.start(*words), run, undisturbed)


@pytest.fixture(scope="module")
def clock(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The library that sets the clock of the programs it is loaded into."""
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("no C compiler on this machine")
    source, library = Path(__file__).with_name("clock.c"), tmp_path_factory.mktemp("clock") / "clock.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return str(library)


def test_a_clock_an_hour_off(
    cluster: Cluster, store: Store, clock: str, shards: str, undisturbed: str, s3: str
) -> None:
    """A store that looks at no clock serves it, and nothing changes; Amazon's does not, and that is said at once."""
    run, words = f"{s3}/site/runs/clock", training(shards, s3, "clock")
    cluster.kill(WORKERS[1])
    cluster.up(WORKERS[1], LD_PRELOAD=clock, CLOCK_OFFSET="3600")
    store.strict = True
    try:
        job = cluster.start(*words)
        out, _ = job.communicate(timeout=LONG_S)
    finally:
        store.strict = False
    try:
        assert job.returncode == 2, out
        assert f"cannot be used from node {WORKERS[1]}" in out
        assert not storage.exists(f"{run}/{run_info.RUN_INFO}")
        finish(cluster.start(*words), run, undisturbed)
    finally:
        cluster.kill(WORKERS[1])
