"""What image files say besides their pixels: removed from what is stored, and never repeated in a stored reason.

PNG text, EXIF, XMP, comments and color profiles can hold a patient's name. Only what a decoder needs stays, and the
compressed pixel data is copied as it is, so that the pixels are the same bit for bit.
"""

from __future__ import annotations

import re
from functools import cache

from pydicom.uid import UID_dictionary

from cxrscale.io import png
from cxrscale.types import UnreadableImageError

_PNG_KEPT = frozenset({b"IHDR", b"PLTE", b"tRNS", b"sBIT", b"IDAT", b"IEND"})
"""sBIT says which bits of a sample are significant; the other ancillary chunks change no pixel."""
_END_OF_IMAGE, _START_OF_SCAN, _COMMENT, _APP0, _APP14, _APP15 = 0xD9, 0xDA, 0xFE, 0xE0, 0xEE, 0xEF
_WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xD8)})
"""TEM and the restart markers (ITU T.81, table B.1)."""
_MARKER_IN_SCAN = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])", re.DOTALL)
"""What ends entropy-coded data: a marker that is neither a stuffed zero nor a restart marker."""

_QUOTED = re.compile(r"""(?<!\w)b?(?:'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")(?!\w)""")
"""A quoted text; the apostrophe of `file's` does not begin one."""
_KNOWN_TERMS = frozenset(
    {
        *("MONOCHROME1", "MONOCHROME2", "RGB", "ARGB", "CMYK", "HSV", "PALETTE COLOR", "DICM", "YES", "NO"),
        *("YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_422", "YBR_PARTIAL_420", "YBR_ICT", "YBR_RCT"),
        *("IHDR", "PLTE", "IDAT", "IEND", "tRNS", "sBIT", "tEXt", "zTXt", "iTXt", "eXIf", "tIME", "iCCP", "pHYs"),
        *("gAMA", "cHRM", "sRGB", "bKGD", "hIST", "acTL"),
    }
)


def strip_metadata(data: bytes) -> bytes:
    """A PNG or JPEG file without everything that its pixels do not need.

    Args:
        data: a complete and undamaged PNG or JPEG file.

    Returns:
        The file with the same compressed pixel data. PNG keeps IHDR, PLTE, tRNS, sBIT, IDAT and IEND. JPEG loses
        comments and application segments; JFIF's header stays without its thumbnail and so does Adobe's, which says
        how colors are coded. What follows the end of the image is dropped. An orientation is lost: the caller has to
        compare pixels.

    Raises:
        UnreadableImageError: another format, or the structure of the file is damaged.
    """
    if data.startswith(png.SIGNATURE):
        return _strip_png(data)
    if data.startswith(b"\xff\xd8\xff"):
        return _strip_jpeg(data)
    raise UnreadableImageError("neither PNG nor JPEG: its metadata cannot be removed")


def without_quotes(reason: str) -> str:
    """A reason without the texts that it quotes from a file; the terms of the standards stay.

    A header's text can be anything, a name included; a reason is stored beside the dataset.
    """

    def shown(match: re.Match[str]) -> str:
        text = match[0].removeprefix("b")[1:-1]
        return match[0] if text in _KNOWN_TERMS or text in _uid_names() else "'...'"

    return _QUOTED.sub(shown, reason)


@cache
def _uid_names() -> frozenset[str]:
    return frozenset(entry[0][:64] for entry in UID_dictionary.values())


def _strip_png(data: bytes) -> bytes:
    return b"".join([png.SIGNATURE, *(chunk for kind, _, chunk in png.chunks(data) if kind in _PNG_KEPT)])


def _strip_jpeg(data: bytes) -> bytes:
    kept, offset = [data[:2]], 2
    while offset + 2 <= len(data) and data[offset] == 0xFF:
        marker = data[offset + 1]
        if marker == 0xFF:  # fill bytes before a marker
            offset += 1
            continue
        if marker == _END_OF_IMAGE:
            return b"".join([*kept, b"\xff\xd9"])
        if marker in _WITHOUT_LENGTH:
            kept.append(data[offset : offset + 2])
            offset += 2
            continue
        end = offset + 2 + int.from_bytes(data[offset + 2 : offset + 4], "big")
        if end <= offset + 3 or end > len(data):
            break
        kept.append(_jpeg_segment(marker, data[offset:end]))
        offset = end
        if marker == _START_OF_SCAN:
            match = _MARKER_IN_SCAN.search(data, offset)
            if match is None:
                break
            kept.append(data[offset : match.start()])
            offset = match.start()
    raise UnreadableImageError("JPEG is damaged: its metadata cannot be removed")


def _jpeg_segment(marker: int, segment: bytes) -> bytes:
    """What stays of a segment, its marker and length included."""
    if marker == _APP0 and segment[4:9] == b"JFIF\0" and len(segment) >= 18:
        return b"\xff\xe0\x00\x10" + segment[4:16] + b"\0\0"  # without the thumbnail
    if marker == _APP14 and segment[4:9] == b"Adobe" and len(segment) >= 16:
        return b"\xff\xee\x00\x0e" + segment[4:16]
    return b"" if marker == _COMMENT or _APP0 <= marker <= _APP15 else segment
