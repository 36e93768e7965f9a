"""The PixelData of a DICOM file -> stored values, or a one-line reason why it cannot be decoded.

Decoders are lenient: most of them fill the missing half of a truncated frame with gray. So a frame is first checked
against the header (transfer syntax, markers, rows, columns, length, memory) and decoded afterwards, with one fixed
decoder per transfer syntax, so that other installed packages cannot change a pixel.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
import simplejpeg
from pydicom import uid
from pydicom.encaps import generate_fragments

from cxrscale.io import limits
from cxrscale.io.dicom import tags
from cxrscale.io.dicom.frames import JPEG_LS, LOSSLESS_JPEG, FrameHeader, frame_header
from cxrscale.io.strictness import FormalFaults

NATIVE = (
    uid.ImplicitVRLittleEndian,
    uid.ExplicitVRLittleEndian,
    uid.DeflatedExplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
)
"""Transfer syntaxes whose pixels are not encoded."""

ENCODED: dict[str, tuple[int, ...]] = {
    uid.JPEGBaseline8Bit: (0xC0,),
    uid.JPEGExtended12Bit: (0xC0, 0xC1),
    uid.JPEGLossless: (LOSSLESS_JPEG,),
    uid.JPEGLosslessSV1: (LOSSLESS_JPEG,),
    uid.JPEGLSLossless: (JPEG_LS,),
    uid.JPEGLSNearLossless: (JPEG_LS,),
    uid.JPEG2000Lossless: (),
    uid.JPEG2000: (),
    uid.HTJ2KLossless: (),
    uid.HTJ2KLosslessRPCL: (),
    uid.HTJ2K: (),
    uid.RLELossless: (),
}
"""Transfer syntax -> the JPEG frame markers that it allows; none where its frames are not JPEG."""

LOSSY = (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEGLSNearLossless, uid.JPEG2000, uid.HTJ2K)
"""Transfer syntaxes that may change values, so that some come out above the range of BitsStored."""

OVERSHOOT = 1 / 8
"""How far lossy compression carries values out of a range, as a share of it; at sharp edges a few go further."""

OVERSHOOT_SHARE = 0.01
"""If more values than this share are further out, BitsStored is wrong."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The Image Pixel module (PS3.3 C.7.6.3) of one gray image."""

    rows: int
    columns: int
    bits_allocated: int
    """8 or 16."""
    bits_stored: int
    """1 to bits_allocated."""
    high_bit: int
    """The place of the highest stored bit: bits_stored - 1, or above it in old files."""
    pixel_representation: int
    """1 if stored values are signed."""

    @property
    def values(self) -> int:
        """Rows x columns."""
        return self.rows * self.columns


def decode_frame(
    pixels: bytes, vr: str, syntax: Any, layout: Layout, faults: FormalFaults
) -> tuple[npt.NDArray[Any], bytes | None]:
    """Decode the one frame of a PixelData element.

    Bits above BitsStored do not belong to a value (PS3.5 8.1.1): they hold overlays, or nothing, and are masked. Where
    the transfer syntax is lossy, a value can leave the range of BitsStored by compression, and is clipped to it.

    Args:
        pixels: the element's value.
        vr: its value representation, OB or OW.
        syntax: the file's TransferSyntaxUID, one of `ENCODED` or `NATIVE`.
        layout: the layout in the file's header.
        faults: what to do about faults that leave the values certain.

    Returns:
        Stored values, (rows, columns), uint8, int8, uint16 or int16 according to `layout`; and the encoded frame
        without padding after its end marker, or None if the pixels are not encoded.

    Raises:
        UnreadableImageError: the frame is truncated, is not one frame, takes too much memory, or does not match
            `layout` or `syntax`.
    """
    if syntax not in ENCODED:
        return _masked(_native(pixels, vr, syntax, layout, faults), layout), None
    if syntax == uid.RLELossless:
        frame = _rle_frame(pixels)
        return _masked(_by_rle(frame, layout), layout), frame
    frame = _frame(pixels, syntax, faults)
    header = frame_header(frame, syntax)
    _check(header, syntax, layout)
    if (offset := header.selection_offset) is not None:
        found = f"{frame[offset]} to {frame[offset + 1]}, {frame[offset + 2]:02X}"
        faults.add(tags.unreadable("PixelData", f"holds a JPEG scan of coefficients {found}, not 0 to 63, 00"))
        frame = frame[:offset] + b"\x00\x3f\x00" + frame[offset + 3 :]
    try:
        if syntax in tags.JPEG_2000:
            value_HW = _by_jpeg_2000(frame, header, layout)
        elif header.marker == JPEG_LS:
            value_HW = imagecodecs.jpegls_decode(frame)
        else:
            value_HW = _by_jpeg(frame, header)
    except Exception as error:  # each decoder raises errors of its own types
        raise tags.unreadable("PixelData", f"cannot be decoded as {syntax.name}", error) from error
    return _of_stored_bits(np.asarray(value_HW), header, syntax in LOSSY, layout), frame


def _native(pixels: bytes, vr: str, syntax: Any, layout: Layout, faults: FormalFaults) -> npt.NDArray[Any]:
    """Values that are not encoded (PS3.5 8.1.1, A.1 to A.3)."""
    need = layout.values * layout.bits_allocated // 8
    shape = f"{layout.rows} x {layout.columns} values of {layout.bits_allocated} bits"
    if len(pixels) < need:
        message = f"holds {len(pixels)} bytes, but {shape} take {need}: the file is truncated, or "
        raise tags.unreadable("PixelData", message + "its Rows or Columns are wrong")
    if len(pixels) > need + need % 2:
        message = f"holds {len(pixels)} bytes, but {shape} take {need}: its Rows or Columns are wrong, or "
        fault = tags.unreadable("PixelData", message + "something follows the image")
        if len(pixels) >= 2 * need:
            raise fault
        faults.add(fault)
    order = ">" if syntax == uid.ExplicitVRBigEndian else "<"
    if order == ">" and layout.bits_allocated == 8 and vr == "OW" and len(pixels) % 2 == 0:
        swapped = np.frombuffer(pixels, dtype=">u2").astype("<u2").view(np.uint8)
        return swapped[: layout.values].reshape(layout.rows, layout.columns)
    code_HW = np.frombuffer(pixels, dtype=f"{order}u{layout.bits_allocated // 8}", count=layout.values)
    return code_HW.astype(code_HW.dtype.newbyteorder("="), copy=False).reshape(layout.rows, layout.columns)


def _fragments(pixels: bytes) -> list[bytes]:
    """The fragments of encapsulated pixels (PS3.5 A.4) that are not empty."""
    try:
        fragments = [bytes(fragment) for fragment in list(generate_fragments(pixels))[1:]]  # after the offset table
    except Exception as error:  # damaged bytes can make the parser raise any error
        raise tags.unreadable("PixelData", "is truncated or not encapsulated", error) from error
    fragments = [fragment for fragment in fragments if fragment]
    if not fragments:
        raise tags.unreadable("PixelData", "holds no frame")
    return fragments


def _rle_frame(pixels: bytes) -> bytes:
    fragments = _fragments(pixels)
    if len(fragments) > 1:  # in RLE, a frame is one fragment (PS3.5 G.2)
        raise tags.unreadable("PixelData", f"holds {len(fragments)} frames, not one image: split the file")
    return fragments[0]


def _frame(pixels: bytes, syntax: Any, faults: FormalFaults) -> bytes:
    """The one frame of encapsulated pixels, with the start and end that its transfer syntax requires."""
    fragments = _fragments(pixels)
    magic = b"\xff\x4f\xff\x51" if syntax in tags.JPEG_2000 else b"\xff\xd8\xff"
    frames = sum(fragment.startswith(magic) for fragment in fragments)
    joined = b"".join(fragments)
    if not joined.startswith(magic):
        start = f"the frame starts with {joined[:4].hex()}, not {magic.hex()}"
        raise tags.unreadable("TransferSyntaxUID", f"is {syntax.name}, but {start}")
    if frames > 1:
        raise tags.unreadable("PixelData", f"holds {frames} frames, not one image: split the file")
    frame = joined.rstrip(b"\0\xff")  # some writers pad with FF
    if frame.endswith(b"\xff\xd9"):
        return frame
    end = joined.rfind(b"\xff\xd9") + 2
    if end < 2:
        raise tags.unreadable("PixelData", f"is truncated: its {syntax.name} frame lacks the end marker FFD9")
    if len(frame) - end > 1:  # a pad byte can have any value
        extra = f"{len(frame) - end} bytes behind the end marker of its {syntax.name} frame, or the frame is truncated"
        faults.add(tags.unreadable("PixelData", f"holds {extra}"))
    return joined[:end]


def _check(header: FrameHeader, syntax: Any, layout: Layout) -> None:
    """Compare a frame with the file's header; decoders check only the number of pixels, not 64 x 32 against 32 x 64."""
    if header.marker and header.marker not in ENCODED[syntax]:
        raise tags.unreadable("TransferSyntaxUID", f"is {syntax.name}, but the frame is JPEG FF{header.marker:02X}")
    if (header.rows, header.columns) != (layout.rows, layout.columns):
        shapes = f"{layout.rows} x {layout.columns}, but the frame is {header.rows} x {header.columns}"
        raise tags.unreadable("Rows", f"x {tags.label('Columns')} is {shapes}")
    if header.components != 1:
        raise tags.unreadable("PixelData", f"holds a frame of {header.components} components: color, not gray")
    if header.bits > layout.bits_allocated:
        raise tags.unreadable("BitsAllocated", f"is {layout.bits_allocated}, but the frame holds {header.bits} bits")
    if header.marker not in (0, JPEG_LS) and header.bits == 8 < layout.bits_stored:
        raise tags.unreadable(
            "BitsStored", f"is {layout.bits_stored}, but the {syntax.name} frame holds {header.bits} bits"
        )
    # The values, a copy of them with the unused bits masked, and the gray image. OpenJPEG computes with 4 bytes.
    cost = 2 * layout.bits_allocated // 8 + 1 + (4 if syntax in tags.JPEG_2000 else 0)
    limits.check_memory(layout.rows, layout.columns, cost, syntax.name, header.more_bytes)


def _by_jpeg(frame: bytes, header: FrameHeader) -> npt.NDArray[Any]:
    """Decode 8-bit JPEG with simplejpeg, 2 to 16 bits (Extended, Lossless) with imagecodecs.

    Because imagecodecs is lenient, simplejpeg first decodes the same frame with its header changed to 8 bits. The codes
    of a scan do not depend on the bits per value (ITU-T T.81 F.2.2, H.2), so simplejpeg reads all of them and refuses a
    truncated or damaged scan; its output is ignored.
    """
    as_8_bit = frame[: header.bits_offset] + b"\x08" + frame[header.bits_offset + 1 :]
    value_HW: npt.NDArray[Any] = simplejpeg.decode_jpeg(as_8_bit, colorspace="GRAY", strict=True)[..., 0]
    if header.bits != 8:
        value_HW = imagecodecs.jpeg8_decode(frame)
    return value_HW


def _by_jpeg_2000(frame: bytes, header: FrameHeader, layout: Layout) -> npt.NDArray[Any]:
    """Decode JPEG 2000; its own sign may differ from the file's, which counts."""
    value_HW = np.asarray(imagecodecs.jpeg2k_decode(frame))
    code_HW = value_HW.astype(f"u{layout.bits_allocated // 8}", copy=False)
    if header.bits == 8 * code_HW.itemsize or not (layout.pixel_representation or header.signed):
        return code_HW
    # Sign extension, where there are more bits than the frame has.
    unused, kind = 8 * code_HW.itemsize - header.bits, "i" if layout.pixel_representation else "u"
    extended_HW: npt.NDArray[Any] = (code_HW << unused).view(f"{kind}{code_HW.itemsize}") >> unused
    return extended_HW.view(code_HW.dtype)


def _by_rle(frame: bytes, layout: Layout) -> npt.NDArray[Any]:
    """Decode RLE (PS3.5 G): one segment per byte of the values, the highest byte first.

    Segment by segment, to compare the number of pixels with Rows and Columns: other decoders accept a longer frame.
    """
    limits.check_memory(layout.rows, layout.columns, 2 * layout.bits_allocated // 8 + 1, "RLE Lossless")
    count, *offsets = struct.unpack_from("<16L", frame.ljust(64, b"\0"))
    bounds = [*offsets[:count], len(frame)]
    if count != layout.bits_allocated // 8 or bounds[0] != 64 or sorted(set(bounds)) != bounds:
        raise tags.unreadable("PixelData", f"holds an RLE header that does not fit {layout.bits_allocated} bits")
    code_HW = np.empty((layout.rows, layout.columns), dtype=f"<u{count}")
    byte_PN = code_HW.reshape(-1).view(np.uint8).reshape(layout.values, count)
    for index, (begin, end) in enumerate(pairwise(bounds)):
        try:
            # Two bytes can stand for 128 pixels: the decoder stops after one more than there are, which padding can
            # look like.
            segment = np.frombuffer(imagecodecs.packbits_decode(frame[begin:end], out=layout.values + 1), np.uint8)
        except Exception as error:  # imagecodecs raises errors of its own types
            message = "cannot be decoded as RLE Lossless of its Rows and Columns"
            raise tags.unreadable("PixelData", message, error) from error
        if len(segment) < layout.values:
            sizes = f"{len(segment)} pixels, not {layout.rows} x {layout.columns}"
            raise tags.unreadable("PixelData", f"holds an RLE segment of {sizes}: its Rows or Columns are wrong")
        byte_PN[:, count - 1 - index] = segment[: layout.values]
    return code_HW.astype(f"u{count}", copy=False)


def _of_stored_bits(value_HW: npt.NDArray[Any], header: FrameHeader, lossy: bool, layout: Layout) -> npt.NDArray[Any]:
    """The values of a frame, in the file's type, without the bits above BitsStored, or clipped to their range."""
    code_HW = value_HW.astype(f"u{layout.bits_allocated // 8}", copy=False)
    if not lossy or header.bits <= layout.bits_stored or layout.high_bit != layout.bits_stored - 1:
        return _masked(code_HW, layout)
    if not layout.pixel_representation:
        return _clipped(code_HW, 0, (1 << layout.bits_stored) - 1, layout)
    # Signed values are stored in BitsStored bits, or extended to all bits of the frame.
    unused, half = 8 * code_HW.itemsize - header.bits, 1 << layout.bits_stored - 1
    extended_HW = (code_HW << unused).view(f"i{code_HW.itemsize}") >> unused
    if np.count_nonzero(code_HW >= 2 * half) > np.count_nonzero((extended_HW < -half) | (extended_HW >= half)):
        return _clipped(extended_HW, -half, half - 1, layout)
    return _masked(_clipped(code_HW, 0, 2 * half - 1, layout), layout)


def _clipped(value_HW: npt.NDArray[Any], low: int, high: int, layout: Layout) -> npt.NDArray[Any]:
    """Values in the range of BitsStored, which lossy compression has overshot a little."""
    margin = int((high - low) * OVERSHOOT)
    far = np.count_nonzero((value_HW < low - margin) | (value_HW > high + margin)) / layout.values
    if far > OVERSHOOT_SHARE:
        raise tags.unreadable("BitsStored", f"is {layout.bits_stored}, but {far:.1%} of the values need more bits")
    clipped_HW: npt.NDArray[Any] = np.clip(value_HW, low, high)
    return clipped_HW


def _masked(code_HW: npt.NDArray[Any], layout: Layout) -> npt.NDArray[Any]:
    """Unsigned values -> values with the file's sign, without the unused high bits (PS3.5 8.1.1)."""
    size = code_HW.itemsize
    above, below = 8 * size - 1 - layout.high_bit, layout.high_bit + 1 - layout.bits_stored
    if layout.pixel_representation:
        if above == below == 0:
            return code_HW.view(f"i{size}")
        return (code_HW << above).view(f"i{size}") >> (above + below)
    if above:
        code_HW = code_HW & code_HW.dtype.type((1 << layout.high_bit + 1) - 1)
    return code_HW >> below if below else code_HW
