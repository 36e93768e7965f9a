"""Image files (DICOM, PNG, JPEG) <-> gray arrays, or a one-line reason why a file is unreadable."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg

from cxrscale.io import dicom, exif, jpeg_segments, limits, png
from cxrscale.io.gray_levels import StoredImage
from cxrscale.io.strictness import FormalFaults, Strictness
from cxrscale.types import GrayImage, UnreadableImageError, one_line

_JPEG = b"\xff\xd8\xff"
_OTHER_FORMATS = {
    b"version https://git-lfs": "a Git LFS pointer: fetch the file itself with `git lfs pull`",
    b"\x1f\x8b": "a gzip file: decompress it",
    b"PK\x03\x04": "a zip file: unpack it",
    b"GIF8": "a GIF image: convert it to PNG",
    b"BM": "a BMP image: convert it to PNG",
    b"II*\x00": "a TIFF image: convert it to PNG",
    b"MM\x00*": "a TIFF image: convert it to PNG",
    b"RIFF": "a WebP image: convert it to PNG",
    b"\x00\x00\x00\x0cjP  ": "a JPEG 2000 image: convert it to PNG",
    b"%PDF": "a PDF document: export its images as PNG",
}


_FIRST_TAGS = tuple(
    struct.pack(order + "HH", group, element)
    for order in "<>"
    for group, element in ((2, 0), (2, 1), (2, 2), (8, 0), (8, 1), (8, 5), (8, 8), (8, 0x12), (8, 0x16))
)
"""How a DICOM file without preamble starts: with one of the first tags that there are."""

_TIE = 1e-5
"""Shares of a pixel that differ from one half by less are one half: sums of thirds can be an ulp away from it."""
MAX_SCANS = 500
"""Scans of a JPEG; a progressive one has about 10, and each takes the time of a complete image."""


@dataclass(frozen=True, slots=True, eq=False)
class LoadedImage:
    """An image with the metadata of its file; PNG and JPEG have none."""

    image_HW: GrayImage
    """(H, W) uint8, upright: 0 black, bone bright."""
    jpeg: bytes | None = None
    """A JPEG stream that decodes to exactly `image_HW`: the file itself, or its DICOM frame. None if there is none."""
    png: bytes | None = None
    """The file itself if it is a PNG that decodes to exactly `image_HW`: at most 8 bits, and upright as stored."""
    view: str | None = None
    """PA or AP, or None if unknown."""
    sex: str | None = None
    """F or M, or None if unknown."""
    age: int | None = None
    """Age in full years, or None if unknown."""
    spacing_mm: tuple[float, float] | None = None
    """Distance between (rows, columns) in millimeters, or None if unknown."""
    burned_in: bool = False
    """Whether the file says that text which identifies the patient is burned into its pixels."""
    warnings: tuple[str, ...] = ()
    """The faults of the file that a lenient reading accepted, one line each; a strict reading refuses them."""


def load_image(data: bytes, *, name: str = "", strictness: Strictness = Strictness.STRICT) -> LoadedImage:
    """Decode an image file; its format is recognized by its first bytes, not by its name.

    16-bit gray is scaled as `decode_png` says. Color files with equal red, green and blue are accepted as gray; alpha
    must be opaque. The EXIF orientation of a JPEG or PNG is applied, so that the image is upright.

    Args:
        data: the complete file.
        name: its name, which matters in one case only: `.dcm` and `.dicom` files may lack the DICOM preamble.
        strictness: what to do with a file that breaks a rule although its gray values are certain; `io.strictness` has
            the list.

    Returns:
        The image, (H, W) uint8, with the metadata of a DICOM header.

    Raises:
        UnreadableImageError: empty, another format, truncated, damaged, colored, transparent, or so large that decoding
            it takes over `limits.MAX_BYTES`; for DICOM see `dicom.read_dicom`.
    """
    if not data:
        raise UnreadableImageError("the file is empty")
    if data.startswith(png.SIGNATURE):
        image_HW, exact = png.decode_png(data)
        return LoadedImage(image_HW, png=data if exact else None)
    if data.startswith(_JPEG):
        return _jpeg(data)
    if data[128:132] == b"DICM":
        return _dicom(data, strictness)
    if name.lower().endswith((".dcm", ".dicom")) and _other_format(data) is None:
        return _dicom(data, strictness, force=True)
    if data[:4] in _FIRST_TAGS:
        fault = UnreadableImageError("the file seems to be DICOM, but has neither preamble nor suffix: name it .dcm")
        FormalFaults(strictness).add(fault)
        return _dicom(data, strictness, fault.args, force=True)
    actual = _other_format(data) or f"an unknown format that starts with {data[:8].hex()}"
    raise UnreadableImageError(f"not a PNG, JPEG or DICOM file but {actual}")


def load_stored(data: bytes, *, name: str = "", strictness: Strictness = Strictness.STRICT) -> StoredImage | None:
    """An image file's values before its window; None for what has no more than 8 bits, or is no PNG and no DICOM file.

    Args, raises: as `load_image`, whose gray values its window gives.
    """
    if data.startswith(png.SIGNATURE):
        return png.decode_stored(data)
    plain = data[128:132] != b"DICM"
    named = name.lower().endswith((".dcm", ".dicom")) and _other_format(data) is None
    if data.startswith(_JPEG) or (plain and not named and data[:4] not in _FIRST_TAGS):
        return None
    return dicom.read_stored(data, force=plain, strictness=strictness)


def _dicom(data: bytes, strictness: Strictness, warnings: tuple[str, ...] = (), *, force: bool = False) -> LoadedImage:
    image = dicom.read_dicom(data, force=force, strictness=strictness)
    return LoadedImage(
        image.image_HW,
        jpeg=image.jpeg,
        view=image.view,
        sex=image.sex,
        age=image.age,
        spacing_mm=image.spacing_mm,
        burned_in=image.burned_in,
        warnings=warnings + image.warnings,
    )


def encode_jpeg(image_HW: GrayImage, quality: int = 95) -> bytes:
    """Encode as gray baseline JPEG; the same bytes for the same image.

    Args:
        image_HW: (H, W) uint8.
        quality: 1 to 100, on libjpeg's scale.

    Raises:
        ValueError: not uint8 (H, W), or a quality outside 1 to 100.
    """
    if not 1 <= quality <= 100:
        raise ValueError(f"quality is {quality}: give 1 to 100")
    # OpenCV, because simplejpeg always uses the fast DCT, which loses 0.6 dB and needs 2% more bytes at quality 95.
    return _encoded(".jpg", _checked(image_HW), (cv2.IMWRITE_JPEG_QUALITY, quality))


def encode_png(image_HW: GrayImage) -> bytes:
    """Encode losslessly as gray 8-bit PNG; the same bytes for the same image.

    Args:
        image_HW: (H, W) uint8.

    Raises:
        ValueError: not uint8 (H, W).
    """
    return _encoded(".png", _checked(image_HW), ())


def encode_mask(mask_HW: npt.NDArray[np.bool_]) -> bytes:
    """Encode as PNG with one bit per pixel, which reads as a gray image of 0 and 255; the same bytes for the same mask.

    Args:
        mask_HW: (H, W) bool.

    Raises:
        ValueError: not bool (H, W), or empty.
    """
    if mask_HW.dtype != np.bool_ or mask_HW.ndim != 2 or mask_HW.size == 0:
        raise ValueError(f"mask is {mask_HW.dtype} of shape {mask_HW.shape}, not bool (H, W): threshold it first")
    height, width = mask_HW.shape
    rows = np.zeros((height, 1 + (width + 7) // 8), dtype=np.uint8)  # the first byte of each row: no filter
    rows[:, 1:] = np.packbits(mask_HW, axis=1)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 6)), (b"IEND", b""))
    return png.SIGNATURE + b"".join(png.chunk(kind, body) for kind, body in chunks)


def decode_mask(data: bytes) -> npt.NDArray[np.bool_]:
    """Decode a mask: a gray PNG with 0 outside and one other value inside.

    Args:
        data: the PNG, with one bit per pixel as from `encode_mask`, or with 8 bits.

    Returns:
        (H, W) bool.

    Raises:
        UnreadableImageError: damaged, not PNG, or more than one value besides 0.
    """
    if not data.startswith(png.SIGNATURE):
        raise UnreadableImageError("the mask is not a PNG file")
    image_HW, _ = png.decode_png(data)
    mask_HW: npt.NDArray[np.bool_] = image_HW != 0
    if mask_HW.any() and np.ptp(image_HW[mask_HW]):
        raise UnreadableImageError("the mask holds more than one value besides 0: threshold it first")
    return mask_HW


def resize_image(image_HW: GrayImage, size: int) -> GrayImage:
    """Resize to `size` x `size` pixels: area averaging (no aliasing) for shrinking, linear interpolation for enlarging.

    The aspect ratio is not kept, and nothing is padded or cropped: published models are trained this way, and findings
    at the edges stay in the image. Images of NIH and SIIM are square.

    Args:
        image_HW: (H, W) uint8.
        size: pixels per side, at least 1.

    Returns:
        (size, size) uint8; the same array if it already has this shape.

    Raises:
        ValueError: not uint8 (H, W), or a size below 1.
    """
    resized: GrayImage = _resized(_checked(image_HW), size)
    return resized


def resize_mask(mask_HW: npt.NDArray[np.bool_], size: int) -> npt.NDArray[np.bool_]:
    """Resize a mask as `resize_image` resizes its image; a pixel is inside if more than half of it is covered.

    Pixels that are covered by exactly half are inside as long as the mask does not become larger than it was, evenly
    spread: with all of them, SIIM's 74 masks below 1,000 pixels gain 7.7% at 512 pixels, without them they lose 8.7%.
    A mask that has a pixel keeps at least one, the one that it covers most.

    Args:
        mask_HW: (H, W) bool.
        size: pixels per side, at least 1.

    Returns:
        (size, size) bool.

    Raises:
        ValueError: not bool (H, W), or a size below 1.
    """
    return shrink_mask(mask_HW, size)[0]


def shrink_mask(mask_HW: npt.NDArray[np.bool_], size: int) -> tuple[npt.NDArray[np.bool_], bool]:
    """`resize_mask`, and whether the mask covers no pixel by half, so that only the one that it covers most is kept.

    Args, raises: as `resize_mask`.
    """
    cover_HW = _cover(mask_HW, size)
    inside_HW: npt.NDArray[np.bool_] = cover_HW > 0.5 + _TIE
    half_P = np.flatnonzero((cover_HW >= 0.5 - _TIE) & ~inside_HW)
    count = min(len(half_P), round(float(cover_HW.sum(dtype=np.float64))) - int(inside_HW.sum()))
    if count > 0:
        inside_HW.flat[half_P[np.arange(count) * len(half_P) // count]] = True
    if not inside_HW.any() and mask_HW.any():
        inside_HW.flat[int(cover_HW.argmax())] = True
    return inside_HW, bool(mask_HW.any()) and float(cover_HW.max()) < 0.5 - _TIE


def _cover(mask_HW: npt.NDArray[np.bool_], size: int) -> npt.NDArray[np.float32]:
    """(size, size) share of each pixel that the mask covers."""
    if mask_HW.dtype != np.bool_ or mask_HW.ndim != 2 or mask_HW.size == 0:
        raise ValueError(f"mask is {mask_HW.dtype} of shape {mask_HW.shape}, not bool (H, W): threshold it first")
    cover_HW: npt.NDArray[np.float32] = _resized(mask_HW.astype(np.float32), size)
    return cover_HW


def _resized(array_HW: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
    if size < 1:
        raise ValueError(f"size is {size}: give the pixels per side, at least 1")
    height, width = array_HW.shape
    # OpenCV's INTER_AREA averages only if both sides shrink: so shrink first, then enlarge.
    smaller = (min(width, size), min(height, size))
    if smaller != (width, height):
        array_HW = cv2.resize(array_HW, smaller, interpolation=cv2.INTER_AREA)
    if smaller != (size, size):
        array_HW = cv2.resize(array_HW, (size, size), interpolation=cv2.INTER_LINEAR)
    return array_HW


def _checked(image_HW: GrayImage) -> GrayImage:
    if image_HW.dtype != np.uint8 or image_HW.ndim != 2 or image_HW.size == 0:
        raise ValueError(f"image is {image_HW.dtype} of shape {image_HW.shape}, not uint8 (H, W): convert it first")
    return np.ascontiguousarray(image_HW)


def _encoded(suffix: str, image_HW: GrayImage, options: tuple[int, ...]) -> bytes:
    done, data = cv2.imencode(suffix, image_HW, options)
    if not done:
        raise ValueError(f"image of shape {image_HW.shape} is too large for {suffix}: resize it first")
    return bytes(data)


def _other_format(data: bytes) -> str | None:
    """The format of a file that is often mistaken for a supported image, with how to fix it; None if not recognized."""
    start = data[:64].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<svg")):
        return "an HTML or XML page: the download has probably failed"
    return next((text for magic, text in _OTHER_FORMATS.items() if data.startswith(magic)), None)


# JPEG


def _jpeg(data: bytes) -> LoadedImage:
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data, strict=True)
        if space not in ("Gray", "YCbCr", "RGB"):
            raise UnreadableImageError(f"JPEG is {space}, neither gray nor RGB: save it as gray")
        metadata, progressive = _jpeg_header(data)
        channels = 1 if space == "Gray" else 3
        # The gray image; of color, its channels and their differences; of all, the coefficients if it is progressive.
        cost = 1 + (6 if channels == 3 else 0) + (2 * channels if progressive else 0)
        limits.check_memory(height, width, cost, "JPEG")
        image_HW = simplejpeg.decode_jpeg(data, colorspace="GRAY", strict=True)[..., 0]
        # Refuses a colored image. If all pixels are exactly neutral, every decoder gives the same gray values.
        exact = space == "Gray" or np.array_equal(
            image_HW, png.to_gray(simplejpeg.decode_jpeg(data, colorspace="BGR", strict=True))[0]
        )
    except (ValueError, IndexError, struct.error) as error:
        if isinstance(error, UnreadableImageError):
            raise
        raise UnreadableImageError(f"JPEG is truncated or damaged: {one_line(error, limit=200)}") from error
    turned = 1 if metadata is None else exif.orientation(metadata, "JPEG")
    return LoadedImage(exif.upright(image_HW, turned), data if exact and turned == 1 else None)


def _jpeg_header(data: bytes) -> tuple[bytes | None, bool]:
    """(EXIF metadata, wherever it stands before the first scan; whether the image is progressive)."""
    metadata, progressive = None, False
    for marker, start, end in jpeg_segments.segments(data):
        progressive |= marker in jpeg_segments.PROGRESSIVE
        if marker == 0xE1 and metadata is None and data[start : start + 6] == b"Exif\0\0":
            metadata = data[start + 6 : end]
    # In a scan, FF is followed by 00.
    if (scans := data.count(b"\xff\xda")) > MAX_SCANS:
        raise UnreadableImageError(f"JPEG of {scans:,} scans: over {MAX_SCANS}")
    return metadata, progressive
