"""Reading, listing and atomically writing files on a local disk or at an fsspec address."""

from __future__ import annotations

import errno
import glob
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blake3 import blake3

from cxrscale.io import process, scratch
from cxrscale.io.access import patiently as patiently
from cxrscale.io.access import store, user_errors
from cxrscale.io.access import waiting_for_stores as waiting_for_stores
from cxrscale.io.address import absolute as absolute
from cxrscale.io.address import is_remote as is_remote
from cxrscale.io.address import join as join
from cxrscale.io.address import local_path as local_path
from cxrscale.types import AccessError, UserError

TEMPORARY_PREFIX = ".tmp-"
"""Prefix of the name of an unfinished file, which has no suffix, so that a pattern such as `*.tar` never matches it."""


def exists(address: str) -> bool:
    """Whether a file or folder exists.

    Raises:
        AccessError: a store does not say so.
    """
    if not is_remote(address):
        return local_path(address).exists()
    return bool(_ask(address, lambda files, path: files.exists(path)))


def read(address: str, *, listed: bool = False) -> bytes:
    """All bytes of a file, with patience for a store or a network disk that fails for a moment.

    Args:
        address: a file.
        listed: a listing has named it, so that "not found" is a failure too.

    Raises:
        AccessError: it cannot be reached: no permission, no network, an expired login, or it came shorter than its
            size each time.
        UserError: it does not exist, or the path can be no file.
    """
    return patiently(address, lambda: _read_completely(address), listed=listed)


def read_start(address: str, length: int) -> bytes:
    """The first bytes of a file that a listing has named; fewer where it is shorter.

    Raises:
        AccessError: it cannot be reached.
    """

    def start() -> bytes:
        if not is_remote(address):
            with local_path(address).open("rb") as file:
                return file.read(length)
        files, path = store(address)
        data, size = bytes(files.cat_file(path, start=0, end=length)), files.info(path).get("size")
        if size is not None and len(data) < min(length, size):
            files.invalidate_cache()
            raise OSError(f"{len(data)} of {min(length, size)} bytes came")
        return data

    return patiently(address, start, listed=True)


def _read_completely(address: str) -> bytes:
    if not is_remote(address):
        return local_path(address).read_bytes()
    files, path = store(address)
    size = files.info(path).get("size")
    data: bytes = files.cat_file(path)
    if size is not None and len(data) != size:
        files.invalidate_cache()  # the size came with a listing, which may be older than the file
        raise OSError(f"{len(data)} of {size} bytes came")
    return data


def listing(address: str, suffix: str = "") -> list[str]:
    """The sorted names of the entries of a folder that end in `suffix`; empty if the folder does not exist.

    Raises:
        AccessError: the folder cannot be read.
    """
    return patiently(address, lambda: _names(address, suffix))


def is_folder(address: str) -> bool:
    """Whether it is a folder, or the prefix of objects.

    Raises:
        AccessError: the store cannot be asked.
    """
    if not is_remote(address):
        return local_path(address).is_dir()
    return bool(_ask(address, lambda files, path: files.isdir(path)))


def matches(pattern: str) -> list[str]:
    """The sorted addresses of the objects that an fsspec pattern names.

    Raises:
        AccessError: the store cannot be asked.
    """
    scheme, _, _ = pattern.partition("://")
    found = _ask(pattern, lambda files, path: [name for name in files.glob(path) if not files.isdir(name)])
    return sorted(f"{scheme}://{name}" for name in found)


def _ask(address: str, question: Callable[[Any, str], Any]) -> Any:
    """What a store says of the path of an address now, not when it was asked before."""

    def ask() -> Any:
        files, path = store(address)
        files.invalidate_cache()
        return question(files, path)

    return patiently(address, ask)


def _names(address: str, suffix: str) -> list[str]:
    if not is_remote(address):
        root = local_path(address)
        return sorted(entry.name for entry in root.iterdir() if entry.name.endswith(suffix)) if root.is_dir() else []
    files, path = store(address)
    files.invalidate_cache()
    names = files.ls(path, detail=False) if files.exists(path) else []
    return sorted(name.rsplit("/", 1)[-1] for name in names if name.endswith(suffix))


def remove(address: str) -> None:
    """Remove a file, if it exists."""
    _check_fences(address)
    if not is_remote(address):
        local_path(address).unlink(missing_ok=True)
        return

    def rm() -> None:
        files, path = store(address)
        if files.exists(path):
            files.rm_file(path)

    patiently(address, rm)


def remove_empty_folder(address: str) -> None:
    """Remove a local folder if it is empty; object stores have no empty folders."""
    if not is_remote(address) and local_path(address).is_dir() and not listing(address):
        local_path(address).rmdir()


@contextmanager
def publishing(address: str, *, private: bool = False) -> Iterator[Path]:
    """Write a file atomically: a temporary local path, whose content appears at `address` complete or not at all.

    A local file is written into its final folder, synced and renamed; a remote one is uploaded from the local temporary
    folder (an object store shows an object only when its upload is complete).

    Args:
        private: only the owner can read the file; otherwise the umask decides.

    Raises:
        UserError: the disk is full or the target cannot be written; no temporary file remains.
    """
    remote = is_remote(address)
    _check_fences(address)
    final = Path(address) if remote else _target(address)
    if not remote and _is_stream(final):
        with _writing_to_stream(final) as temporary:
            yield temporary
        return
    with user_errors(address):
        if not remote:
            final.parent.mkdir(parents=True, exist_ok=True)
        folder = scratch.shared() if remote else final.parent
        temporary = _temporary(folder, final.name)
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600 if private or remote else 0o666))
        try:
            yield temporary
            _check_fences(address)
            if remote:
                patiently(address, lambda: _put(temporary, address))
            else:
                _sync(temporary)
                temporary.replace(final)
                _sync(final.parent)
        finally:
            temporary.unlink(missing_ok=True)


def create(address: str, text: str) -> bool:
    """Write a small file unless there is one; False where there is. Of two processes, one gets True."""
    if is_remote(address):

        def put() -> bool:
            files, path = store(address)
            files.invalidate_cache()
            if files.exists(path):
                return False
            try:
                files.pipe_file(path, text.encode(), mode="create")
            except FileExistsError:
                return False
            return True

        return patiently(address, put)
    final = local_path(address)
    with user_errors(address):
        final.parent.mkdir(parents=True, exist_ok=True)
        draft = _temporary(final.parent, final.name)
        draft.write_text(text)
        try:
            # Unlike a rename, a link is refused where the name exists, on network disks too.
            os.link(draft, final)
        except FileExistsError:
            return False
        finally:
            draft.unlink()
    return True


def touch(address: str) -> None:
    """Make the file as young as one that is written now."""
    if is_remote(address):
        data = read(address)
        patiently(address, lambda: store(address)[0].pipe_file(store(address)[1], data))
    else:
        os.utime(local_path(address))


def age(address: str) -> float | None:
    """Seconds since the file was written, by the clock of its disk or store alone; None where it is gone."""
    folder, name = address.rsplit("/", 1)
    probe = f"{folder}/{TEMPORARY_PREFIX}{name}-{secrets.token_hex(4)}"
    try:
        if not is_remote(address):
            path = local_path(probe)
            path.touch()
            return path.stat().st_mtime - local_path(address).stat().st_mtime

        def compare() -> float:
            files, path = store(address)
            files.invalidate_cache()
            beside = store(probe)[1]
            files.pipe_file(beside, b"")
            now = files.modified(beside)
            return float((now - files.modified(path)).total_seconds())

        return patiently(address, compare)
    except FileNotFoundError:
        return None
    except AccessError:
        raise
    except UserError:
        return None
    finally:
        remove(probe)


_fences: list[tuple[str, Callable[[], None]]] = []
"""Folders that this process may write only under a condition, with the check of it."""


@contextmanager
def fenced(folder: str, check: Callable[[], None]) -> Iterator[None]:
    """Call the check before anything is published or removed under the folder, and before it gets its final name."""
    entry = (absolute(folder).rstrip("/") + "/", check)
    _fences.append(entry)
    try:
        yield
    finally:
        _fences.remove(entry)


def _check_fences(address: str) -> None:
    if _fences:
        where = absolute(address)
        for folder, check in _fences:
            if where.startswith(folder):
                check()


def _put(file: Path, address: str) -> None:
    files, path = store(address)
    files.put_file(str(file), path)


def _target(address: str) -> Path:
    """The file that an output address means: a link is followed, so that it stays a link to the new content.

    Raises:
        UserError: a folder, a socket, a block device or a link that leads in a circle is there.
    """
    path = local_path(address)
    with user_errors(address):
        if _is_stream(path):
            return path
        if path.is_symlink():
            path = Path(os.path.realpath(path))
        if path.is_symlink():
            raise OSError(errno.ELOOP, "links lead in a circle", address)
        if path.is_dir():
            raise IsADirectoryError(address)
    if path.exists() and not path.is_file():
        raise UserError(f"{address} is neither a file nor a folder; choose another output")
    return path


def _is_stream(path: Path) -> bool:
    """Whether it is written and not replaced: a pipe, a terminal, /dev/null, also /dev/stdout where it is a file."""
    return (
        path.is_fifo() or path.is_char_device() or (path.parts[:2] in (("/", "dev"), ("/", "proc")) and path.exists())
    )


@contextmanager
def _writing_to_stream(stream: Path) -> Iterator[Path]:
    """A temporary path, whose content is copied into the stream at the end."""
    with tempfile.TemporaryDirectory(dir=scratch.shared()) as folder:
        temporary = Path(folder, "output")
        yield temporary
        with user_errors(str(stream)), stream.open("wb") as target:
            target.write(temporary.read_bytes())


def write(address: str, data: bytes | str, *, private: bool = False) -> None:
    """Write a file atomically; a private one can be read by its owner only."""
    with publishing(address, private=private) as path:
        path.write_bytes(data.encode() if isinstance(data, str) else data)


def _temporary(folder: Path, name: str) -> Path:
    """A new path for an unfinished file; those that killed processes of this machine have left for it are removed."""
    # It says whose it is: this machine, then the number of the process.
    stem = f"{TEMPORARY_PREFIX}{name[:100]}-{digest(process.place().encode())[:8]}-"
    for path in folder.glob(f"{glob.escape(stem)}*"):
        pid = path.name.removeprefix(stem).partition("-")[0]
        if pid.isdecimal() and process.started(int(pid)) is None:
            path.unlink(missing_ok=True)
    return folder / f"{stem}{os.getpid()}-{secrets.token_hex(4)}"


def remove_temporary_files(address: str) -> int:
    """Remove temporary files that killed processes left in a local folder; returns their number."""
    paths = [] if is_remote(address) else list(local_path(address).glob(f"{TEMPORARY_PREFIX}*"))
    for path in paths:
        path.unlink(missing_ok=True)
    return len(paths)


def digest(*parts: bytes | memoryview) -> str:
    """BLAKE3 of the bytes, 64 hexadecimal digits; several parts count as if they were joined."""
    total = blake3()
    for part in parts:
        total.update(part)
    return total.hexdigest()


def file_digest(path: Path) -> str:
    """BLAKE3 of a local file, which is memory-mapped and not read at once."""
    return blake3().update_mmap(path).hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
