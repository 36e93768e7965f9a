"""What is in a tar: its members, and from them its index."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Mapping
from typing import BinaryIO

Members = Mapping[str, tuple[int, int, int]]
"""Name -> (offset, length, CRC-32) of each member, in the order of the tar."""


def read_members(file: BinaryIO) -> Members:
    """The members of an open tar.

    Raises:
        tarfile.TarError: it is damaged.
    """
    members = {}
    with tarfile.open(fileobj=file) as tar:
        for member in tar:
            content = tar.extractfile(member)
            if content is not None:
                members[member.name] = (member.offset_data, member.size, zlib.crc32(content.read()))
    return members


def index_name(tar: str) -> str:
    """The file name of a tar's index."""
    return tar.removesuffix(".tar") + ".idx"


def index_of(members: Members) -> bytes:
    """Index of a tar in DALI's format (wds2idx v1.2), for `fn.readers.webdataset(index_paths=...)`: per sample the
    image, its mask, its JSON."""
    samples: dict[str, list[tuple[str, int, int, str]]] = {}
    for name, (offset, length, _) in members.items():
        key, _, suffix = name.partition(".")
        samples.setdefault(key, []).append((suffix, offset, length, name))
    lines = [f"v1.2 {len(samples)}"]
    for fields in samples.values():
        fields.sort(key=lambda field: (field[0] == "json", field[0] == "mask.png"))
        lines.append(" ".join(str(value) for field in fields for value in field))
    return ("\n".join(lines) + "\n").encode()
