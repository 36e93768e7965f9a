"""The PixelData of a DICOM file -> stored values, or a one-line reason why not.

Decoders are lenient: most fill the missing half of a cut frame with grey. So a frame is first held against what the
file says of it (transfer syntax, markers, rows, columns, length) and only then decoded, each transfer syntax by one
named decoder, so that what else happens to be installed changes no pixel.
"""

from __future__ import annotations

import struct
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
from pydicom import uid
from pydicom.datadict import tag_for_keyword
from pydicom.encaps import generate_fragments
from pydicom.pixels import get_decoder
from pydicom.tag import Tag

from cxrscale.schema import Unreadable

NATIVE = (
    uid.ImplicitVRLittleEndian,
    uid.ExplicitVRLittleEndian,
    uid.DeflatedExplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
)
"""Transfer syntaxes whose pixels are not encoded."""

ENCODED: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    uid.JPEGBaseline8Bit: ((0xC0,), ()),
    uid.JPEGExtended12Bit: ((0xC0, 0xC1), ("pylibjpeg",)),
    uid.JPEGLossless: ((0xC3,), ("gdcm", "pylibjpeg")),
    uid.JPEGLosslessSV1: ((0xC3,), ("gdcm", "pylibjpeg")),
    uid.JPEGLSLossless: ((0xF7,), ("pyjpegls",)),
    uid.JPEGLSNearLossless: ((0xF7,), ("pyjpegls",)),
    uid.JPEG2000Lossless: ((), ("pylibjpeg",)),
    uid.JPEG2000: ((), ("pylibjpeg",)),
    uid.HTJ2KLossless: ((), ("pylibjpeg",)),
    uid.HTJ2KLosslessRPCL: ((), ("pylibjpeg",)),
    uid.HTJ2K: ((), ("pylibjpeg",)),
    uid.RLELossless: ((), ("pylibjpeg",)),
}
"""Transfer syntax -> the JPEG frame markers that it allows, and pydicom's names of the decoders, the first that is
installed. JPEG of 8 bits goes to simplejpeg instead, which is strict. pylibjpeg decodes JPEG only where the user has
added its GPL plugin."""

_GDCM = "install python-gdcm, or decompress the file with DCMTK's dcmdjpeg"
_REMEDY: dict[str, str] = {
    uid.JPEGExtended12Bit: "decompress the file with DCMTK's dcmdjpeg",
    uid.JPEGLossless: _GDCM,
    uid.JPEGLosslessSV1: _GDCM,
}


@dataclass(frozen=True, slots=True)
class Layout:
    """What the Image Pixel module (PS3.3 C.7.6.3) says of one grey picture. The names are the decoders' own."""

    rows: int
    columns: int
    bits_allocated: int
    """8 or 16."""
    bits_stored: int
    """1 to bits_allocated."""
    pixel_representation: int
    """1 where stored values are signed."""


def named(keyword: str) -> str:
    """A tag as reasons name it: `Rows (0028,0010)`."""
    return f"{keyword} {Tag(tag_for_keyword(keyword))}"


def one_line(error: Exception) -> str:
    """An error of somebody else's code, as part of a reason."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(": ")


def decode(pixels: bytes, vr: str, syntax: Any, layout: Layout) -> tuple[npt.NDArray[Any], bytes | None]:
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
        Unreadable: the frame is cut short, is not one frame, is not what `layout` or `syntax` say, or no decoder for it
            is installed.
    """
    if syntax not in ENCODED:
        need = layout.rows * layout.columns * layout.bits_allocated // 8
        if not need <= len(pixels) <= need + need % 2:
            shape = f"{layout.rows} x {layout.columns} values of {layout.bits_allocated} bits"
            raise Unreadable(
                f"{named('PixelData')} holds {len(pixels)} bytes, but {shape} take {need}: the file is cut short, or "
                "its Rows or Columns are wrong"
            )
        return _by_plugin(pixels, vr, "", syntax, layout), None
    markers, plugins = ENCODED[syntax]
    frame = _frame(pixels, syntax)
    precision = _check(frame, syntax, markers, layout)
    if markers and markers != (0xF7,) and precision == 8:
        return _by_simplejpeg(frame, syntax, layout), frame
    available = get_decoder(syntax).available_plugins
    plugin = next((name for name in plugins if name in available), None)
    if plugin is None:
        raise Unreadable(
            f"{named('TransferSyntaxUID')} is {syntax.name} with {precision} bits, which nothing installed decodes: "
            f"{_REMEDY.get(syntax, 'install ' + ' or '.join(plugins))}"
        )
    return _by_plugin(pixels, vr, plugin, syntax, layout), frame


def _frame(pixels: bytes, syntax: Any) -> bytes:
    """The one frame of encapsulated pixels (PS3.5 A.4), which begins and ends as its transfer syntax says."""
    try:
        fragments = list(generate_fragments(pixels))[1:]  # the first item is the offset table
    except Exception as error:  # damaged bytes make a parser raise nearly anything
        raise Unreadable(f"{named('PixelData')} is cut short or not encapsulated: {one_line(error)}") from error
    if not fragments:
        raise Unreadable(f"{named('PixelData')} holds no frame")
    if syntax == uid.RLELossless:
        begins = len(fragments)  # a frame is one fragment there (PS3.5 A.4.2)
        frame = bytes(fragments[0])
    else:
        magic = b"\xff\x4f\xff\x51" if syntax in uid.JPEG2000TransferSyntaxes else b"\xff\xd8\xff"
        begins = sum(fragment.startswith(magic) for fragment in fragments)
        frame = b"".join(fragments).rstrip(b"\0")
        if not frame.startswith(magic):
            told = f"but the frame begins with {frame[:4].hex()}, not {magic.hex()}"
            raise Unreadable(f"{named('TransferSyntaxUID')} is {syntax.name}, {told}")
        if not frame.endswith(b"\xff\xd9"):
            raise Unreadable(f"{named('PixelData')} is cut short: its {syntax.name} frame lacks the end marker FFD9")
    if begins > 1:
        raise Unreadable(f"{named('PixelData')} holds {begins} frames, not one picture: split the file")
    return frame


def _check(frame: bytes, syntax: Any, markers: tuple[int, ...], layout: Layout) -> int:
    """Hold the frame's own header against the file's; returns its bits a value (RLE's header does not say).

    Decoders check the number of pixels at most: a frame of 64 x 32 would pass for one of 32 x 64.
    """
    try:
        if syntax == uid.RLELossless:
            _check_rle(frame, layout)
            return layout.bits_stored
        if markers:
            marker, precision, rows, columns, components = _jpeg_header(frame)
            if marker not in markers:
                raise Unreadable(f"{named('TransferSyntaxUID')} is {syntax.name}, but the frame is JPEG FF{marker:02X}")
        else:
            precision, rows, columns, components = _jpeg2000_header(frame)
    except (struct.error, IndexError):
        raise Unreadable(f"{named('PixelData')} holds a {syntax.name} frame that is cut short or damaged") from None
    if (rows, columns) != (layout.rows, layout.columns):
        told = f"{layout.rows} x {layout.columns}, but the frame is {rows} x {columns}"
        raise Unreadable(f"{named('Rows')} x {named('Columns')} is {told}")
    if components != 1:
        raise Unreadable(f"{named('PixelData')} holds a frame of {components} components: colour, not grey")
    if precision > layout.bits_allocated:
        raise Unreadable(f"{named('BitsAllocated')} is {layout.bits_allocated}, but the frame holds {precision} bits")
    return precision


def _check_rle(frame: bytes, layout: Layout) -> None:
    """The RLE header (PS3.5 G.5): one segment a byte of the value, each beginning behind the one before."""
    count, *offsets = struct.unpack_from("<16L", frame)
    bounds = [*offsets[:count], len(frame)]
    if count != layout.bits_allocated // 8 or bounds[0] != 64 or sorted(set(bounds)) != bounds:
        raise Unreadable(f"{named('PixelData')} holds an RLE header that does not fit {layout.bits_allocated} bits")


def _jpeg_header(frame: bytes) -> tuple[int, int, int, int, int]:
    """(marker, bits a value, rows, columns, components) of the frame header (ITU-T T.81 B.2.2, T.87 C.2.2)."""
    at = 2
    while frame[at] == 0xFF:
        marker = frame[at + 1]
        if marker == 0xFF:  # fill bytes may stand before any marker
            at += 1
            continue
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            precision, rows, columns, components = struct.unpack_from(">BHHB", frame, at + 4)
            return marker, precision, rows, columns, components
        at += 2 + struct.unpack_from(">H", frame, at + 2)[0]
    raise IndexError(at)


def _jpeg2000_header(frame: bytes) -> tuple[int, int, int, int]:
    """(bits a value, rows, columns, components) of a codestream (ITU-T T.800 A.5.1) that is whole.

    Every tile-part tells its length (A.4.2); one that is shorter decodes silently, to a picture that is partly smooth.
    """
    right, bottom, left, top = struct.unpack_from(">4I", frame, 8)
    components, precision = struct.unpack_from(">HB", frame, 40)
    at = 2
    while frame[at : at + 2] != b"\xff\xd9":
        length = 2 + struct.unpack_from(">H", frame, at + 2)[0]
        if frame[at + 1] == 0x90:  # a tile-part; length 0 means up to the end marker
            length = struct.unpack_from(">I", frame, at + 6)[0] or len(frame) - 2 - at
        if frame[at] != 0xFF or length < 4:
            raise IndexError(at)
        at += length
    return (precision & 0x7F) + 1, bottom - top, right - left, components


def _by_simplejpeg(frame: bytes, syntax: Any, layout: Layout) -> npt.NDArray[Any]:
    """JPEG of 8 bits, lossy or lossless. Strict: a cut or damaged scan, at which others only warn, is an error."""
    if layout.bits_stored != 8:
        raise Unreadable(f"{named('BitsStored')} is {layout.bits_stored}, but the {syntax.name} frame holds 8 bits")
    try:
        stored_HW1 = simplejpeg.decode_jpeg(frame, colorspace="GRAY", strict=True)
    except ValueError as error:
        raise Unreadable(f"{named('PixelData')} cannot be decoded as {syntax.name}: {one_line(error)}") from error
    stored_HW: npt.NDArray[Any] = stored_HW1[..., 0].view(np.int8 if layout.pixel_representation else np.uint8)
    return stored_HW


def _by_plugin(pixels: bytes, vr: str, plugin: str, syntax: Any, layout: Layout) -> npt.NDArray[Any]:
    """Everything else: pydicom with the decoder of that name ("" for pixels that are not encoded)."""
    try:
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
        raise Unreadable(f"{named('PixelData')} cannot be decoded as {syntax.name}: {one_line(error)}") from error
    return np.ascontiguousarray(stored_HW, dtype=stored_HW.dtype.newbyteorder("="))
