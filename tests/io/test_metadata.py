"""Files without their metadata: the same compressed pixels, and no text that anybody wrote into them."""

import io
import struct
import zlib
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from cxrscale.io import load_image, strip_metadata, without_quotes
from cxrscale.types import UnreadableImageError

MARK = b"CANARY"
IMAGE = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 255, (48, 40), dtype=np.uint8), (5, 5), 0)


def png(mode: str = "L", **options: Any) -> bytes:
    """A PNG with the mark in every chunk that can hold text."""
    info = PngImagePlugin.PngInfo()
    info.add_text("PatientName", MARK.decode())
    info.add_text("Compressed", MARK.decode() * 50, zip=True)
    info.add_itxt("International", MARK.decode(), lang=MARK.decode(), tkey=MARK.decode())
    info.add(b"tIME", b"CANARY\0")
    info.add(b"prVt", MARK)
    exif = Image.Exif()
    exif[0x010E] = MARK.decode()
    buffer = io.BytesIO()
    image = Image.fromarray(IMAGE).convert(mode)
    image.save(buffer, "PNG", pnginfo=info, exif=exif, icc_profile=MARK * 20, dpi=(72, 72), **options)
    return buffer.getvalue() + b"after the end: " + MARK


def jpeg(mode: str = "L", orientation: int = 1, **options: Any) -> bytes:
    """A JPEG with the mark in EXIF, a comment, a profile, and segments of other programs, one between two scans."""
    exif = Image.Exif()
    exif[0x010E], exif[0x0112] = MARK.decode(), orientation
    buffer = io.BytesIO()
    image = Image.fromarray(IMAGE).convert(mode)
    image.save(buffer, "JPEG", exif=exif, comment=MARK, icc_profile=MARK * 20, quality=90, **options)
    data = buffer.getvalue()
    thumbnail = b"JFIF\0\1\1\0\0\1\0\1\2\1" + MARK  # 2 x 1 pixels of 3 bytes
    segments = [(0xE0, thumbnail), (0xE0, b"JFXX\0" + MARK), (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + MARK)]
    segments += [(0xED, b"Photoshop 3.0\0" + MARK), (0xEE, b"Adobe\0d\0\0\0\0\0\1"[:12] + MARK)][: 1 + (mode == "RGB")]
    extra = b"".join(b"\xff" + bytes([kind]) + struct.pack(">H", len(body) + 2) + body for kind, body in segments)
    first = 4 + int.from_bytes(data[4:6], "big")  # after Pillow's own JFIF segment
    data = data[:2] + extra[: len(thumbnail) + 4] + data[first:2] + extra[len(thumbnail) + 4 :] + data[first:]
    last_scan = data.rindex(b"\xff\xda")
    comment = b"\xff\xfe" + struct.pack(">H", len(MARK) + 2) + MARK
    return data[:last_scan] + comment + data[last_scan:] + b"after the end: " + MARK


def compressed_pixels(data: bytes) -> bytes:
    """IDAT of a PNG; all scans of a JPEG with their tables."""
    if data.startswith(b"\x89PNG"):
        offset, found = 8, b""
        while offset < data.rindex(b"IEND"):
            length, kind = struct.unpack_from(">I4s", data, offset)
            found += data[offset + 8 : offset + 8 + length] if kind == b"IDAT" else b""
            offset += 12 + length
        return found
    return data[data.index(b"\xff\xda") : data.rindex(b"\xff\xd9")]


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "LA", "I;16"])
def test_a_png_loses_its_texts_and_keeps_its_pixels(mode: str) -> None:
    data = png(mode) if mode != "I;16" else png16()
    bare = strip_metadata(data)
    assert MARK in data
    assert MARK not in bare
    assert zlib.compress(MARK * 50) not in bare
    assert compressed_pixels(bare) == compressed_pixels(data)
    with Image.open(io.BytesIO(bare)) as image, Image.open(io.BytesIO(data)) as original:
        assert np.array_equal(np.asarray(image.convert("RGBA")), np.asarray(original.convert("RGBA")))
        assert {key for key in image.info if key != "transparency"} == set()
    assert np.array_equal(load_image(bare).image_HW, load_image(data).image_HW)
    assert strip_metadata(bare) == bare


def png16() -> bytes:
    """16 bits, of which 12 are significant."""
    done, encoded = cv2.imencode(".png", IMAGE.astype(np.uint16) << 4)
    assert done
    data = bytes(encoded)
    chunks = [(b"sBIT", b"\x0c"), (b"tEXt", b"PatientName\0" + MARK)]
    extra = b"".join(struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks)
    return data[:33] + extra + data[33:]


def test_significant_bits_stay() -> None:
    assert b"sBIT\x0c" in strip_metadata(png16())


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}], ids=str)
def test_a_jpeg_loses_its_texts_and_keeps_its_pixels(mode: str, options: dict[str, Any]) -> None:
    data = jpeg(mode, **options)
    bare = strip_metadata(data)
    assert data.count(MARK) > 20
    assert MARK not in bare
    if not options.get("progressive"):
        assert compressed_pixels(bare) == compressed_pixels(data)
    with Image.open(io.BytesIO(bare)) as image, Image.open(io.BytesIO(data)) as original:
        assert np.array_equal(np.asarray(image), np.asarray(original))
        assert "exif" not in image.info
        assert "comment" not in image.info
    assert np.array_equal(load_image(bare).image_HW, load_image(data).image_HW)
    assert strip_metadata(bare) == bare


def test_an_orientation_is_lost_so_that_the_caller_sees_other_pixels() -> None:
    data = jpeg(orientation=6)
    assert load_image(data).image_HW.shape == (40, 48)
    assert load_image(strip_metadata(data)).image_HW.shape == (48, 40)


@given(st.binary(max_size=300), st.integers(0, 10_000), st.sampled_from([png(), jpeg(), jpeg("RGB")]))
def test_a_damaged_file_is_refused_or_stripped_and_nothing_else_happens(junk: bytes, at: int, data: bytes) -> None:
    at %= len(data)
    for damaged in (data[:at], data[:at] + junk + data[at + len(junk) :], data[:3] + junk, junk):
        try:
            bare = strip_metadata(damaged)
        except UnreadableImageError:
            continue
        assert len(bare) <= len(damaged)


@pytest.mark.parametrize(
    ("reason", "stored"),
    [
        ("PatientID is 'Doe^John', not a number", "PatientID is '...', not a number"),
        ('x is b"O\'Neil": refused', "x is '...': refused"),
        ("PhotometricInterpretation (0028,0004) is 'RGB', not MONOCHROME1", None),
        ("TransferSyntaxUID (0002,0010) is 'JPEG 2000 Image Compression': convert the file", None),
        ("JPEG's EXIF metadata is damaged (ValueError): remove the file's metadata", None),
        ("PNG is damaged: the CRC of the chunk 'IDAT' at byte 33 is wrong", None),
        ("the CRC of the chunk 'Jane' is wrong", "the CRC of the chunk '...' is wrong"),
    ],
)
def test_a_stored_reason_quotes_terms_of_the_standards_only(reason: str, stored: str | None) -> None:
    assert without_quotes(reason) == (stored or reason)
