"""DICOM pixels in every transfer syntax, intact, truncated, damaged and mislabeled."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom import uid

from cxrscale.io import dicom
from cxrscale.types import UnreadableImageError
from tests.dicom_files import Stored, dicom_file, encoded, gray_image

SIIM = Path(__file__).resolve().parents[3] / "shared" / "data" / "siim" / "original"
SHIPPED = Path(pydicom.__file__).parent / "data" / "test_files"

LOSSLESS = (uid.JPEGLossless, uid.JPEGLosslessSV1, uid.JPEGLSLossless, uid.JPEG2000Lossless, uid.RLELossless)
HIGH_THROUGHPUT = (uid.HTJ2K, uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL)
LOSSY = (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEGLSNearLossless, uid.JPEG2000)
NATIVE = (uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.DeflatedExplicitVRLittleEndian)


def gray_of(data: bytes) -> Stored:
    return dicom.read_dicom(data).image_HW


def refusal(data: bytes) -> str:
    with pytest.raises(UnreadableImageError) as caught:
        dicom.read_dicom(data)
    reason = str(caught.value)
    assert reason.isprintable()  # one line
    assert 10 < len(reason) < 400
    return reason


def encoded_file(stored: Stored, syntax: str, bits: int | None = None, **tags: Any) -> bytes:
    bits = bits or 8 * stored.dtype.itemsize
    return dicom_file(stored, syntax=syntax, frames=[encoded(stored, syntax, bits=bits)], BitsStored=bits, **tags)


def needs_pyjpegls(syntax: str, bits: int) -> None:
    """To encode; the reader does without."""
    if syntax in (uid.JPEGLSLossless, uid.JPEGLSNearLossless) and bits not in (8, 16):
        pytest.importorskip("jpeg_ls")


# Intact files


@pytest.mark.parametrize(
    ("dtype", "bits"), [("u1", 8), ("i1", 8), ("u2", 10), ("u2", 12), ("i2", 12), ("u2", 16), ("i2", 16)]
)
@pytest.mark.parametrize("syntax", LOSSLESS, ids=lambda syntax: syntax.name[:40])
def test_lossless_syntaxes_are_lossless(syntax: str, dtype: str, bits: int) -> None:
    needs_pyjpegls(syntax, bits)
    stored = gray_image(dtype=dtype, bits=bits)
    loaded = dicom.read_dicom(encoded_file(stored, syntax, bits))
    assert np.array_equal(loaded.image_HW, gray_of(dicom_file(stored, BitsStored=bits)))
    assert loaded.jpeg is None


@pytest.mark.parametrize("syntax", LOSSY, ids=lambda syntax: syntax.name[:40])
def test_lossy_syntaxes_lose_little(syntax: str) -> None:
    stored = gray_image(96, 80)
    assert np.abs(gray_of(encoded_file(stored, syntax)).astype(int) - stored).mean() < 4


def test_8_bit_jpeg_is_decoded_exactly_as_by_pillow() -> None:
    frame = encoded(gray_image(), uid.JPEGBaseline8Bit)
    with Image.open(io.BytesIO(frame)) as image:
        assert np.array_equal(
            gray_of(dicom_file(gray_image(), syntax=uid.JPEGBaseline8Bit, frames=[frame])), np.asarray(image)
        )


@pytest.mark.parametrize("shape", [(40, 34), (33, 5), (1, 1)])
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2"])
@pytest.mark.parametrize("syntax", NATIVE, ids=lambda syntax: syntax.name)
def test_native_syntaxes(syntax: str, dtype: str, shape: tuple[int, int]) -> None:
    stored = np.resize(gray_image(dtype=dtype), shape)
    stored.flat[0] = np.iinfo(stored.dtype).max  # so that the values need all bits
    low = np.iinfo(stored.dtype).min
    if dtype == "i2" and stored.min() >= 0:
        low = 0  # 16 bits that never go below zero are read as 15
    gray = gray_of(dicom_file(stored, syntax=syntax))
    assert np.abs(gray - (stored.astype(float) - low) * 255 / (np.iinfo(stored.dtype).max - low)).max() <= 0.5


def test_big_endian() -> None:
    for dtype in ("u2", "i2"):
        stored = gray_image(33, 5, dtype=dtype)
        assert np.array_equal(gray_of(dicom_file(stored, syntax=uid.ExplicitVRBigEndian)), gray_of(dicom_file(stored)))
    # 8-bit values in 16-bit words, whose bytes are swapped (PS3.5 A.3), with one byte of padding.
    stored = gray_image(33, 5)
    words = np.frombuffer(stored.tobytes() + b"\0", dtype="<u2").astype(">u2").tobytes()
    data = dicom_file(stored, syntax=uid.ExplicitVRBigEndian, PixelData=words, vr="OW")
    assert np.array_equal(gray_of(data), stored)


def test_bits_above_the_stored_ones_are_ignored() -> None:
    stored = gray_image(dtype="u2", bits=12)
    overlay = stored | (np.random.default_rng(0).integers(0, 16, stored.shape) << 12).astype(np.uint16)
    for syntax in (uid.ExplicitVRLittleEndian, uid.RLELossless):
        frames = [encoded(overlay, syntax)] if syntax == uid.RLELossless else None
        data = dicom_file(overlay, syntax=syntax, frames=frames, BitsStored=12)
        assert np.array_equal(gray_of(data), gray_of(dicom_file(stored, BitsStored=12)))


def test_shipped_12_bit_jpeg() -> None:
    data = (SHIPPED / "JPGExtended.dcm").read_bytes()
    assert gray_of(data).shape == (1024, 256)


# The unchanged JPEG frame


def test_the_jpeg_frame_is_returned_unchanged() -> None:
    stored = gray_image(41, 33)
    frame = encoded(stored, uid.JPEGBaseline8Bit)
    for padded in (frame, frame + b"\0", frame + b"\xff"):
        loaded = dicom.read_dicom(dicom_file(stored, syntax=uid.JPEGBaseline8Bit, frames=[padded]))
        assert loaded.jpeg == frame
    fragments = [frame[:100], frame[100:400], frame[400:]]
    assert dicom.read_dicom(dicom_file(stored, syntax=uid.JPEGBaseline8Bit, frames=fragments)).jpeg == frame


@pytest.mark.parametrize(
    ("tags", "kept"),
    [
        ({"RescaleSlope": 1, "RescaleIntercept": 0}, True),
        ({"RescaleSlope": 2, "RescaleIntercept": -1000}, True),  # the same gray values, because there is no window
        ({"WindowCenter": 128, "WindowWidth": 256}, True),
        ({"WindowCenter": 127.5, "WindowWidth": 255, "VOILUTFunction": "LINEAR_EXACT"}, True),
        ({"WindowCenter": 127, "WindowWidth": 255}, False),
        ({"WindowCenter": 100, "WindowWidth": 200}, False),
        ({"WindowCenter": 128, "WindowWidth": 256, "VOILUTFunction": "SIGMOID"}, False),
        ({"WindowCenter": 128, "WindowWidth": 256, "RescaleSlope": 2, "RescaleIntercept": 0}, False),
        ({"RescaleSlope": -1, "RescaleIntercept": 255}, False),
        ({"PhotometricInterpretation": "MONOCHROME1"}, False),
        ({"PixelRepresentation": 1}, False),
    ],
)
def test_the_frame_is_returned_only_if_it_shows_the_image(tags: dict[str, Any], kept: bool) -> None:
    stored = gray_image()
    frame = encoded(stored, uid.JPEGBaseline8Bit)
    loaded = dicom.read_dicom(dicom_file(stored, syntax=uid.JPEGBaseline8Bit, frames=[frame], **tags))
    assert (loaded.jpeg == frame) is kept
    with Image.open(io.BytesIO(frame)) as image:
        assert np.array_equal(loaded.image_HW, np.asarray(image)) is kept


# Truncated


CASES = [
    *[(syntax, "u2", 12) for syntax in (*NATIVE, uid.ExplicitVRBigEndian, uid.JPEGLSLossless, uid.JPEG2000)],
    *[(syntax, "u1", 8) for syntax in (uid.ExplicitVRLittleEndian, uid.JPEGBaseline8Bit, uid.JPEGLosslessSV1)],
    *[(syntax, "i2", 16) for syntax in (uid.JPEG2000Lossless, uid.RLELossless, uid.JPEGLosslessSV1)],
]
"""Transfer syntax, type and bits of stored values."""


def case_file(stored: Stored, syntax: Any, bits: int, **tags: Any) -> bytes:
    if syntax.is_encapsulated:
        return encoded_file(stored, syntax, bits, **tags)
    return dicom_file(stored, syntax=syntax, BitsStored=bits, **tags)


@pytest.mark.parametrize(("syntax", "dtype", "bits"), CASES)
def test_a_file_truncated_anywhere_is_refused(syntax: Any, dtype: str, bits: int) -> None:
    needs_pyjpegls(syntax, bits)
    stored = gray_image(120, 100, dtype=dtype, bits=bits)
    data = (
        encoded_file(stored, syntax, bits)
        if syntax.is_encapsulated
        else dicom_file(stored, syntax=syntax, BitsStored=bits)
    )
    assert gray_of(data).shape == (120, 100)
    for length in range(0, len(data) - 8, 256):
        assert refusal(data[:length])


def test_a_real_file_truncated_at_every_kilobyte_is_refused() -> None:
    paths = sorted(SIIM.glob("*.dcm"))
    if not paths:
        pytest.skip("the original SIIM files are missing")
    data = paths[0].read_bytes()
    for length in range(0, len(data), 1024):
        assert refusal(data[:length])


@pytest.mark.parametrize(("syntax", "dtype", "bits"), [case for case in CASES if case[0].is_encapsulated])
def test_a_truncated_frame_in_an_intact_file_is_refused(syntax: str, dtype: str, bits: int) -> None:
    """The file is consistent, and most decoders fill the missing rest with gray, also if there is an end marker."""
    needs_pyjpegls(syntax, bits)
    stored = gray_image(64, 48, dtype=dtype, bits=bits)
    frame = encoded(stored, syntax, bits=bits)
    for length in range(0, len(frame) - 3, 61):
        for end in (b"", b"\xff\xd9"):
            assert refusal(dicom_file(stored, syntax=syntax, frames=[frame[:length] + end], BitsStored=bits))


# Damaged and mislabeled


@pytest.mark.parametrize(("syntax", "dtype", "bits"), CASES)
def test_damage_never_raises_another_error(
    syntax: Any, dtype: str, bits: int, capfd: pytest.CaptureFixture[str]
) -> None:
    needs_pyjpegls(syntax, bits)
    stored = gray_image(dtype=dtype, bits=bits)
    tags: dict[str, Any] = {"WindowCenter": 100, "WindowWidth": 50, "RescaleSlope": 2, "RescaleIntercept": -3}
    data = case_file(stored, syntax, bits, PatientAge="062Y", PixelSpacing=[1, 1], **tags)
    random = np.random.default_rng(bits)
    for _ in range(60):
        damaged = bytearray(data)
        for index in random.integers(128, len(data), random.integers(1, 4)):
            damaged[index] = random.integers(0, 256)
        try:
            assert dicom.read_dicom(bytes(damaged)).image_HW.dtype == np.uint8
        except UnreadableImageError:
            continue
    capfd.readouterr()  # decoders in C and Rust write to the terminal


def test_rle_of_another_size_is_refused() -> None:
    stored = np.zeros((16, 16), dtype=np.uint8)
    complete = b"\x81\0\x81\0"  # two runs of 128
    header = np.array([1, 64, *[0] * 14], dtype="<u4").tobytes()
    for segment in (complete, complete + b"\x80\0", complete + b"\0\0"):  # exact, and padded
        assert not gray_of(dicom_file(stored, syntax=uid.RLELossless, frames=[header + segment])).any()
    for segment in (complete[:2], complete + b"\xfe\0", complete + complete, b"\x7f\0", b"\x81"):
        assert "RLE" in refusal(dicom_file(stored, syntax=uid.RLELossless, frames=[header + segment]))
    for offsets in ([0], [2, 64, 66], [1, 60], [1, 64, 66], [2, 66, 64], [16] + [64] * 15, [1000, 64]):
        bad = np.array([*offsets, *[0] * (16 - len(offsets))], dtype="<u4").tobytes()
        if offsets != [1, 64, 66]:  # offsets after the last segment are ignored
            assert "RLE header" in refusal(dicom_file(stored, syntax=uid.RLELossless, frames=[bad + complete]))


def relabeled(data: bytes, true: str, declared: str) -> bytes:
    """The same file under another transfer syntax, whose name must not be longer."""
    true_value = true.encode() + b"\0" * (len(true) % 2)
    assert data.count(true_value) == 1
    return data.replace(true_value, declared.encode().ljust(len(true_value), b"\0"))


FAMILY = {
    uid.JPEGBaseline8Bit: {uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit},
    uid.JPEGLosslessSV1: {uid.JPEGLosslessSV1, uid.JPEGLossless},
    uid.JPEGLSLossless: {uid.JPEGLSLossless, uid.JPEGLSNearLossless},
    uid.JPEG2000Lossless: {uid.JPEG2000Lossless, uid.JPEG2000, uid.HTJ2K, uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL},
    uid.RLELossless: {uid.RLELossless},
}


@pytest.mark.parametrize("true", FAMILY, ids=lambda syntax: syntax.name[:40])
def test_a_wrong_transfer_syntax_is_refused(true: str) -> None:
    stored = gray_image()
    frame = encoded(stored, true)
    every = set().union(*FAMILY.values())
    for declared in sorted(every - FAMILY[true]):
        refusal(dicom_file(stored, syntax=declared, frames=[frame]))
    data = dicom_file(stored, syntax=true, frames=[frame])
    assert "is encapsulated" in refusal(relabeled(data, true, uid.ExplicitVRLittleEndian))
    for declared in FAMILY[true] - {uid.HTJ2K, uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL}:
        assert gray_of(dicom_file(stored, syntax=declared, frames=[frame])).shape == stored.shape


def test_native_pixels_under_an_encapsulated_syntax_are_refused() -> None:
    data = relabeled(dicom_file(gray_image()), uid.ExplicitVRLittleEndian, uid.RLELossless)
    assert "is not encapsulated" in refusal(data)


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, *FAMILY], ids=lambda syntax: syntax.name[:40])
def test_wrong_rows_and_columns_are_refused(syntax: Any) -> None:
    stored = gray_image()
    for rows, columns in ((39, 34), (41, 34), (40, 33), (40, 35), (34, 40), (20, 68)):
        if rows * columns == stored.size and syntax in (uid.ExplicitVRLittleEndian, uid.RLELossless):
            continue  # such a file has no other information on its shape
        reason = refusal(case_file(stored, syntax, 8, Rows=rows, Columns=columns))
        assert "Rows" in reason or "PixelData" in reason


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"SOPInstanceUID": None}, r"SOPInstanceUID \(0008,0018\) is missing"),
        ({"PhotometricInterpretation": None}, r"PhotometricInterpretation \(0028,0004\) is missing"),
        ({"SamplesPerPixel": None}, r"SamplesPerPixel \(0028,0002\) is missing"),
        ({"Rows": None}, r"Rows \(0028,0010\) is missing"),
        ({"Columns": None}, r"Columns \(0028,0011\) is missing"),
        ({"BitsAllocated": None}, r"BitsAllocated \(0028,0100\) is missing"),
        ({"BitsStored": None}, r"BitsStored \(0028,0101\) is missing"),
        ({"PixelRepresentation": None}, r"PixelRepresentation \(0028,0103\) is missing"),
        ({"PixelData": None}, r"PixelData \(7FE0,0010\) is missing"),
        ({"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}, "is 'RGB', not MONOCHROME1 or MONOCHROME2"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "is 'PALETTE COLOR'"),
        ({"SamplesPerPixel": 3}, "SamplesPerPixel .* is 3"),
        ({"NumberOfFrames": 2}, "NumberOfFrames .* is 2"),
        ({"NumberOfFrames": 0}, None),
        ({"SharedFunctionalGroupsSequence": [pydicom.Dataset()]}, "SharedFunctionalGroupsSequence .* is present"),
        ({"BitsAllocated": 32, "BitsStored": 32}, "BitsAllocated .* is 32, not 8 or 16"),
        ({"BitsAllocated": 1, "BitsStored": 1}, "BitsAllocated .* is 1, not 8 or 16"),
        ({"BitsStored": 9}, "BitsStored .* is 9, not 1 to BitsAllocated = 8"),
        ({"HighBit": 6}, "HighBit .* is 6, not BitsStored - 1 = 7"),
        ({"PixelRepresentation": 2}, "PixelRepresentation .* is 2"),
        ({"Rows": 0}, "Rows .* is 0"),
        ({"Rows": 60000, "Columns": 60000}, "60000 x 60000"),
        ({"Rows": 39}, "PixelData .* holds 1360 bytes"),
        ({"RescaleSlope": 0, "RescaleIntercept": 1}, "RescaleSlope .* is 0"),
        ({"RescaleSlope": "1e300", "RescaleIntercept": 0, "WindowCenter": 1, "WindowWidth": 2}, None),
        ({"RescaleSlope": "1e307", "RescaleIntercept": 0}, "RescaleSlope"),
        ({"WindowCenter": 5}, "WindowWidth .* is missing"),
        ({"WindowWidth": 5}, "WindowCenter .* is missing"),
        ({"WindowCenter": 5, "WindowWidth": 0}, "WindowWidth .* is 0; LINEAR needs a width of at least 1"),
        ({"WindowCenter": 5, "WindowWidth": 0.5}, "WindowWidth .* is 0.5; LINEAR needs a width of at least 1"),
        ({"WindowCenter": 5, "WindowWidth": 0, "VOILUTFunction": "SIGMOID"}, "SIGMOID needs a width above 0"),
        ({"WindowCenter": 5, "WindowWidth": 9, "VOILUTFunction": "CUBIC"}, "VOILUTFunction .* is 'CUBIC'"),
        ({"VOILUTSequence": [pydicom.Dataset()]}, "VOILUTSequence .* is malformed"),
        ({"ModalityLUTSequence": [pydicom.Dataset()]}, "ModalityLUTSequence .* is malformed"),
    ],
)
def test_the_reason_names_the_wrong_tag(tags: dict[str, Any], reason: str | None) -> None:
    data = dicom_file(gray_image(), **tags)
    if reason is None:
        assert gray_of(data).shape == (40, 34)
    else:
        with pytest.raises(UnreadableImageError, match=reason):
            dicom.read_dicom(data)


def test_several_frames_in_one_file_are_refused() -> None:
    stored = gray_image()
    for syntax in (uid.JPEGBaseline8Bit, uid.JPEG2000Lossless, uid.RLELossless, uid.JPEGLSLossless):
        frame = encoded(stored, syntax)
        assert "2 frames" in refusal(dicom_file(stored, syntax=syntax, frames=[frame, frame]))
    assert "no frame" in refusal(dicom_file(stored, syntax=uid.JPEGBaseline8Bit, frames=[]))
    assert "holds 2720 bytes" in refusal(dicom_file(stored, PixelData=stored.tobytes() * 2))


def test_other_kinds_of_jpeg_are_refused() -> None:
    stored = gray_image()
    color, progressive = io.BytesIO(), io.BytesIO()
    Image.fromarray(np.stack([stored] * 3, axis=-1)).save(color, "JPEG")
    Image.fromarray(stored).save(progressive, "JPEG", progressive=True)
    assert "3 components" in refusal(dicom_file(stored, syntax=uid.JPEGBaseline8Bit, frames=[color.getvalue()]))
    assert "FFC2" in refusal(dicom_file(stored, syntax=uid.JPEGBaseline8Bit, frames=[progressive.getvalue()]))
    frame = encoded(stored, uid.JPEGBaseline8Bit)
    wide = dicom_file(stored.astype(np.uint16), syntax=uid.JPEGBaseline8Bit, frames=[frame], BitsStored=12)
    assert "BitsStored (0028,0101) is 12" in refusal(wide)
    narrow = dicom_file(stored.astype(np.uint16), syntax=uid.JPEGBaseline8Bit, frames=[frame], BitsStored=8)
    assert gray_of(narrow).shape == stored.shape


def test_files_that_are_not_dicom_are_refused() -> None:
    for data in (b"", b"DICM", b"\0" * 128 + b"DICM", b"\0" * 4000, b"<html></html>" * 40):
        refusal(data)
        with pytest.raises(UnreadableImageError):
            dicom.read_dicom(data, force=True)
    assert "MPEG2" in refusal(dicom_file(gray_image(), syntax=uid.MPEG2MPML, frames=[b"\0" * 100]))


def test_a_file_without_preamble_is_read_by_force() -> None:
    data = dicom_file(gray_image())
    assert "not a DICOM file" in refusal(data[132:])
    assert np.array_equal(dicom.read_dicom(data[132:], force=True).image_HW, gray_image())
    for syntax in (uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian):
        stored = gray_image(dtype="u2", bits=12)
        complete = dicom_file(stored, syntax=syntax, BitsStored=12)
        bare = complete[144 + int.from_bytes(complete[140:144], "little") :]  # also without file meta information
        assert np.array_equal(dicom.read_dicom(bare, force=True).image_HW, gray_of(complete))
