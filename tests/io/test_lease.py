"""One writer per folder, and none after it has lost its lease."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cxrscale.io import lease, process, storage
from cxrscale.io.lease import BusyError

HOLDER = """
import sys, time
from cxrscale.io import lease, storage

lease.RENEW_SECONDS = 0.1
with lease.held(sys.argv[1], "run x"):
    print("held", flush=True)
    sys.stdin.readline()
    storage.write(sys.argv[1] + "/late.txt", "late")
"""


def holder(folder: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", HOLDER, folder]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "run") if request.param == "local" else f"{request.getfixturevalue('s3')}/{tmp_path.name}"


def test_a_second_writer_gets_one_line_and_its_own_exit_code(folder: str) -> None:
    with lease.held(folder, "run x") as first:
        storage.write(storage.join(folder, "a.txt"), "a")
        with pytest.raises(BusyError, match=rf"^run x is being written by process {os.getpid()} on ") as caught:
            lease._take(folder, "run x")
        assert caught.value.exit_code == 5
        assert "\n" not in str(caught.value)
        first.check()
    assert storage.listing(folder) == ["a.txt"]
    with lease.held(folder, "run x"):
        pass


def test_the_lease_of_a_killed_process_is_taken_over_at_once(folder: str) -> None:
    with holder(folder) as other:
        with pytest.raises(BusyError):
            lease._take(folder, "run x")
        other.kill()
        other.wait()
        with lease.held(folder, "run x"):
            assert storage.listing(folder) == [lease.NAME]
    assert storage.listing(folder) == []


def test_a_process_that_stood_still_publishes_nothing_more(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "STALE_SECONDS", 2.0)
    # As from another machine, whose processes cannot be looked at.
    monkeypatch.setattr(process, "place", lambda: "another machine")
    with holder(folder) as other:
        other.send_signal(signal.SIGSTOP)
        end = time.monotonic() + 30
        while True:
            try:
                taken = lease._take(folder, "run x")
                break
            except BusyError:
                assert time.monotonic() < end
                time.sleep(0.2)
        other.send_signal(signal.SIGCONT)
        _, err = other.communicate("go on\n", timeout=30)
    assert other.returncode == 1
    assert "BusyError" in err
    assert "nothing more is written" in err
    assert not storage.exists(storage.join(folder, "late.txt"))
    taken.check()


def test_a_living_owner_is_never_taken_for_stale(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "STALE_SECONDS", 1.5)
    monkeypatch.setattr(process, "place", lambda: "another machine")
    with holder(folder) as other:
        for _ in range(8):
            with pytest.raises(BusyError):
                lease._take(folder, "run x")
            time.sleep(0.3)
        other.communicate("go on\n", timeout=30)
    assert other.returncode == 0
    assert storage.listing(folder) == ["late.txt"]


def test_a_worker_publishes_under_the_lease_of_its_driver(tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    with lease.held(folder, "run x") as mine:
        with lease.share(folder, mine.owner):
            storage.write(f"{folder}/a.txt", "a")
        with lease.share(folder, "another"), pytest.raises(BusyError):
            storage.write(f"{folder}/b.txt", "b")
        storage.write(str(tmp_path / "beside.txt"), "not under the lease")
    with lease.share(folder, mine.owner), pytest.raises(BusyError, match="belongs to nobody"):
        storage.write(f"{folder}/c.txt", "c")
    with lease.share(folder, mine.owner), pytest.raises(BusyError):
        storage.remove(f"{folder}/a.txt")
    assert storage.listing(folder) == ["a.txt"]


def _try(folder: str, barrier: "multiprocessing.synchronize.Barrier", results: "multiprocessing.Queue[bool]") -> None:
    barrier.wait()
    try:
        lease._take(folder, "run x")
        results.put(True)
    except BusyError:
        results.put(False)
    barrier.wait()  # while all of them live


def test_of_many_processes_one_gets_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(6), context.Queue()
    processes = [context.Process(target=_try, args=(str(tmp_path / "run"), barrier, results)) for _ in range(6)]
    for one in processes:
        one.start()
    assert sorted(results.get(timeout=30) for _ in processes) == [False] * 5 + [True]
    for one in processes:
        one.join()


def test_a_damaged_lease_ends_like_any_other(tmp_path: Path) -> None:
    path = tmp_path / lease.NAME
    path.write_text('{"id": 3')
    with pytest.raises(BusyError, match="run the command again"):
        lease._take(str(tmp_path), "run x")
    os.utime(path, (time.time() - 100, time.time() - 100))
    lease._take(str(tmp_path), "run x").check()
