"""Re-read every byte of a dataset and compare it with the manifest."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np

from cxrscale.io import storage
from cxrscale.shards import manifest


def verify(root: str, progress: Callable[[int], None] | None = None) -> list[str]:
    """All faults of a dataset, one line per fault; empty if it is intact.

    Args:
        root: the dataset.
        progress: called with the number of images checked since the last call.

    Raises:
        UserError: there is no manifest.
    """
    data = manifest.load(root)
    expected = data.metadata[0]["shards"]
    faults = [f"{name}: missing" for name in expected if not storage.exists(storage.join(root, name))]
    faults += [f"{name}: not in the manifest" for name in storage.listing(root, ".tar") if name not in expected]
    shard = data.column("shard")
    for name, tar in expected.items():
        address = storage.join(root, name)
        if not storage.exists(address):
            continue
        rows = np.flatnonzero(shard == name)
        faults += _shard_faults(name, storage.read(address), tar, data, rows)
        if progress:
            progress(len(rows))
    return faults


def _shard_faults(
    name: str, content: bytes, tar: dict[str, str | int], data: manifest.Manifest, rows: np.ndarray
) -> list[str]:
    faults = []
    if len(content) != tar["bytes"]:
        faults.append(f"{name}: {len(content)} bytes, the manifest has {tar['bytes']}")
    if storage.digest(content) == tar["blake3"] and not faults:
        return []
    view = memoryview(content)
    for kind in ("image", "mask", "json"):
        offsets, lengths, crcs = (data.column(f"{kind}_{part}") for part in ("offset", "length", "crc"))
        for row in rows:
            if np.isnan(offsets[row]):
                continue
            start = int(offsets[row])
            if zlib.crc32(view[start : start + int(lengths[row])]) != int(crcs[row]):
                faults.append(f"{name}: {kind} of {data.image_id[row]} differs from its CRC-32")
    return faults or [f"{name}: bytes outside the members differ from the manifest's BLAKE3"]
