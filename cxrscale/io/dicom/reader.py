"""DICOM file -> upright gray image, or a one-line reason why not.

`frames` turns the file's pixels into stored values, `tone` stored values into gray ones; here is what joins them: the
file itself, what its header says, and the order of the checks.
"""

from __future__ import annotations

import io
import math
import re
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom import uid
from pydicom.errors import InvalidDicomError

from cxrscale.io.dicom import grayscale, tags
from cxrscale.io.dicom.pixels import ENCODED, NATIVE, Layout, decode_frame
from cxrscale.types import GrayImage, UnreadableImageError

MAX_PIXELS = 100_000_000
"""Rows x Columns above this is a damaged header, not a detector (the largest have some 20 million pixels)."""

MAX_AGE = 120
"""Years; NIH and SIIM hold ages such as 412."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DicomHeader:
    """What a file says of its image."""

    sop_uid: str
    """SOPInstanceUID: the image's own name."""
    patient_id: str | None
    """PatientID as written, or None where empty. SIIM's differ from file to file and name nobody."""
    sex: str | None
    """F or M, or None."""
    age: int | None
    """Whole years, 0 to 120, or None where unknown or impossible."""
    view: str | None
    """PA or AP, or None where unknown or another (lateral, oblique)."""
    spacing_mm: tuple[float, float] | None
    """Millimeters between (rows, columns): in the patient, else at the detector; None where not given."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DicomImage(DicomHeader):
    """A file's header and its image."""

    image_HW: GrayImage
    """(H, W) uint8: 0 black, bone bright. Rows and columns as stored."""
    jpeg: bytes | None
    """The file's own JPEG frame, where that is the image as it stands: JPEG Baseline, no tone changed. Else None."""


def read_dicom(data: bytes, *, force: bool = False) -> DicomImage:
    """Read a single-frame monochrome DICOM file.

    Of several windows the first counts; a VOI LUT counts before a window; PresentationLUTShape, where present, says
    whether to invert, before PhotometricInterpretation does.

    A file with neither window nor VOI LUT is shown by the standard's identity: the range that the stored bits can hold
    becomes 0..255, so 8-bit images come out as they are and 12-bit ones divided by 4095/255. But where a file claims
    16 stored bits, which is what writers put who do not know, the fewest bits (8 at least) that hold the image's
    values are the range: 12-bit values under a 16-bit claim come out as under a 12-bit one, and not in 16 gray levels.
    The image's own minimum and maximum are no good for it: among ChestX-ray14's they would move the gray by 4 levels
    on average and by up to 59.

    Args:
        data: the whole file.
        force: accept a file without the 128-byte preamble and 'DICM'.

    Returns:
        The image, 8-bit and bone bright, with its header.

    Raises:
        UnreadableImageError: one line that names the tag and its value: not DICOM, cut short, color, several frames, a frame
            that is not what the header says, a transfer syntax without a decoder.
    """
    with tags.quiet():
        ds = _parse(io.BytesIO(data), force=force, stop_before_pixels=False)
        about = _describe(ds)
        syntax = _syntax(ds, force=force)
        layout = _layout(ds)
        way = grayscale.of(ds, signed=layout.pixel_representation == 1, big_endian=syntax == uid.ExplicitVRBigEndian)
        pixels, vr = _pixels(ds, syntax)
    stored_HW, frame = decode_frame(pixels, vr, syntax, layout)
    gray_C = grayscale.gray_table(stored_HW, layout, way)
    code_HW: npt.NDArray[Any] = stored_HW.view(f"u{stored_HW.itemsize}")
    unchanged = len(gray_C) == 256 and np.array_equal(gray_C, np.arange(256))
    return DicomImage(
        **asdict(about),
        # A code cannot lie outside the table; `clip` spares the check that raises.
        image_HW=code_HW if unchanged else gray_C.take(code_HW, mode="clip"),
        jpeg=frame if unchanged and syntax == uid.JPEGBaseline8Bit else None,
    )


def read_header(source: bytes | BinaryIO, *, force: bool = False) -> DicomHeader:
    """Read what a file says of its image and nothing behind it, in a third of a millisecond.

    Args:
        source: the file's bytes, or the file opened for reading, of which only the beginning is then read.
        force: accept a file without the 128-byte preamble and 'DICM'.

    Returns:
        The header. Tags that are absent, empty or malformed are None.

    Raises:
        UnreadableImageError: not DICOM, or without SOPInstanceUID. Whether the pixels can be read is not looked at.
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    with tags.quiet():
        return _describe(_parse(file, force=force, stop_before_pixels=True))


def _parse(file: BinaryIO, *, force: bool, stop_before_pixels: bool) -> Any:
    try:
        ds = pydicom.dcmread(file, force=force, stop_before_pixels=stop_before_pixels)
    except InvalidDicomError:
        raise UnreadableImageError("not a DICOM file: 'DICM' does not stand at byte 128") from None
    except Exception as error:  # damaged bytes make the parser raise nearly anything
        raise UnreadableImageError(f"DICOM cannot be parsed: {tags.one_line(error)}") from error
    if len(ds) == 0:
        raise UnreadableImageError("not a DICOM file, or cut short: it holds no tag")
    return ds


def _describe(ds: Any) -> DicomHeader:
    sop_uid = tags.text(ds, "SOPInstanceUID")
    if not sop_uid:
        raise tags.wrong("SOPInstanceUID", "is missing")
    sex = tags.text(ds, "PatientSex").upper()
    view = tags.text(ds, "ViewPosition").upper()
    if not view:  # SIIM writes it in both places
        found = re.search(r"view:\s*(\w+)", tags.text(ds, "SeriesDescription"), re.IGNORECASE)
        view = found[1].upper() if found else ""
    spacings = (_spacing(ds, tag) for tag in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"))
    return DicomHeader(
        sop_uid=sop_uid,
        patient_id=tags.text(ds, "PatientID") or None,
        sex=sex if sex in ("F", "M") else None,
        age=_years(tags.text(ds, "PatientAge")),
        view=view if view in ("PA", "AP") else None,
        spacing_mm=next((spacing for spacing in spacings if spacing), None),
    )


def _years(text: str) -> int | None:
    """Whole years of an age string (PS3.5 6.2, AS): 062Y, 018M, 003W, 010D; SIIM's bare 62 means years."""
    found = re.fullmatch(r"([0-9]{1,4})([YMWD]?)", text.upper())
    if found is None:
        return None
    age = int(found[1]) // {"": 1, "Y": 1, "M": 12, "W": 52, "D": 365}[found[2]]
    return age if age <= MAX_AGE else None


def _spacing(ds: Any, keyword: str) -> tuple[float, float] | None:
    try:
        rows, columns = (float(value) for value in tags.value(ds, keyword) or ())
    except (UnreadableImageError, TypeError, ValueError):
        return None
    return (rows, columns) if 0 < rows < math.inf and 0 < columns < math.inf else None


def _syntax(ds: Any, *, force: bool) -> Any:
    """The transfer syntax, known to be one that is read here."""
    syntax = getattr(ds, "file_meta", {}).get("TransferSyntaxUID")
    if not syntax and force:  # without file meta information pixels are not encoded; byte order shows in the tags
        syntax = uid.ExplicitVRLittleEndian if ds.original_encoding[1] else uid.ExplicitVRBigEndian
    if not isinstance(syntax, uid.UID) or not syntax:
        raise tags.wrong("TransferSyntaxUID", "is missing or malformed, so what the pixels are is unknown")
    if syntax not in ENCODED and syntax not in NATIVE:
        raise tags.wrong("TransferSyntaxUID", f"is {syntax.name[:64]!r}: convert the file, e.g. by gdcmconv --raw")
    return syntax


def _layout(ds: Any) -> Layout:
    """The Image Pixel module (PS3.3 C.7.6.3), refused where it is not one gray image of 8 or 16 bits."""
    photometric = tags.text(ds, "PhotometricInterpretation")
    if not photometric:
        raise tags.wrong("PhotometricInterpretation", "is missing")
    if photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise tags.wrong("PhotometricInterpretation", f"is {photometric[:40]!r}, not MONOCHROME1 or MONOCHROME2")
    tags.whole(ds, "SamplesPerPixel", (1,), "1: color, not gray")
    tags.whole(ds, "NumberOfFrames", (1,), "1: split the file into images", default=1)
    for keyword in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        if keyword in ds:
            raise tags.wrong(keyword, "is present: an enhanced multi-frame object; split it into images")
    allocated = tags.whole(ds, "BitsAllocated", (8, 16), "8 or 16")
    stored = tags.whole(ds, "BitsStored", range(1, allocated + 1), f"1 to BitsAllocated = {allocated}")
    tags.whole(ds, "HighBit", (stored - 1,), f"BitsStored - 1 = {stored - 1}", default=stored - 1)
    signed = tags.whole(ds, "PixelRepresentation", (0, 1), "0 or 1")
    rows = tags.whole(ds, "Rows", range(1, 1 << 16), "1 to 65535")
    columns = tags.whole(ds, "Columns", range(1, 1 << 16), "1 to 65535")
    if rows * columns > MAX_PIXELS:
        raise tags.wrong("Rows", f"x {tags.named('Columns')} is {rows} x {columns}: over {MAX_PIXELS:,} pixels")
    return Layout(rows, columns, allocated, stored, signed)


def _pixels(ds: Any, syntax: Any) -> tuple[bytes, str]:
    """The value and VR of PixelData, which is encapsulated if and only if its transfer syntax says so."""
    pixels = tags.value(ds, "PixelData")
    if pixels is None:
        raise tags.wrong("PixelData", "is missing: the file holds no image, or is cut short")
    element = ds["PixelData"]
    if bool(element.is_undefined_length) != (syntax in ENCODED):
        told = "encapsulated" if element.is_undefined_length else "not encapsulated"
        raise tags.wrong("TransferSyntaxUID", f"is {syntax.name}, but {tags.named('PixelData')} is {told}")
    return pixels, str(element.VR)
