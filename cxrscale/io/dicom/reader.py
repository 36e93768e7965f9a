"""DICOM file -> upright gray image with metadata, or a one-line reason why the file is unreadable.

`pixels` decodes the pixel data into stored values, `grayscale` turns stored values into gray values; this module parses
the file, reads its metadata and calls the two in the order of the checks.
"""

from __future__ import annotations

import io
import math
import re
import zlib
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom import uid
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_dataset, read_preamble

from cxrscale.io import limits
from cxrscale.io.dicom import grayscale, tags
from cxrscale.io.dicom.pixels import ENCODED, NATIVE, Layout, decode_frame
from cxrscale.io.gray_levels import StoredImage, look_up
from cxrscale.io.strictness import FormalFaults, Strictness
from cxrscale.types import GrayImage, UnreadableImageError, one_line

MAX_AGE = 120
"""Years; NIH and SIIM hold ages such as 412."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DicomHeader:
    """The metadata of an image."""

    sop_uid: str
    """SOPInstanceUID: the unique id of the image; empty if it is missing and the file was read leniently."""
    patient_id: str | None
    """PatientID as written, or None if empty. In SIIM it differs from file to file and identifies nobody."""
    sex: str | None
    """F or M, or None."""
    age: int | None
    """Age in full years, 0 to 120, or None if unknown or impossible."""
    view: str | None
    """PA or AP, or None if unknown or another view (lateral, oblique)."""
    spacing_mm: tuple[float, float] | None
    """Distance between (rows, columns) in millimeters: in the patient, else at the detector; None if not given."""
    burned_in: bool
    """Whether BurnedInAnnotation says that the pixels show text that identifies the patient."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DicomImage(DicomHeader):
    """An image with its metadata."""

    image_HW: GrayImage
    """(H, W) uint8: 0 black, bone bright. Rows and columns as stored."""
    jpeg: bytes | None
    """The file's own JPEG frame if it shows exactly `image_HW` (JPEG Baseline, unchanged gray values), else None."""
    warnings: tuple[str, ...] = ()
    """The faults of the file that a lenient reading accepted, one line each."""


def read_dicom(data: bytes, *, force: bool = False, strictness: Strictness = Strictness.STRICT) -> DicomImage:
    """Read a single-frame monochrome DICOM file.

    The first of several windows is used. A VOI LUT takes precedence over a window. Whether to invert is decided by
    PresentationLUTShape if present, else by PhotometricInterpretation.

    Without a window and a VOI LUT, the standard's identity maps the range of the stored bits to 0..255: 8-bit images
    are unchanged, 12-bit values are divided by 4095/255. One exception: writers that do not know the number of bits
    declare 16, so with 16 stored bits the range is that of the fewest bits (at least 8) that hold the image's values,
    without its padding. Then 12-bit values declared as 16 bits look as if declared as 12 bits, instead of using only 16
    gray levels.

    Args:
        data: the complete file.
        force: accept a file without the 128-byte preamble and 'DICM'.
        strictness: what to do with a file that breaks a rule although its gray values are certain; `io.strictness` has
            the list.

    Returns:
        The image, 8-bit with bright bone, and its metadata.

    Raises:
        UnreadableImageError: not DICOM, truncated, color, several frames, a frame that does not match the header or
            takes too much memory, or a transfer syntax without a decoder; one line with the tag and its value.
    """
    faults = FormalFaults(strictness)
    found = _decode(data, force, faults)
    gray_C = grayscale.gray_table(found.stored_HW, found.layout, found.transform)
    code_HW: npt.NDArray[Any] = found.stored_HW.view(f"u{found.stored_HW.itemsize}")
    unchanged = len(gray_C) == 256 and np.array_equal(gray_C, np.arange(256))
    return DicomImage(
        **asdict(found.header),
        image_HW=code_HW if unchanged else look_up(gray_C, code_HW),
        jpeg=found.frame if unchanged and found.syntax == uid.JPEGBaseline8Bit and not faults.messages else None,
        warnings=tuple(faults.messages),
    )


def read_stored(data: bytes, *, force: bool = False, strictness: Strictness = Strictness.STRICT) -> StoredImage | None:
    """The image of a DICOM file before its window; None where it is stored in 8 bits or fewer.

    Args, raises: as `read_dicom`, whose gray values its window gives.
    """
    found = _decode(data, force, FormalFaults(strictness))
    if found.layout.bits_stored <= 8 or found.stored_HW.itemsize == 1:
        return None
    return grayscale.stored_image(found.stored_HW, found.layout, found.transform)


@dataclass(frozen=True, slots=True, eq=False)
class _Decoded:
    """A file's stored values, and what they mean."""

    header: DicomHeader
    syntax: Any
    layout: Layout
    transform: grayscale.GrayTransform
    stored_HW: npt.NDArray[Any]
    frame: bytes | None


def _decode(data: bytes, force: bool, faults: FormalFaults) -> _Decoded:
    with tags.silence_pydicom():
        ds = _parse(io.BytesIO(data), force=force, stop_before_pixels=False)
        header = _header(ds, faults)
        syntax = _syntax(ds, force=force)
        layout = _layout(ds, faults)
        transform = grayscale.read_transform(
            ds, signed=layout.pixel_representation == 1, big_endian=syntax == uid.ExplicitVRBigEndian
        )
        pixels, vr = _pixels(ds, syntax)
    stored_HW, frame = decode_frame(pixels, vr, syntax, layout, faults)
    return _Decoded(header, syntax, layout, transform, stored_HW, frame)


def read_header(source: bytes | BinaryIO, *, force: bool = False) -> DicomHeader:
    """Read only the metadata of an image, which takes a third of a millisecond.

    Args:
        source: the file's bytes, or the open file, of which only the beginning is read.
        force: accept a file without the 128-byte preamble and 'DICM'.

    Returns:
        The metadata. Tags that are absent, empty or malformed are None.

    Raises:
        UnreadableImageError: not DICOM, or without SOPInstanceUID. The pixels are not checked.
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    with tags.silence_pydicom():
        return _header(_parse(file, force=force, stop_before_pixels=True), FormalFaults())


def _parse(file: BinaryIO, *, force: bool, stop_before_pixels: bool) -> Any:
    try:
        ds = pydicom.dcmread(_inflated(file, force=force), force=force, stop_before_pixels=stop_before_pixels)
    except UnreadableImageError:
        raise
    except InvalidDicomError:
        raise UnreadableImageError("not a DICOM file: 'DICM' is missing at byte 128") from None
    except Exception as error:  # damaged bytes can make the parser raise any error
        raise UnreadableImageError(f"DICOM cannot be parsed: {one_line(error, with_type=True, limit=200)}") from error
    if len(ds) == 0:
        raise UnreadableImageError("not a DICOM file, or truncated: it holds no tag")
    return ds


def _inflated(file: BinaryIO, *, force: bool) -> BinaryIO:
    """The file itself; or a deflated one (PS3.5 A.5) as if it had never been, because pydicom inflates without limit.

    The inflated file is in memory three times: here, as the value of PixelData, and as the image.
    """
    name = uid.DeflatedExplicitVRLittleEndian.encode()
    if isinstance(file, io.BytesIO) and name not in file.getvalue():  # spares 2% of reading a file of 1 megapixel
        return file
    read_preamble(file, force)
    meta = read_dataset(file, is_implicit_VR=False, is_little_endian=True, stop_when=_is_behind_meta)
    start = file.tell()
    file.seek(0)
    if meta.get("TransferSyntaxUID") != uid.DeflatedExplicitVRLittleEndian:
        return file
    head, deflated = file.read(start), file.read()
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    most = limits.MAX_BYTES // 3
    plain = inflate.decompress(deflated, most)
    if inflate.unconsumed_tail:
        raise tags.unreadable(
            "TransferSyntaxUID", f"is Deflated, and {len(deflated):,} bytes inflate to over {most >> 20} MiB"
        )
    if not inflate.eof:
        raise UnreadableImageError("DICOM is truncated: its deflated part lacks its end")
    # Both names are padded to the same even length.
    return io.BytesIO(head.replace(name, uid.ExplicitVRLittleEndian.encode().ljust(len(name), b"\0"), 1) + plain)


def read_tags(data: bytes) -> Any:
    """The tags before the pixels as pydicom holds them: any of them may be missing or malformed.

    Args:
        data: the complete file; one without preamble is accepted.

    Returns:
        A pydicom.Dataset. Take its values with `tags`, which knows what malformed ones raise.

    Raises:
        UnreadableImageError: not DICOM.
    """
    with tags.silence_pydicom():
        return _parse(io.BytesIO(data), force=data[128:132] != b"DICM", stop_before_pixels=True)


def _is_behind_meta(tag: Any, _vr: Any, _length: Any) -> bool:
    return bool(tag.group != 2)


def _header(ds: Any, faults: FormalFaults) -> DicomHeader:
    sop_uid = tags.text(ds, "SOPInstanceUID")
    if not sop_uid:
        faults.add(tags.unreadable("SOPInstanceUID", "is missing: the image has no id"))
    sex = tags.text(ds, "PatientSex").upper()
    view = tags.text(ds, "ViewPosition").upper()
    if not view:  # SIIM writes it in both tags
        match = re.search(r"view:\s*(\w+)", tags.text(ds, "SeriesDescription"), re.IGNORECASE)
        view = match[1].upper() if match else ""
    spacings = (_spacing(ds, tag) for tag in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"))
    return DicomHeader(
        sop_uid=sop_uid,
        patient_id=tags.text(ds, "PatientID") or None,
        sex=sex if sex in ("F", "M") else None,
        age=_years(tags.text(ds, "PatientAge")),
        view=view if view in ("PA", "AP") else None,
        spacing_mm=next((spacing for spacing in spacings if spacing), None),
        burned_in=tags.text(ds, "BurnedInAnnotation").upper() == "YES",
    )


def _years(text: str) -> int | None:
    """Full years of an age string (PS3.5 6.2, AS): 062Y, 018M, 003W, 010D; a plain 62, as in SIIM, means years."""
    match = re.fullmatch(r"([0-9]{1,4})([YMWD]?)", text.upper())
    if match is None:
        return None
    age = int(match[1]) // {"": 1, "Y": 1, "M": 12, "W": 52, "D": 365}[match[2]]
    return age if age <= MAX_AGE else None


def _spacing(ds: Any, keyword: str) -> tuple[float, float] | None:
    try:
        rows, columns = (float(value) for value in tags.value(ds, keyword) or ())
    except (UnreadableImageError, TypeError, ValueError):
        return None
    return (rows, columns) if 0 < rows < math.inf and 0 < columns < math.inf else None


def _syntax(ds: Any, *, force: bool) -> Any:
    """The transfer syntax, which is a supported one."""
    syntax = getattr(ds, "file_meta", {}).get("TransferSyntaxUID")
    if not syntax and force:  # no file meta information: the pixels are not encoded, the tags show the byte order
        syntax = uid.ExplicitVRLittleEndian if ds.original_encoding[1] else uid.ExplicitVRBigEndian
    if not isinstance(syntax, uid.UID) or not syntax:
        raise tags.unreadable("TransferSyntaxUID", "is missing or malformed, so the encoding of the pixels is unknown")
    if syntax not in ENCODED and syntax not in NATIVE:
        raise tags.unreadable(
            "TransferSyntaxUID", f"is {syntax.name[:64]!r}: convert the file, e.g. with gdcmconv --raw"
        )
    return syntax


def _layout(ds: Any, faults: FormalFaults) -> Layout:
    """The Image Pixel module (PS3.3 C.7.6.3); only one gray image of 8 or 16 bits is accepted."""
    photometric = tags.text(ds, "PhotometricInterpretation")
    if not photometric:
        raise tags.unreadable("PhotometricInterpretation", "is missing")
    if photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise tags.unreadable("PhotometricInterpretation", f"is {photometric[:40]!r}, not MONOCHROME1 or MONOCHROME2")
    tags.integer(ds, "SamplesPerPixel", (1,), "1: color, not gray")
    # 0 is what some writers of single images put there; the pixels are checked to be one frame.
    tags.integer(ds, "NumberOfFrames", (0, 1), "1: split the file into images", default=1)
    for keyword in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        if keyword in ds:
            raise tags.unreadable(keyword, "is present: this is an enhanced multi-frame object; split it into images")
    allocated = tags.integer(ds, "BitsAllocated", (8, 16), "8 or 16")
    stored = tags.integer(ds, "BitsStored", range(1, allocated + 1), f"1 to BitsAllocated = {allocated}")
    expected = f"BitsStored - 1 = {stored - 1}"
    high_bit = tags.integer(
        ds, "HighBit", range(stored - 1, allocated if faults.lenient else stored), expected, default=stored - 1
    )
    if high_bit >= stored:
        faults.add(tags.unreadable("HighBit", f"is {high_bit}, not {expected}: the values are stored shifted"))
    signed = tags.integer(ds, "PixelRepresentation", (0, 1), "0 or 1")
    rows = tags.integer(ds, "Rows", range(1, 1 << 16), "1 to 65535")
    columns = tags.integer(ds, "Columns", range(1, 1 << 16), "1 to 65535")
    if rows * columns > limits.MAX_PIXELS:
        raise tags.unreadable(
            "Rows", f"x {tags.label('Columns')} is {rows} x {columns}: over {limits.MAX_PIXELS:,} pixels"
        )
    return Layout(rows, columns, allocated, stored, high_bit, signed)


def _pixels(ds: Any, syntax: Any) -> tuple[bytes, str]:
    """The value and VR of PixelData, which is encapsulated if and only if its transfer syntax is an encoded one."""
    pixels = tags.value(ds, "PixelData")
    if pixels is None:
        raise tags.unreadable("PixelData", "is missing: the file holds no image, or is truncated")
    element = ds["PixelData"]
    if bool(element.is_undefined_length) != (syntax in ENCODED):
        actual = "encapsulated" if element.is_undefined_length else "not encapsulated"
        raise tags.unreadable("TransferSyntaxUID", f"is {syntax.name}, but {tags.label('PixelData')} is {actual}")
    return pixels, str(element.VR)
