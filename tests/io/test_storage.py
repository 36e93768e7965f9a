"""Files appear complete or not at all."""

import itertools
import os
import re
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from cxrscale.config import Scaling
from cxrscale.io import access, storage
from cxrscale.types import AccessError, UserError


def names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()]


def test_a_failed_write_keeps_the_old_file_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    storage.write(str(target), b"old")

    def interrupted() -> None:
        with storage.publishing(str(target)) as path:
            path.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_the_umask_decides_who_can_read_a_file(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        storage.write(str(tmp_path / "folder" / "a.txt"), "text")
        storage.write(str(tmp_path / "folder" / "b.txt"), "text", private=True)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "folder").iterdir()}
    assert modes == {"a.txt": 0o666 & ~mask, "b.txt": 0o600}
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~mask


def test_file_addresses_are_plain_paths(tmp_path: Path) -> None:
    address = f"file://{tmp_path}/b.txt"
    storage.write(address, "text")
    assert storage.read(address) == b"text"
    assert storage.listing(f"file://{tmp_path}", ".txt") == ["b.txt"]
    assert storage.join(f"file://{tmp_path}", "b.txt") == str(tmp_path / "b.txt")


def test_temporary_files_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".tmp-123-a.tar").write_bytes(b"half")
    (tmp_path / "a.tar").write_bytes(b"complete")
    assert storage.remove_temporary_files(str(tmp_path)) == 1
    assert names(tmp_path) == ["a.tar"]


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing.bin does not exist; check the path"):
        storage.read(str(tmp_path / "nothing.bin"))


def test_a_full_disk_is_one_line() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("only Linux has /dev/full, a device that is always full")

    def fill() -> None:
        with access.user_errors("/data/out.tar"), full.open("wb", buffering=0) as disk:
            disk.write(b"x")

    with pytest.raises(UserError, match=r"/data/out.tar: no space left on the disk; free some"):
        fill()


def test_a_path_through_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="a part of this path is a file"):
        storage.write(str(tmp_path / "file" / "inner"), b"x")


def test_an_output_that_is_a_link_changes_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "a.txt", tmp_path / "link.txt"
    target.write_text("old")
    link.symlink_to(target)
    storage.write(str(link), "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert names(tmp_path / "real") == ["a.txt"]


@pytest.mark.parametrize("device", ["/dev/null", "/dev/zero"])
def test_a_device_is_written_and_stays_a_device(device: str) -> None:
    storage.write(device, "text")
    assert Path(device).is_char_device()


def test_a_pipe_gets_the_content(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        content = pool.submit(pipe.read_bytes)
        storage.write(str(pipe), "text")
        assert content.result(10) == b"text"
    assert pipe.is_fifo()


def test_standard_output_can_be_the_output(tmp_path: Path) -> None:
    script = "from cxrscale.io import storage; storage.write('/dev/stdout', 'text')"
    command = [sys.executable, "-c", script]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "text"
    with (tmp_path / "out").open("w") as file:
        subprocess.run(command, stdout=file, check=True)
    assert (tmp_path / "out").read_text() == "text"


def test_what_cannot_be_an_output_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for name, message in (
            ("folder", "is a folder; give a file"),
            ("loop", "links lead in a circle; correct the path"),
            ("socket", "is neither a file nor a folder"),
            ("x" * 300, "file name too long; correct the path"),
        ):
            with pytest.raises(UserError, match=message):
                storage.write(str(tmp_path / name), "text")
        assert (tmp_path / "socket").is_socket()
    assert sorted(names(tmp_path)) == ["folder", "loop", "socket"]


def away_until(monkeypatch: pytest.MonkeyPatch, attempts: int, failure: Exception) -> Callable[[], str]:
    """A request that fails so often, to a store that nobody has heard of yet; pauses are short."""
    monkeypatch.setattr(access, "RETRY_SECONDS", (0.01, 0.02))
    monkeypatch.setattr(access, "FIRST_SECONDS", 0.3)
    monkeypatch.setattr(access, "_patience", access._Patience())
    failures = itertools.repeat(failure, attempts)

    def ask() -> str:
        for one in failures:
            raise one
        return "answer"

    return ask


def test_a_store_that_is_away_is_waited_for_once_it_has_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = ConnectionRefusedError(111, "Connection refused")
    ask = away_until(monkeypatch, 60, silent)
    with pytest.raises(AccessError, match=r"^s3://bucket/run/best\.pt cannot be reached \(Connection refused\)"):
        storage.patiently("s3://bucket/run/best.pt", ask)
    assert storage.patiently("s3://bucket/other", lambda: 7) == 7
    ask = away_until(monkeypatch, 60, silent)
    storage.patiently("s3://bucket/other", lambda: 7)
    assert storage.patiently("s3://bucket/run/best.pt", ask) == "answer"
    # In a worker of a run, whose driver has heard of the store: as long as the recipe says.
    ask = away_until(monkeypatch, 10**9, silent)
    began = time.monotonic()
    with storage.waiting_for_stores(0.6), pytest.raises(AccessError):
        storage.patiently("s3://bucket/run/best.pt", ask)
    assert 0.6 <= time.monotonic() - began < 5


def test_what_a_store_refuses_is_asked_again_a_few_times_only(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = away_until(monkeypatch, 3, PermissionError("Forbidden"))
    with storage.waiting_for_stores(600), pytest.raises(AccessError, match="Forbidden"):
        storage.patiently("s3://bucket/run/best.pt", ask)
    assert ask() == "answer"


def test_a_store_that_is_away_is_said_once_for_all_that_wait(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(access, "SAY_SECONDS", 0.2)
    monkeypatch.setattr(access, "_sayer", access._Sayer())
    ask = away_until(monkeypatch, 10**9, TimeoutError("Connect timeout on endpoint"))

    def read(number: int) -> None:
        with suppress(AccessError):
            storage.patiently(f"s3://bucket/{number}", ask)

    with storage.waiting_for_stores(0.8), ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(4)))
    (said,) = caplog.messages
    assert re.fullmatch(r"waiting 0 s for s3://bucket/\d; ends at scaling\.store_seconds=0\.8", said)


def test_the_patience_for_stores_is_that_of_the_recipe() -> None:
    assert Scaling().store_seconds == access.STORE_SECONDS
