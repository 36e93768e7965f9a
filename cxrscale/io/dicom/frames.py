"""The header of an encoded frame: its size and depth, what decoding it costs, and what is wrong with it.

It is held against the file's header before a decoder allocates anything.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from cxrscale.io import jpeg_segments
from cxrscale.io.dicom import tags

JPEG_LS = 0xF7
LOSSLESS_JPEG = 0xC3

# What OpenJPEG 2.5 keeps besides the values, measured on images of many small parts, which its structures outweigh.
_TILE_BYTES, _PRECINCT_BYTES, _BLOCK_BYTES = 10_500, 2_300, 400


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """The header of an encoded frame."""

    bits: int
    rows: int
    columns: int
    components: int
    marker: int
    """The second byte of the marker of a JPEG or JPEG-LS frame; 0 for JPEG 2000."""
    signed: bool = False
    """Whether a JPEG 2000 decoder gives signed values."""
    bits_offset: int = 0
    """The offset of the byte that holds `bits`."""
    selection_offset: int | None = None
    """The offset of a JPEG scan's spectral selection, where it is a wrong one: see `jpeg_header`."""
    more_bytes: int = 0
    """What decoding needs besides a few bytes per pixel."""


def frame_header(frame: bytes, syntax: Any) -> FrameHeader:
    """The header of a JPEG, JPEG-LS or JPEG 2000 frame.

    Raises:
        UnreadableImageError: it is truncated or damaged.
    """
    try:
        return jpeg2000_header(frame) if syntax in tags.JPEG_2000 else jpeg_header(frame)
    except (struct.error, IndexError):
        raise tags.unreadable("PixelData", f"holds a {syntax.name} frame that is truncated or damaged") from None


def jpeg_header(frame: bytes) -> FrameHeader:
    """The frame header of JPEG and JPEG-LS (ITU-T T.81 B.2.2, T.87 C.2.2).

    A sequential scan has the spectral selection 0 to 63 (T.81 B.2.3). Some writers put others there, which decoders
    that do not check them ignore: a sequential scan always holds all coefficients.

    Raises:
        IndexError, struct.error: the stream is truncated, or has no frame before its first scan.
    """
    found: FrameHeader | None = None
    for marker, start, end in jpeg_segments.segments(frame):
        if marker in jpeg_segments.FRAMES:
            bits, rows, columns, components = struct.unpack_from(">BHHB", frame, start)
            found = found or FrameHeader(bits, rows, columns, components, marker, bits_offset=start)
        elif marker == jpeg_segments.SCAN and found and found.marker in (0xC0, 0xC1):
            is_right = frame[end - 3 : end] == b"\x00\x3f\x00"
            return found if is_right else replace(found, selection_offset=end - 3)
    if found is None:
        raise IndexError(len(frame))
    return found


def jpeg2000_header(frame: bytes) -> FrameHeader:
    """The SIZ segment of a complete JPEG 2000 codestream (ITU-T T.800 A.5.1).

    Every tile-part declares its length (A.4.2); a shorter one decodes without an error, to an image that is partly
    smooth. So all lengths are checked.

    Raises:
        IndexError, struct.error: the stream is truncated.
    """
    right, bottom, left, top, tile_width, tile_height = struct.unpack_from(">6I", frame, 8)
    components, bits = struct.unpack_from(">HB", frame, 40)
    rows, columns = bottom - top, right - left
    blocks, precincts = 0.0, 0.0
    for marker, start in _jpeg2000_segments(frame):
        if marker in (0x52, 0x53):  # COD and COC; the latter starts with a component of one byte or two
            style = start if marker == 0x52 else start + (1 if components < 257 else 2)
            area, precinct = _areas(frame, style, style + (5 if marker == 0x52 else 1))
            blocks, precincts = max(blocks, rows * columns / area), max(precincts, rows * columns / precinct)
    tiles = ceil(rows / max(1, tile_height)) * ceil(columns / max(1, tile_width)) if rows > 0 < columns else 0
    more = tiles * _TILE_BYTES + int(precincts * _PRECINCT_BYTES + blocks * _BLOCK_BYTES)
    return FrameHeader((bits & 0x7F) + 1, rows, columns, components, 0, bool(bits & 0x80), more_bytes=more)


def _jpeg2000_segments(frame: bytes) -> Iterator[tuple[int, int]]:
    """(second byte of the marker, start of its parameters) of the main header and those of the tile-parts."""
    offset, part_end = 2, 0
    while (marker := frame[offset : offset + 2]) != b"\xff\xd9":
        if marker[0] != 0xFF:
            raise IndexError(offset)
        if marker[1] == 0x93:  # the data of the tile-part
            if part_end <= offset:
                raise IndexError(offset)
            offset, part_end = part_end, 0
            continue
        length = 2 + struct.unpack_from(">H", frame, offset + 2)[0]
        if length < 4:
            raise IndexError(offset)
        yield marker[1], offset + 4
        if marker[1] == 0x90:  # a tile-part; length 0 means until the end marker
            part_end = offset + (struct.unpack_from(">I", frame, offset + 6)[0] or len(frame) - 2 - offset)
        offset += length


def _areas(frame: bytes, style: int, levels: int) -> tuple[int, int]:
    """Pixels per code-block and per precinct of a coding style (T.800 A.6.1), whose offsets these are."""
    sizes = frame[levels + 5 : levels + 6 + frame[levels]] if frame[style] & 1 else b""
    precinct = min(((size & 15) + (size >> 4) for size in sizes), default=30)
    block = (frame[levels + 1] & 15) + (frame[levels + 2] & 15) + 4
    return 1 << min(block, precinct), 1 << precinct
