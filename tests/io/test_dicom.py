"""Gray values of DICOM files, against the formulas of the standard; and the metadata of their headers."""

from __future__ import annotations

import io
import math
import threading
import warnings
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import JPEGExtended12Bit

from cxrscale.io import dicom
from cxrscale.types import GrayImage, UnreadableImageError
from tests.dicom_files import Stored, dicom_file, gray_image, lut_item

SIIM = Path(__file__).resolve().parents[3] / "shared" / "data" / "siim"
SHIPPED = Path(pydicom.__file__).parent / "data" / "test_files"


def in_window(x: float, center: float, width: float, function: str) -> float:
    """PS3.3 C.11.2.1.2 and C.11.2.1.3 with ymin = 0 and ymax = 255, exactly as in the standard."""
    if function == "SIGMOID":
        return 255 / (1 + math.exp(-4 * (x - center) / width))
    if function == "LINEAR_EXACT":
        if x <= center - width / 2:
            return 0
        return 255 if x > center + width / 2 else ((x - center) / width + 0.5) * 255
    if x <= center - 0.5 - (width - 1) / 2:
        return 0
    return 255 if x > center - 0.5 + (width - 1) / 2 else ((x - (center - 0.5)) / (width - 1) + 0.5) * 255


def windowed(modality: np.ndarray[Any, Any], center: float, width: float, function: str) -> np.ndarray[Any, Any]:
    grays = [in_window(x, center, width, function) for x in modality.astype(float).ravel().tolist()]
    return np.array(grays, dtype=float).reshape(modality.shape)


def gray_of(stored: Stored, **tags: Any) -> GrayImage:
    return dicom.read_dicom(dicom_file(stored, **tags)).image_HW


def assert_close(gray: GrayImage, expected: np.ndarray[Any, Any], levels: float = 0.5) -> None:
    """Equal except for rounding, which is at most half a gray level."""
    assert gray.dtype == np.uint8
    assert gray.shape == expected.shape
    assert np.abs(gray - expected).max() <= levels + 1e-9


DEPTHS = [("u1", 8), ("i1", 8), ("u1", 7), ("u2", 10), ("u2", 12), ("u2", 16), ("i2", 12), ("i2", 16)]


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("function", [None, "LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize(("slope", "intercept"), [(None, None), (1, -1024), (0.684, 200), (-2.5, 4095)])
@pytest.mark.parametrize(("dtype", "bits"), DEPTHS)
def test_windows_follow_the_standard(
    dtype: str, bits: int, slope: float | None, intercept: float | None, function: str | None, photometric: str
) -> None:
    stored = gray_image(dtype=dtype, bits=bits)
    modality = stored.astype(float) * (slope or 1) + (intercept or 0)
    center = round(float(np.median(modality)), 2)
    width = round(float(np.ptp(modality)) / 2 + 2, 2)
    gray = gray_of(
        stored,
        BitsStored=bits,
        RescaleSlope=slope,
        RescaleIntercept=intercept,
        WindowCenter=center,
        WindowWidth=width,
        VOILUTFunction=function,
        PhotometricInterpretation=photometric,
    )
    expected = windowed(modality, center, width, function or "LINEAR")
    assert_close(gray, 255 - expected if photometric == "MONOCHROME1" else expected)


@pytest.mark.parametrize(
    ("center", "width", "function"),
    [(100, 1, "LINEAR"), (100.5, 1, "LINEAR_EXACT"), (100, 1e-3, "SIGMOID"), (1e6, 2, "LINEAR"), (-1e6, 2, "SIGMOID")],
)
def test_a_narrow_or_distant_window_is_a_step(center: float, width: float, function: str) -> None:
    stored = np.arange(256, dtype=np.uint8).reshape(16, 16)
    gray = gray_of(stored, WindowCenter=center, WindowWidth=width, VOILUTFunction=function)
    expected = 255 * (stored >= center)
    near = np.abs(stored - center) < 1
    assert np.array_equal(gray[~near], expected[~near])


def test_the_first_of_several_windows_is_used() -> None:
    stored = gray_image(dtype="u2", bits=12)
    two = gray_of(stored, BitsStored=12, WindowCenter=[450, 200], WindowWidth=[790, 443])
    assert np.array_equal(two, gray_of(stored, BitsStored=12, WindowCenter=450, WindowWidth=790))


@pytest.mark.parametrize("slope", [2.0, -1.5])
@pytest.mark.parametrize(("dtype", "bits"), [depth for depth in DEPTHS if depth[1] < 16])
def test_without_a_window_the_stored_bits_define_the_range(dtype: str, bits: int, slope: float) -> None:
    stored = gray_image(dtype=dtype, bits=bits)
    unit = (stored.astype(float) - (-(1 << bits - 1) if dtype[0] == "i" else 0)) / ((1 << bits) - 1)
    assert_close(gray_of(stored, BitsStored=bits), 255 * unit)
    assert_close(gray_of(stored, BitsStored=bits, PhotometricInterpretation="MONOCHROME1"), 255 * (1 - unit))
    rescaled = gray_of(stored, BitsStored=bits, RescaleSlope=slope, RescaleIntercept=-7)
    assert_close(rescaled, 255 * (unit if slope > 0 else 1 - unit))


def test_8_bits_without_a_window_are_unchanged() -> None:
    stored = gray_image()[:20] // 3  # uses only a part of the range
    assert np.array_equal(gray_of(stored), stored)
    assert np.array_equal(gray_of(stored, PhotometricInterpretation="MONOCHROME1"), 255 - stored)
    assert np.array_equal(gray_of(stored.astype(np.uint16), BitsStored=8), stored)


@pytest.mark.parametrize("bits", [8, 10, 12, 15, 16])
def test_16_declared_bits_are_checked_against_the_values(bits: int) -> None:
    stored = gray_image(dtype="u2", bits=bits)
    assert stored.max() == (1 << bits) - 1
    assert_close(gray_of(stored), stored * (255 / ((1 << bits) - 1)))
    if bits < 16:
        assert np.array_equal(gray_of(stored.astype(np.int16)), gray_of(stored))
        negative = gray_image(dtype="i2", bits=bits)
        assert_close(gray_of(negative), (negative + (1 << bits - 1)) * (255 / ((1 << bits) - 1)))


def test_padding_is_ignored_in_the_range() -> None:
    stored = gray_image(dtype="i2", bits=12)
    stored[:3] = -32768
    gray = gray_of(stored, PixelPaddingValue=-32768)
    assert_close(gray, np.clip((stored.astype(float) + 2048) * (255 / 4095), 0, 255))
    assert np.array_equal(gray_of(np.full_like(stored, 5), PixelPaddingValue=5), np.full(stored.shape, 5))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(
    ("dtype", "bits", "vr"), [("u2", 10, "US"), ("u2", 12, "OW"), ("u2", 16, "US"), ("u1", 8, "OW")]
)
def test_lookup_tables(dtype: str, bits: int, vr: str, signed: bool) -> None:
    stored = gray_image(dtype="i2" if signed else "u2", bits=12)
    first = -500 if signed else 300
    entries = np.sqrt(np.linspace(0, 1, 2501)) * ((1 << bits) - 1)
    lut = lut_item(entries.astype(dtype), first=first, bits=bits, vr=vr, signed=signed)
    output = entries.astype(dtype)[np.clip(stored.astype(int) - first, 0, 2500)]
    expected = output * (255 / ((1 << bits) - 1))
    assert_close(gray_of(stored, BitsStored=12, VOILUTSequence=[lut]), expected)
    assert_close(gray_of(stored, BitsStored=12, ModalityLUTSequence=[lut]), expected)
    with_window = gray_of(stored, BitsStored=12, VOILUTSequence=[lut], WindowCenter=1, WindowWidth=2)
    assert_close(with_window, expected)
    inverted = gray_of(stored, BitsStored=12, VOILUTSequence=[lut], PhotometricInterpretation="MONOCHROME1")
    assert_close(inverted, 255 - expected)
    # Some writers store a signed first input with an unsigned VR.
    lut["LUTDescriptor"].VR = "US"
    lut["LUTDescriptor"].value = [2501, first % 65536, bits]
    assert_close(gray_of(stored, BitsStored=12, ModalityLUTSequence=[lut]), expected)
    window = gray_of(stored, BitsStored=12, ModalityLUTSequence=[lut], WindowCenter=100, WindowWidth=150)
    assert_close(window, windowed(output, 100, 150, "LINEAR"))


def test_a_voi_table_is_applied_after_rescale() -> None:
    stored = gray_image(dtype="u2", bits=12)
    entries = np.linspace(0, 255, 2001).astype(np.uint8)
    lut = lut_item(entries, first=-1000, bits=8, signed=True)
    gray = gray_of(stored, BitsStored=12, RescaleSlope=0.5, RescaleIntercept=-1024, VOILUTSequence=[lut])
    index_HW = np.clip(np.rint(stored * 0.5 - 1024) + 1000, 0, 2000).astype(int)
    assert np.array_equal(gray, entries[index_HW])


def test_tables_with_unusual_lengths_and_bits() -> None:
    stored = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    full = lut_item(stored.ravel()[::-1].copy())  # 65,536 entries are written as 0
    assert_close(gray_of(stored, VOILUTSequence=[full]), 255 - stored / 257)
    wide = lut_item(np.arange(256, dtype=np.uint16), bits=8)  # 8-bit entries, one per word
    assert np.array_equal(gray_of(stored // 256, VOILUTSequence=[wide]), stored // 256)
    unused = lut_item(np.arange(4096, dtype=np.uint16), bits=16)  # 12 bits declared as 16
    assert_close(gray_of(stored // 16, VOILUTSequence=[unused]), stored // 16 * (255 / 4095))


@pytest.mark.parametrize(
    ("shape", "photometric", "inverted"),
    [("IDENTITY", "MONOCHROME2", False), ("INVERSE", "MONOCHROME1", True), ("INVERSE", "MONOCHROME2", True)],
)
def test_presentation_and_photometric_invert_once(shape: str, photometric: str, inverted: bool) -> None:
    stored = gray_image()
    gray = gray_of(stored, PresentationLUTShape=shape, PhotometricInterpretation=photometric)
    assert np.array_equal(gray, 255 - stored if inverted else stored)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize(("dtype", "intercept"), [("u2", 0.0), ("i2", -1024.0)])
def test_highdicom_gives_the_same_gray_values(dtype: str, intercept: float, function: str, photometric: str) -> None:
    data = dicom_file(
        gray_image(dtype=dtype, bits=12),
        BitsStored=12,
        RescaleSlope=2.0,
        RescaleIntercept=intercept,
        WindowCenter=500,
        WindowWidth=1500,
        VOILUTFunction=function,
        PhotometricInterpretation=photometric,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = highdicom.Image.from_dataset(pydicom.dcmread(io.BytesIO(data)))
        theirs = image.get_frame(
            1,
            apply_modality_transform=None,
            apply_voi_transform=None,
            apply_presentation_lut=True,
            voi_output_range=(0, 255),
        )
    assert_close(dicom.read_dicom(data).image_HW, theirs, 1)


def expected_of(ds: Dataset) -> np.ndarray[Any, Any] | None:
    """The standard's gray values for a monochrome file with a window or fewer than 16 bits; None for others."""
    if ds.PhotometricInterpretation not in ("MONOCHROME1", "MONOCHROME2"):
        return None
    if ds.file_meta.get("TransferSyntaxUID") == JPEGExtended12Bit:  # 12 bits, which pydicom's own decoders refuse
        return None
    modality = ds.pixel_array * float(ds.get("RescaleSlope") or 1) + float(ds.get("RescaleIntercept") or 0)
    if "WindowCenter" in ds:
        center, width = np.atleast_1d(ds.WindowCenter)[0], np.atleast_1d(ds.WindowWidth)[0]
        expected = windowed(modality, float(center), float(width), ds.get("VOILUTFunction") or "LINEAR")
    elif ds.BitsStored < 16 and ds.PixelRepresentation == 0:
        expected = modality * (255 / ((1 << ds.BitsStored) - 1))
    else:
        return None
    return 255 - expected if ds.PhotometricInterpretation == "MONOCHROME1" else expected


def test_the_test_files_of_pydicom_are_correct_or_refused() -> None:
    correct = 0
    reasons: list[str] = []
    for path in sorted(file for file in SHIPPED.rglob("*") if file.suffix in (".dcm", "")):
        if path.is_dir() or path.name.startswith(("README", "IM0000")):
            continue
        data = path.read_bytes()
        try:
            gray = dicom.read_dicom(data, force=True).image_HW
        except UnreadableImageError as error:
            reasons.append(str(error))
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = expected_of(pydicom.dcmread(io.BytesIO(data), force=True))
        if expected is not None:
            assert_close(gray, expected, 1)
            correct += 1
    assert correct >= 40
    assert len(reasons) >= 40
    assert all(10 < len(reason) < 400 and reason.isprintable() for reason in reasons)


# Metadata


@pytest.mark.parametrize(
    ("text", "years"),
    [
        *[("062Y", 62), ("62", 62), ("018M", 1), ("011M", 0), ("104W", 2), ("400D", 1), ("000Y", 0), ("120Y", 120)],
        *[("121Y", None), ("412", None), ("", None), ("Y", None), ("-5", None), ("6.5", None), ("62 Y", None)],
        *[("062y", 62), (" 62 ", 62), ("²", None)],
    ],
)
def test_ages(text: str, years: int | None) -> None:
    data = dicom_file(gray_image(), PatientAge=text)
    assert dicom.read_header(data).age == years


@pytest.mark.parametrize(
    ("position", "series", "view"),
    [
        *[("PA", None, "PA"), ("AP", "view: PA", "AP"), ("", "view: PA", "PA"), (None, "CHEST View:ap ", "AP")],
        *[(None, None, None), ("LL", "view: PA", None), (None, "view:", None), (None, "PA", None), ("pa", None, "PA")],
    ],
)
def test_views(position: str | None, series: str | None, view: str | None) -> None:
    assert dicom.read_header(dicom_file(gray_image(), ViewPosition=position, SeriesDescription=series)).view == view


@pytest.mark.parametrize(
    ("tags", "spacing"),
    [
        ({}, None),
        ({"PixelSpacing": [0.168, 0.17]}, (0.168, 0.17)),
        ({"ImagerPixelSpacing": [0.1, 0.2]}, (0.1, 0.2)),
        ({"PixelSpacing": [0.3, 0.3], "ImagerPixelSpacing": [0.1, 0.2]}, (0.3, 0.3)),
        ({"PixelSpacing": [0, 0.3], "ImagerPixelSpacing": [0.1, 0.2]}, (0.1, 0.2)),
        ({"PixelSpacing": "0.3"}, None),
        ({"PixelSpacing": [-1, 1]}, None),
    ],
)
def test_spacing(tags: dict[str, Any], spacing: tuple[float, float] | None) -> None:
    assert dicom.read_header(dicom_file(gray_image(), **tags)).spacing_mm == spacing


def test_patients() -> None:
    header = dicom.read_header(dicom_file(gray_image(), PatientID=" 7 ", PatientSex="f"))
    assert (header.patient_id, header.sex, header.sop_uid) == ("7", "F", "1.2.3.4")
    header = dicom.read_header(dicom_file(gray_image(), PatientID="", PatientSex="O"))
    assert (header.patient_id, header.sex) == (None, None)


def test_header_reads_no_pixels() -> None:
    data = dicom_file(gray_image(400, 400), PatientAge="062Y", ViewPosition="PA")
    file = io.BytesIO(data)
    header = dicom.read_header(file)
    assert file.tell() < 2000
    loaded = dicom.read_dicom(data)
    assert (header.sop_uid, header.age, header.view) == ("1.2.3.4", 62, "PA")
    assert (loaded.sop_uid, loaded.age, loaded.view) == ("1.2.3.4", 62, "PA")
    assert dicom.read_header(data[:2000]) == header
    with pytest.raises(UnreadableImageError, match="SOPInstanceUID"):
        dicom.read_header(dicom_file(gray_image(), SOPInstanceUID=None))
    with pytest.raises(UnreadableImageError, match="not a DICOM file"):
        dicom.read_header(b"<html>" * 100)


def test_threads_do_not_change_the_warning_filters() -> None:
    data = dicom_file(gray_image(), PatientAge="62")
    before = list(warnings.filters)
    threads = [threading.Thread(target=lambda: [dicom.read_dicom(data) for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before


# Real files


def siim(name: str) -> dicom.DicomImage:
    path = SIIM / "original" / name
    if not path.exists():
        pytest.skip("the original SIIM files are missing")
    return dicom.read_dicom(path.read_bytes())


def test_an_original_siim_file_and_its_inverse() -> None:
    plain = siim("1.2.276.0.7230010.3.1.4.8323329.6904.1517875201.850819.dcm")
    inverse = siim("Fake_MONOHR1.dcm")
    assert plain.image_HW.shape == (1024, 1024)
    assert (plain.sex, plain.age, plain.view, plain.spacing_mm) == ("M", 62, "PA", (0.168, 0.168))
    assert plain.jpeg is not None
    assert plain.jpeg[:2] + plain.jpeg[-2:] == b"\xff\xd8\xff\xd9"
    assert inverse.jpeg is None  # its frame is not the final image
    # The same frame as MONOCHROME1 is the negative.
    assert np.array_equal(inverse.image_HW, 255 - plain.image_HW)
    # Upright: the middle of the chest (spine, heart) is brighter than the lungs on both sides.
    middle, left, right = (plain.image_HW[400:600, x : x + 60].mean() for x in (480, 250, 720))
    assert middle > max(left, right) + 20


def test_siim_training_files_keep_their_frames() -> None:
    paths = sorted((SIIM / "dicom-images-train").rglob("*.dcm"))
    if not paths:
        pytest.skip("the SIIM files are missing")
    for path in paths:
        loaded = dicom.read_dicom(path.read_bytes())
        assert loaded.sop_uid == path.stem
        assert loaded.jpeg is not None
        assert loaded.jpeg in path.read_bytes()
        assert loaded.age is not None
        assert loaded.view in ("PA", "AP")
