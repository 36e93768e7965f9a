"""Files that may lie on a local disk or behind an fsspec address, and writing them whole or not at all."""

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

STRAY = ".tmp-"
"""How the name of an unfinished file begins; it never ends as the finished one's does, so no `*.tar` takes it in."""


def is_remote(address: str) -> bool:
    """Whether the address needs a network file system (s3://, gs://, ...); file:// and plain paths do not."""
    return "://" in address and not address.startswith(("file://", "local://"))


def local_path(address: str) -> Path:
    """The plain path behind a local address."""
    return Path(address.removeprefix("file://"))


def join(root: str | Path, *names: str) -> str:
    """root/name/..., for paths and addresses alike."""
    root = str(root)
    return "/".join([root.rstrip("/"), *names]) if is_remote(root) else str(local_path(root).joinpath(*names))


def absolute(address: str) -> str:
    """The address from the root of its file system: workers run in other directories."""
    return address if is_remote(address) else str(local_path(address).resolve())


def exists(address: str) -> bool:
    """Whether a file or folder is there."""
    if not is_remote(address):
        return local_path(address).exists()
    with _named(address):
        files, path = fsspec.core.url_to_fs(address)
        files.invalidate_cache()
        return bool(files.exists(path))


def read(address: str) -> bytes:
    """All bytes of a file.

    Raises:
        UserError: it does not exist or may not be read.
    """
    with _named(address):
        if not is_remote(address):
            return local_path(address).read_bytes()
        with fsspec.open(address, "rb") as file:
            data: bytes = file.read()
            return data


def listing(address: str, suffix: str = "") -> list[str]:
    """The sorted names of the files directly in a folder; empty where there is no folder."""
    if not is_remote(address):
        root = local_path(address)
        return sorted(entry.name for entry in root.iterdir() if entry.name.endswith(suffix)) if root.is_dir() else []
    with _named(address):
        files, path = fsspec.core.url_to_fs(address)
        files.invalidate_cache()
        names = files.ls(path, detail=False) if files.exists(path) else []
        return sorted(name.rsplit("/", 1)[-1] for name in names if name.endswith(suffix))


def remove(address: str) -> None:
    """Remove a file; nothing happens where there is none."""
    if not is_remote(address):
        local_path(address).unlink(missing_ok=True)
        return
    with _named(address):
        files, path = fsspec.core.url_to_fs(address)
        if files.exists(path):
            files.rm_file(path)


def remove_empty_folder(address: str) -> None:
    """Remove a local folder that holds nothing; an object store has no empty folders."""
    if not is_remote(address) and local_path(address).is_dir() and not listing(address):
        local_path(address).rmdir()


@contextmanager
def publishing(address: str) -> Iterator[Path]:
    """A temporary local path; what was written there appears under `address` at once and whole, or never.

    A local file is written beside its final place, synced and renamed; a remote one is uploaded from the local
    temporary folder (an object store shows an object only when its upload is complete).

    Raises:
        UserError: the disk is full or the target may not be written; nothing is left behind.
    """
    remote = is_remote(address)
    final = local_path(address)
    with _named(address):
        if not remote:
            final.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f"{STRAY}{final.name}-", dir=None if remote else final.parent)
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
    """Write a whole file, atomically."""
    with publishing(address) as path:
        path.write_bytes(data.encode() if isinstance(data, str) else data)


def sweep(address: str) -> int:
    """Remove temporary files that killed processes left in a local folder; returns how many there were."""
    strays = [] if is_remote(address) else list(local_path(address).glob(f"{STRAY}*"))
    for stray in strays:
        stray.unlink(missing_ok=True)
    return len(strays)


def unreachable(error: Exception) -> bool:
    """Whether an object store did not answer, or had no credentials; such errors are of no type of Python's."""
    return any(each.__module__ == "botocore.exceptions" for each in type(error).__mro__)


def digest(data: bytes | memoryview) -> str:
    """BLAKE3 of the bytes, 64 hexadecimal digits."""
    return blake3(data).hexdigest()


def file_digest(path: Path) -> str:
    """BLAKE3 of a local file, without reading it into memory at once."""
    return blake3().update_mmap(path).hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _named(address: str) -> Iterator[None]:
    """Turn what the file system says into one line with the address and the remedy."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{error.filename or address} does not exist; check the path") from None
    except PermissionError as error:
        raise UserError(f"{error.filename or address}: permission denied; choose a folder you may use") from None
    except IsADirectoryError:
        raise UserError(f"{address} is a folder, a file was expected") from None
    except (NotADirectoryError, FileExistsError):
        raise UserError(f"{address}: a part of this path is a file, not a folder") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(f"{address}: no space left on the disk; free some, then run this again") from None
        if error.errno == errno.EROFS:
            raise UserError(f"{address}: the disk is read-only; choose another folder") from None
        raise
    except ImportError as error:
        raise UserError(f"{address}: {error}; install cxrscale[s3] for s3:// addresses") from None
