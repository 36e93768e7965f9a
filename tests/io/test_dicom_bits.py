"""The bits that belong to a value, and those that do not, in every transfer syntax; padding of the image."""

from __future__ import annotations

from typing import Any

import imagecodecs
import numpy as np
import pytest
from pydicom import uid

from cxrscale.io import dicom
from cxrscale.types import UnreadableImageError
from tests.dicom_files import Stored, dicom_file, encoded, gray_image, jpeg_lossless

NATIVE = (uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.DeflatedExplicitVRLittleEndian)
LOSSLESS = (uid.RLELossless, uid.JPEGLossless, uid.JPEGLosslessSV1, uid.JPEGLSLossless, uid.JPEG2000Lossless)
HIGH_THROUGHPUT = (uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL)


def gray_of(data: bytes) -> Stored:
    return dicom.read_dicom(data).image_HW


def file_of_16_bits(code: Stored, syntax: Any, **tags: Any) -> bytes:
    """A file whose frame has 16 bits per value, whatever BitsStored says."""
    if not syntax.is_encapsulated:
        return dicom_file(code, syntax=syntax, **tags)
    return dicom_file(code, syntax=syntax, frames=[encoded(code, syntax, bits=16)], **tags)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [8, 10, 12, 15])
@pytest.mark.parametrize(
    "syntax", [*NATIVE, uid.ExplicitVRBigEndian, *LOSSLESS, *HIGH_THROUGHPUT], ids=lambda syntax: syntax.name[:40]
)
def test_bits_above_the_stored_ones_are_ignored(syntax: Any, bits: int, signed: bool) -> None:
    """Overlays or garbage."""
    stored = gray_image(dtype="i2" if signed else "u2", bits=bits)
    garbage = np.random.default_rng(0).integers(0, 1 << 16 - bits, stored.shape) << bits
    code = (stored.astype(np.int64) & ((1 << bits) - 1) | garbage).astype(np.uint16).view(stored.dtype)
    assert not np.array_equal(code, stored)
    expected = gray_of(dicom_file(stored, BitsStored=bits))
    assert np.array_equal(gray_of(file_of_16_bits(code, syntax, BitsStored=bits)), expected)


def jpeg_12_bit(stored: Stored) -> bytes:
    """JPEG Extended of 12 bits, at a quality that overshoots sharp edges."""
    return bytes(imagecodecs.jpeg8_encode(stored, level=60, bitspersample=12))


def lossy_frame(stored: Stored, syntax: Any) -> bytes:
    if syntax == uid.JPEGExtended12Bit:
        return jpeg_12_bit(stored)
    if syntax == uid.JPEGLSNearLossless:
        return bytes(imagecodecs.jpegls_encode(stored, level=9))
    if syntax == uid.HTJ2K:
        return bytes(imagecodecs.htj2k_encode(stored, level=0.001, reversible=False))
    return bytes(imagecodecs.jpeg2k_encode(stored, level=45, codecformat="j2k", bitspersample=12, reversible=False))


@pytest.mark.parametrize(
    "syntax",
    [uid.JPEGExtended12Bit, uid.JPEGLSNearLossless, uid.JPEG2000, uid.HTJ2K],
    ids=lambda syntax: syntax.name[:40],
)
def test_what_a_lossy_frame_overshoots_is_clipped(syntax: Any) -> None:
    """Wrapped, the brightest pixels would be black."""
    noise = 900 + np.random.default_rng(0).integers(0, 124, (64, 64))
    stored = np.where(np.arange(64)[:, None] // 16 % 2, 1023, noise).astype(np.uint16)
    frame = lossy_frame(stored, syntax)
    decoders = {uid.JPEGExtended12Bit: imagecodecs.jpeg8_decode, uid.JPEGLSNearLossless: imagecodecs.jpegls_decode}
    decoded = decoders.get(syntax, imagecodecs.jpeg2k_decode)(frame)
    assert decoded.max() > 1023  # or this test shows nothing
    gray = gray_of(dicom_file(stored, syntax=syntax, frames=[frame], BitsStored=10))
    assert np.array_equal(gray, np.rint(np.minimum(decoded, 1023) * (255 / 1023)))
    assert gray[decoded > 1023].size > 50


def test_a_lossy_frame_far_above_the_stored_bits_contradicts_its_header() -> None:
    stored = gray_image(64, 64, dtype="u2", bits=12)
    for syntax in (uid.JPEGExtended12Bit, uid.JPEG2000):
        data = dicom_file(stored, syntax=syntax, frames=[lossy_frame(stored, syntax)], BitsStored=8)
        with pytest.raises(UnreadableImageError, match=r"BitsStored .* is 8, but \d+\.\d% of the values need more"):
            dicom.read_dicom(data)


@pytest.mark.parametrize("extended", [False, True])
def test_signed_lossy_values_are_clipped_where_their_sign_is(extended: bool) -> None:
    """Stored as 10-bit patterns, or as patterns of all 12 bits of the frame."""
    stored = np.full((64, 64), -500 if extended else -30, dtype=np.int16)
    stored[20:40, 20:40] = -512 if extended else -1
    code = (stored & (0xFFF if extended else 0x3FF)).astype(np.uint16)
    frame = jpeg_12_bit(code)
    data = dicom_file(stored, syntax=uid.JPEGExtended12Bit, frames=[frame], BitsStored=10)
    expected = gray_of(dicom_file(stored, BitsStored=10))
    assert np.abs(gray_of(data).astype(int) - expected).max() <= 3


def test_the_sign_of_the_file_counts_not_that_of_jpeg_2000() -> None:
    stored = gray_image(dtype="i2", bits=12)
    pattern = (stored & 0xFFF).astype(np.uint16)
    for codes in (stored, pattern):
        frame = encoded(codes, uid.JPEG2000Lossless, bits=12)
        for dtype, values in (("i2", stored), ("u2", pattern)):
            data = dicom_file(values.astype(dtype), syntax=uid.JPEG2000Lossless, frames=[frame], BitsStored=12)
            assert np.array_equal(gray_of(data), gray_of(dicom_file(values.astype(dtype), BitsStored=12)))


def test_a_lossless_jpeg_of_16_bits_may_store_8() -> None:
    stored = gray_image(dtype="u2", bits=8)
    for syntax in (uid.JPEGLosslessSV1, uid.JPEGLSLossless):
        frame = jpeg_lossless(stored, 16) if syntax == uid.JPEGLosslessSV1 else encoded(stored, syntax)
        data = dicom_file(stored, syntax=syntax, frames=[frame], BitsStored=8)
        assert np.array_equal(gray_of(data), stored)


@pytest.mark.parametrize(("value", "limit"), [(60000, 65535), (65535, 60000), (60000, None)])
def test_a_range_of_padding_is_ignored(value: int, limit: int | None) -> None:
    """PixelPaddingRangeLimit is on either side of PixelPaddingValue; only declared 16 bits look at the values."""
    stored = gray_image(dtype="u2", bits=12)
    stored[:2], stored[2:4] = 60000, 63000 if limit else 60000
    gray = gray_of(dicom_file(stored, PixelPaddingValue=value, PixelPaddingRangeLimit=limit))
    assert np.array_equal(gray[4:], np.rint(stored[4:] * (255 / 4095)))
    without = gray_of(dicom_file(stored, PixelPaddingValue=value if limit else None))
    assert not np.array_equal(without[4:], gray[4:])


def test_padding_below_zero() -> None:
    stored = gray_image(dtype="i2", bits=12)
    stored[:2], stored[2:4] = -32768, -20000
    gray = gray_of(dicom_file(stored, PixelPaddingValue=-32768, PixelPaddingRangeLimit=-15000))
    assert np.array_equal(gray[4:], np.rint((stored[4:].astype(int) + 2048) * (255 / 4095)))
