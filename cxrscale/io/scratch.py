"""Private temporary folders that go with their process, and those that killed processes left."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

from cxrscale.types import UserError

PREFIX = "cxr-"
"""How the folders' names start; short, because the path of a socket in them must be."""
OWNER = ".owner"
"""The file in each folder that its process holds locked for as long as it lives."""
LONGEST = 40
"""Bytes that a folder's path may have for Ray's sockets: a socket's path has at most 107, Ray's part up to 66."""

_open: dict[Path, int] = {}
_created_by: int | None = None
_shared: Path | None = None


def make(short: bool = False) -> Path:
    """Create a folder that only this user reads, and that is removed when this process ends.

    A process that is killed leaves its folders; the next one that calls this on the machine removes them.

    Args:
        short: sockets will be in it, so it goes to /tmp where the temporary folder's path is too long.

    Raises:
        UserError: the temporary folder cannot be written.
    """
    global _created_by
    base = _base(short)
    remove_stale(base)
    handle = None
    while handle is None:
        try:
            folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
            handle = _lock(folder / OWNER)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"temporary folder {base}: {reason}; free space there, or set TMPDIR to another") from None
    if _created_by != os.getpid():
        # A forked child has its parent's folders in the table and must leave them alone.
        _open.clear()
        _created_by = os.getpid()
        atexit.register(_remove_all)
    _open[folder] = handle
    return folder


def shared() -> Path:
    """The folder of `make` for all of this process's temporary files that need none of their own."""
    global _shared
    # Long runs outlive what cleans a temporary folder of old files.
    if _shared is None or _created_by != os.getpid() or not _shared.is_dir():
        _shared = make()
    return _shared


def _lock(owner: Path) -> int | None:
    """Create and lock the file; None where another process took the folder for stale in between."""
    handle = os.open(owner, os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(handle, fcntl.LOCK_EX)
    if os.fstat(handle).st_nlink:
        return handle
    os.close(handle)
    return None


def remove(folder: Path) -> None:
    """Remove a folder of `make` before this process ends; processes that are just ending may still write to it."""
    handle = _open.pop(folder, None)
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            break
        time.sleep(0.1)
    if handle is not None:
        os.close(handle)


def remove_stale(base: Path | None = None) -> None:
    """Remove the folders whose process no longer lives.

    A command that needs no folder calls this too: the one before it may have been killed.

    Args:
        base: where they are; None: in the temporary folder.
    """
    base = base or _base(short=False)
    for owner in base.glob(f"{PREFIX}*/{OWNER}"):
        try:
            handle = os.open(owner, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:  # another user's, or gone by now
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The lock's file first: who makes this folder just now, and has not locked it yet, sees that it is gone.
            owner.unlink(missing_ok=True)
            shutil.rmtree(owner.parent, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(handle)
    for folder in base.glob(f"{PREFIX}*"):
        # Of a process that was killed before it had locked its folder.
        with contextlib.suppress(OSError):
            if time.time() - folder.lstat().st_mtime > 60:
                folder.rmdir()


def _base(short: bool) -> Path:
    base = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) if short else Path(tempfile.gettempdir())
    # mkdtemp adds eight characters to the prefix.
    if short and len(os.fsencode(base)) + 1 + len(PREFIX) + 8 > LONGEST:
        return Path("/tmp")
    return base


def _remove_all() -> None:
    if _created_by == os.getpid():
        for folder in list(_open):
            remove(folder)
