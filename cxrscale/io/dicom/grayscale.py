"""Stored values of a DICOM file -> gray values (PS3.3 C.11).

The steps are: modality LUT or rescale, then VOI LUT or window, then the inversion for MONOCHROME1, then 8 bits. A
stored value has at most 16 bits, so all steps are computed once per possible value, in float64, and the image is one
look-up in that table. The result follows the standard's formulas to half a gray level.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from cxrscale.io.dicom import tags
from cxrscale.io.dicom.pixels import Layout
from cxrscale.io.gray_levels import StoredImage, used_bits
from cxrscale.types import GrayImage


@dataclass(frozen=True, slots=True)
class _Lut:
    """A look-up table (PS3.3 C.11.1.1, C.11.2.1.1): input `first + i` becomes `entries[i]`, in the range 0..top."""

    first: int
    entries: npt.NDArray[np.uint16]
    top: int


@dataclass(frozen=True, slots=True)
class _Window:
    """A window (PS3.3 C.11.2.1.2), in units of the modality step's output."""

    center: float
    width: float
    function: Literal["LINEAR", "LINEAR_EXACT", "SIGMOID"]


@dataclass(frozen=True, slots=True)
class GrayTransform:
    """The steps from a stored value to a gray value."""

    modality: _Lut | tuple[float, float]
    """A look-up table, or rescale: (slope, intercept)."""
    voi: _Lut | _Window | None
    """A look-up table, a window, or neither."""
    invert: bool
    """Whether the smallest value is white."""
    padding: tuple[int, int] | None
    """The lowest and highest stored value of pixels outside the image, or None if the file has none."""


def read_transform(ds: Any, *, signed: bool, big_endian: bool) -> GrayTransform:
    """The modality LUT, VOI LUT and presentation of a file (PS3.3 C.11.1, C.11.2, C.11.6).

    Args:
        ds: the file's dataset.
        signed: whether stored values are signed.
        big_endian: whether the file is big-endian.

    Raises:
        UnreadableImageError: one of these tags is malformed or makes all gray values equal.
    """
    modality: _Lut | tuple[float, float]
    negative = False
    if tags.value(ds, "ModalityLUTSequence") is not None:
        modality = _lut(ds, "ModalityLUTSequence", signed=signed, big_endian=big_endian)
    else:
        slope, intercept = modality = tags.number(ds, "RescaleSlope", 1), tags.number(ds, "RescaleIntercept", 0)
        negative = signed or slope < 0 or intercept < 0
    voi: _Lut | _Window | None = None
    if tags.value(ds, "VOILUTSequence") is not None:
        voi = _lut(ds, "VOILUTSequence", signed=negative, big_endian=big_endian)
    elif tags.value(ds, "WindowCenter") is not None or tags.value(ds, "WindowWidth") is not None:
        voi = _window(ds)
    shape = tags.text(ds, "PresentationLUTShape")
    return GrayTransform(
        modality,
        voi,
        # Two tags can ask for inversion; PresentationLUTShape is the later step of the standard's pipeline.
        invert=shape == "INVERSE" if shape else tags.text(ds, "PhotometricInterpretation") == "MONOCHROME1",
        padding=_padding(ds, signed=signed),
    )


def _padding(ds: Any, *, signed: bool) -> tuple[int, int] | None:
    """PixelPaddingValue to PixelPaddingRangeLimit, in either order (PS3.3 C.7.5.1.1.2); without limit, one value."""
    if tags.value(ds, "PixelPaddingValue") is None:
        return None
    value = tags.number(ds, "PixelPaddingValue")
    ends = [int(end) for end in (value, tags.number(ds, "PixelPaddingRangeLimit", value))]
    if signed:  # some writers give the bits of a negative value as an unsigned one
        ends = [end - (1 << 16) if end >= 1 << 15 else end for end in ends]
    return min(ends), max(ends)


def _window(ds: Any) -> _Window:
    center, width = tags.number(ds, "WindowCenter"), tags.number(ds, "WindowWidth")
    function = tags.text(ds, "VOILUTFunction") or "LINEAR"
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise tags.unreadable("VOILUTFunction", f"is {function[:40]!r}, not LINEAR, LINEAR_EXACT or SIGMOID")
    if width <= 0 or (function == "LINEAR" and width < 1):
        required = "of at least 1" if function == "LINEAR" else "above 0"
        raise tags.unreadable("WindowWidth", f"is {width:g}; {function} needs a width {required}")
    return _Window(center, width, cast(Literal["LINEAR", "LINEAR_EXACT", "SIGMOID"], function))


def _lut(ds: Any, keyword: str, *, signed: bool, big_endian: bool) -> _Lut:
    """The first table of a LUT sequence. `signed`: inputs may be negative, regardless of the descriptor's VR."""
    try:
        item = tags.value(ds, keyword)[0]
        count, first, bits = (int(value) for value in item.LUTDescriptor)
        count = count or 1 << 16  # the descriptor's 16 bits cannot hold 65,536, which is written as 0
        data = item.LUTData
        if not isinstance(data, bytes):
            data = np.atleast_1d(np.asarray(data, dtype="<u2")).tobytes()
        elif big_endian:
            data = np.frombuffer(data, dtype=">u2").astype("<u2").tobytes()
        # 8-bit entries may be stored one or two per 16-bit word.
        packed = bits == 8 and len(data) == count + count % 2
        entries = np.frombuffer(data, dtype=np.uint8 if packed else "<u2").astype(np.uint16)
        if packed:
            entries = entries[:count]
        if len(entries) != count or not 8 <= bits <= 16:
            raise ValueError(f"{len(data)} bytes for {count} entries of {bits} bits")
    except Exception as error:  # damaged bytes can make any of these lines raise
        raise tags.unreadable(keyword, "is malformed", error) from error
    if bits == 16:  # often declared but not used, as for the stored values
        bits = max(8, int(entries.max()).bit_length())
    return _Lut(first - (1 << 16) if signed and first >= 1 << 15 else first, entries, (1 << bits) - 1)


def gray_table(stored_HW: npt.NDArray[Any], layout: Layout, transform: GrayTransform) -> GrayImage:
    """The gray value of each of the C = 256 or 65,536 possible codes of a stored value.

    Args:
        stored_HW: (H, W) uint8, int8, uint16 or int16. Its values matter only without a window and a VOI LUT, as
            `read_dicom` describes.
        layout: how the values are stored.
        transform: the file's gray value transform.

    Returns:
        (C,) uint8, indexed by stored values reinterpreted as unsigned: 0 black, bone bright.

    Raises:
        UnreadableImageError: a rescale slope that makes all gray values equal.
    """
    value_C = _modality_values(1 << 8 * stored_HW.itemsize, layout, transform)
    with np.errstate(over="ignore", invalid="ignore"):  # absurd widths
        if isinstance(transform.voi, _Lut):
            unit_C = _looked_up(value_C, transform.voi) / transform.voi.top
        elif isinstance(transform.voi, _Window):
            unit_C = _windowed(value_C, transform.voi)
        else:
            low, high = _output_range(stored_HW, layout, transform)
            unit_C = (value_C - low) / (high - low)
    unit_C = np.clip(unit_C, 0, 1)
    return np.rint(255 * (1 - unit_C if transform.invert else unit_C)).astype(np.uint8)


def stored_image(stored_HW: npt.NDArray[Any], layout: Layout, transform: GrayTransform) -> StoredImage:
    """The image before its window, which gives the gray values of `gray_table`.

    A window acts on what the modality step gives; behind a VOI LUT, whose entries are no linear function of that, on
    these entries.

    Args:
        stored_HW: (H, W) uint16 or int16.

    Raises:
        UnreadableImageError: as `gray_table`.
    """
    value_C = _modality_values(1 << 16, layout, transform)
    code_HW: npt.NDArray[np.uint16] = stored_HW.view(np.uint16)
    slope, intercept = 1.0, 0.0
    if isinstance(transform.voi, _Lut):
        level_HW = _looked_up(value_C, transform.voi).astype(np.uint16)[code_HW]
        window = _full_window(0, transform.voi.top)
    else:
        if isinstance(transform.modality, _Lut):
            level_HW = value_C.astype(np.uint16)[code_HW]
        else:
            slope, intercept = transform.modality
            signed = layout.pixel_representation == 1
            level_HW = code_HW ^ np.uint16(1 << 15) if signed else code_HW  # the lowest of signed values becomes 0
            intercept -= slope * (1 << 15) if signed else 0
        window = transform.voi or _full_window(*_output_range(stored_HW, layout, transform))
    return StoredImage(
        level_HW, slope, intercept, window.center, window.width, window.function, inverted=transform.invert
    )


def _full_window(low: float, high: float) -> _Window:
    return _Window((low + high) / 2, high - low, "LINEAR_EXACT")


def _modality_values(codes: int, layout: Layout, transform: GrayTransform) -> npt.NDArray[np.float64]:
    """(C,) what the modality step makes of each code of a stored value.

    Raises:
        UnreadableImageError: a rescale slope that makes all gray values equal.
    """
    value_C = np.arange(codes, dtype=np.float64)
    if layout.pixel_representation:
        value_C[codes // 2 :] -= codes
    if isinstance(transform.modality, _Lut):
        return _looked_up(value_C, transform.modality)
    with np.errstate(over="ignore", invalid="ignore"):  # absurd slopes; infinite results are refused
        value_C = value_C * transform.modality[0] + transform.modality[1]
    if not np.isfinite(value_C).all() or value_C[0] == value_C[1]:
        raise tags.unreadable("RescaleSlope", f"is {transform.modality[0]:g}, which makes all gray values equal")
    return value_C


def _output_range(stored_HW: npt.NDArray[Any], layout: Layout, transform: GrayTransform) -> tuple[float, float]:
    """The smallest and the largest possible output of the modality step."""
    if isinstance(transform.modality, _Lut):
        return 0, transform.modality.top
    slope, intercept = transform.modality
    ends = [end * slope + intercept for end in _stored_range(stored_HW, layout, transform.padding)]
    return min(ends), max(ends)


def _stored_range(stored_HW: npt.NDArray[Any], layout: Layout, padding: tuple[int, int] | None) -> tuple[int, int]:
    """The smallest and the largest value of the stored bits; `used_bits` explains why 16 bits are not trusted."""
    bits, signed = layout.bits_stored, layout.pixel_representation == 1
    if bits == 16:
        inside = stored_HW
        if padding is not None:
            inside = stored_HW[(stored_HW < padding[0]) | (stored_HW > padding[1])]
        low, high = (int(inside.min()), int(inside.max())) if inside.size else (0, 0)
        signed = low < 0
        bits = used_bits(low, high)
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)


def _looked_up(value_C: npt.NDArray[np.float64], lut: _Lut) -> npt.NDArray[np.float64]:
    """Values outside a table's range get its first or last entry (PS3.3 C.11.1.1)."""
    index_C = np.clip(np.rint(value_C) - lut.first, 0, len(lut.entries) - 1).astype(np.int64)
    entry_C: npt.NDArray[np.float64] = lut.entries[index_C].astype(np.float64)
    return entry_C


def _windowed(value_C: npt.NDArray[np.float64], window: _Window) -> npt.NDArray[np.float64]:
    """PS3.3 C.11.2.1.2.1 (LINEAR), C.11.2.1.3.1 (SIGMOID), C.11.2.1.3.2 (LINEAR_EXACT); 0..1 inside the window."""
    center, width = window.center, window.width
    if window.function == "SIGMOID":
        # Clipped before exp overflows; the result is exactly 0 or 1 long before that.
        unit_C: npt.NDArray[np.float64] = 1 / (1 + np.exp(np.clip(-4 * (value_C - center) / width, -700, 700)))
        return unit_C
    if window.function == "LINEAR":
        center, width = center - 0.5, width - 1
    if width == 0:  # LINEAR of width 1 is a step
        return np.where(value_C > center, 1.0, 0.0)
    return (value_C - center) / width + 0.5
