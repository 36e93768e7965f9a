"""What a prediction is made for: files, folders, patterns and lists, each image once."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TextIO

from cxrscale.inference import stored_images
from cxrscale.io import storage
from cxrscale.sources import FORMATS, LedgerBook, find_images
from cxrscale.types import UserError

_PATTERN = set("*?[")


@dataclass(frozen=True, slots=True)
class Inputs:
    """The images to predict, and what was not taken for one."""

    paths: tuple[str, ...]
    """Local paths and addresses in the order in which they were given, each once."""
    twice: int
    """How often one was given again."""
    left_out: tuple[str, ...]
    """One line per kind of file in a folder that looks like an image and is left out."""


def find_inputs(given: Sequence[str], stdin: TextIO | None = None, split: str | None = None) -> Inputs:
    """Expand what a command line names.

    A folder or prefix stands for the images under it, at any depth: DICOM with or without a suffix, PNG, JPEG; the
    folder or address of a dataset for its images, or those of one of its splits (see `stored_images`). A name
    with `*`, `?` or `[` that is no file is a pattern (`**` is any depth). `@list.txt` is a file of one input per line,
    and `-` such lines on stdin. Anything else is a file, whether it can be read or not.

    Args:
        split: of datasets; all inputs then are datasets.

    Raises:
        UserError: a list does not exist, a pattern or all inputs together name no image, a dataset has no such split or
            something else is none.
        AccessError: a folder cannot be listed.
    """
    book = LedgerBook("inputs")
    found = list(_expand(_named(given, stdin), book, split))
    if not found:
        raise UserError(f"{', '.join(given) or 'the command'} names no image; give DICOM, PNG or JPEG files or folders")
    paths = tuple(dict.fromkeys(found))
    return Inputs(paths, len(found) - len(paths), tuple(book.lines()[1:]))


def _named(given: Sequence[str], stdin: TextIO | None) -> Iterator[str]:
    """The inputs, with what lists name in their place."""
    for name in given:
        yield from _lines(name, stdin) if name == "-" or name.startswith("@") else (name,)


def _expand(given: Iterable[str], book: LedgerBook, split: str | None) -> Iterator[str]:
    for name in given:
        if storage.is_folder(name) and stored_images.is_dataset(name):
            yield from stored_images.dataset_images(name, split)
        elif split is not None:
            raise UserError(f"--split {split} is one of datasets, and {name} is none; leave one of them out")
        elif storage.is_folder(name):
            yield from (image.path for image in find_images(name, FORMATS, lambda _: "", book))
        elif not _PATTERN.isdisjoint(name) and not storage.exists(name):
            yield from _matches(name)
        else:
            yield name


def _lines(name: str, stdin: TextIO | None) -> list[str]:
    if name == "-":
        text = stdin.read() if stdin is not None else ""
    else:
        address = name.removeprefix("@")
        if not storage.exists(address):
            raise UserError(f"{name}: the list {address} does not exist")
        try:
            text = storage.read(address).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{name} is no text ({error.reason}); give a file of one path per line") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def _matches(pattern: str) -> list[str]:
    """The files that a pattern names, sorted.

    Raises:
        UserError: it names none.
    """
    if storage.is_remote(pattern):
        names = storage.matches(pattern)
    else:
        found = glob.glob(pattern, recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
        names = sorted(name for name in found if not storage.is_folder(name))
    if not names:
        raise UserError(f"{pattern} matches no file; quote it, so that the shell does not change it")
    return names
