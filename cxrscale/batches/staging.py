"""Remote shards -> whole local copies in a cache that all processes of a machine share.

A copy is named by the BLAKE3 that the manifest states, so that sets with the same shard share it, and it appears under
that name only when it is whole and its digest is right. A lock a shard lets one process download while the others
wait. The folder is CXRSCALE_CACHE, or ~/.cache/cxrscale; it holds at most CXRSCALE_CACHE_GB gigabytes (default 200).
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import fsspec

from cxrscale import storage
from cxrscale.schema import InputError

FOLDER, GIGABYTES = "CXRSCALE_CACHE", "CXRSCALE_CACHE_GB"

_log = logging.getLogger("cxrscale")


@dataclass(frozen=True, slots=True)
class Shard:
    """A remote tar, and what the manifest says of it; None where it says nothing."""

    address: str
    blake3: str | None
    size: int | None
    """Bytes."""


def staged(shard: Shard, in_use: Collection[Path] = ()) -> Path:
    """The local copy of a remote shard, downloaded if need be.

    Args:
        shard: what to copy.
        in_use: copies that must not be removed to make room.

    Raises:
        InputError: it is not there, differs from what the manifest says, or does not fit into the cache.
    """
    folder = Path(os.environ.get(FOLDER) or "~/.cache/cxrscale").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}; point {FOLDER} to a folder with room") from None
    name = shard.blake3 or storage.digest(shard.address.encode())
    final = folder / f"{name}.tar"
    with _locked(folder / f"{name}.lock"):
        if not _whole(final, shard):
            size = _remote_size(shard)
            _make_room(folder, size, {*in_use, final})
            _download(shard, final)
        os.utime(final)
    return final


def _whole(path: Path, shard: Shard) -> bool:
    # The digest was compared before the copy got its name; its size tells whether someone has cut it since.
    return path.exists() and (shard.size is None or path.stat().st_size == shard.size)


def _remote_size(shard: Shard) -> int:
    files, path = fsspec.core.url_to_fs(shard.address)
    try:
        size = int(files.size(path))
    except FileNotFoundError:
        raise InputError(f"{shard.address} is missing; run `cxrscale verify`, then shard again") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{shard.address} cannot be read ({error}); check network and credentials") from None
    if shard.size is not None and size != shard.size:
        raise InputError(f"{shard.address} has {size} bytes, its manifest says {shard.size}; run `cxrscale verify`")
    return size


def _download(shard: Shard, final: Path) -> None:
    _log.info("copying %s to %s", shard.address, final)
    part = final.with_suffix(".part")
    files, path = fsspec.core.url_to_fs(shard.address)
    try:
        files.get_file(path, str(part))
        if shard.blake3 is not None and storage.file_digest(part) != shard.blake3:
            raise InputError(f"{shard.address} differs from its manifest's digest; run `cxrscale verify`")
        part.replace(final)
    except OSError as error:
        raise InputError(f"{shard.address} cannot be copied to {final.parent} ({error}); free space there") from None
    finally:
        part.unlink(missing_ok=True)


def _make_room(folder: Path, size: int, keep: Collection[Path]) -> None:
    """Remove the copies that were asked for longest ago, until `size` more bytes fit; and what killed processes left.

    Several processes may do this at once; a copy that another process has mapped stays readable for it when removed.
    """
    text = os.environ.get(GIGABYTES, "200")
    try:
        limit = float(text) * 1e9
    except ValueError:
        raise InputError(f"{GIGABYTES}={text!r} is not a number of gigabytes") from None
    for part in folder.glob("*.part"):
        _remove_if_free(part)
    copies = sorted(
        (seen for path in folder.glob("*.tar") if (seen := _seen(path)) is not None), key=lambda seen: seen[0]
    )
    total = sum(bytes_ for _, bytes_, _ in copies) + size
    for _, bytes_, path in copies:
        if total > limit and path not in keep:
            path.unlink(missing_ok=True)
            total -= bytes_
    if total > limit:
        raise InputError(
            f"{folder} would hold {total / 1e9:.1f} GB, more than {GIGABYTES}={text}: this run needs them all at once; "
            f"raise {GIGABYTES} or copy the shards to a local disk"
        )


def _seen(path: Path) -> tuple[float, int, Path] | None:
    """(last asked for, bytes, path) of a copy; None where another process has just removed it."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_mtime, status.st_size, path


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that ends with the process that holds it, however that ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_if_free(part: Path) -> None:
    with part.with_suffix(".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        part.unlink(missing_ok=True)
