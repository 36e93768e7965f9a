"""A cluster of three machines in namespaces: a head that runs no tasks, two workers, and a bucket that all reach."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec
import pytest

from cxrscale.io import storage
from cxrscale.sources.synthetic.archive import SyntheticPaths
from cxrscale.training import checkpoint, tracking
from tests.multinode.namespaces import BUCKET, Machine, NotAllowed, Site
from tests.tiny import TINY_CLASSIFIER

ROOT = Path(__file__).resolve().parents[2]
HEAD, WORKERS = "10.77.0.2", ("10.77.0.11", "10.77.0.12")
S3_PORT = 9000
SKEW_S = 900
"""How far a clock may be off for S3 to take its requests."""
BOOTS = 5
PATIENCE_S = 300.0
"""What anything here may take on a machine that has much else to do."""
LONG_S = 900.0
"""The same for the end of a disturbed run."""

STEPS = 40
"""Steps per epoch of `RECIPE`, which has two."""
RECIPE = (
    "jobs/demo.yaml",
    *TINY_CLASSIFIER,
    "tracking.wandb=disabled",
    "scaling.num_workers=2",
    f"sampler.steps_per_epoch={STEPS}",
    "train.epochs=2",
    "train.checkpoint_steps=4",
)


def newest(run: str) -> int:
    """The step of a run's last checkpoint, 0 before the first."""
    return max(checkpoint.steps(storage.join(run, checkpoint.FOLDER)).values(), default=0)


def saved(run: str, step: int) -> Callable[[], bool]:
    """Whether the run has a checkpoint of that step or a later one, to be asked again and again."""
    return lambda: newest(run) >= step


def tell_waits(run: str) -> None:
    """Print what the run has waited for, step by step; `pytest -rP` shows it."""
    for line in tracking.read_waits(run):
        print(f"{run}: at step {line['step']} {line['seconds']:.0f} s for {line['what']} ({line['limit']})")


class Store:
    """The test session's S3 server on the site's bridge too; remembers who asked for what."""

    def __init__(self, site: Site) -> None:
        from moto.server import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
        from werkzeug.serving import make_server

        self.asked: list[tuple[str, str, str]] = []
        """(address of the client, method, path), in the order of the requests."""
        self.strict = False
        """Whether requests of a clock that is off are refused, as Amazon does; moto itself looks at no time."""
        moto = DomainDispatcherApplication(create_backend_app)

        def noting(environment: Any, respond: Any) -> Iterable[bytes]:
            said = (environment["REMOTE_ADDR"], environment["REQUEST_METHOD"], environment["PATH_INFO"])
            self.asked.append(said)
            if self.strict and abs(_signed(environment) - time.time()) > SKEW_S:
                respond("403 Forbidden", [("Content-Type", "application/xml")])
                return [
                    b"<Error><Code>RequestTimeTooSkewed</Code><Message>The difference between the request time and "
                    b"the current time is too large.</Message></Error>"
                ]
            answer: Iterable[bytes] = moto(environment, respond)
            return answer

        self._socket = site.listen(BUCKET, S3_PORT)
        descriptor = self._socket.fileno()
        self._server = make_server(
            BUCKET, S3_PORT, noting, threaded=True, request_handler=MotoRequestHandler, fd=descriptor
        )
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def who(self, method: str, suffix: str, since: int = 0) -> set[str]:
        """The clients that asked for an object with that end of its name, after so many requests."""
        return {who for who, how, what in self.asked[since:] if how == method and what.endswith(suffix)}

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._socket.close()


def _signed(environment: Any) -> float:
    """When a request was made by the clock of its client."""
    date = datetime.strptime(environment["HTTP_X_AMZ_DATE"], "%Y%m%dT%H%M%SZ")
    return date.replace(tzinfo=UTC).timestamp()


class Cluster:
    """Ray on a site."""

    def __init__(self, site: Site, cpus: int) -> None:
        self.site, self._cpus = site, cpus
        unset = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "PYTHONDONTWRITEBYTECODE")
        self.environment = {name: value for name, value in os.environ.items() if name not in unset} | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "AWS_ENDPOINT_URL": f"http://{BUCKET}:{S3_PORT}",
            "GLOO_SOCKET_IFNAME": "eth0",
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }
        self.head: Machine | None = None
        self.workers: dict[str, Machine] = {}
        self._unplugged: dict[str, Machine] = {}
        self.mend()

    def mend(self) -> None:
        """Boot what is missing; without a head everything, since a new head is a new cluster."""
        if self.head is None:
            for address in list(self.workers):
                self.kill(address)
            serving = (f"--dashboard-host={HEAD}", "--dashboard-port=8265")
            self.head = self._node("head", HEAD, {}, "--head", "--port=6379", "--num-cpus=0", *serving)
        self.up(*(address for address in WORKERS if address not in self.workers))

    def kill_head(self) -> None:
        """End the head's machine; the workers live on, as long as Ray lets them."""
        assert self.head is not None
        self.site.kill(self.head)
        self.head = None

    def up(self, *addresses: str, **variables: str) -> None:
        """Boot workers, in whose environment the variables are too, until they have joined."""
        for address in addresses:
            if address in self._unplugged:
                self.site.kill(self._unplugged.pop(address))
            words = (f"--address={HEAD}:6379", f"--num-cpus={self._cpus}")
            self.workers[address] = self._node(f"worker{address.rsplit('.', 1)[1]}", address, variables, *words)

    def kill(self, address: str) -> None:
        """End a worker and everything on it at once, as a power cut does."""
        self.site.kill(self.workers.pop(address))

    def unplug(self, address: str) -> None:
        """Leave a worker running that nobody hears of any more; the next of its address takes its place."""
        self._unplugged[address] = self.workers.pop(address)
        self.site.unplug(self._unplugged[address])

    def training(self) -> dict[str, int]:
        """The machines with a training worker, and its process."""
        found = {}
        for address, machine in self.workers.items():
            for pid, title in machine.titles():
                if title.startswith("ray::RayTrainWorker"):
                    found[address] = pid
        return found

    def start(self, *words: str) -> subprocess.Popen[str]:
        """`cxrscale submit WORDS...` of this checkout."""
        command = [sys.executable, "-W", "ignore", "-m", "cxrscale", "submit", "--address", f"http://{HEAD}:8265"]
        return self.site.start([*command, *words], self.environment, ROOT)

    def run(self, *words: str) -> str:
        """The output of a job that must succeed."""
        job = self.start(*words)
        out, _ = job.communicate(timeout=LONG_S)
        assert job.returncode == 0, out
        return out

    def stop(self, name: str) -> None:
        """`ray job stop`, as the job's log said."""
        command = ["ray", "job", "stop", name, "--address", f"http://{HEAD}:8265"]
        with self.site.start(command, self.environment, ROOT) as stopping:
            out, _ = stopping.communicate(timeout=PATIENCE_S)
        assert stopping.returncode == 0, out

    def until(self, true: Callable[[], bool], job: subprocess.Popen[str]) -> None:
        """Wait, as long as the job runs."""
        end = time.monotonic() + PATIENCE_S
        while not true():
            assert job.poll() is None, job.stdout.read() if job.stdout else ""
            if time.monotonic() > end:
                job.kill()
                raise AssertionError(f"still waiting; the job said {job.stdout.read() if job.stdout else ''}")
            time.sleep(0.05)

    def _node(self, name: str, address: str, variables: Mapping[str, str], *words: str) -> Machine:
        """A machine that has joined; Ray gives up after 30 s, so a slow one is booted again."""
        # Not `ray start --block`: it ends the whole node when the server for Ray clients, which nobody here needs, has
        # not found the node's raylet after as long.
        ray = ["bash", "-c", 'ray start "$@" && exec sleep infinity', "ray"]
        given = [f"--node-ip-address={address}", f"--object-store-memory={100 * 2**20}", *words]
        for _ in range(BOOTS):
            machine = self.site.boot(name, address, [*ray, *given], {**self.environment, **variables})
            while "Ray runtime started" not in machine.log.read_text() and machine.process.poll() is None:
                time.sleep(0.1)
            if machine.process.poll() is None:
                return machine
            self.site.kill(machine)
        raise AssertionError(machine.log.read_text())


@pytest.fixture(scope="package")
def site() -> Iterator[Site]:
    # A socket's path is short, so not pytest's folder.
    with tempfile.TemporaryDirectory(prefix="cxr") as folder:
        try:
            with Site(Path(folder)) as made:
                made.kill(made.boot("trial", "10.77.0.99", ["true"], os.environ))
                yield made
        except NotAllowed as reason:
            pytest.skip(f"no namespaces of users, networks, processes and mounts here: {reason}")


@pytest.fixture(scope="package")
def store(site: Site, s3: str) -> Iterator[Store]:  # noqa: ARG001 - the server whose buckets these are
    started = Store(site)
    yield started
    started.close()


@pytest.fixture(scope="package")
def one_cluster(site: Site, store: Store) -> Cluster:  # noqa: ARG001 - the site's end is the cluster's
    return Cluster(site, cpus=1)


@pytest.fixture
def cluster(one_cluster: Cluster) -> Cluster:
    """The cluster, with all of its machines whatever the test before has done to them."""
    one_cluster.mend()
    return one_cluster


@pytest.fixture(scope="package")
def shards(one_cluster: Cluster, store: Store, drawn: SyntheticPaths, s3: str) -> str:
    """An archive in the bucket, sharded into the bucket by a job."""
    fsspec.filesystem("s3").put(str(drawn.nih), f"{s3}/site/archive", recursive=True)
    out = f"{s3}/site/shards"
    one_cluster.run("shard", "nih", f"{s3}/site/archive", "pack.size=64", "pack.samples_per_shard=4", "--out", out)
    assert store.who("PUT", ".tar") == set(WORKERS)
    assert store.who("GET", ".png") >= set(WORKERS)
    return out


@pytest.fixture(scope="package")
def undisturbed(one_cluster: Cluster, shards: str, s3: str) -> str:
    """The run of `RECIPE` to which nothing happens."""
    whole = f"{s3}/site/runs/whole"
    assert one_cluster.run(*training(shards, s3, "whole")).splitlines()[-1] == whole
    return whole


def training(shards: str, s3: str, name: str) -> list[str]:
    """The command of a training of `RECIPE`."""
    return ["train", *RECIPE, f"data.shards=[{shards}]", f"tracking.runs_dir={s3}/site/runs", f"tracking.name={name}"]
