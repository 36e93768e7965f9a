"""A file that carries its own digest, so that a changed bit anywhere in it is seen.

The seal is `blake3:DIGITS:blake3` near the end of the file: in a field of JSON, a comment of YAML, HTML or a zip
archive, or the metadata of Parquet. DIGITS is BLAKE3 of the file with zeros in their place. No second file has to be
kept in step with it, whatever process is killed when, and a copy of the file keeps it. Files of earlier versions carry
none and are read as they are.
"""

from __future__ import annotations

import re

from cxrscale.io import storage
from cxrscale.types import UserError

FIELD = "seal"
"""The name of the field that holds it."""
_DIGITS = 64
BLANK = f"blake3:{'0' * _DIGITS}:blake3"
"""What a writer puts where the seal is to be."""
_TAIL = 1 << 18
"""Bytes at the end of a file in which a seal is looked for; Parquet's footer stands behind it."""
_SEAL = re.compile(rb"blake3:([0-9a-f]{64}):blake3")
_PART = re.compile(rb"blake3:|:blake3")
"""Of a seal: it has the word twice, so that one changed bit does not make a file look like an earlier version's."""


def close(content: bytes) -> bytes:
    """The content with its blank filled in.

    Args:
        content: a file with `BLANK` in its last 256 KB.
    """
    start = content.rindex(BLANK.encode()) + len("blake3:")
    return content[:start] + storage.digest(content).encode() + content[start + _DIGITS :]


def closed_text(text: str, comment: str = "# {}") -> str:
    """The text with a seal as its last line.

    Args:
        comment: what makes a line a comment, around {}.
    """
    end = "" if text.endswith("\n") else "\n"
    return close((text + end + comment.format(BLANK) + "\n").encode()).decode()


def is_intact(content: bytes) -> bool | None:
    """Whether the bytes are those that were sealed; None where there is no seal."""
    tail = max(0, len(content) - _TAIL)
    found = list(_SEAL.finditer(content, tail))
    if not found:
        return False if _PART.search(content, tail) else None
    start, end = found[-1].span(1)
    view = memoryview(content)
    return storage.digest(view[:start], b"0" * _DIGITS, view[end:]) == found[-1][1].decode()


def check(content: bytes, address: str, remedy: str) -> bytes:
    """The content, unless it carries a seal that it does not fit.

    Raises:
        UserError: it does not; the message ends with the remedy.
    """
    if is_intact(content) is False:
        raise UserError(f"{address} is damaged or was edited: it does not fit the digest that it carries; {remedy}")
    return content


def read(address: str, remedy: str) -> bytes:
    """All bytes of a file, as `storage.read`.

    Raises:
        UserError: as `check`; or the file does not exist.
    """
    return check(storage.read(address), address, remedy)
