"""What a dataset refuses and a prediction reads with a warning; and odd files from elsewhere, as DCMTK reads them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from pydicom import uid

from cxrscale.io import LoadedImage, Strictness, load_image
from cxrscale.types import UnreadableImageError
from tests.compare_dicom import by_dcmtk, stored_values
from tests.dicom_files import Stored, dicom_file, encoded, gray_image

ODD = Path(__file__).resolve().parents[3] / "shared" / "data" / "dicom"


def lenient(data: bytes, name: str = "") -> LoadedImage:
    return load_image(data, name=name, strictness=Strictness.LENIENT)


def strict_reason(data: bytes, name: str = "") -> str:
    with pytest.raises(UnreadableImageError) as caught:
        load_image(data, name=name)
    return str(caught.value)


def wrong_selection(frame: bytes) -> bytes:
    """A sequential JPEG whose scan header declares the coefficients 0 to 0."""
    scan = frame.index(b"\xff\xda")
    return frame[: scan + 7] + b"\0\0\0" + frame[scan + 10 :]


def faulty_files() -> dict[str, tuple[bytes, Stored]]:
    """Fault -> a file that has it, and its stored values."""
    gray, deep = gray_image(), gray_image(dtype="u2", bits=12)
    jpeg = encoded(gray, uid.JPEGBaseline8Bit)
    lossless = encoded(gray, uid.JPEGLSLossless)
    shifted: dict[str, Any] = {"BitsStored": 12, "HighBit": 15}
    decoded = load_image(jpeg).image_HW
    return {
        "SOPInstanceUID (0008,0018) is missing": (dicom_file(gray, SOPInstanceUID=None), gray),
        "neither preamble nor suffix": (dicom_file(gray)[132:], gray),
        "PixelData (7FE0,0010) holds 1460 bytes": (dicom_file(gray, PixelData=gray.tobytes() + bytes(100)), gray),
        "8 bytes behind the end marker": (
            dicom_file(gray, syntax=uid.JPEGLSLossless, frames=[lossless + b"trailers"]),
            gray,
        ),
        "HighBit (0028,0102) is 15": (dicom_file(deep << 4 | 9, **shifted), deep >> 4),
        "a JPEG scan of coefficients 0 to 0": (
            dicom_file(gray, syntax=uid.JPEGBaseline8Bit, frames=[wrong_selection(jpeg)]),
            decoded,
        ),
    }


@pytest.mark.parametrize("fault", faulty_files())
def test_a_formal_fault_is_refused_for_a_dataset_and_a_warning_for_a_prediction(fault: str) -> None:
    data, stored = faulty_files()[fault]
    assert fault in strict_reason(data)
    image = lenient(data)
    assert [fault in warning for warning in image.warnings] == [True]
    assert image.warnings[0].isprintable()
    assert np.abs(image.image_HW.astype(int) - stored).max() <= (1 if "HighBit" in fault else 0)
    assert image.jpeg is None


def test_several_faults_give_several_warnings() -> None:
    gray = gray_image()
    data = dicom_file(gray, SOPInstanceUID=None, PixelData=gray.tobytes() + bytes(100))[132:]
    image = lenient(data)
    assert len(image.warnings) == 3
    assert np.array_equal(image.image_HW, gray)


def test_a_file_without_fault_is_read_alike_and_without_a_warning() -> None:
    gray = gray_image()
    for syntax in (uid.ExplicitVRLittleEndian, uid.JPEGBaseline8Bit):
        frames = [encoded(gray, syntax)] if syntax.is_encapsulated else None
        data = dicom_file(gray, syntax=syntax, frames=frames)
        one, other = load_image(data), lenient(data)
        assert one.warnings == other.warnings == ()
        assert one.jpeg == other.jpeg
        assert np.array_equal(one.image_HW, other.image_HW)


def test_where_gray_values_are_in_doubt_a_prediction_refuses_too() -> None:
    gray = gray_image()
    frame = encoded(gray, uid.JPEGBaseline8Bit)
    doubtful = [
        dicom_file(gray)[:-400],
        dicom_file(gray, PixelData=gray.tobytes() * 2),
        dicom_file(gray, NumberOfFrames=2),
        dicom_file(gray, HighBit=6),
        dicom_file(gray, syntax=uid.JPEGBaseline8Bit, frames=[frame[:-300] + b"\xff\xd9"]),
        dicom_file(gray, Rows=39, syntax=uid.JPEGBaseline8Bit, frames=[frame]),
        dicom_file(gray, PhotometricInterpretation=None),
        b"\x08\x00\x05\x00 but no DICOM",
        b"any text",
    ]
    for data in doubtful:
        with pytest.raises(UnreadableImageError):
            lenient(data)


@pytest.mark.parametrize("extra", [b"\0", b"\xff", b"\0\0", b"\xff\xff\xff", b"\x20", b"\xcc"])
@pytest.mark.parametrize("syntax", [uid.JPEGLosslessSV1, uid.JPEGLSLossless, uid.JPEG2000Lossless])
def test_a_pad_byte_behind_a_frame_is_no_fault(syntax: str, extra: bytes) -> None:
    gray = gray_image()
    data = dicom_file(gray, syntax=syntax, frames=[encoded(gray, syntax).rstrip(b"\0") + extra])
    assert np.array_equal(load_image(data).image_HW, gray)


def test_empty_fragments_and_no_frames_are_no_fault() -> None:
    gray = gray_image()
    for syntax in (uid.RLELossless, uid.JPEGLSLossless, uid.JPEG2000Lossless):
        frame = encoded(gray, syntax)
        for fragments in ([frame, b""], [b"", frame], [frame, b"", b""]):
            data = dicom_file(gray, syntax=syntax, frames=fragments, NumberOfFrames=0)
            assert np.array_equal(load_image(data).image_HW, gray)


# Files from elsewhere

DCMTK = {
    "CR-MONO1-10-chest": "9351934ec242fc95",
    "GH184.dcm": "ad16ac564b212e44",
    "MR-JPEGLosslessSV1.dcm": "1616de7431ca52e0",
    "MR1_JLSL": "6c59822031d59e26",
    "MR_small_padded.dcm": "80c91b8c8ef0c027",
    "RG2_JPLY.dcm": "24a91909c6da1551",
    "RG2_JPLY_fixed.dcm": "24a91909c6da1551",
    "RG3_JPLY": "032c5181e51f2557",
    "TEST_1_study_1234.dcm": "f968691fa164d7ce",
    "XA1_JPLY": "5d0de1c58f94846b",
    "gdcm-CR-MONO1-10-chest.dcm": "9351934ec242fc95",
}
"""File -> BLAKE3 (the first 16 digits) of the values that DCMTK 3.6.7 decodes, clipped to BitsStored."""
WITH_WARNING = {"CR-MONO1-10-chest", "MR_small_padded.dcm", "RG2_JPLY.dcm", "RG3_JPLY", "XA1_JPLY"}


def odd_file(name: str) -> Path:
    if not (ODD / name).exists():
        pytest.skip("the odd DICOM files are missing")
    return ODD / name


@pytest.mark.parametrize("name", DCMTK)
def test_odd_files_have_the_values_that_dcmtk_read(name: str) -> None:
    data = odd_file(name).read_bytes()
    stored, _ = stored_values(data)
    assert blake3(stored.astype("<i4").tobytes()).hexdigest()[:16] == DCMTK[name]
    assert bool(lenient(data, name).warnings) == (name in WITH_WARNING)
    if name in WITH_WARNING:
        assert strict_reason(data, name)
    else:
        assert np.array_equal(load_image(data, name=name).image_HW, lenient(data, name).image_HW)


@pytest.mark.parametrize("name", DCMTK)
def test_odd_files_are_read_as_by_the_dcmtk_of_this_machine(name: str) -> None:
    path = odd_file(name)
    if shutil.which("dcmdjpeg") is None:
        pytest.skip("DCMTK is not installed")
    assert np.array_equal(stored_values(path.read_bytes())[0], by_dcmtk(path))


def test_overshoot_is_white_not_black() -> None:
    """8 pixels of this MONOCHROME1 file are 1024 of 1023."""
    data = odd_file("RG3_JPLY").read_bytes()
    stored, _ = stored_values(data)
    gray = lenient(data).image_HW[stored == 1023]
    assert gray.size >= 8
    assert set(gray.tolist()) == {9}  # 9.47 by the formula of its window; wrapped to 0, they would be 255
