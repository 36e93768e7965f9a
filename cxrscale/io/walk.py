"""All files under a folder, at any depth, on a local disk or at an fsspec address; links are followed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cxrscale.io import access
from cxrscale.io import address as addresses
from cxrscale.types import AccessError


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file, a pipe, or a link that leads to none."""

    parts: tuple[str, ...]
    """Folders below the root, then the file's name."""
    path: str
    """Local path or fsspec address."""
    problem: str = ""
    """Why it cannot be opened; empty where it can."""


def walk(root: str) -> Iterator[FoundFile]:
    """Every file under a folder, in the order of the paths; none where the folder does not exist.

    Linked files and folders count as if they were copies. A link to nothing, and a link to a folder that contains it,
    are returned once with `problem`.

    Raises:
        AccessError: a folder cannot be listed: what it holds must not be taken for absent.
    """
    if addresses.is_remote(root):
        yield from _remote(root)
    elif addresses.local_path(root).is_dir():
        yield from _local(str(addresses.local_path(root)), (), frozenset())


def _local(folder: str, parts: tuple[str, ...], above: frozenset[tuple[int, int]]) -> Iterator[FoundFile]:
    """The files of a folder; `above` are device and inode of the folders on the way to it."""
    try:
        status = Path(folder).stat()
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        reason = (error.strerror or "unknown reason").lower()
        raise AccessError(f"{folder}: cannot be listed ({reason}); grant access, or move it elsewhere") from None
    inside = above | {(status.st_dev, status.st_ino)}
    for entry in entries:
        name = (*parts, entry.name)
        if entry.is_symlink() and (problem := _problem_of_link(entry, inside)):
            yield FoundFile(name, entry.path, problem)
        elif entry.is_dir():
            yield from _local(entry.path, name, inside)
        else:
            yield FoundFile(name, entry.path)


def _problem_of_link(entry: os.DirEntry[str], above: frozenset[tuple[int, int]]) -> str:
    try:
        status = entry.stat()
    except OSError:
        return "a link to nothing"
    if entry.is_dir() and (status.st_dev, status.st_ino) in above:
        return "a link that leads in a circle"
    return ""


def _remote(root: str) -> Iterator[FoundFile]:
    above, names = access.patiently(root, lambda: _names(root))
    for name in names:
        parts = tuple(name.removeprefix(above).split("/"))
        yield FoundFile(parts, addresses.join(root, *parts))


def _names(root: str) -> tuple[str, list[str]]:
    """(the folder's path in the store with a slash, the sorted paths of all files below it)."""
    files, path = access.store(root)
    files.invalidate_cache()
    names = sorted(files.find(path)) if files.exists(path) else []
    return path.rstrip("/") + "/", names
