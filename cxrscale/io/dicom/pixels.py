"""The PixelData of a DICOM file -> stored values, or a one-line reason why it cannot be decoded.

Decoders are lenient: most of them fill the missing half of a truncated frame with gray. So a frame is first checked
against the header (transfer syntax, markers, rows, columns, length) and decoded afterwards, with one fixed decoder per
transfer syntax, so that other installed packages cannot change a pixel.
"""

from __future__ import annotations

import struct
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
import simplejpeg
from pydicom import uid
from pydicom.encaps import generate_fragments
from pydicom.pixels import get_decoder
from rle.utils import decode_segment  # type: ignore[attr-defined]  # re-exported without __all__

from cxrscale.io.dicom import tags

NATIVE = (
    uid.ImplicitVRLittleEndian,
    uid.ExplicitVRLittleEndian,
    uid.DeflatedExplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
)
"""Transfer syntaxes whose pixels are not encoded."""

ENCODED: dict[str, tuple[tuple[int, ...], str]] = {
    uid.JPEGBaseline8Bit: ((0xC0,), ""),
    uid.JPEGExtended12Bit: ((0xC0, 0xC1), ""),
    uid.JPEGLossless: ((0xC3,), ""),
    uid.JPEGLosslessSV1: ((0xC3,), ""),
    uid.JPEGLSLossless: ((0xF7,), ""),
    uid.JPEGLSNearLossless: ((0xF7,), ""),
    uid.JPEG2000Lossless: ((), "pylibjpeg"),
    uid.JPEG2000: ((), "pylibjpeg"),
    uid.HTJ2KLossless: ((), "pylibjpeg"),
    uid.HTJ2KLosslessRPCL: ((), "pylibjpeg"),
    uid.HTJ2K: ((), "pylibjpeg"),
    uid.RLELossless: ((), ""),
}
"""Transfer syntax -> the JPEG frame markers that it allows, and pydicom's name of the decoder; "" if the decoder is
called without pydicom."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The Image Pixel module (PS3.3 C.7.6.3) of one gray image. The fields are arguments of the decoders."""

    rows: int
    columns: int
    bits_allocated: int
    """8 or 16."""
    bits_stored: int
    """1 to bits_allocated."""
    pixel_representation: int
    """1 if stored values are signed."""


@dataclass(frozen=True, slots=True)
class _FrameHeader:
    """The header of an encoded frame."""

    bits: int
    rows: int
    columns: int
    components: int
    bits_offset: int
    """The offset of the byte that holds `bits`."""


def decode_frame(pixels: bytes, vr: str, syntax: Any, layout: Layout) -> tuple[npt.NDArray[Any], bytes | None]:
    """Decode the one frame of a PixelData element.

    Args:
        pixels: the element's value.
        vr: its value representation, OB or OW.
        syntax: the file's TransferSyntaxUID, one of `ENCODED` or `NATIVE`.
        layout: the layout in the file's header.

    Returns:
        Stored values, (rows, columns), uint8, int8, uint16 or int16 according to `layout`; and the encoded frame
        without padding after its end marker, or None if the pixels are not encoded.

    Raises:
        UnreadableImageError: the frame is truncated, is not one frame, does not match `layout` or `syntax`, or its
            decoder is not installed.
    """
    if syntax not in ENCODED:
        need = layout.rows * layout.columns * layout.bits_allocated // 8
        if not need <= len(pixels) <= need + need % 2:
            shape = f"{layout.rows} x {layout.columns} values of {layout.bits_allocated} bits"
            raise tags.unreadable(
                "PixelData",
                f"holds {len(pixels)} bytes, but {shape} take {need}: the file is truncated, or "
                "its Rows or Columns are wrong",
            )
        return _by_plugin(pixels, vr, "", syntax, layout), None
    markers, plugin = ENCODED[syntax]
    frame = _frame(pixels, syntax)
    if syntax == uid.RLELossless:
        return _by_rle(frame, layout), frame
    header = _frame_header(frame, syntax, markers)
    _check(header, layout)
    if plugin:
        return _by_plugin(pixels, vr, plugin, syntax, layout), frame
    if markers == (0xF7,):
        return _by_jpeg_ls(frame, syntax, layout), frame
    return _by_jpeg(frame, header, syntax, layout), frame


def _frame(pixels: bytes, syntax: Any) -> bytes:
    """The one frame of encapsulated pixels (PS3.5 A.4), with the start and end that its transfer syntax requires."""
    try:
        fragments = list(generate_fragments(pixels))[1:]  # the first item is the offset table
    except Exception as error:  # damaged bytes can make the parser raise any error
        raise tags.unreadable("PixelData", "is truncated or not encapsulated", error) from error
    if not fragments:
        raise tags.unreadable("PixelData", "holds no frame")
    if syntax == uid.RLELossless:
        frames = len(fragments)  # in RLE, a frame is one fragment (PS3.5 G.2)
        frame = bytes(fragments[0])
    else:
        magic = b"\xff\x4f\xff\x51" if syntax in uid.JPEG2000TransferSyntaxes else b"\xff\xd8\xff"
        frames = sum(fragment.startswith(magic) for fragment in fragments)
        frame = b"".join(fragments).rstrip(b"\0\xff")  # some writers pad with FF
        if not frame.startswith(magic):
            start = f"the frame starts with {frame[:4].hex()}, not {magic.hex()}"
            raise tags.unreadable("TransferSyntaxUID", f"is {syntax.name}, but {start}")
        if not frame.endswith(b"\xff\xd9"):
            raise tags.unreadable("PixelData", f"is truncated: its {syntax.name} frame lacks the end marker FFD9")
    if frames > 1:
        raise tags.unreadable("PixelData", f"holds {frames} frames, not one image: split the file")
    return frame


def _frame_header(frame: bytes, syntax: Any, markers: tuple[int, ...]) -> _FrameHeader:
    try:
        if not markers:
            return _jpeg2000_header(frame)
        marker, header = _jpeg_header(frame)
    except (struct.error, IndexError):
        raise tags.unreadable("PixelData", f"holds a {syntax.name} frame that is truncated or damaged") from None
    if marker not in markers:
        raise tags.unreadable("TransferSyntaxUID", f"is {syntax.name}, but the frame is JPEG FF{marker:02X}")
    return header


def _check(header: _FrameHeader, layout: Layout) -> None:
    """Compare a frame with the file's header; decoders check only the number of pixels, not 64 x 32 against 32 x 64."""
    if (header.rows, header.columns) != (layout.rows, layout.columns):
        shapes = f"{layout.rows} x {layout.columns}, but the frame is {header.rows} x {header.columns}"
        raise tags.unreadable("Rows", f"x {tags.label('Columns')} is {shapes}")
    if header.components != 1:
        raise tags.unreadable("PixelData", f"holds a frame of {header.components} components: color, not gray")
    if header.bits > layout.bits_allocated:
        raise tags.unreadable("BitsAllocated", f"is {layout.bits_allocated}, but the frame holds {header.bits} bits")


def _jpeg_header(frame: bytes) -> tuple[int, _FrameHeader]:
    """The frame header of JPEG and JPEG-LS (ITU-T T.81 B.2.2, T.87 C.2.2), and the second byte of its marker."""
    offset = 2
    while frame[offset] == 0xFF:
        marker = frame[offset + 1]
        if marker == 0xFF:  # fill bytes may precede any marker
            offset += 1
            continue
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            bits, rows, columns, components = struct.unpack_from(">BHHB", frame, offset + 4)
            return marker, _FrameHeader(bits, rows, columns, components, bits_offset=offset + 4)
        offset += 2 + struct.unpack_from(">H", frame, offset + 2)[0]
    raise IndexError(offset)


def _jpeg2000_header(frame: bytes) -> _FrameHeader:
    """The SIZ segment of a complete JPEG 2000 codestream (ITU-T T.800 A.5.1).

    Every tile-part declares its length (A.4.2); a shorter one decodes without an error, to an image that is partly
    smooth. So all lengths are checked.
    """
    right, bottom, left, top = struct.unpack_from(">4I", frame, 8)
    components, bits = struct.unpack_from(">HB", frame, 40)
    offset = 2
    while frame[offset : offset + 2] != b"\xff\xd9":
        length = 2 + struct.unpack_from(">H", frame, offset + 2)[0]
        if frame[offset + 1] == 0x90:  # a tile-part; length 0 means until the end marker
            length = struct.unpack_from(">I", frame, offset + 6)[0] or len(frame) - 2 - offset
        if frame[offset] != 0xFF or length < 4:
            raise IndexError(offset)
        offset += length
    return _FrameHeader((bits & 0x7F) + 1, bottom - top, right - left, components, bits_offset=42)


def _by_jpeg(frame: bytes, header: _FrameHeader, syntax: Any, layout: Layout) -> npt.NDArray[Any]:
    """Decode 8-bit JPEG with simplejpeg, 9 to 16 bits (Extended, Lossless) with imagecodecs.

    Because imagecodecs is lenient, simplejpeg first decodes the same frame with its header changed to 8 bits. The codes
    of a scan do not depend on the bits per value (ITU-T T.81 F.2.2, H.2), so simplejpeg reads all of them and refuses a
    truncated or damaged scan; its output is ignored.
    """
    if (header.bits == 8) != (layout.bits_stored == 8):
        raise tags.unreadable(
            "BitsStored", f"is {layout.bits_stored}, but the {syntax.name} frame holds {header.bits} bits"
        )
    try:
        as_8_bit = frame[: header.bits_offset] + b"\x08" + frame[header.bits_offset + 1 :]
        stored_HW = simplejpeg.decode_jpeg(as_8_bit, colorspace="GRAY", strict=True)[..., 0]
        if header.bits != 8:
            stored_HW = imagecodecs.jpeg8_decode(frame)
    except Exception as error:  # imagecodecs raises errors of its own types
        raise tags.unreadable("PixelData", f"cannot be decoded as {syntax.name}", error) from error
    return _of_stored_bits(np.asarray(stored_HW), layout)


def _by_jpeg_ls(frame: bytes, syntax: Any, layout: Layout) -> npt.NDArray[Any]:
    try:
        stored_HW = imagecodecs.jpegls_decode(frame)
    except Exception as error:  # imagecodecs raises errors of its own types
        raise tags.unreadable("PixelData", f"cannot be decoded as {syntax.name}", error) from error
    return _of_stored_bits(np.asarray(stored_HW), layout)


def _by_rle(frame: bytes, layout: Layout) -> npt.NDArray[Any]:
    """Decode RLE (PS3.5 G): one segment per byte of the values, the highest byte first.

    Segment by segment, to compare the number of pixels with Rows and Columns: other decoders accept a longer frame.
    """
    count, *offsets = struct.unpack_from("<16L", frame.ljust(64, b"\0"))
    bounds = [*offsets[:count], len(frame)]
    if count != layout.bits_allocated // 8 or bounds[0] != 64 or sorted(set(bounds)) != bounds:
        raise tags.unreadable("PixelData", f"holds an RLE header that does not fit {layout.bits_allocated} bits")
    need = layout.rows * layout.columns
    stored_HW = np.zeros((layout.rows, layout.columns), dtype=f"u{count}")
    for begin, end in pairwise(bounds):
        try:
            segment = np.frombuffer(decode_segment(frame[begin:end]), dtype=np.uint8)
        except ValueError as error:
            raise tags.unreadable("PixelData", "cannot be decoded as RLE Lossless", error) from error
        if not need <= len(segment) <= need + 1:  # padding of a segment can look like one more pixel
            sizes = f"{len(segment)} pixels, not {layout.rows} x {layout.columns}"
            raise tags.unreadable("PixelData", f"holds an RLE segment of {sizes}: its Rows or Columns are wrong")
        stored_HW = (stored_HW << 8 if count > 1 else stored_HW) | segment[:need].reshape(stored_HW.shape)
    return _of_stored_bits(stored_HW, layout)


def _of_stored_bits(code_HW: npt.NDArray[Any], layout: Layout) -> npt.NDArray[Any]:
    """Unsigned values -> values with the file's sign, without the unused high bits (PS3.5 8.1.1)."""
    unused = 8 * code_HW.itemsize - layout.bits_stored
    kind = f"{'i' if layout.pixel_representation else 'u'}{code_HW.itemsize}"
    value_HW: npt.NDArray[Any] = code_HW.view(kind) if unused == 0 else (code_HW << unused).view(kind) >> unused
    return value_HW


def _by_plugin(pixels: bytes, vr: str, plugin: str, syntax: Any, layout: Layout) -> npt.NDArray[Any]:
    """Decode with pydicom and the named decoder ("" for pixels that are not encoded)."""
    try:
        with tags.silence_pydicom():
            stored_HW, _ = get_decoder(syntax).as_array(
                pixels,
                index=0,
                raw=True,
                validate=False,  # checked above, with errors instead of warnings
                decoding_plugin=plugin,
                samples_per_pixel=1,
                number_of_frames=1,
                photometric_interpretation="MONOCHROME2",
                pixel_keyword="PixelData",
                pixel_vr=vr,
                **asdict(layout),
            )
    except Exception as error:  # each decoder raises errors of its own types
        raise tags.unreadable("PixelData", f"cannot be decoded as {syntax.name}", error) from error
    return np.ascontiguousarray(stored_HW, dtype=stored_HW.dtype.newbyteorder("="))
