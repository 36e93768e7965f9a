"""Remote shards -> complete local copies in a cache that all processes of a machine share.

A copy is named by the BLAKE3 in the manifest, so that datasets with the same shard share it, and it appears under that
name only when it is complete and its digest is right. A lock per shard lets one process download while the others wait.
The folder is CXRSCALE_CACHE, or ~/.cache/cxrscale; it holds at most CXRSCALE_CACHE_GB gigabytes (default 200), and a
running download counts with its full size from the start.

A copy is locked while any process has it open, and by each reader that uses it for as long as the reader lives (a
reader of thousands of shards has few of them open at once). Only unlocked copies are removed to make room: they would
be downloaded again for the next batch, and one that is still open would go on filling the disk.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import math
import os
import struct
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import fsspec

from cxrscale.config import CACHE_FOLDER, CACHE_GIGABYTES, DEFAULT_CACHE_FOLDER, DEFAULT_CACHE_GIGABYTES
from cxrscale.io import storage
from cxrscale.types import UserError

_log = logging.getLogger("cxrscale")
_USERS = "users.lock"


@dataclass(frozen=True, slots=True)
class RemoteShard:
    """A remote tar, and its digest and size from the manifest; None where the manifest has none."""

    address: str
    blake3: str | None
    size: int | None
    """Bytes."""


class CacheUse:
    """The copies that a reader uses: none of them is removed to make room while this object lives, in no process.

    They are locked in one file, a byte each, so that thousands of them cost one file descriptor.
    """

    def __init__(self) -> None:
        self._file: BinaryIO | None = None
        self._names: set[str] = set()

    def add(self, name: str, folder: Path) -> None:
        """Lock a copy; the caller holds the lock of its name."""
        if name in self._names:
            return
        if self._file is None:
            self._file = (folder / _USERS).open("a+b")
            weakref.finalize(self, self._file.close)
        _lock_byte(self._file, name, fcntl.F_RDLCK)
        self._names.add(name)


def staged_copy(shard: RemoteShard, use: CacheUse | None = None) -> BinaryIO:
    """The local copy of a remote shard, downloaded if necessary, open for reading.

    It is not removed to make room while this file, or a map of it, is open in any process, or while `use` lives.

    Raises:
        UserError: it does not exist, differs from the manifest, or does not fit into the cache.
    """
    try:
        folder = Path(os.environ.get(CACHE_FOLDER) or DEFAULT_CACHE_FOLDER).expanduser()
    except RuntimeError:
        raise UserError(f"no home folder for copies of remote shards; point {CACHE_FOLDER} to a folder") from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; point {CACHE_FOLDER} to a folder with room") from None
    name = shard.blake3 or storage.digest(shard.address.encode())
    final = folder / f"{name}.tar"
    try:
        with _locked(folder / f"{name}.lock"):
            if not _complete(final, shard):
                _download(shard, final)
            # Left by a process that was killed when its copy was complete; no other can be downloading this one now.
            final.with_suffix(".room").unlink(missing_ok=True)
            os.utime(final)
            if use is not None:
                use.add(name, folder)
            file = final.open("rb")
            # Taken before the name's lock is released, so that no process can remove the copy in between. A map
            # duplicates the descriptor and with it the lock, which therefore lasts as long as the map.
            fcntl.flock(file, fcntl.LOCK_SH)
    except PermissionError as error:
        raise UserError(f"{error.filename}: {error.strerror}; point {CACHE_FOLDER} to a folder that you own") from None
    return file


def _complete(path: Path, shard: RemoteShard) -> bool:
    # The digest was compared before the copy got its name; its size shows whether it has been truncated since.
    return path.exists() and (shard.size is None or path.stat().st_size == shard.size)


def _download(shard: RemoteShard, final: Path) -> None:
    """Copy the shard, within the limit; the caller holds the lock of its name."""
    size = _remote_size(shard)
    part, room = final.with_suffix(".part"), final.with_suffix(".room")
    try:
        with _locked(final.parent / "cache.lock"):
            # A copy of another size is unusable, and the process that left the others is dead: we hold the name's lock.
            for stale in (final, part, room):
                stale.unlink(missing_ok=True)
            _make_room(shard, size, final.parent)
            room.write_text(str(size))
        _log.info("copying %s to %s", shard.address, final)
        storage.patiently(shard.address, lambda: _copy(shard, part, size), listed=True)
        if shard.blake3 is not None and storage.file_digest(part) != shard.blake3:
            raise UserError(f"{shard.address} differs from its manifest's digest; run `cxrscale verify`")
        part.replace(final)
    except PermissionError:
        raise
    except OSError as error:
        raise UserError(f"{shard.address} cannot be copied to {final.parent} ({error}); free space there") from None
    finally:
        part.unlink(missing_ok=True)
        room.unlink(missing_ok=True)


def _copy(shard: RemoteShard, part: Path, size: int) -> None:
    files, path = fsspec.core.url_to_fs(shard.address)
    try:
        files.get_file(path, str(part))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(f"{part.parent} is full; free space there, or point {CACHE_FOLDER} elsewhere") from None
        raise
    if (came := part.stat().st_size) != size:
        raise OSError(f"{came} of {size} bytes came")


def _remote_size(shard: RemoteShard) -> int:
    def ask() -> int:
        files, path = fsspec.core.url_to_fs(shard.address)
        try:
            return int(files.size(path))
        except FileNotFoundError:
            raise UserError(f"{shard.address} is missing; run `cxrscale verify`, then shard again") from None

    size = storage.patiently(shard.address, ask)
    if shard.size is not None and size != shard.size:
        raise UserError(f"{shard.address} has {size} bytes, its manifest says {shard.size}; run `cxrscale verify`")
    return size


def _make_room(shard: RemoteShard, size: int, folder: Path) -> None:
    """Remove the least recently used copies until `size` more bytes fit, and files that killed processes left.

    The caller holds the cache's lock: two processes that counted at once would both use the same room.
    """
    limit = _limit()
    if size > limit:
        raise UserError(
            f"{shard.address} alone has {size / 1e9:.3g} GB, more than "
            f"{CACHE_GIGABYTES}={limit / 1e9:g}; raise {CACHE_GIGABYTES}"
        )
    for suffix in ("part", "room"):
        for stray in folder.glob(f"*.{suffix}"):
            _remove_if_free(stray)
    # First running downloads, then complete copies: a download that ends in between is seen twice, and counted once.
    used = {path.stem: bytes_ for path in folder.glob("*.room") if (bytes_ := _reserved(path)) is not None}
    copies = sorted(entry for path in folder.glob("*.tar") if (entry := _copy_entry(path)) is not None)
    used |= {path.stem: bytes_ for _, bytes_, path in copies}
    for _, _, path in copies:
        if sum(used.values()) + size > limit and _remove_if_free(path):
            del used[path.stem]
    total = sum(used.values())
    if total + size > limit:
        raise UserError(
            f"{folder} would hold {(total + size) / 1e9:.3g} GB, more than {CACHE_GIGABYTES}={limit / 1e9:g}, and all "
            f"of it is in use at once; raise {CACHE_GIGABYTES} or copy the shards to a local disk"
        )


def _limit() -> float:
    """Maximum size of the cache in bytes."""
    text = os.environ.get(CACHE_GIGABYTES, str(DEFAULT_CACHE_GIGABYTES))
    try:
        limit = float(text) * 1e9
    except ValueError:
        limit = math.nan
    if not limit > 0:
        raise UserError(f"{CACHE_GIGABYTES}={text!r} is not a number of gigabytes; give one above 0")
    return limit


def _reserved(room: Path) -> int | None:
    """Bytes that a running download will take; None where it has just ended."""
    try:
        return int(room.read_text())
    except FileNotFoundError:
        return None


def _copy_entry(path: Path) -> tuple[float, int, Path] | None:
    """(time of last use, bytes, path) of a copy; None where it has just been removed."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_mtime, status.st_size, path


def _remove_if_free(path: Path) -> bool:
    """Remove a file of the cache unless a process is downloading or reading it; returns whether it is gone."""
    try:
        with _locked(path.with_suffix(".lock"), wait=False):
            if path.suffix == ".tar":
                with path.open("r+b") as copy, (path.parent / _USERS).open("a+b") as users:
                    fcntl.flock(copy, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _lock_byte(users, path.stem, fcntl.F_WRLCK)
            path.unlink()
    except (BlockingIOError, PermissionError):
        return False
    except FileNotFoundError:
        return True
    return True


@contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold a lock that the system releases when the process ends, for whatever reason.

    Raises:
        BlockingIOError: another process holds it, and `wait` is False.
    """
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def _lock_byte(file: BinaryIO, name: str, kind: int) -> None:
    """Lock the byte that stands for a copy until the file is closed.

    Raises:
        BlockingIOError: another open file has a lock that excludes this one.
    """
    # The lock of an open file description; a plain one would go as soon as this process closes any file of the name.
    whole = struct.pack("@hhqqi4x", kind, os.SEEK_SET, int(name[:15], 16), 1, 0)
    fcntl.fcntl(file, fcntl.F_OFD_SETLK, whole)
