"""Raw archives, one module a source: each lists an archive's images and what its tables say of them.

A new source is one module with `read(root) -> list[ImageRecord]` and one line in `READERS`.
"""

from __future__ import annotations

import importlib

from cxrscale.types import ImageRecord, UserError

READERS = {
    "nih": "cxrscale.sources.nih:read",
    "siim": "cxrscale.sources.siim:read",
    "rsna": "cxrscale.sources.rsna:read",
    "kermany": "cxrscale.sources.kermany:read",
}
"""Source -> the function that reads it, as 'module:function'; the module is imported when it is asked for."""


def read(source: str, root: str) -> list[ImageRecord]:
    """All images of a raw archive, in the order of their ids; no pixel is read.

    Args:
        source: one of READERS.
        root: the archive's folder, a local path or an fsspec address.

    Raises:
        UserError: the source is unknown, or the archive is not as published; the message names file and remedy.
    """
    if source not in READERS:
        raise UserError(f"unknown source {source!r}; on offer: {', '.join(sorted(READERS))}")
    module, function = READERS[source].split(":")
    records: list[ImageRecord] = getattr(importlib.import_module(module), function)(root)
    return records
