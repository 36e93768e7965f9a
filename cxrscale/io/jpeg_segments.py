"""The marker segments at the beginning of a JPEG or JPEG-LS stream (ITU-T T.81 B.1.1, T.87 C.1.1)."""

from __future__ import annotations

import struct
from collections.abc import Iterator

FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC} | {0xF7}
"""Second bytes of the markers that start a frame: size, bits and components."""
PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)
"""Those of progressive frames, of which a decoder keeps all coefficients."""
SCAN = 0xDA


def segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(second byte of the marker, start and end of its parameters) up to the header of the first scan.

    Raises:
        IndexError, struct.error: the stream is truncated, or something else than a marker follows a segment.
    """
    offset = 2
    while data[offset] == 0xFF:
        marker = data[offset + 1]
        if marker == 0xFF:  # fill bytes may precede any marker
            offset += 1
            continue
        end = offset + 2 + struct.unpack_from(">H", data, offset + 2)[0]
        yield marker, offset + 4, end
        if marker == SCAN:
            return
        offset = end
    raise IndexError(offset)
