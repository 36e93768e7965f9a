"""DICOM files written from scratch for the tests, valid ones and ones with a single error."""

from __future__ import annotations

import io
import struct
import warnings
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
import simplejpeg
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset

Stored = npt.NDArray[Any]


def gray_image(
    height: int = 40, width: int = 34, *, dtype: str = "u1", bits: int | None = None, seed: int = 0
) -> Stored:
    """A smooth, noisy image that uses the full range of its bits."""
    kind = np.dtype(dtype)
    bits = bits or 8 * kind.itemsize
    row, column = np.mgrid[:height, :width]
    wave = np.sin(row / 5) + np.cos(column / 7) + np.random.default_rng(seed).normal(0, 0.1, (height, width))
    unit = (wave - wave.min()) / np.ptp(wave)
    low = -(1 << bits - 1) if kind.kind == "i" else 0
    stored: Stored = np.rint(unit * ((1 << bits) - 1) + low).astype(kind)
    return stored


def dicom_file(
    stored: Stored,
    *,
    syntax: str = uid.ExplicitVRLittleEndian,
    frames: list[bytes] | None = None,
    vr: str | None = None,
    **tags: Any,
) -> bytes:
    """The bytes of a file with the pixels `stored`; `frames` are the fragments of an encapsulated syntax.

    A keyword argument in `tags` sets a tag, None removes it; `vr` is the VR of PixelData.
    """
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.file_meta.MediaStorageSOPClassUID = uid.SecondaryCaptureImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    bits = 8 * stored.dtype.itemsize
    values: dict[str, Any] = {
        "SOPClassUID": uid.SecondaryCaptureImageStorage,
        "SOPInstanceUID": "1.2.3.4",
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": stored.shape[0],
        "Columns": stored.shape[1],
        "BitsAllocated": bits,
        "BitsStored": bits,
        "HighBit": None,
        "PixelRepresentation": int(stored.dtype.kind == "i"),
    } | tags
    if values["HighBit"] is None and values["BitsStored"] is not None:
        values["HighBit"] = values["BitsStored"] - 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about values that are wrong on purpose
        for keyword, value in values.items():
            if value is not None:
                setattr(ds, keyword, value)
        if "PixelData" not in tags:
            if frames is not None:
                ds.PixelData = b"".join(map(_item, [b"", *frames]))
            else:
                big = syntax == uid.ExplicitVRBigEndian
                data = stored.astype(stored.dtype.newbyteorder(">" if big else "<")).tobytes()
                ds.PixelData = data + b"\0" * (len(data) % 2)
        if "PixelData" in ds:
            ds["PixelData"].VR = vr or ("OB" if frames is not None or bits == 8 else "OW")
            ds["PixelData"].is_undefined_length = frames is not None
        file = io.BytesIO()
        ds.save_as(file, enforce_file_format=True)
    return file.getvalue()


def _item(fragment: bytes) -> bytes:
    """An item of encapsulated PixelData (PS3.5 A.4); the first one, empty, is the offset table."""
    fragment += b"\0" * (len(fragment) % 2)
    return struct.pack("<HHL", 0xFFFE, 0xE000, len(fragment)) + fragment


def encoded(stored: Stored, syntax: str, *, bits: int | None = None, quality: int = 90) -> bytes:
    """One frame of `stored` in an encapsulated transfer syntax."""
    bits = bits or 8 * stored.dtype.itemsize
    if syntax in (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit):
        return bytes(simplejpeg.encode_jpeg(stored[..., None], quality, "GRAY", fastdct=False))
    if syntax in (uid.JPEGLossless, uid.JPEGLosslessSV1):
        return jpeg_lossless(stored, bits)
    if syntax in uid.JPEG2000TransferSyntaxes:
        return jpeg_2000(stored, bits, syntax)
    if syntax in uid.JPEGLSTransferSyntaxes and bits in (8, 16):  # for which imagecodecs writes the right header
        near = 2 if syntax == uid.JPEGLSNearLossless else 0
        return bytes(imagecodecs.jpegls_encode(stored.view(f"u{stored.itemsize}"), level=near))
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows, ds.Columns = stored.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8 * stored.dtype.itemsize, bits, bits - 1
    ds.PixelRepresentation = int(stored.dtype.kind == "i")
    ds.PixelData = stored.tobytes()
    ds["PixelData"].VR = "OW"
    options: dict[str, Any] = {"jls_error": 2} if syntax == uid.JPEGLSNearLossless else {}
    plugin = "pyjpegls" if syntax in uid.JPEGLSTransferSyntaxes else "pydicom"
    ds.compress(syntax, encoding_plugin=plugin, generate_instance_uid=False, **options)
    size = struct.unpack_from("<L", ds.PixelData, 4)[0]  # of the offset table, which precedes the fragment
    length = struct.unpack_from("<L", ds.PixelData, 12 + size)[0]
    return bytes(ds.PixelData[16 + size : 16 + size + length])


def jpeg_2000(stored: Stored, bits: int, syntax: str) -> bytes:
    """A JPEG 2000 codestream, lossy at 45 dB where the transfer syntax is."""
    if syntax in (uid.HTJ2K, uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL):
        return bytes(imagecodecs.htj2k_encode(stored, reversible=True))
    lossless = syntax == uid.JPEG2000Lossless
    return bytes(
        imagecodecs.jpeg2k_encode(
            stored, level=0 if lossless else 45, codecformat="j2k", bitspersample=bits, reversible=lossless
        )
    )


def jpeg_lossless(stored: Stored, bits: int) -> bytes:
    """JPEG Lossless (ITU-T T.81 annex H) of 2 to 16 bits, with left-neighbor prediction and 5 bits per category."""
    value = stored.astype(np.int64) & ((1 << bits) - 1)
    before = np.empty_like(value)
    before[:, 1:] = value[:, :-1]
    before[1:, 0] = value[:-1, 0]
    before[0, 0] = 1 << bits - 1
    difference = (value - before + 32768) % 65536 - 32768
    stream = []
    for one in difference.ravel().tolist():
        category = 16 if one == -32768 else abs(one).bit_length()
        stream.append(f"{category:05b}")
        if 0 < category < 16:
            stream.append(f"{one if one > 0 else one + (1 << category) - 1:0{category}b}")
    text = "".join(stream)
    text += "1" * (-len(text) % 8)
    scan = int(text, 2).to_bytes(len(text) // 8, "big").replace(b"\xff", b"\xff\x00")
    height, width = stored.shape
    table = bytes([0, *(17 if length == 5 else 0 for length in range(1, 17)), *range(17)])
    return b"".join(
        [
            b"\xff\xd8",
            b"\xff\xc3" + struct.pack(">HBHHB", 11, bits, height, width, 1) + b"\x01\x11\x00",
            b"\xff\xc4" + struct.pack(">H", 2 + len(table)) + table,
            b"\xff\xda" + struct.pack(">HB", 8, 1) + b"\x01\x00\x01\x00\x00",
            scan,
            b"\xff\xd9",
        ]
    )


def lut_item(entries: Stored, *, first: int = 0, bits: int = 16, vr: str = "OW", signed: bool = False) -> Dataset:
    """An item of a modality or VOI LUT sequence; uint8 entries are packed two per word."""
    item = Dataset()
    descriptor = [len(entries) % 65536, first if signed else first % 65536, bits]
    item.add_new("LUTDescriptor", "SS" if signed else "US", descriptor)
    data = entries.astype("<u2" if entries.dtype.itemsize == 2 else "u1").tobytes()
    data += b"\0" * (len(data) % 2)
    item.add_new("LUTData", vr, data if vr == "OW" else np.frombuffer(data, "<u2").tolist())
    return item
