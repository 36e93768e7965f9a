"""Reading, listing and atomically writing files on a local disk or at an fsspec address."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
from blake3 import blake3

from cxrscale.io.address import absolute as absolute
from cxrscale.io.address import is_remote as is_remote
from cxrscale.io.address import join as join
from cxrscale.io.address import local_path as local_path
from cxrscale.io.address import normalize
from cxrscale.types import UserError

TEMPORARY_PREFIX = ".tmp-"
"""Prefix of the name of an unfinished file, which has no suffix, so that a pattern such as `*.tar` never matches it."""


def exists(address: str) -> bool:
    """Whether a file or folder exists."""
    if not is_remote(address):
        return local_path(address).exists()
    with _user_errors(address):
        files, path = fsspec.core.url_to_fs(normalize(address))
        files.invalidate_cache()
        return bool(files.exists(path))


def read(address: str) -> bytes:
    """All bytes of a file.

    Raises:
        UserError: it does not exist or cannot be read.
    """
    with _user_errors(address):
        if not is_remote(address):
            return local_path(address).read_bytes()
        with fsspec.open(normalize(address), "rb") as file:
            data: bytes = file.read()
            return data


def listing(address: str, suffix: str = "") -> list[str]:
    """The sorted names of the entries of a folder that end in `suffix`; empty if the folder does not exist."""
    if not is_remote(address):
        root = local_path(address)
        return sorted(entry.name for entry in root.iterdir() if entry.name.endswith(suffix)) if root.is_dir() else []
    with _user_errors(address):
        files, path = fsspec.core.url_to_fs(normalize(address))
        files.invalidate_cache()
        names = files.ls(path, detail=False) if files.exists(path) else []
        return sorted(name.rsplit("/", 1)[-1] for name in names if name.endswith(suffix))


def remove(address: str) -> None:
    """Remove a file, if it exists."""
    if not is_remote(address):
        local_path(address).unlink(missing_ok=True)
        return
    with _user_errors(address):
        files, path = fsspec.core.url_to_fs(normalize(address))
        if files.exists(path):
            files.rm_file(path)


def remove_empty_folder(address: str) -> None:
    """Remove a local folder if it is empty; object stores have no empty folders."""
    if not is_remote(address) and local_path(address).is_dir() and not listing(address):
        local_path(address).rmdir()


@contextmanager
def publishing(address: str) -> Iterator[Path]:
    """Write a file atomically: a temporary local path, whose content appears at `address` complete or not at all.

    A local file is written into its final folder, synced and renamed; a remote one is uploaded from the local temporary
    folder (an object store shows an object only when its upload is complete).

    Raises:
        UserError: the disk is full or the target cannot be written; no temporary file remains.
    """
    remote = is_remote(address)
    final = Path(address) if remote else _target(address)
    if not remote and _is_stream(final):
        with _writing_to_stream(final) as temporary:
            yield temporary
        return
    with _user_errors(address):
        if not remote:
            final.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f"{TEMPORARY_PREFIX}{final.name}-", dir=None if remote else final.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            if remote:
                files, path = fsspec.core.url_to_fs(normalize(address))
                files.put_file(str(temporary), path)
            else:
                temporary.chmod(0o644)
                _sync(temporary)
                temporary.replace(final)
                _sync(final.parent)
        finally:
            temporary.unlink(missing_ok=True)


def _target(address: str) -> Path:
    """The file that an output address means: a link is followed, so that it stays a link to the new content.

    Raises:
        UserError: a folder, a socket, a block device or a link that leads in a circle is there.
    """
    path = local_path(address)
    with _user_errors(address):
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
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder, "output")
        yield temporary
        with _user_errors(str(stream)), stream.open("wb") as target:
            target.write(temporary.read_bytes())


def write(address: str, data: bytes | str) -> None:
    """Write a file atomically."""
    with publishing(address) as path:
        path.write_bytes(data.encode() if isinstance(data, str) else data)


def remove_temporary_files(address: str) -> int:
    """Remove temporary files that killed processes left in a local folder; returns their number."""
    paths = [] if is_remote(address) else list(local_path(address).glob(f"{TEMPORARY_PREFIX}*"))
    for path in paths:
        path.unlink(missing_ok=True)
    return len(paths)


def unreachable(error: Exception) -> bool:
    """Whether an error means that an object store did not answer, or that credentials are missing."""
    # By name, because botocore is optional and slow to import; its errors are not OSErrors.
    return any(base.__module__ == "botocore.exceptions" for base in type(error).__mro__)


def digest(data: bytes | memoryview) -> str:
    """BLAKE3 of the bytes, 64 hexadecimal digits."""
    return blake3(data).hexdigest()


def file_digest(path: Path) -> str:
    """BLAKE3 of a local file, which is memory-mapped and not read at once."""
    return blake3().update_mmap(path).hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _user_errors(address: str) -> Iterator[None]:
    """Turn errors of the file system into one line with the address and how to fix it."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{error.filename or address} does not exist; check the path") from None
    except PermissionError as error:
        raise UserError(f"{error.filename or address}: permission denied; choose a folder with permission") from None
    except IsADirectoryError:
        raise UserError(f"{address} is a folder; give a file") from None
    except (NotADirectoryError, FileExistsError):
        raise UserError(f"{address}: a part of this path is a file, not a folder") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(f"{address}: no space left on the disk; free some, then re-run the command") from None
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            raise UserError(f"{address}: {(error.strerror or '').lower()}; correct the path") from None
        if error.errno == errno.EROFS:
            raise UserError(f"{address}: the disk is read-only; choose another folder") from None
        raise
    except ImportError as error:
        raise UserError(f"{address}: {error}; install cxrscale[s3] for s3:// addresses") from None
