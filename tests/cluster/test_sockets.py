"""No command listens off loopback without a token, and nothing of it stays in the temporary folder."""

import getpass
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cxrscale.cluster import ray_session
from cxrscale.io import scratch
from cxrscale.sources.synthetic.archive import SyntheticPaths
from tests.cluster import listeners
from tests.cluster.job_server import FakeJobServer
from tests.cluster.listeners import Listener
from tests.tiny import TINY_CLASSIFIER

ROOT = Path(__file__).resolve().parents[2]

STRANGER = """
import sys
import ray
ray.init(address=sys.argv[1], logging_level="CRITICAL", log_to_driver=False)
print("ran", ray.get(ray.remote(lambda: 42).remote()))
"""


def outer_address() -> str | None:
    """This machine's address as others see it; None where there is no network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return None
        return str(probe.getsockname()[0])


def stranger(address: str, home: Path) -> subprocess.CompletedProcess[str]:
    """A second process, without a variable of Ray's and without a token in its home, that wants to join and run a task.

    Ray may ask the control service again and again: who has not joined after a minute is ended.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(home), "TMPDIR": str(home)}
    command = [sys.executable, "-W", "ignore", "-c", STRANGER, address]
    try:
        return subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired as waited:
        return subprocess.CompletedProcess(command, -signal.SIGKILL, (waited.stdout or b"").decode(), "")


def reached_from_outside(port: int) -> bool:
    """Whether a port answers at this machine's own address."""
    address = outer_address()
    try:
        if address is not None:
            socket.create_connection((address, port), 5).close()
    except OSError:
        return False
    return address is not None


def watch(arguments: list[str], folder: Path, visit: Callable[[int], None]) -> set[Listener]:
    """Run a command to its end; calls `visit` with the port of Ray's control service. Returns all that listened."""
    temporary, log = folder / "t", folder / "log"
    temporary.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    environment |= {"TMPDIR": str(temporary), "HOME": "/nonexistent"}
    command = [sys.executable, "-m", "cxrscale", *arguments]
    seen: set[Listener] = set()
    visited = False
    with log.open("w") as out, subprocess.Popen(command, env=environment, cwd=ROOT, stdout=out, stderr=out) as process:
        while process.poll() is None:
            seen |= listeners.of_process(process.pid)
            control = next((found for found in seen if "gcs_server" in found.process), None)
            if control is not None and not visited:
                visited = True
                # Stopped, so that it does not end before the visit does.
                process.send_signal(signal.SIGSTOP)
                try:
                    visit(control.port)
                finally:
                    process.send_signal(signal.SIGCONT)
            time.sleep(0.3)
    assert process.returncode == 0, log.read_text()
    # torch makes an empty folder for what it compiles.
    left = [path for path in temporary.rglob("*") if path.name != f"torchinductor_{getpass.getuser()}"]
    assert left == [], "left in the temporary folder"
    assert visited
    return seen


def wide(seen: set[Listener]) -> list[Listener]:
    return [found for found in seen if not found.on_loopback]


def knock(port: int) -> None:
    assert not ray_session.control_service_answers(f"127.0.0.1:{port}", with_token=False)
    assert not reached_from_outside(port)


def test_packing_listens_on_loopback_behind_a_token_and_leaves_nothing(drawn: SyntheticPaths, tmp_path: Path) -> None:
    """Also without a home folder, and with a temporary folder whose path is too long for Ray's sockets."""
    folder = tmp_path / ("long" * 20)
    folder.mkdir()
    before = set(Path("/tmp").glob(f"{scratch.PREFIX}*"))
    seen = watch(["shard", "nih", str(drawn.nih), "--out", str(tmp_path / "nih"), "pack.size=64"], folder, knock)
    assert any("raylet" in found.process for found in seen)
    assert wide(seen) == []
    assert {path for path in set(Path("/tmp").glob(f"{scratch.PREFIX}*")) - before if path.name in str(seen)} == set()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "tune"])
def test_training_listens_on_loopback_behind_a_token_and_leaves_nothing(
    command: str, nih_shards: str, tmp_path: Path
) -> None:
    """With two workers, whose process group listens too. A stranger joins neither at loopback nor from outside."""
    arguments = [command, "jobs/demo.yaml", *TINY_CLASSIFIER, f"data.shards=[{nih_shards}]", "scaling.num_workers=2"]
    arguments += ["scaling.cpus_per_worker=0.5", f"tracking.runs_dir={tmp_path / 'runs'}", "tracking.name=watched"]
    arguments += ["train.epochs=1", "sampler.steps_per_epoch=30", "tracking.wandb=offline"]
    if command == "tune":
        arguments += ["tune.space={optim.lr: 'loguniform(1e-4, 1e-2)'}", "tune.trials=2", "tune.baseline_seeds=0"]
    answers = []

    def visit(port: int) -> None:
        knock(port)
        answers.append(stranger(f"127.0.0.1:{port}", tmp_path))

    seen = watch(arguments, tmp_path, visit)
    assert wide(seen) == []
    (answer,) = answers
    assert answer.returncode != 0
    assert "ran" not in answer.stdout


def test_submitting_listens_nowhere(job_server: FakeJobServer, tmp_path: Path) -> None:
    job_server.seconds = 1.0
    command = [sys.executable, "-m", "cxrscale", "submit", "config", "jobs/demo.yaml", "--address", job_server.address]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    environment |= {"TMPDIR": str(tmp_path), "HOME": "/nonexistent"}
    seen: set[Listener] = set()
    with subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            seen |= listeners.of_process(process.pid)
            time.sleep(0.05)
        assert process.stdout is not None
        assert process.stdout.read() == job_server.log
    assert process.returncode == 0
    assert seen == set()
    assert list(tmp_path.iterdir()) == []
