"""Jobs on a real cluster of two nodes with a job server, with `cxrscale submit` and with plain `ray job submit`."""

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from cxrscale.cluster import jobs
from cxrscale.training import checkpoint, tracking
from cxrscale.types import UserError
from tests.tiny import TINY_CLASSIFIER
from tests.training.test_local import until

ROOT = Path(__file__).resolve().parents[2]
RAY = Path(sys.executable).with_name("ray")

STAND_IN = """
import signal, sys, time

def stop(*_):
    print("checkpoint written", flush=True)
    sys.exit(0)

signal.signal(signal.SIGTERM, stop)
print("ready", *sys.argv[1:], flush=True)
time.sleep(600)
"""
"""The program of a checkout that runs until SIGTERM."""


def pair_of_ports() -> int:
    """A port above those of Ray's workers that is free, with the next one."""
    for port in range(21000 + os.getpid() % 8000, 40000, 7):
        try:
            with socket.create_server(("", port)), socket.create_server(("", port + 1)):
                return port
        except OSError:
            continue
    raise AssertionError("no free ports")


class Cluster:
    """A head and workers from cluster/local.sh, in a separate folder and on separate ports."""

    def __init__(self, folder: Path) -> None:
        port = pair_of_ports()
        given = {
            "CXR_DIR": str(folder),
            "CXR_PORT": str(port),
            "CXR_DASHBOARD_PORT": str(port + 2),
            "CXR_WORKER_CPUS": "2",
            "CXR_OBJECT_STORE_MB": "200",
            "VIRTUAL_ENV": sys.prefix,
        }
        self.folder, self.control = folder, os.environ | given

    def local(self, *arguments: str, **more: str) -> str:
        """Run cluster/local.sh."""
        command = [str(ROOT / "cluster" / "local.sh"), *arguments]
        for _ in range(3):
            # Ray gives a node 30 s to start, which a busy machine may exceed; nodes that run already are kept.
            ran = subprocess.run(command, env=self.control | more, capture_output=True, text=True, timeout=250)
            if ran.returncode == 0:
                break
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    def up(self, workers: int, **more: str) -> None:
        """Start nodes up to this number of workers; new ones get more environment variables."""
        output = self.local("up", str(workers), **more)
        exported = " ".join(line.removeprefix("export ") for line in output.splitlines() if line.startswith("export "))
        self.environment = os.environ | dict(pair.split("=", 1) for pair in exported.split())

    def start(self, *arguments: str, **named: int) -> "subprocess.Popen[str]":
        """Start `cxrscale submit ARGUMENTS...` with stdout and stderr in one stream."""
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} | named
        command = [sys.executable, "-m", "cxrscale", "submit", *arguments]
        return subprocess.Popen(command, env=self.environment, cwd=ROOT, text=True, **streams)  # type: ignore[call-overload,no-any-return]

    def submit(self, *arguments: str) -> tuple[int, str]:
        """Exit code and output of `cxrscale submit ARGUMENTS...`."""
        with self.start(*arguments) as process:
            out, _ = process.communicate(timeout=150)
        return process.returncode, out


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # Not in pytest's folder, because the path of a socket must be short.
    with tempfile.TemporaryDirectory(prefix="cxr") as folder:
        started = Cluster(Path(folder))
        try:
            started.up(1)
            yield started
        finally:
            started.local("down")


def info(cluster: Cluster, name: str) -> dict[str, object]:
    """The job server's public information on a job."""
    script = (
        "import json, sys; from cxrscale.cluster import jobs; details = jobs.connect().get_job_info(sys.argv[1]);"
        "print(json.dumps(details.dict(), default=str))"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, name]
    ran = subprocess.run(command, env=cluster.environment, capture_output=True, text=True, check=True, timeout=60)
    details: dict[str, object] = json.loads(ran.stdout)
    return details


def test_a_job_is_submitted_and_followed_later(cluster: Cluster) -> None:
    arguments = ["config", "jobs/demo.yaml", "optim.lr=3e-4", "tracking.project=two words; $HOME 'and' more"]
    code, out = cluster.submit("--detach", "--name", "first", "--env", "COLOR=blue", *arguments)
    assert (code, out.splitlines()[-1]) == (0, "first")
    assert "submit --follow first" in out
    code, out = cluster.submit("--name", "first", *arguments)
    assert code == 2
    assert "a job named first exists" in out
    code, out = cluster.submit("--follow", "first")
    assert code == 0
    assert "  lr: 0.0003" in out
    assert "project: two words; $HOME 'and' more" in out
    details = info(cluster, "first")
    variables = details["runtime_env"]["env_vars"]  # type: ignore[index]
    assert variables == {"RAY_JOB_STOP_WAIT_TIME_S": "120", "RAY_AUTH_MODE": "token", "COLOR": "blue"}
    # This process knows the cluster's token, which must not be in the job's public information.
    assert (cluster.folder / "token").read_text() not in json.dumps(details)


def test_the_exit_code_and_the_error_line_are_returned(cluster: Cluster) -> None:
    command = [sys.executable, "jobs/submit.py", "verify", "/nowhere"]
    ran = subprocess.run(command, env=cluster.environment, cwd=ROOT, capture_output=True, text=True, timeout=150)
    assert ran.returncode == 2
    assert "results:" not in ran.stderr
    assert "error: /nowhere/manifest.parquet does not exist" in ran.stdout
    assert ran.stderr.rstrip().endswith("failed with exit code 2")


def test_ctrl_c_stops_watching_or_stops_the_job_with_time_for_a_checkpoint(cluster: Cluster, tmp_path: Path) -> None:
    package = tmp_path / "checkout" / "cxrscale"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(STAND_IN)
    with cluster.start("--name", "long", "--working-dir", str(package.parent), "config") as watching:
        assert watching.stdout is not None
        for line in watching.stdout:
            if line.startswith("ready"):
                break
        assert line == "ready config\n"  # the shipped program, not the installed one
        watching.send_signal(signal.SIGINT)
        rest, _ = watching.communicate(timeout=60)
    assert watching.returncode == jobs.STOPPED_WATCHING
    assert "the job continues" in rest
    assert info(cluster, "long")["status"] == "RUNNING"

    master, slave = pty.openpty()
    with cluster.start("--follow", "long", stdin=slave, stdout=slave, stderr=slave) as watching:
        os.close(slave)
        until(master, "ready")
        watching.send_signal(signal.SIGINT)
        until(master, "[s/w]")
        os.write(master, b"s\n")
        until(master, "checkpoint written")
        assert watching.wait(60) == jobs.STOPPED
    os.close(master)
    assert info(cluster, "long")["status"] == "STOPPED"


def test_a_stopped_training_writes_a_checkpoint_and_resumes(cluster: Cluster, nih_shards: str, tmp_path: Path) -> None:
    """Started with plain `ray job submit`, stopped as `ray job stop` does, resumed with `cxrscale submit`."""
    arguments = ["train", "jobs/demo.yaml", *TINY_CLASSIFIER, f"data.shards=[{nih_shards}]", "scaling.num_workers=1"]
    arguments += [
        f"tracking.runs_dir={tmp_path}",
        "tracking.name=stopped",
        "train.epochs=1",
        "sampler.steps_per_epoch=400",
    ]
    arguments += ["tracking.wandb=disabled", "train.checkpoint_steps=100000"]
    run = tmp_path / "stopped"

    def ray_job(*given: str) -> str:
        command = [str(RAY), "job", *given]
        ran = subprocess.run(command, env=cluster.environment, cwd=ROOT, capture_output=True, text=True, timeout=100)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    # By default Ray kills a stopped job after 3 s.
    given = ["--submission-id", "started", "--runtime-env-json", '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}}']
    ray_job("submit", *given, "--no-wait", "--working-dir", ".", "--", "python", "-m", "cxrscale", *arguments)
    deadline = time.monotonic() + 150
    while len(tracking.read_log(str(run))) < 10:
        assert time.monotonic() < deadline, ray_job("logs", "started")
        time.sleep(0.2)
    # The request of `ray job stop`, whose own start takes as long as a busy machine needs for the rest of the training.
    address = f"{cluster.environment['RAY_API_SERVER_ADDRESS']}/api/jobs/started/stop"
    headers = {"Authorization": f"Bearer {(cluster.folder / 'token').read_text()}"}
    urllib.request.urlopen(urllib.request.Request(address, method="POST", headers=headers), timeout=60).close()
    while info(cluster, "started")["status"] == "RUNNING":
        assert time.monotonic() < deadline, ray_job("logs", "started")
    assert "stopped with a checkpoint; resume with tracking.name=stopped" in ray_job("logs", "started")
    (last_step,) = checkpoint.steps(str(run / checkpoint.FOLDER)).values()
    assert 10 <= last_step < 400
    assert len(tracking.read_log(str(run))) == last_step

    code, out = cluster.submit(*arguments)
    assert code == 0, out
    assert f"results: {run}" in out.splitlines()
    assert out.splitlines()[-1] == str(run)
    assert [line["step"] for line in tracking.read_log(str(run)) if line["kind"] == "train"] == list(range(1, 401))
    assert (run / "best.pt").is_file()


@pytest.mark.slow
def test_a_node_with_other_versions_is_named(cluster: Cluster, tmp_path: Path) -> None:
    """Last, because it leaves a second worker, whose torch has a different version in its metadata."""
    other = tmp_path / "torch-9.9.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9\n")
    cluster.up(2, PYTHONPATH=str(tmp_path))
    out = tmp_path / "doctor.json"
    command = [sys.executable, "-m", "cxrscale", "doctor", "--json", str(out)]
    ran = subprocess.run(command, env=cluster.environment, capture_output=True, text=True, timeout=200)
    rows = json.loads(out.read_text())["checks"]
    wrong = [row for row in rows if row["verdict"] == "wrong"]
    assert ran.returncode == 1, ran.stderr
    assert [row["check"] for row in wrong] == ["versions agree"]
    assert "and 9.9 on" in wrong[0]["result"]
    assert len([row for row in rows if row["check"] == "network"]) == 3
    script = (
        "from cxrscale import config; from cxrscale.cluster import nodes, ray_session; ray_session.connect(); "
        "nodes.preflight(config.Scaling(num_workers=2))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], env=cluster.environment, capture_output=True, text=True, timeout=100
    )
    assert "UserError: torch is" in ran.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("address", "fragment"),
    [
        ("http://127.0.0.1:1", "no job server answers at http://127.0.0.1:1"),
        ("ray://127.0.0.1:1", "is not a job server; give the dashboard's"),
    ],
)
def test_no_job_server_is_one_line_at_once(address: str, fragment: str) -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match=fragment):
        jobs.submit(["config"], jobs.JobSpec(), address)
    assert time.monotonic() - start < 10


def test_nothing_to_submit_is_one_line() -> None:
    with pytest.raises(UserError, match="give a command"):
        jobs.submit([], jobs.JobSpec())
    with pytest.raises(UserError, match="is not a folder"):
        jobs.submit(["config"], jobs.JobSpec(Path("/nowhere")))
