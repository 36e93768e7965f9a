"""Images before their window: with that window they are the gray images that models see. Milliseconds."""

from __future__ import annotations

import struct
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from cxrscale.io import StoredImage, load_image, load_stored, png
from tests.dicom_files import dicom_file, gray_image, lut_item

BITS = [("u2", 10), ("u2", 12), ("u2", 16), ("i2", 12), ("i2", 16)]


def windowed(image: StoredImage) -> npt.NDArray[np.uint8]:
    """The gray image by the file's own window, as a viewer computes it."""
    value_HW = image.slope * image.level_HW.astype(np.float64) + image.intercept
    center, width = image.center, image.width
    if image.function == "SIGMOID":
        unit_HW = 1 / (1 + np.exp(-4 * (value_HW - center) / width))
    else:
        if image.function == "LINEAR":
            center, width = center - 0.5, width - 1
        unit_HW = np.clip((value_HW - center) / width + 0.5, 0, 1)
    return np.rint(255 * (1 - unit_HW if image.inverted else unit_HW)).astype(np.uint8)


def check(data: bytes) -> StoredImage:
    """What there is before the window, once its gray values are those of the gray image, but for rounding."""
    stored = load_stored(data, name="a.dcm")
    assert stored is not None
    assert stored.level_HW.dtype == np.uint16
    gray_HW = load_image(data, name="a.dcm").image_HW
    assert np.abs(windowed(stored).astype(int) - gray_HW).max() <= 1
    assert (windowed(stored) == gray_HW).mean() > 0.999
    return stored


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("window", [{}, {"WindowCenter": 300, "WindowWidth": 500}])
@pytest.mark.parametrize("rescale", [{}, {"RescaleSlope": -2.5, "RescaleIntercept": 100}])
@pytest.mark.parametrize(("dtype", "bits"), BITS)
def test_a_dicom_file_with_its_own_window_is_its_gray_image(
    dtype: str, bits: int, rescale: dict[str, Any], window: dict[str, Any], photometric: str
) -> None:
    values = gray_image(dtype=dtype, bits=bits)
    stored = check(dicom_file(values, BitsStored=bits, PhotometricInterpretation=photometric, **rescale, **window))
    slope, intercept = rescale.get("RescaleSlope", 1), rescale.get("RescaleIntercept", 0)
    assert np.allclose(stored.slope * stored.level_HW.astype(float) + stored.intercept, slope * values + intercept)
    assert stored.inverted == (photometric == "MONOCHROME1")
    if window:
        assert (stored.center, stored.width, stored.function) == (300, 500, "LINEAR")


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_the_function_of_a_window_is_kept(function: str) -> None:
    values = gray_image(dtype="u2", bits=12)
    tags: dict[str, Any] = {"WindowCenter": 2000, "WindowWidth": 1500, "VOILUTFunction": function}
    assert check(dicom_file(values, BitsStored=12, **tags)).function == function


@pytest.mark.parametrize("keyword", ["ModalityLUTSequence", "VOILUTSequence"])
def test_a_table_is_applied(keyword: str) -> None:
    values = gray_image(dtype="u2", bits=12)
    entries = (np.sqrt(np.arange(4096) / 4095) * 1023).astype(np.uint16)
    table: dict[str, Any] = {keyword: [lut_item(entries, bits=10)]}
    stored = check(dicom_file(values, BitsStored=12, **table))
    assert np.array_equal(stored.level_HW, entries[values])


def png_of(levels_HW: npt.NDArray[Any], *more: bytes) -> bytes:
    """A 16-bit PNG with more chunks after its header."""
    data = bytes(cv2.imencode(".png", levels_HW)[1])
    return data[:33] + b"".join(more) + data[33:]


def test_a_16_bit_png_has_the_bits_that_it_uses() -> None:
    levels_HW = gray_image(dtype="u2", bits=12)
    stored = check(png_of(levels_HW))
    assert np.array_equal(stored.level_HW, levels_HW)
    assert (stored.center, stored.width) == (4095 / 2, 4095)
    scaled = check(png_of(levels_HW << 4, png.chunk(b"sBIT", bytes([12]))))
    assert np.array_equal(scaled.level_HW, levels_HW)


def test_a_png_is_upright() -> None:
    exif = b"MM\0*\0\0\0\x08" + struct.pack(">HHHIHHI", 1, 0x0112, 3, 1, 6, 0, 0)
    levels_HW = gray_image(dtype="u2", bits=12)
    assert np.array_equal(check(png_of(levels_HW, png.chunk(b"eXIf", exif))).level_HW, np.rot90(levels_HW, -1))


def test_what_has_8_bits_or_is_no_image_has_none() -> None:
    assert load_stored(dicom_file(gray_image())) is None
    assert load_stored(dicom_file(gray_image().astype(np.uint16), BitsStored=8)) is None
    assert load_stored(bytes(cv2.imencode(".png", gray_image())[1])) is None
    assert load_stored(bytes(cv2.imencode(".jpg", gray_image())[1])) is None
    assert load_stored(b"text") is None
