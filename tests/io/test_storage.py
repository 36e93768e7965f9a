"""Files appear complete or not at all."""

from pathlib import Path

import pytest

from cxrscale.io import storage
from cxrscale.types import UserError


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
        with storage._user_errors("/data/out.tar"), full.open("wb", buffering=0) as disk:
            disk.write(b"x")

    with pytest.raises(UserError, match=r"/data/out.tar: no space left on the disk; free some"):
        fill()


def test_a_path_through_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="a part of this path is a file"):
        storage.write(str(tmp_path / "file" / "inner"), b"x")
