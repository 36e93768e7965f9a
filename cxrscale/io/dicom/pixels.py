"""The PixelData of a DICOM file -> stored values, or a one-line reason why not.

Decoders are lenient: most fill the missing half of a cut frame with gray. So a frame is first held against what the
file says of it (transfer syntax, markers, rows, columns, length) and only then decoded, each transfer syntax by one
named decoder, so that what else happens to be installed changes no pixel.
"""

from __future__ import annotations

import importlib
import struct
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
from pydicom import uid
from pydicom.encaps import generate_fragments
from pydicom.pixels import get_decoder
from rle.utils import decode_segment  # type: ignore[attr-defined]  # it re-exports without saying so

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
    uid.JPEGLSLossless: ((0xF7,), "pyjpegls"),
    uid.JPEGLSNearLossless: ((0xF7,), "pyjpegls"),
    uid.JPEG2000Lossless: ((), "pylibjpeg"),
    uid.JPEG2000: ((), "pylibjpeg"),
    uid.HTJ2KLossless: ((), "pylibjpeg"),
    uid.HTJ2KLosslessRPCL: ((), "pylibjpeg"),
    uid.HTJ2K: ((), "pylibjpeg"),
    uid.RLELossless: ((), ""),
}
"""Transfer syntax -> the JPEG frame markers that it allows, and pydicom's name of the decoder, "" where a decoder is
called without pydicom."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What the Image Pixel module (PS3.3 C.7.6.3) says of one gray image. The names are the decoders' own."""

    rows: int
    columns: int
    bits_allocated: int
    """8 or 16."""
    bits_stored: int
    """1 to bits_allocated."""
    pixel_representation: int
    """1 where stored values are signed."""


@dataclass(frozen=True, slots=True)
class _Header:
    """What a frame says of itself."""

    bits: int
    rows: int
    columns: int
    components: int
    at: int
    """Where the byte stands that holds `bits`."""


def decode_frame(pixels: bytes, vr: str, syntax: Any, layout: Layout) -> tuple[npt.NDArray[Any], bytes | None]:
    """Decode the one frame of a PixelData element.

    Args:
        pixels: the element's value.
        vr: its value representation, OB or OW.
        syntax: the file's TransferSyntaxUID, one of `ENCODED` or `NATIVE`.
        layout: what the file says of the frame.

    Returns:
        Stored values, (rows, columns), uint8, int8, uint16 or int16 as signedness and size ask for; and the encoded
        frame without the padding behind its end marker, None where the pixels are not encoded.

    Raises:
        UnreadableImageError: the frame is cut short, is not one frame, is not what `layout` or `syntax` say, or no decoder for it
            is installed.
    """
    if syntax not in ENCODED:
        need = layout.rows * layout.columns * layout.bits_allocated // 8
        if not need <= len(pixels) <= need + need % 2:
            shape = f"{layout.rows} x {layout.columns} values of {layout.bits_allocated} bits"
            raise tags.wrong(
                "PixelData",
                f"holds {len(pixels)} bytes, but {shape} take {need}: the file is cut short, or "
                "its Rows or Columns are wrong",
            )
        return _by_plugin(pixels, vr, "", syntax, layout), None
    markers, plugin = ENCODED[syntax]
    frame = _frame(pixels, syntax)
    if syntax == uid.RLELossless:
        return _by_rle(frame, layout), frame
    head = _header(frame, syntax, markers)
    _check(head, layout)
    if plugin:
        return _by_plugin(pixels, vr, plugin, syntax, layout), frame
    return _by_jpeg(frame, head, syntax, layout), frame


def _frame(pixels: bytes, syntax: Any) -> bytes:
    """The one frame of encapsulated pixels (PS3.5 A.4), which begins and ends as its transfer syntax says."""
    try:
        fragments = list(generate_fragments(pixels))[1:]  # the first item is the offset table
    except Exception as error:  # damaged bytes make a parser raise nearly anything
        raise tags.wrong("PixelData", f"is cut short or not encapsulated: {tags.one_line(error)}") from error
    if not fragments:
        raise tags.wrong("PixelData", "holds no frame")
    if syntax == uid.RLELossless:
        begins = len(fragments)  # a frame is one fragment there (PS3.5 G.2)
        frame = bytes(fragments[0])
    else:
        magic = b"\xff\x4f\xff\x51" if syntax in uid.JPEG2000TransferSyntaxes else b"\xff\xd8\xff"
        begins = sum(fragment.startswith(magic) for fragment in fragments)
        frame = b"".join(fragments).rstrip(b"\0\xff")  # some pad with FF
        if not frame.startswith(magic):
            told = f"but the frame begins with {frame[:4].hex()}, not {magic.hex()}"
            raise tags.wrong("TransferSyntaxUID", f"is {syntax.name}, {told}")
        if not frame.endswith(b"\xff\xd9"):
            raise tags.wrong("PixelData", f"is cut short: its {syntax.name} frame lacks the end marker FFD9")
    if begins > 1:
        raise tags.wrong("PixelData", f"holds {begins} frames, not one image: split the file")
    return frame


def _header(frame: bytes, syntax: Any, markers: tuple[int, ...]) -> _Header:
    try:
        if not markers:
            return _jpeg2000_header(frame)
        marker, head = _jpeg_header(frame)
    except (struct.error, IndexError):
        raise tags.wrong("PixelData", f"holds a {syntax.name} frame that is cut short or damaged") from None
    if marker not in markers:
        raise tags.wrong("TransferSyntaxUID", f"is {syntax.name}, but the frame is JPEG FF{marker:02X}")
    return head


def _check(head: _Header, layout: Layout) -> None:
    """Decoders check the number of pixels at most: a frame of 64 x 32 would pass for one of 32 x 64."""
    if (head.rows, head.columns) != (layout.rows, layout.columns):
        told = f"{layout.rows} x {layout.columns}, but the frame is {head.rows} x {head.columns}"
        raise tags.wrong("Rows", f"x {tags.named('Columns')} is {told}")
    if head.components != 1:
        raise tags.wrong("PixelData", f"holds a frame of {head.components} components: color, not gray")
    if head.bits > layout.bits_allocated:
        raise tags.wrong("BitsAllocated", f"is {layout.bits_allocated}, but the frame holds {head.bits} bits")


def _jpeg_header(frame: bytes) -> tuple[int, _Header]:
    """The frame header of JPEG and JPEG-LS (ITU-T T.81 B.2.2, T.87 C.2.2), and the second byte of its marker."""
    at = 2
    while frame[at] == 0xFF:
        marker = frame[at + 1]
        if marker == 0xFF:  # fill bytes may stand before any marker
            at += 1
            continue
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            bits, rows, columns, components = struct.unpack_from(">BHHB", frame, at + 4)
            return marker, _Header(bits, rows, columns, components, at=at + 4)
        at += 2 + struct.unpack_from(">H", frame, at + 2)[0]
    raise IndexError(at)


def _jpeg2000_header(frame: bytes) -> _Header:
    """The SIZ segment of a JPEG 2000 codestream (ITU-T T.800 A.5.1) that is whole.

    Every tile-part tells its length (A.4.2); one that is shorter decodes silently, to an image that is partly smooth.
    """
    right, bottom, left, top = struct.unpack_from(">4I", frame, 8)
    components, bits = struct.unpack_from(">HB", frame, 40)
    at = 2
    while frame[at : at + 2] != b"\xff\xd9":
        length = 2 + struct.unpack_from(">H", frame, at + 2)[0]
        if frame[at + 1] == 0x90:  # a tile-part; length 0 means up to the end marker
            length = struct.unpack_from(">I", frame, at + 6)[0] or len(frame) - 2 - at
        if frame[at] != 0xFF or length < 4:
            raise IndexError(at)
        at += length
    return _Header((bits & 0x7F) + 1, bottom - top, right - left, components, at=42)


def _by_jpeg(frame: bytes, head: _Header, syntax: Any, layout: Layout) -> npt.NDArray[Any]:
    """JPEG of 8 bits by simplejpeg, of 9 to 16 (Extended, Lossless) by imagecodecs, which is optional and lenient.

    So simplejpeg reads those first, told that they are of 8 bits. The codes of a scan do not depend on the bits a value
    (ITU-T T.81 F.2.2, H.2): it meets all of them, and refuses a scan that is cut or damaged. The values that it makes
    of them are of no use.
    """
    if (head.bits == 8) != (layout.bits_stored == 8):
        raise tags.wrong("BitsStored", f"is {layout.bits_stored}, but the {syntax.name} frame holds {head.bits} bits")
    try:
        of_8_bits = frame[: head.at] + b"\x08" + frame[head.at + 1 :]
        stored_HW = simplejpeg.decode_jpeg(of_8_bits, colorspace="GRAY", strict=True)[..., 0]
        if head.bits != 8:
            stored_HW = importlib.import_module("imagecodecs").jpeg8_decode(frame)
    except ImportError:
        raise tags.wrong(
            "TransferSyntaxUID",
            f"is {syntax.name} of {head.bits} bits: install imagecodecs, or decompress the file with DCMTK's dcmdjpeg",
        ) from None
    except Exception as error:  # imagecodecs has errors of its own
        raise tags.wrong("PixelData", f"cannot be decoded as {syntax.name}: {tags.one_line(error)}") from error
    return _of_stored_bits(np.asarray(stored_HW), layout)


def _by_rle(frame: bytes, layout: Layout) -> npt.NDArray[Any]:
    """RLE (PS3.5 G): a segment for each byte of the values, the highest first.

    By segment, because as many pixels as Rows and Columns ask for can be had from any frame that holds more.
    """
    count, *offsets = struct.unpack_from("<16L", frame.ljust(64, b"\0"))
    bounds = [*offsets[:count], len(frame)]
    if count != layout.bits_allocated // 8 or bounds[0] != 64 or sorted(set(bounds)) != bounds:
        raise tags.wrong("PixelData", f"holds an RLE header that does not fit {layout.bits_allocated} bits")
    need = layout.rows * layout.columns
    stored_HW = np.zeros((layout.rows, layout.columns), dtype=f"u{count}")
    for begin, end in pairwise(bounds):
        try:
            segment = np.frombuffer(decode_segment(frame[begin:end]), dtype=np.uint8)
        except ValueError as error:
            raise tags.wrong("PixelData", f"cannot be decoded as RLE Lossless: {tags.one_line(error)}") from error
        if not need <= len(segment) <= need + 1:  # padding of a segment can look like one more
            told = f"{len(segment)} pixels, not {layout.rows} x {layout.columns}: its Rows or Columns are wrong"
            raise tags.wrong("PixelData", f"holds an RLE segment of {told}")
        stored_HW = (stored_HW << 8 if count > 1 else stored_HW) | segment[:need].reshape(stored_HW.shape)
    return _of_stored_bits(stored_HW, layout)


def _of_stored_bits(code_HW: npt.NDArray[Any], layout: Layout) -> npt.NDArray[Any]:
    """Unsigned values -> values of the file's sign, without the bits above those that are stored (PS3.5 8.1.1)."""
    unused = 8 * code_HW.itemsize - layout.bits_stored
    kind = f"{'i' if layout.pixel_representation else 'u'}{code_HW.itemsize}"
    value_HW: npt.NDArray[Any] = code_HW.view(kind) if unused == 0 else (code_HW << unused).view(kind) >> unused
    return value_HW


def _by_plugin(pixels: bytes, vr: str, plugin: str, syntax: Any, layout: Layout) -> npt.NDArray[Any]:
    """Everything else: pydicom with the decoder of that name ("" for pixels that are not encoded)."""
    try:
        with tags.quiet():
            stored_HW, _ = get_decoder(syntax).as_array(
                pixels,
                index=0,
                raw=True,
                validate=False,  # done above, with reasons instead of warnings
                decoding_plugin=plugin,
                samples_per_pixel=1,
                number_of_frames=1,
                photometric_interpretation="MONOCHROME2",
                pixel_keyword="PixelData",
                pixel_vr=vr,
                **asdict(layout),
            )
    except Exception as error:  # each decoder has errors of its own
        raise tags.wrong("PixelData", f"cannot be decoded as {syntax.name}: {tags.one_line(error)}") from error
    return np.ascontiguousarray(stored_HW, dtype=stored_HW.dtype.newbyteorder("="))
