"""A cluster of three machines in namespaces: a head that runs no tasks, two workers, and a bucket that all reach."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.multinode.namespaces import HOST, Machine, NotAllowed, Site

ROOT = Path(__file__).resolve().parents[2]
HEAD, WORKERS = "10.77.0.2", ("10.77.0.11", "10.77.0.12")
S3_PORT = 9000
BOOTS = 5
PATIENCE_S = 300.0
"""What anything here may take on a machine that has much else to do."""


class Store:
    """The test session's S3 server on the site's bridge too; remembers who asked for what."""

    def __init__(self, site: Site) -> None:
        from moto.server import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
        from werkzeug.serving import make_server

        self.asked: list[tuple[str, str, str]] = []
        """(address of the client, method, path), in the order of the requests."""
        moto = DomainDispatcherApplication(create_backend_app)

        def noting(environment: Any, respond: Any) -> Iterable[bytes]:
            said = (environment["REMOTE_ADDR"], environment["REQUEST_METHOD"], environment["PATH_INFO"])
            self.asked.append(said)
            answer: Iterable[bytes] = moto(environment, respond)
            return answer

        self._socket = site.listen(S3_PORT)
        descriptor = self._socket.fileno()
        self._server = make_server(
            HOST, S3_PORT, noting, threaded=True, request_handler=MotoRequestHandler, fd=descriptor
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


class Cluster:
    """Ray on a site."""

    def __init__(self, site: Site, cpus: int) -> None:
        self.site, self._cpus = site, cpus
        unset = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "PYTHONDONTWRITEBYTECODE")
        self.environment = {name: value for name, value in os.environ.items() if name not in unset} | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "AWS_ENDPOINT_URL": f"http://{HOST}:{S3_PORT}",
            "GLOO_SOCKET_IFNAME": "eth0",
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }
        serving = (f"--dashboard-host={HEAD}", "--dashboard-port=8265")
        self._head = self._node("head", HEAD, "--head", "--port=6379", "--num-cpus=0", *serving)
        self.workers: dict[str, Machine] = {}
        self._unplugged: dict[str, Machine] = {}
        self.up(*WORKERS)

    def up(self, *addresses: str) -> None:
        """Boot workers, until they have joined."""
        for address in addresses:
            if address in self._unplugged:
                self.site.kill(self._unplugged.pop(address))
            words = (f"--address={HEAD}:6379", f"--num-cpus={self._cpus}")
            self.workers[address] = self._node(f"worker{address.rsplit('.', 1)[1]}", address, *words)

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
        out, _ = job.communicate(timeout=PATIENCE_S)
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

    def _node(self, name: str, address: str, *words: str) -> Machine:
        """A machine that has joined; Ray gives up after 30 s, so a slow one is booted again."""
        # Not `ray start --block`: it ends the whole node when the server for Ray clients, which nobody here needs, has
        # not found the node's raylet after as long.
        ray = ["bash", "-c", 'ray start "$@" && exec sleep infinity', "ray"]
        given = [f"--node-ip-address={address}", f"--object-store-memory={100 * 2**20}", *words]
        for _ in range(BOOTS):
            machine = self.site.boot(name, address, [*ray, *given], self.environment)
            while "Ray runtime started" not in machine.log.read_text() and machine.process.poll() is None:
                time.sleep(0.1)
            if machine.process.poll() is None:
                return machine
            self.site.kill(machine)
        raise AssertionError(machine.log.read_text())


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    # A socket's path is short, so not pytest's folder.
    with tempfile.TemporaryDirectory(prefix="cxr") as folder:
        try:
            with Site(Path(folder)) as made:
                made.kill(made.boot("trial", "10.77.0.99", ["true"], os.environ))
                yield made
        except NotAllowed as reason:
            pytest.skip(f"no namespaces of users, networks, processes and mounts here: {reason}")


@pytest.fixture(scope="module")
def store(site: Site, s3: str) -> Iterator[Store]:  # noqa: ARG001 - the server whose buckets these are
    started = Store(site)
    yield started
    started.close()


@pytest.fixture(scope="module")
def cluster(site: Site, store: Store) -> Cluster:  # noqa: ARG001 - the site's end is the cluster's
    return Cluster(site, cpus=1)
