"""Reading image files of every format, intact, damaged and mislabeled; encoding and resizing images and masks."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image, ImageOps

from cxrscale.io.images import (
    decode_mask,
    encode_jpeg,
    encode_mask,
    encode_png,
    load_image,
    resize_image,
    resize_mask,
    shrink_mask,
)
from cxrscale.types import GrayImage, UnreadableImageError
from tests.dicom_files import dicom_file, encoded, gray_image

NIH = Path(__file__).resolve().parents[3] / "shared" / "data" / "nih" / "images"
KERMANY = Path(__file__).resolve().parents[3] / "shared" / "data" / "kermany" / "test"


def saved(array: np.ndarray[Any, Any], kind: str, **options: Any) -> bytes:
    """A file written by Pillow, which the code under test does not use for encoding."""
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, rows: bytes, bits: int = 8, color: int = 0, **chunks: bytes) -> bytes:
    """A PNG of unfiltered rows, chunk by chunk; `chunks` come before the pixels."""
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    parts = [(b"IHDR", header), *((name.encode(), body) for name, body in chunks.items())]
    parts += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in parts:
        data += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return data


def gray_of(data: bytes, name: str = "") -> GrayImage:
    image_HW = load_image(data, name=name).image_HW
    assert image_HW.dtype == np.uint8
    assert image_HW.flags.c_contiguous
    return image_HW


def refusal(data: bytes, name: str = "") -> str:
    with pytest.raises(UnreadableImageError) as caught:
        load_image(data, name=name)
    reason = str(caught.value)
    assert reason.isprintable()
    assert 10 < len(reason) < 400
    return reason


# PNG


def test_gray_png() -> None:
    stored = gray_image(41, 33)
    assert np.array_equal(gray_of(saved(stored, "PNG")), stored)
    assert load_image(saved(stored, "PNG")).jpeg is None


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_png_with_fewer_bits_is_scaled_to_255(bits: int) -> None:
    codes = np.arange(1 << bits, dtype=np.uint8).repeat(8 // bits)
    rows = b"\0" + np.packbits(np.unpackbits(codes[:, None], axis=1)[:, 8 - bits :].ravel()).tobytes()
    gray = gray_of(png(len(codes), 1, rows, bits=bits))
    assert np.array_equal(gray[0], codes * (255 // ((1 << bits) - 1)))


def test_color_files_of_gray_images_are_gray() -> None:
    stored = gray_image(41, 33)
    three = np.stack([stored] * 3, axis=-1)
    four = np.dstack([three, np.full_like(stored, 255)])
    palette = Image.fromarray(stored).convert("P")
    file = io.BytesIO()
    palette.save(file, "PNG")
    for data in (saved(three, "PNG"), saved(four, "PNG"), file.getvalue()):
        assert np.array_equal(gray_of(data), stored)
    nearly = three.copy()
    nearly[..., 0] = np.clip(
        nearly[..., 0].astype(int) + np.random.default_rng(0).integers(-8, 9, stored.shape), 0, 255
    )
    assert np.abs(gray_of(saved(nearly, "PNG")).astype(int) - stored).max() <= 3
    marked = np.stack([gray_image(300, 300)] * 3, axis=-1)
    marked[5:13, 5:14] = (255, 0, 0)  # a small colored mark: 0.08% of the pixels
    assert gray_of(saved(marked, "PNG")).shape == (300, 300)


def test_colored_and_transparent_images_are_refused() -> None:
    stored = gray_image(41, 33)
    tinted = np.stack([stored, stored // 2, 255 - stored], axis=-1)
    assert "colored" in refusal(saved(tinted, "PNG"))
    assert "colored" in refusal(saved(tinted, "JPEG", quality=95))
    assert "transparent" in refusal(saved(np.dstack([np.stack([stored] * 3, axis=-1), stored]), "PNG"))
    file = io.BytesIO()
    Image.fromarray(tinted).convert("CMYK").save(file, "JPEG")
    assert "CMYK" in refusal(file.getvalue())


def test_a_png_truncated_anywhere_is_refused() -> None:
    data = saved(gray_image(41, 33), "PNG")
    for length in range(len(data)):
        assert refusal(data[:length])
    assert np.array_equal(gray_of(data + b"trailing bytes"), gray_image(41, 33))


def test_any_flipped_bit_of_a_png_is_refused() -> None:
    data = saved(gray_image(24, 20), "PNG")
    for index in range(8, len(data)):
        damaged = bytearray(data)
        damaged[index] ^= 1 << index % 8
        assert refusal(bytes(damaged))


def test_a_png_that_contradicts_its_header_is_refused() -> None:
    rows = b"".join(b"\0" + bytes([value] * 8) for value in range(8))
    assert gray_of(png(8, 8, rows)).shape == (8, 8)
    assert "cannot be decoded" in refusal(png(8, 9, rows))  # one row is missing
    assert "cannot be decoded" in refusal(png(8, 8, b"\7" + rows[1:]))  # no such filter
    assert "cannot be decoded" in refusal(png(8, 8, rows, bits=3))
    assert "100000 x 100000" in refusal(png(100_000, 100_000, rows))
    assert "animated" in refusal(png(8, 8, rows, acTL=struct.pack(">II", 2, 0)))
    assert "IHDR" in refusal(png(8, 8, rows)[:8] + png(8, 8, rows)[33:])


# JPEG


def test_a_gray_jpeg_is_decoded_exactly_as_by_pillow() -> None:
    data = saved(gray_image(41, 33), "JPEG", quality=90)
    loaded = load_image(data)
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(loaded.image_HW, np.asarray(image))
    assert loaded.jpeg == data


def test_a_color_jpeg_of_a_gray_image_is_gray() -> None:
    stored = gray_image(41, 33)
    for subsampling in (0, 1, 2):
        data = saved(np.stack([stored] * 3, axis=-1), "JPEG", quality=90, subsampling=subsampling)
        loaded = load_image(data)
        assert np.abs(loaded.image_HW.astype(int) - stored).mean() < 5
        assert loaded.jpeg == data  # exactly neutral: every decoder gives the same gray
    progressive = saved(stored, "JPEG", quality=90, progressive=True)
    assert np.array_equal(gray_of(progressive), gray_of(saved(stored, "JPEG", quality=90)))


def test_a_jpeg_truncated_anywhere_is_refused() -> None:
    for options in ({}, {"progressive": True}, {"restart_marker_rows": 1}):
        data = saved(gray_image(64, 48), "JPEG", quality=90, **options)
        for length in range(len(data)):
            assert refusal(data[:length])


def test_a_damaged_jpeg_raises_no_other_error() -> None:
    data = saved(gray_image(64, 48), "JPEG", quality=90)
    random = np.random.default_rng(0)
    for index in random.integers(0, len(data), 300):
        damaged = bytearray(data)
        damaged[index] = random.integers(0, 256)
        try:
            assert load_image(bytes(damaged)).image_HW.ndim == 2
        except UnreadableImageError:
            continue


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(gray_image(41, 33), "JPEG", quality=95, exif=exif.tobytes())
    loaded = load_image(data)
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image)
        assert upright is not None
        assert np.array_equal(loaded.image_HW, np.asarray(upright))
    assert (loaded.jpeg == data) is (orientation == 1)
    assert loaded.image_HW.flags.c_contiguous


def test_damaged_exif_is_ignored_or_refused() -> None:
    exif = Image.Exif()
    exif[0x0112] = 9
    data = saved(gray_image(41, 33), "JPEG", exif=exif.tobytes())
    assert gray_of(data).shape == (41, 33)
    offset = data.index(b"Exif\0\0") + 6
    for damage in (b"\0" * 8, b"MM\0*\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff"):
        damaged = data[:offset] + damage + data[offset + len(damage) :]
        try:
            assert gray_of(damaged).shape == (41, 33)
        except UnreadableImageError:
            assert "EXIF" in refusal(damaged)


# Recognizing the format


def test_dicom_comes_with_its_metadata() -> None:
    stored = gray_image(41, 33)
    frame = encoded(stored, "1.2.840.10008.1.2.4.50")
    tags: dict[str, Any] = {"PatientSex": "F", "PatientAge": "040Y", "ViewPosition": "AP", "PixelSpacing": [0.1, 0.2]}
    data = dicom_file(stored, syntax="1.2.840.10008.1.2.4.50", frames=[frame], **tags)
    loaded = load_image(data, name="x.png")  # the bytes decide, not the name
    assert (loaded.sex, loaded.age, loaded.view, loaded.spacing_mm) == ("F", 40, "AP", (0.1, 0.2))
    assert loaded.jpeg == frame
    assert np.array_equal(loaded.image_HW, load_image(frame).image_HW)


def test_dicom_without_preamble_is_recognized_by_its_name() -> None:
    data = dicom_file(gray_image())[132:]
    assert np.array_equal(gray_of(data, "s3://bucket/A.DCM"), gray_image())
    assert np.array_equal(gray_of(data, "a.dicom"), gray_image())
    assert "neither preamble nor suffix: name it .dcm" in refusal(data, "a.png")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "HTML"),
        (b"\xef\xbb\xbf\r\n <HTML>", "HTML"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"\x1f\x8b\x08\0\0\0\0\0\0", "gzip"),
        (b"PK\x03\x04\x14\0\0\0", "zip"),
        (b"GIF89a\x01\0\x01\0", "GIF"),
        (b"BM\x46\0\0\0\0\0", "BMP"),
        (b"II*\0\x08\0\0\0", "TIFF"),
        (b"MM\0*\0\0\0\x08", "TIFF"),
        (b"RIFF\x24\0\0\0WEBPVP8 ", "WebP"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"%PDF-1.7\n", "PDF"),
        (b"\x01\x02\x03\x04\x05\x06\x07\x08\x09", "0102030405060708"),
        (b"\x89PN", "89504e"),
        (b"\x89PNG\r\n\x1a\n", "truncated"),
        (b"\xff\xd8", "ffd8"),
        (b"\xff\xd8\xff\xe0", "JPEG is truncated or damaged"),
    ],
)
def test_another_format_is_named(data: bytes, reason: str) -> None:
    assert reason in refusal(data)
    assert reason in refusal(data, "a.png")
    refusal(data, "a.dcm")


# Encoding


@pytest.mark.parametrize("shape", [(1, 1), (7, 300), (300, 7), (64, 64)])
def test_an_encoded_png_is_lossless(shape: tuple[int, int]) -> None:
    stored = gray_image(*shape) if shape != (1, 1) else np.array([[7]], dtype=np.uint8)
    data = encode_png(stored)
    assert np.array_equal(gray_of(data), stored)
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "L"
    assert encode_png(np.asfortranarray(stored)) == data


def test_an_encoded_jpeg_is_close_to_the_image() -> None:
    stored = gray_image(120, 100)
    smooth = cv2.GaussianBlur(stored, (0, 0), 2)
    data = encode_jpeg(smooth, 95)
    loaded = load_image(data)
    assert np.abs(loaded.image_HW.astype(int) - smooth).mean() < 1
    assert loaded.jpeg == data
    with Image.open(io.BytesIO(data)) as image:
        assert (image.mode, image.info.get("progressive")) == ("L", None)
    assert encode_jpeg(np.asfortranarray(smooth), 95) == data
    assert len(encode_jpeg(smooth, 50)) < len(data) < len(encode_jpeg(smooth, 100))


def test_the_same_image_makes_the_same_bytes() -> None:
    stored, mask = gray_image(64, 64), gray_image(64, 64) > 128
    for make in (encode_png, encode_jpeg):
        assert len({hashlib.sha256(make(stored.copy())).hexdigest() for _ in range(5)}) == 1
    assert len({hashlib.sha256(encode_mask(mask.copy())).hexdigest() for _ in range(5)}) == 1


@given(arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, max_side=40)))
def test_any_mask_survives_encoding_and_decoding(mask: np.ndarray[Any, np.dtype[np.bool_]]) -> None:
    data = encode_mask(mask)
    assert np.array_equal(decode_mask(data), mask)
    shown = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_GRAYSCALE)
    assert shown is not None
    assert np.array_equal(shown, mask * np.uint8(255))
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "1"
        assert np.array_equal(np.asarray(image), mask)


def test_masks_from_other_programs() -> None:
    mask = gray_image(20, 30) > 100
    for inside in (1, 128, 255):
        assert np.array_equal(decode_mask(saved(mask * np.uint8(inside), "PNG")), mask)
    with pytest.raises(UnreadableImageError, match="more than one value"):
        decode_mask(saved(gray_image(20, 30), "PNG"))
    with pytest.raises(UnreadableImageError, match="not a PNG"):
        decode_mask(saved(mask * np.uint8(255), "JPEG"))
    with pytest.raises(UnreadableImageError, match="truncated"):
        decode_mask(encode_mask(mask)[:-5])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: encode_png(np.zeros((3, 3), dtype=np.float32)), "image is float32"),
        (lambda: encode_jpeg(np.zeros((3, 3, 1), dtype=np.uint8)), "image is uint8 of shape"),
        (lambda: encode_jpeg(gray_image(), 0), "quality is 0"),
        (lambda: encode_mask(np.zeros((3, 3), dtype=np.uint8)), "mask is uint8"),
        (lambda: encode_mask(np.zeros((0, 3), dtype=np.bool_)), "mask is bool of shape"),
        (lambda: resize_image(gray_image(), 0), "size is 0"),
        (lambda: resize_image(np.zeros((3, 3), dtype=np.float32), 4), "image is float32"),
        (lambda: resize_mask(gray_image(), 4), "mask is uint8"),
    ],
)
def test_wrong_arguments_are_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# Resizing


def area_mean(values: np.ndarray[Any, Any], size: int) -> np.ndarray[Any, Any]:
    """The mean over the area of each target pixel, weighted by overlap: slow and exact."""

    def weights(length: int) -> np.ndarray[Any, Any]:
        edge = np.arange(size + 1) * length / size
        source = np.arange(length)
        overlap = np.minimum(edge[1:, None], source + 1) - np.maximum(edge[:-1, None], source)
        return np.asarray(np.clip(overlap, 0, None) * size / length)

    return np.asarray(weights(values.shape[0]) @ values @ weights(values.shape[1]).T)


@pytest.mark.parametrize(("shape", "size"), [((64, 64), 32), ((60, 60), 20), ((100, 100), 37), ((90, 50), 30)])
def test_shrinking_averages_areas(shape: tuple[int, int], size: int) -> None:
    stored = gray_image(*shape)
    assert np.abs(resize_image(stored, size) - area_mean(stored, size)).max() <= 0.51


def test_enlarging_and_changing_the_aspect_ratio() -> None:
    stored = gray_image(16, 16)
    grown = resize_image(stored, 64)
    assert grown.shape == (64, 64)
    assert np.array_equal(grown, cv2.resize(stored, (64, 64), interpolation=cv2.INTER_LINEAR))
    assert resize_image(stored, 16) is stored
    wide = resize_image(gray_image(20, 200), 64)  # one side grows, the other shrinks
    assert wide.shape == (64, 64)
    narrow = area_mean(gray_image(20, 200), 64)  # only the means of columns are compared
    assert np.abs(wide.mean(axis=0) - narrow.mean(axis=0)).max() < 12


@given(arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, min_side=8, max_side=40)), st.integers(1, 8))
@settings(max_examples=60)
def test_a_smaller_mask_has_pixels_covered_by_half(mask: np.ndarray[Any, np.dtype[np.bool_]], size: int) -> None:
    cover = area_mean(mask.astype(float), size)
    sure = np.abs(cover - 0.5) > 1e-4
    resized = resize_mask(mask, size)
    assert resized.dtype == np.bool_
    assert resized.any() == mask.any()
    assert shrink_mask(mask, size)[1] == (mask.any() and bool((cover < 0.5 - 1e-4).all()))
    if not shrink_mask(mask, size)[1]:
        assert np.array_equal(resized[sure], (cover > 0.5)[sure])
        # Of the pixels that are covered by half, as many are inside as the mask's area asks for.
        assert resized.sum() == max((cover > 0.5 + 1e-4).sum(), min(round(cover.sum()), (cover > 0.5 - 1e-4).sum()))


def test_half_covered_pixels_neither_enlarge_nor_shrink_a_mask() -> None:
    mask = np.zeros((8, 8), dtype=np.bool_)
    mask[:, :4] = mask[0, 4] = True
    assert np.array_equal(resize_mask(mask, 1), [[True]])
    checks = np.indices((8, 8)).sum(axis=0) % 2 == 0  # every pixel of 4 x 4 is half covered
    assert resize_mask(checks, 4).sum(axis=1).tolist() == [2, 2, 2, 2]
    assert np.array_equal(resize_mask(np.eye(2, dtype=np.bool_), 4)[[0, 0, 3], [0, 3, 3]], [True, False, True])


def test_the_smallest_mask_keeps_the_pixel_that_it_covers_most() -> None:
    mask = np.zeros((64, 64), dtype=np.bool_)
    mask[20:22, 31] = mask[20, 32] = True
    resized = resize_mask(mask, 8)
    assert shrink_mask(mask, 8)[1]
    assert np.argwhere(resized).tolist() == [[2, 3]]
    assert not shrink_mask(np.zeros((64, 64), dtype=np.bool_), 8)[1]
    assert not shrink_mask(mask, 64)[1]


# Real images


def test_real_pngs() -> None:
    paths = sorted(NIH.glob("*.png"))
    if not paths:
        pytest.skip("the NIH images are missing")
    rgba = 0
    for path in [*paths[::12], NIH / "00001369_000.png", NIH / "00005813_000.png"]:
        data = path.read_bytes()
        with Image.open(path) as image:
            rgba += image.mode == "RGBA"
            expected = np.asarray(image if image.mode == "L" else image.getchannel("G"))
        assert np.array_equal(gray_of(data), expected), path.name
    assert rgba >= 2
    for length in range(0, len(data), 1024 * 16):
        refusal(data[:length])


def test_real_jpegs() -> None:
    paths = sorted(KERMANY.rglob("*.jpeg"))
    if not paths:
        pytest.skip("the Kermany images are missing")
    for path in paths[::12]:
        data = path.read_bytes()
        loaded = load_image(data, name=str(path))
        assert loaded.image_HW.shape == (224, 224)
        assert loaded.jpeg == data
        with Image.open(path) as image:
            assert np.abs(loaded.image_HW.astype(int) - np.asarray(image.convert("L"))).max() <= 1
