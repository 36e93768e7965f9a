"""Real kills in mid-shard: whatever dies, the set ends in the same bytes.

One image of the archive is a named pipe: whoever packs its shard waits there until the test lets go.
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

from cxrscale.shards import build, manifest, pack
from cxrscale.sources.synthetic.archive import SyntheticPaths
from tests.shards.test_pack import SETTINGS, contents


class Trap:
    """An archive with one image that keeps its reader waiting."""

    def __init__(self, archive: Path) -> None:
        self.archive = archive
        self.image = sorted(archive.rglob("*.png"))[40]
        self.content = self.image.read_bytes()
        self.image.unlink()
        os.mkfifo(self.image)
        self._pipe = -1

    def caught(self) -> None:
        """Return once somebody waits for the image."""
        for _ in range(600):
            try:
                self._pipe = os.open(self.image, os.O_WRONLY | os.O_NONBLOCK)
                return
            except OSError:  # ENXIO: no reader yet
                time.sleep(0.1)
        raise AssertionError("nobody came to read the image")

    def mend(self) -> None:
        """Put the real image where the pipe was; who still waits at the pipe gets it too."""
        whole = self.image.with_suffix(".whole")
        whole.write_bytes(self.content)
        whole.replace(self.image)
        with suppress(BrokenPipeError):
            os.write(self._pipe, self.content)
        os.close(self._pipe)


def parts(out: Path) -> list[str]:
    """The tars that are finished and written down."""
    return [path.name.removesuffix(".parquet") for path in (out / pack.PARTS).glob("*.parquet")]


@pytest.fixture
def trap(drawn: SyntheticPaths, tmp_path: Path) -> Trap:
    return Trap(Path(shutil.copytree(drawn.nih, tmp_path / "nih")))


def packers() -> list[psutil.Process]:
    """The processes of this machine that run a packing task of Ray."""
    return [process for process in psutil.process_iter(["cmdline"]) if "ray::_told" in (process.info["cmdline"] or [])]


@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_ray_worker_costs_only_its_shard(trap: Trap, nih_shards: str, tmp_path: Path) -> None:
    failure: list[BaseException] = []

    def pack_it() -> None:
        try:
            build.build("nih", str(trap.archive), SETTINGS, str(tmp_path / "out"))
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=pack_it)
    thread.start()
    trap.caught()
    waiting = packers()
    assert waiting
    for process in waiting:
        process.send_signal(signal.SIGKILL)
    trap.mend()
    thread.join(timeout=120)
    assert not thread.is_alive()
    assert failure == []
    assert contents(tmp_path / "out") == contents(nih_shards)


def driver(archive: Path, out: Path, *, local: bool, address: str | None = None) -> subprocess.Popen[bytes]:
    script = (
        "import sys; from cxrscale import session; from cxrscale.config import Pack\n"
        "from cxrscale.shards import build\n"
        f"local = {local}\n"
        f"local or session.connect({address!r})\n"
        "build.build('nih', sys.argv[1], Pack(size=64, samples_per_shard=20), sys.argv[2], local=local)"
    )
    return subprocess.Popen([sys.executable, "-W", "ignore", "-c", script, str(archive), str(out)])


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("local", [True, False], ids=["in-process", "ray"])
def test_a_killed_driver_costs_only_the_shards_under_way(
    local: bool, trap: Trap, nih_shards: str, tmp_path: Path
) -> None:
    import ray

    out = tmp_path / "out"
    address = None if local else ray.get_runtime_context().gcs_address
    process = driver(trap.archive, out, local=local, address=address)
    trap.caught()
    process.send_signal(signal.SIGKILL)
    process.wait()
    trap.mend()
    assert not (out / manifest.NAME).exists()
    finished = {name: (out / name).stat().st_mtime_ns for name in parts(out)}
    build.build("nih", str(trap.archive), SETTINGS, str(out), local=local)
    assert contents(out) == contents(nih_shards)
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == finished


def test_ctrl_c_leaves_nothing_half_done(trap: Trap, nih_shards: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "cxrscale", "shard", "nih", str(trap.archive), "--out", str(out), "--local"]
    process = subprocess.Popen(
        [*command, "pack.size=64", "pack.samples_per_shard=20"], stderr=subprocess.PIPE, text=True
    )
    trap.caught()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "stopped; the same command goes on from what is finished"
    assert list(out.rglob(".tmp-*")) == []
    trap.mend()
    build.build("nih", str(trap.archive), SETTINGS, str(out), local=True)
    assert contents(out) == contents(nih_shards)


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("workers", [1, 4])
def test_any_number_of_workers_writes_the_same_bytes(
    workers: int, drawn: SyntheticPaths, nih_shards: str, tmp_path: Path
) -> None:
    settings = SETTINGS.model_copy(update={"workers": workers})
    build.build("nih", str(drawn.nih), settings, str(tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(nih_shards)
