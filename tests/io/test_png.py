"""PNG of more than 8 bits and of any orientation; EXIF wherever it stands."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from cxrscale.config import Pack
from cxrscale.io import load_image
from cxrscale.io.png import SIGNATURE, chunk
from cxrscale.shards.encode import encode_sample
from cxrscale.types import GrayImage, ImageRecord, UnreadableImageError
from tests.dicom_files import Stored, dicom_file, gray_image


def png_file(stored: Stored, **chunks: bytes) -> bytes:
    """Gray of 8 or 16 bits, from scratch; `chunks` come before the pixels."""
    height, width = stored.shape
    rows = np.zeros((height, 1 + width * stored.itemsize), dtype=np.uint8)
    rows[:, 1:] = stored.astype(stored.dtype.newbyteorder(">")).view(np.uint8).reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8 * stored.itemsize, 0, 0, 0, 0)
    named = [(name.encode(), body) for name, body in chunks.items()]
    parts = [(b"IHDR", header), *named, (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b"")]
    return SIGNATURE + b"".join(chunk(kind, body) for kind, body in parts)


def gray_of(data: bytes) -> GrayImage:
    return load_image(data).image_HW


def test_full_16_bits_are_divided_by_257() -> None:
    stored = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    gray = gray_of(png_file(stored))
    assert np.array_equal(gray, np.rint(stored / 257))
    data = cv2.imencode(".png", np.stack([stored] * 3 + [np.full_like(stored, 65535)], axis=-1))[1].tobytes()
    assert np.array_equal(gray_of(data), gray)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 15, 16])
def test_fewer_bits_declared_as_16_are_scaled_as_in_dicom(bits: int) -> None:
    stored = gray_image(dtype="u2", bits=bits)
    assert stored.max() == (1 << bits) - 1
    gray = gray_of(png_file(stored))
    assert np.array_equal(gray, np.rint(stored * (255 / ((1 << bits) - 1))))
    assert np.array_equal(gray, gray_of(dicom_file(stored)))


@pytest.mark.parametrize("bits", [10, 12, 14])
@pytest.mark.parametrize("top", [1, 0.6])
def test_the_chunk_sbit_says_how_many_bits_count(bits: int, top: float) -> None:
    """Also where no value needs all of them; shifted up with zeros or repeated bits, as the standard asks, or not."""
    stored = (gray_image(dtype="u2", bits=bits) * top).astype(np.uint16)
    expected = np.rint(stored * (255 / ((1 << bits) - 1)))
    shifted = stored << 16 - bits
    repeated = shifted | stored >> 2 * bits - 16
    for values in (stored, shifted, repeated):
        assert np.array_equal(gray_of(png_file(values, sBIT=bytes([bits]))), expected)


def test_a_dark_image_that_was_shifted_up_stays_dark() -> None:
    stored = (gray_image(dtype="u2", bits=12) >> 5) << 4  # 7 of 12 bits
    gray = gray_of(png_file(stored, sBIT=b"\x0c"))
    assert np.array_equal(gray, np.rint((stored >> 4) * (255 / 4095)))
    assert gray.max() <= 8


def test_sbit_of_color_files_and_odd_values() -> None:
    stored = gray_image(dtype="u2", bits=12)
    plain = gray_of(png_file(stored))
    color = cv2.imencode(".png", np.dstack([stored] * 3 + [np.full_like(stored, 65535)]))[1].tobytes()
    assert np.array_equal(gray_of(color), plain)
    after = len(SIGNATURE) + 25  # behind IHDR
    with_bits = color[:after] + chunk(b"sBIT", bytes([12, 12, 12, 16])) + color[after:]
    assert np.array_equal(gray_of(with_bits), plain)
    for body in (b"", b"\0", b"\x10", b"\x11", b"\xff"):  # says nothing, or nothing that can be
        assert np.array_equal(gray_of(png_file(stored, sBIT=body)), plain)
    assert not gray_of(png_file(np.zeros((4, 4), np.uint16))).any()
    gray = gray_image()
    assert np.array_equal(gray_of(png_file(gray, sBIT=b"\x07")), gray)  # 8 bits stay


def exif_of(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes().removeprefix(b"Exif\0\0")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_of_a_png_is_applied(orientation: int) -> None:
    data = png_file(gray_image(41, 33), eXIf=exif_of(orientation))
    loaded = load_image(data)
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image)
        assert upright is not None
        assert np.array_equal(loaded.image_HW, np.asarray(upright))
    assert (loaded.png == data) is (orientation == 1)


def test_damaged_exif_of_a_png_is_refused() -> None:
    with pytest.raises(UnreadableImageError, match="PNG's EXIF metadata is damaged"):
        load_image(png_file(gray_image(), eXIf=b"II*\0\x08\0\0\0\xff\xff"))


def test_exif_behind_65536_bytes_of_other_segments_is_applied() -> None:
    file = io.BytesIO()
    Image.fromarray(gray_image(41, 33)).save(file, "JPEG", quality=95, exif=b"Exif\0\0" + exif_of(6))
    data = file.getvalue()
    profile = b"\xff\xe2" + struct.pack(">H", 65535) + bytes(65533)
    start = data.index(b"\xff\xe1")
    late = data[:start] + profile * 3 + data[start:]
    assert late.index(b"Exif\0\0") > 3 * 65535
    assert gray_of(late).shape == (33, 41)
    assert np.array_equal(gray_of(late), gray_of(data))


def test_exif_inside_of_another_segment_is_not_that_of_the_image() -> None:
    file = io.BytesIO()
    Image.fromarray(gray_image(41, 33)).save(file, "JPEG", comment=b"Exif\0\0" + exif_of(6))
    assert gray_of(file.getvalue()).shape == (41, 33)


def test_a_jpeg_of_thousands_of_scans_is_refused() -> None:
    file = io.BytesIO()
    Image.fromarray(gray_image(41, 33)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    scan = data.index(b"\xff\xda")
    rest = data[scan : data.index(b"\xff\xc4", scan)]
    with pytest.raises(UnreadableImageError, match="scans: over 500"):
        load_image(data[:scan] + rest * 600 + data[scan:])


@pytest.mark.parametrize(
    ("chunks", "dtype", "kept"),
    [({}, "u1", True), ({"eXIf": exif_of(6)}, "u1", False), ({}, "u2", False), ({"sBIT": b"\x0c"}, "u2", False)],
)
def test_a_png_is_stored_as_it_is_only_if_every_decoder_shows_the_image(
    chunks: dict[str, bytes], dtype: str, kept: bool, tmp_path: Any
) -> None:
    """`pack.codec=source`: whoever reads the shard knows neither EXIF nor sBIT."""
    data = png_file(gray_image(41, 33, dtype=dtype, bits=8 if dtype == "u1" else 12), **chunks)
    path = tmp_path / "a.png"
    path.write_bytes(data)
    record = ImageRecord("a", "nih", str(path), "patient")
    sample = encode_sample(record, "train", Pack(codec="source"), ())
    stored = sample.members["png"]
    shown = cv2.imdecode(np.frombuffer(stored, np.uint8), cv2.IMREAD_UNCHANGED)
    assert shown is not None
    assert np.array_equal(shown, gray_of(data))
    assert (stored == data) is kept
