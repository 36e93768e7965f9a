"""Image files (DICOM, PNG, JPEG) <-> gray arrays, or a one-line reason why a file is unreadable.

Decoders of PNG and JPEG return what they can of a damaged file, so the checksums and the end marker of a file are
checked before it is decoded.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from cxrscale.io import dicom
from cxrscale.types import GrayImage, UnreadableImageError, one_line

MAX_PIXELS = 100_000_000
"""Height x width above this means a damaged or hostile header; the largest detectors have 20 million pixels."""

COLOR_LEVELS = 16
"""The largest difference between red, green and blue in a gray pixel; JPEG's rounding alone needs 2."""

COLOR_SHARE = 0.001
"""An image is colored if a larger share of its pixels than this exceeds `COLOR_LEVELS`."""

_PNG = b"\x89PNG\r\n\x1a\n"
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


@dataclass(frozen=True, slots=True, eq=False)
class LoadedImage:
    """An image with the metadata of its file; PNG and JPEG have none."""

    image_HW: GrayImage
    """(H, W) uint8, upright: 0 black, bone bright."""
    jpeg: bytes | None = None
    """A JPEG stream that decodes to exactly `image_HW`: the file itself, or its DICOM frame. None if there is none."""
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


def load_image(data: bytes, *, name: str = "") -> LoadedImage:
    """Decode an image file; its format is recognized by its first bytes, not by its name.

    16-bit gray is divided by 257 and rounded. Color files with equal red, green and blue are accepted as gray; alpha
    must be opaque. A JPEG's EXIF orientation is applied, so that the image is upright.

    Args:
        data: the complete file.
        name: its name, which matters in one case only: `.dcm` and `.dicom` files may lack the DICOM preamble.

    Returns:
        The image, (H, W) uint8, with the metadata of a DICOM header.

    Raises:
        UnreadableImageError: empty, another format, truncated, damaged, colored or transparent; for DICOM see
            `dicom.read_dicom`.
    """
    if not data:
        raise UnreadableImageError("the file is empty")
    if data.startswith(_PNG):
        return LoadedImage(_png(data))
    if data.startswith(_JPEG):
        return _jpeg(data)
    force = name.lower().endswith((".dcm", ".dicom"))
    if data[128:132] == b"DICM" or (force and _other_format(data) is None):
        image = dicom.read_dicom(data, force=force)
        return LoadedImage(
            image.image_HW, image.jpeg, image.view, image.sex, image.age, image.spacing_mm, image.burned_in
        )
    actual = _other_format(data) or f"an unknown format that starts with {data[:8].hex()}"
    raise UnreadableImageError(f"not a PNG, JPEG or DICOM file but {actual}")


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
    return _PNG + b"".join(_chunk(kind, body) for kind, body in chunks)


def decode_mask(data: bytes) -> npt.NDArray[np.bool_]:
    """Decode a mask: a gray PNG with 0 outside and one other value inside.

    Args:
        data: the PNG, with one bit per pixel as from `encode_mask`, or with 8 bits.

    Returns:
        (H, W) bool.

    Raises:
        UnreadableImageError: damaged, not PNG, or more than one value besides 0.
    """
    if not data.startswith(_PNG):
        raise UnreadableImageError("the mask is not a PNG file")
    image_HW = _png(data)
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
    """Resize a mask as `resize_image` resizes its image; a pixel is inside if at least half of it is covered.

    Args:
        mask_HW: (H, W) bool.
        size: pixels per side, at least 1.

    Returns:
        (size, size) bool.

    Raises:
        ValueError: not bool (H, W), or a size below 1.
    """
    if mask_HW.dtype != np.bool_ or mask_HW.ndim != 2 or mask_HW.size == 0:
        raise ValueError(f"mask is {mask_HW.dtype} of shape {mask_HW.shape}, not bool (H, W): threshold it first")
    cover_HW = _resized(mask_HW.astype(np.float32), size)
    inside: npt.NDArray[np.bool_] = cover_HW >= 0.5 - 1e-5  # sums of thirds can be an ulp below one half
    return inside


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


# PNG


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """(type, body) of every chunk up to IEND, with its CRC checked; takes 0.2 ms for 400 kB."""
    view, offset = memoryview(data), len(_PNG)
    while offset + 12 <= len(data):
        length, kind = int.from_bytes(view[offset : offset + 4], "big"), bytes(view[offset + 4 : offset + 8])
        end = offset + 8 + length
        if end + 4 > len(data):
            break
        if zlib.crc32(view[offset + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise UnreadableImageError(
                f"PNG is damaged: the CRC of the chunk {kind.decode('latin-1')!r} at byte {offset} is wrong"
            )
        yield kind, view[offset + 8 : end]
        if kind == b"IEND":
            return
        offset = end + 4
    raise UnreadableImageError(f"PNG is truncated: {len(data)} bytes without IEND")


def _png(data: bytes) -> GrayImage:
    chunks = list(_chunks(data))
    kind, header = chunks[0]
    if kind != b"IHDR" or len(header) != 13:
        raise UnreadableImageError("PNG is damaged: it does not start with IHDR")
    width, height = struct.unpack_from(">II", header)
    if width * height > MAX_PIXELS:
        raise UnreadableImageError(f"PNG of {height} x {width} pixels: over {MAX_PIXELS:,}")
    if any(kind == b"acTL" for kind, _ in chunks):
        raise UnreadableImageError("PNG is animated, not a single image: split it")
    pixels = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.shape[:2] != (height, width):
        raise UnreadableImageError(f"PNG of {height} x {width} pixels cannot be decoded")
    if pixels.dtype == np.uint16:
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return _to_gray(pixels)


def _to_gray(pixels: npt.NDArray[Any]) -> GrayImage:
    """(H, W), (H, W, 3) or (H, W, 4) uint8 in OpenCV's channel order -> (H, W); a colored image is refused."""
    if pixels.ndim == 2:
        return pixels
    if pixels.shape[2] == 4 and pixels[..., 3].min() < 255:
        raise UnreadableImageError("the image is transparent: save it without alpha")
    blue, green, red = (pixels[..., channel] for channel in range(3))
    difference_HW = cv2.max(cv2.absdiff(red, green), cv2.absdiff(green, blue))
    if not difference_HW.any():
        return np.ascontiguousarray(green)
    share = float(np.count_nonzero(difference_HW > COLOR_LEVELS)) / difference_HW.size
    if share > COLOR_SHARE:
        raise UnreadableImageError(f"the image is colored ({share:.1%} of its pixels): give the gray original")
    image_HW: GrayImage = cv2.cvtColor(pixels[..., :3], cv2.COLOR_BGR2GRAY)
    return image_HW


# JPEG


def _jpeg(data: bytes) -> LoadedImage:
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data, strict=True)
        if height * width > MAX_PIXELS:
            raise UnreadableImageError(f"JPEG of {height} x {width} pixels: over {MAX_PIXELS:,}")
        if space not in ("Gray", "YCbCr", "RGB"):
            raise UnreadableImageError(f"JPEG is {space}, neither gray nor RGB: save it as gray")
        image_HW = simplejpeg.decode_jpeg(data, colorspace="GRAY", strict=True)[..., 0]
        # Refuses a colored image. If all pixels are exactly neutral, every decoder gives the same gray values.
        exact = space == "Gray" or np.array_equal(
            image_HW, _to_gray(simplejpeg.decode_jpeg(data, colorspace="BGR", strict=True))
        )
    except ValueError as error:
        if isinstance(error, UnreadableImageError):
            raise
        raise UnreadableImageError(f"JPEG is truncated or damaged: {one_line(error, limit=200)}") from error
    orientation = _orientation(data)
    return LoadedImage(_upright(image_HW, orientation), data if exact and orientation == 1 else None)


def _orientation(data: bytes) -> int:
    """EXIF's Orientation, 1 (upright) to 8; 1 if there is none."""
    if b"Exif\0\0" not in data[:65536]:
        return 1
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            orientation = image.getexif().get(0x0112, 1)
    except Exception as error:  # damaged metadata can make the parser raise any error
        raise UnreadableImageError(f"JPEG's EXIF metadata is damaged ({type(error).__name__}): remove it") from error
    return orientation if orientation in range(1, 9) else 1


def _upright(image_HW: GrayImage, orientation: int) -> GrayImage:
    """Rotate and mirror a stored image according to its EXIF orientation (Exif 2.3, 4.6.4 A)."""
    if orientation in (5, 6, 7, 8):
        image_HW = image_HW.T
    if orientation in (2, 3, 6, 7):
        image_HW = image_HW[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image_HW = image_HW[::-1]
    return np.ascontiguousarray(image_HW)
