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

from cxrscale.types import UserError

TEMPORARY_PREFIX = ".tmp-"
"""Prefix of the name of an unfinished file, which has no suffix, so that a pattern such as `*.tar` never matches it."""


def is_remote(address: str) -> bool:
    """Whether the address needs a network file system (s3://, gs://, ...); file:// and plain paths do not."""
    return "://" in address and not address.startswith(("file://", "local://"))


def local_path(address: str) -> Path:
    """The path of a local address."""
    return Path(address.removeprefix("file://"))


def join(root: str | Path, *names: str) -> str:
    """root/name/..., for local paths and addresses."""
    root = str(root)
    return "/".join([root.rstrip("/"), *names]) if is_remote(root) else str(local_path(root).joinpath(*names))


def absolute(address: str) -> str:
    """The address with an absolute path, because workers run in other directories."""
    return address if is_remote(address) else str(local_path(address).resolve())


def exists(address: str) -> bool:
    """Whether a file or folder exists."""
    if not is_remote(address):
        return local_path(address).exists()
    with _user_errors(address):
        files, path = fsspec.core.url_to_fs(address)
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
        with fsspec.open(address, "rb") as file:
            data: bytes = file.read()
            return data


def listing(address: str, suffix: str = "") -> list[str]:
    """The sorted names of the entries of a folder that end in `suffix`; empty if the folder does not exist."""
    if not is_remote(address):
        root = local_path(address)
        return sorted(entry.name for entry in root.iterdir() if entry.name.endswith(suffix)) if root.is_dir() else []
    with _user_errors(address):
        files, path = fsspec.core.url_to_fs(address)
        files.invalidate_cache()
        names = files.ls(path, detail=False) if files.exists(path) else []
        return sorted(name.rsplit("/", 1)[-1] for name in names if name.endswith(suffix))


def remove(address: str) -> None:
    """Remove a file, if it exists."""
    if not is_remote(address):
        local_path(address).unlink(missing_ok=True)
        return
    with _user_errors(address):
        files, path = fsspec.core.url_to_fs(address)
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
    final = local_path(address)
    with _user_errors(address):
        if not remote:
            final.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f"{TEMPORARY_PREFIX}{final.name}-", dir=None if remote else final.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            if remote:
                files, path = fsspec.core.url_to_fs(address)
                files.put_file(str(temporary), path)
            else:
                temporary.chmod(0o644)
                _sync(temporary)
                temporary.replace(final)
                _sync(final.parent)
        finally:
            temporary.unlink(missing_ok=True)


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
        if error.errno == errno.EROFS:
            raise UserError(f"{address}: the disk is read-only; choose another folder") from None
        raise
    except ImportError as error:
        raise UserError(f"{address}: {error}; install cxrscale[s3] for s3:// addresses") from None
