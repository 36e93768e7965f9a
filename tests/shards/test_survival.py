"""Processes are killed while they pack: whichever dies, the finished dataset has the same bytes.

One image of the source is a named pipe: the process that packs its shard waits there until the test continues.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from cxrscale.cluster import tasks
from cxrscale.shards import build, manifest, pack
from cxrscale.sources.synthetic.archive import SyntheticPaths
from tests.shards.test_pack import SETTINGS, contents


class Trap:
    """A source with one image that keeps its reader waiting."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.image = sorted(root.rglob("*.png"))[40]
        self.content = self.image.read_bytes()
        self.image.unlink()
        os.mkfifo(self.image)
        self._pipe = -1

    def wait_for_reader(self) -> None:
        """Return as soon as a process waits for the image."""
        for _ in range(600):
            try:
                self._pipe = os.open(self.image, os.O_WRONLY | os.O_NONBLOCK)
                return
            except OSError:  # ENXIO: no reader yet
                time.sleep(0.1)
        raise AssertionError("no process has opened the image")

    def release(self) -> None:
        """Replace the pipe by the real image; a process that still waits at the pipe gets it too."""
        complete = self.image.with_suffix(".complete")
        complete.write_bytes(self.content)
        complete.replace(self.image)
        with suppress(BrokenPipeError):
            os.write(self._pipe, self.content)
        os.close(self._pipe)


def wait_until_reading(pid: int) -> None:
    """Return when the main thread of a process sleeps in a system call.

    A signal between the opening of a pipe and the first read of it would be seen only after that read, which never
    returns here.
    """
    process, asleep = psutil.Process(pid), 0
    while asleep < 5:
        asleep = asleep + 1 if process.status() == psutil.STATUS_SLEEPING else 0
        time.sleep(0.05)


def parts(out: Path) -> list[str]:
    """The tars that are finished and recorded."""
    return [path.name.removesuffix(".parquet") for path in (out / pack.PARTS).glob("*.parquet")]


@pytest.fixture
def trap(drawn: SyntheticPaths, tmp_path: Path) -> Trap:
    return Trap(Path(shutil.copytree(drawn.nih, tmp_path / "nih")))


def packers() -> list[psutil.Process]:
    """The processes of this machine that run a packing task of Ray, which names a process after its function."""
    name = f"ray::{tasks._call.__name__}"
    return [process for process in psutil.process_iter(["cmdline"]) if name in (process.info["cmdline"] or [])]


@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_ray_worker_costs_only_its_shard(trap: Trap, nih_shards: str, tmp_path: Path) -> None:
    failures: list[BaseException] = []

    def run() -> None:
        try:
            build.build_shards("nih", str(trap.root), SETTINGS, str(tmp_path / "out"))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    trap.wait_for_reader()
    waiting = packers()
    assert waiting
    for process in waiting:
        process.send_signal(signal.SIGKILL)
    trap.release()
    thread.join(timeout=120)
    assert not thread.is_alive()
    assert failures == []
    assert contents(tmp_path / "out") == contents(nih_shards)


def driver(root: Path, out: Path, *, local: bool, address: str | None = None) -> subprocess.Popen[bytes]:
    script = (
        "import sys; from cxrscale.cluster import ray_session; from cxrscale.config import Pack\n"
        "from cxrscale.shards import build\n"
        f"local = {local}\n"
        f"local or ray_session.connect({address!r})\n"
        "build.build_shards('nih', sys.argv[1], Pack(size=64, samples_per_shard=20), sys.argv[2], local=local)"
    )
    return subprocess.Popen([sys.executable, "-W", "ignore", "-c", script, str(root), str(out)])


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("local", [True, False], ids=["in-process", "ray"])
def test_a_killed_driver_costs_only_the_unfinished_shards(
    local: bool, trap: Trap, nih_shards: str, tmp_path: Path
) -> None:
    import ray

    out = tmp_path / "out"
    address = None if local else ray.get_runtime_context().gcs_address
    process = driver(trap.root, out, local=local, address=address)
    trap.wait_for_reader()
    process.send_signal(signal.SIGKILL)
    process.wait()
    trap.release()
    assert not (out / manifest.NAME).exists()
    finished = {name: (out / name).stat().st_mtime_ns for name in parts(out)}
    build.build_shards("nih", str(trap.root), SETTINGS, str(out), local=local)
    assert contents(out) == contents(nih_shards)
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == finished


@pytest.mark.smoke
@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, *(pytest.param(other, marks=pytest.mark.slow) for other in (signal.SIGTERM, signal.SIGHUP))],
    ids=["SIGINT", "SIGTERM", "SIGHUP"],
)
def test_a_signal_to_end_leaves_no_temporary_file(
    number: signal.Signals, trap: Trap, nih_shards: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "cxrscale", "shard", "nih", str(trap.root), "--out", str(out), "--local"]
    command += ["pack.size=64", "pack.samples_per_shard=20"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            trap.wait_for_reader()
            wait_until_reading(process.pid)
            process.send_signal(number)
            _, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 130
    assert err.splitlines()[-1] == "stopped; run the same command again to resume"
    assert list(out.rglob(".tmp-*")) == []
    trap.release()
    build.build_shards("nih", str(trap.root), SETTINGS, str(out), local=True)
    assert contents(out) == contents(nih_shards)


@pytest.mark.usefixtures("ray_cluster")
def test_any_number_of_workers_writes_the_same_bytes(drawn: SyntheticPaths, nih_shards: str, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"workers": 4})
    build.build_shards("nih", str(drawn.nih), settings, str(tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(nih_shards)
