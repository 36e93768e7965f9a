"""Temporary folders that go with their process."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cxrscale.io import scratch
from cxrscale.types import UserError

HOLD = """
import sys, time
from cxrscale.io import scratch
folder = scratch.make()
(folder / "big").mkdir()
(folder / "big" / "file").write_text("x")
print(folder, flush=True)
if len(sys.argv) > 1:
    time.sleep(600)
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    return tmp_path


def holder(temporary: Path, *arguments: str) -> "subprocess.Popen[str]":
    environment = os.environ | {"TMPDIR": str(temporary)}
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, *arguments], env=environment, stdout=subprocess.PIPE, text=True
    )


def test_a_folder_is_private_and_goes_with_its_process(temporary: Path) -> None:
    folder = scratch.make()
    assert folder.parent == temporary
    assert folder.stat().st_mode & 0o777 == 0o700
    scratch.remove(folder)
    with holder(temporary) as process:
        out, _ = process.communicate(timeout=60)
    assert Path(out.strip()).parent == temporary
    assert list(temporary.iterdir()) == []


def test_what_a_killed_process_left_goes_with_the_next_and_nothing_else(temporary: Path) -> None:
    (temporary / f"{scratch.PREFIX}of-somebody").mkdir()
    with holder(temporary, "hold") as killed, holder(temporary, "hold") as alive:
        assert killed.stdout is not None
        assert alive.stdout is not None
        left, kept = (Path(stream.readline().strip()) for stream in (killed.stdout, alive.stdout))
        killed.kill()
        killed.wait()
        own = scratch.make()
        assert not left.exists()
        assert (kept / "big" / "file").exists()
        alive.kill()
    scratch.remove(own)
    assert sorted(path.name for path in temporary.iterdir()) == sorted([kept.name, f"{scratch.PREFIX}of-somebody"])


def test_a_folder_that_was_taken_for_stale_while_it_was_made_is_made_again(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Path] = []

    def flock(handle: int, kind: int) -> None:
        if kind == fcntl.LOCK_EX and not taken:
            taken.extend(temporary.iterdir())
            scratch.remove_stale(temporary)
        fcntl_flock(handle, kind)

    fcntl_flock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", flock)
    folder = scratch.make()
    assert folder.is_dir()
    assert taken
    assert folder not in taken
    assert list(temporary.iterdir()) == [folder]
    assert scratch.shared() == scratch.shared() != folder
    scratch.remove(scratch.shared())
    scratch.remove(folder)
    assert list(temporary.iterdir()) == []


def test_a_path_that_is_too_long_for_sockets_is_replaced(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = temporary / ("x" * 60)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    short, other = scratch.make(short=True), scratch.make()
    assert len(os.fsencode(short)) <= scratch.LONGEST
    assert other.parent == long
    for folder in (short, other):
        scratch.remove(folder)
        assert not folder.exists()


def test_a_temporary_folder_that_cannot_be_written_is_one_line(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(temporary / "absent"))
    with pytest.raises(UserError, match="No such file or directory; free space there, or set TMPDIR"):
        scratch.make()
