"""Which sources there are, and what the rest of the package must know about each."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cxrscale.sources.ledger import LedgerBook
from cxrscale.types import ImageRecord, UserError

PACKAGE = "cxrscale.sources"
NOT_SOURCES = frozenset({"csv_rows", "image_files", "ledger", "registry", "synthetic"})
"""Modules of the package that hold no source; every other one does."""


@dataclass(frozen=True, slots=True)
class SourceContent:
    """What a source holds."""

    records: list[ImageRecord]
    """All images, in the order of their IDs."""
    book: LedgerBook
    """What was matched with the tables, and what was left out."""


@dataclass(frozen=True, slots=True)
class Source:
    """A published collection of chest X-rays in the layout in which it is downloaded."""

    name: str
    """The name of its module, and its name at the command line."""
    read: Callable[[str], SourceContent]
    """All images under a root (a local path or an fsspec address) with their ledger; no pixel is read."""
    pack_defaults: Mapping[str, object] = field(default_factory=dict)
    """Fields of the `pack` section that `cxrscale shard` sets where the user does not: {"masks": True}."""
    reliable_patient_ids: bool = True
    """False where each file has a patient ID of its own although patients have several images: nothing can be said
    about patients that splits share until the IDs are taken from another dataset (`--patients-from`)."""
    editions_differ: str = ""
    """By how much the editions of its label table differ, where there are several."""
    publishes_split: bool = False
    """Whether it has a test list of its own. pack.split=official means that list, and random where none is published;
    it is an error where the list is missing."""


def names() -> list[str]:
    """The sources' names, sorted. No source is imported for it."""
    modules = pkgutil.iter_modules(importlib.import_module(PACKAGE).__path__)
    return sorted({module.name for module in modules} - NOT_SOURCES)


def get(name: str) -> Source:
    """The source of this name; its module is imported now.

    Raises:
        UserError: there is none; the message lists those there are.
    """
    if name not in names():
        raise UserError(f"unknown source {name!r}; choose one of {', '.join(names())}")
    source = importlib.import_module(f"{PACKAGE}.{name}").SOURCE
    if not isinstance(source, Source):
        raise TypeError(f"{PACKAGE}.{name}.SOURCE is a {type(source).__name__}, not a Source")
    return source


def read(name: str, root: str) -> SourceContent:
    """All images of a source, and what was left out; no pixel is read.

    Args:
        name: one of `names()`.
        root: the source's folder, a local path or an fsspec address.

    Raises:
        UserError: the source is unknown, or its files are not as published; the message names the file and the remedy.
    """
    return get(name).read(root)
