"""Undamaged files of each kind, and the ways in which they are damaged. A random generator determines everything."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import cv2
import numpy as np
import pydicom
import simplejpeg
from PIL import Image
from pydicom import uid

from cxrscale.io.images import encode_jpeg, encode_mask, encode_png
from tests.dicom_files import dicom_file, encoded, gray_image

Rng = np.random.Generator
PNG_MAGIC = 8
"""Bytes before a PNG's first chunk."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a file with a length field: a PNG chunk, a JPEG segment, a DICOM element."""

    start: int
    end: int
    length_offset: int
    """The offset of its length field."""
    field: str
    """The `struct` format of the length field."""


# Undamaged files


@cache
def png_files() -> tuple[bytes, ...]:
    """Gray with 8, 16 and 1 bits, gray as color with alpha, a palette; several IDATs in large files."""
    gray = gray_image(150, 130)
    deep = cv2.imencode(".png", gray_image(60, 50, dtype="u2"))[1].tobytes()
    rgba = cv2.imencode(".png", cv2.cvtColor(gray, cv2.COLOR_GRAY2BGRA))[1].tobytes()
    palette = io.BytesIO()
    Image.fromarray(gray[:40]).convert("P").save(palette, "PNG", dpi=(72, 72))
    return encode_png(gray), deep, rgba, palette.getvalue(), encode_mask(gray > 99)


@cache
def jpeg_files() -> tuple[bytes, ...]:
    """Baseline gray, neutral color, progressive, with restart markers, and rotated by EXIF."""
    gray = gray_image(90, 110)
    color = cv2.cvtColor(gray, cv2.COLOR_GRAY2BGR)
    turned, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(gray).save(turned, "JPEG", exif=exif, quality=90)
    return (
        encode_jpeg(gray),
        simplejpeg.encode_jpeg(color, 85, "BGR"),
        cv2.imencode(".jpg", gray, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes(),
        cv2.imencode(".jpg", gray, [cv2.IMWRITE_JPEG_RST_INTERVAL, 3])[1].tobytes(),
        turned.getvalue(),
    )


@cache
def dicom_files() -> tuple[bytes, ...]:
    """Every way of storing pixels, with and without windows, and all tags that the reader uses."""
    small, deep = gray_image(64, 48), gray_image(64, 48, dtype="u2", bits=12)
    metadata: dict[str, Any] = {"PatientSex": "F", "PatientAge": "051Y", "ViewPosition": "PA", "PatientID": "someone"}
    window: dict[str, Any] = {"WindowCenter": [2048, 1000], "WindowWidth": [4096, 900], "BitsStored": 12}
    slope: dict[str, Any] = {"RescaleSlope": "1.5", "RescaleIntercept": "-100", "BitsStored": 12}
    syntaxes_8_bit = (uid.JPEGBaseline8Bit, uid.JPEGLosslessSV1, uid.RLELossless, uid.JPEGLSLossless, uid.JPEG2000)
    syntaxes_12_bit = (uid.RLELossless, uid.JPEG2000Lossless)
    return (
        dicom_file(small, PhotometricInterpretation="MONOCHROME1", PixelSpacing=[0.14, 0.14], **metadata),
        dicom_file(deep, syntax=uid.ImplicitVRLittleEndian, VOILUTFunction="SIGMOID", **window),
        dicom_file(deep, syntax=uid.ExplicitVRBigEndian, **slope),
        dicom_file(deep, syntax=uid.DeflatedExplicitVRLittleEndian, **window),
        *(dicom_file(small, syntax=name, frames=[encoded(small, name)], **metadata) for name in syntaxes_8_bit),
        *(dicom_file(deep, syntax=name, frames=[encoded(deep, name, bits=12)], **window) for name in syntaxes_12_bit),
    )


@cache
def nih_labels() -> tuple[bytes, ...]:
    """The two editions of the label table."""
    header = (
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient {},{},View Position,OriginalImage[Width,Height],"
    )
    header += "OriginalImagePixelSpacing[x,y]"
    findings = ("No Finding", "Cardiomegaly|Effusion", "Hernia", "Pleural_Thickening|Mass")
    rows = [
        f"{n:08d}_{n % 3:03d}.png,{findings[n % 4]},{n % 3},{n},{{}},{'FM'[n % 2]},{('PA', 'AP')[n % 2]},2048,2500,"
        "0.168,0.168"
        for n in range(1, 25)
    ]
    newer = [header.format("Age", "Patient Gender"), *(row.format(58) for row in rows)]
    older = [header.format("Age", "Patient Gender") + ",", *(row.format("058Y") + "," for row in rows)]
    return "\n".join(newer).encode(), "\r\n".join(older).encode()


@cache
def nih_boxes() -> tuple[bytes, ...]:
    """The box table, with its unquoted commas."""
    rows = [f"{n:08d}_000.png,Infiltrate,{n}.5,547.01,{80 + n},79.9,,," for n in range(1, 20)]
    return (("\n".join(["Image Index,Finding Label,Bbox [x,y,w,h],,,", *rows]) + "\n").encode(),)


@cache
def siim_masks() -> tuple[bytes, ...]:
    """The mask table, with its spaces."""
    rows = [f"1.2.276.{n}, {'-1' if n % 3 else f'{n}00 5 1019 7 1016 9'}" for n in range(20)]
    return (("\n".join(["ImageId, EncodedPixels", *rows, rows[0]]) + "\n").encode(),)


@cache
def rsna_labels() -> tuple[bytes, ...]:
    """The label table, with several boxes for one patient."""
    rows = [f"p-{n},,,,,0" if n % 3 else f"p-{n},264.0,{n}52.0,213.0,379.0,1" for n in range(20)]
    return (("\n".join(["patientId,x,y,width,height,Target", *rows, rows[0]]) + "\n").encode(),)


# Their parts


def png_parts(data: bytes) -> list[Part]:
    """All chunks."""
    parts, offset = [], PNG_MAGIC
    while offset < len(data):
        end = offset + 12 + int.from_bytes(data[offset : offset + 4], "big")
        parts.append(Part(offset, end, offset, ">I"))
        offset = end
    return parts


def jpeg_parts(data: bytes) -> list[Part]:
    """All segments up to the header of the first scan."""
    parts, offset = [], 2
    while data[offset + 1] != 0xDA:
        end = offset + 2 + int.from_bytes(data[offset + 2 : offset + 4], "big")
        parts.append(Part(offset, end, offset + 2, ">H"))
        offset = end
    return [*parts, Part(offset, len(data), offset + 2, ">H")]


def dicom_parts(data: bytes) -> list[Part]:
    """All elements of the file meta information and, unless it is deflated, of the first level of the data set."""
    syntax = pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True).file_meta.TransferSyntaxUID
    parts, offset = [], 132
    while offset < len(data):
        is_meta = data[offset : offset + 2] == b"\x02\x00"
        if not is_meta and syntax.is_deflated:
            break
        order = "<" if is_meta or syntax.is_little_endian else ">"
        implicit = not is_meta and syntax.is_implicit_VR
        wide = not implicit and data[offset + 4 : offset + 6] in (b"OB", b"OW", b"SQ", b"UN", b"UT")
        length_offset = offset + (8 if wide else 4 if implicit else 6)
        field = order + ("I" if implicit or wide else "H")
        length = struct.unpack_from(field, data, length_offset)[0]
        # Encapsulated pixels are the last element and have an undefined length.
        end = len(data) if length == 0xFFFFFFFF else length_offset + struct.calcsize(field) + length
        parts.append(Part(offset, end, length_offset, field))
        offset = end
    return parts


# Damage


def bytewise(data: bytes, rng: Rng) -> bytes:
    """Damage by disks, downloads and copying: flipped bits; overwritten, lost, doubled or swapped runs; truncation."""
    out = bytearray(data)
    length = len(data)
    start = int(rng.integers(length))
    # Headers are small and matter most: they get half of all damage.
    if rng.random() < 0.5:
        start = int(rng.integers(min(length, 700)))
    run = min(length - start, int(rng.choice([1, 2, 4, 16, 64, 512])))
    match int(rng.integers(8)):
        case 0:
            for offset in rng.integers(length, size=int(rng.integers(1, 9))):
                out[offset] ^= 1 << int(rng.integers(8))
        case 1:
            out[start] ^= 1 << int(rng.integers(8))
        case 2:
            out[start : start + run] = bytes([int(rng.choice([0, 0xFF]))]) * run
        case 3:
            out[start : start + run] = rng.bytes(run)
        case 4:
            del out[start:]
        case 5:
            del out[start : start + run]
        case 6:
            out[start:start] = out[start : start + run]
        case _:
            other = int(rng.integers(length - run + 1))
            out[start : start + run], out[other : other + run] = out[other : other + run], out[start : start + run]
    return bytes(out)


def partwise(data: bytes, parts: list[Part], rng: Rng) -> bytes:
    """Errors of faulty writers: parts that are swapped, missing, doubled, misnamed, or have a wrong length field."""
    one, other = sorted(rng.integers(len(parts), size=2).tolist())
    a, b = parts[one], parts[other]
    match int(rng.integers(5)):
        case 0:
            if one == other:
                return data[: a.start] + data[a.end :]
            return b"".join(
                [data[: a.start], data[b.start : b.end], data[a.end : b.start], data[a.start : a.end], data[b.end :]]
            )
        case 1:
            return data[: a.start] + data[a.end :]
        case 2:
            return data[: b.end] + data[a.start : a.end] + data[b.end :]
        case 3:
            offset = a.start + int(rng.integers(8))
            return data[:offset] + bytes([int(rng.integers(256))]) + data[offset + 1 :]
        case _:
            most = 256 ** struct.calcsize(a.field) - 1
            length = struct.unpack_from(a.field, data, a.length_offset)[0]
            values = [0, 1, most, most >> 1, length - 1, length + 1, 2 * length, int(rng.integers(most))]
            value = values[int(rng.integers(len(values)))] % (most + 1)
            after = a.length_offset + struct.calcsize(a.field)
            return data[: a.length_offset] + struct.pack(a.field, value) + data[after:]


def resealed(data: bytes, rng: Rng) -> bytes:
    """A PNG with damaged compressed pixels but matching CRCs: only the Adler-32 of the pixels shows the damage."""
    chunks = [part for part in png_parts(data) if data[part.start + 4 : part.start + 8] == b"IDAT"]
    part = chunks[int(rng.integers(len(chunks)))]
    body = bytewise(data[part.start + 8 : part.end - 4], rng)
    inside = b"IDAT" + body
    sealed = struct.pack(">I", len(body)) + inside + struct.pack(">I", zlib.crc32(inside))
    return data[: part.start] + sealed + data[part.end :]


_CELLS = "|-1|0|1e999|nan|²|-|No Finding|Effusion||Hernia|1 2 3|5 -4|\"|'|\x00|\ufeff|٣|" + "9" * 400
_BREAKS = (",", "\n", '"', ";", "\t", "\r", "\x00", "'", " ", ",,", "\u2028")


def cellwise(data: bytes, rng: Rng) -> bytes:
    """Damage to tables by spreadsheets and manual edits: cells, rows, columns and separators; other encodings."""
    rows = [line.split(",") for line in data.decode().splitlines()]
    offset = int(rng.integers(len(rows))) if rng.random() < 0.7 else 0
    cell = int(rng.integers(len(rows[offset])))
    cells = _CELLS.split("|")
    match int(rng.integers(9)):
        case 0:
            rows[offset][cell] = cells[int(rng.integers(len(cells)))]
        case 1:
            del rows[offset][cell]
        case 2:
            rows[offset].insert(cell, cells[int(rng.integers(len(cells)))])
        case 3:
            rows.insert(offset, list(rows[int(rng.integers(len(rows)))]))
        case 4:
            del rows[offset]
        case 5:
            rows[offset][cell] += _BREAKS[int(rng.integers(len(_BREAKS)))]
        case 6:
            for row in rows:
                del row[min(cell, len(row) - 1)]
        case 7:
            other = int(rng.integers(len(rows)))
            rows[offset], rows[other] = rows[other], rows[offset]
        case _:
            text = "\n".join(map(",".join, rows))
            return text.encode(("utf-16", "utf-8-sig", "utf-32", "cp500")[int(rng.integers(4))])
    return "\n".join(map(",".join, rows)).encode()


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of input: its undamaged files and how they are damaged."""

    files: Callable[[], tuple[bytes, ...]]
    parts: Callable[[bytes], list[Part]] | None = None
    special: Callable[[bytes, Rng], bytes] | None = None


KINDS = {
    "png": Kind(png_files, png_parts),
    "png-resealed": Kind(png_files, special=resealed),
    "jpeg": Kind(jpeg_files, jpeg_parts),
    "dicom": Kind(dicom_files, dicom_parts),
    "nih-labels": Kind(nih_labels, special=cellwise),
    "nih-boxes": Kind(nih_boxes, special=cellwise),
    "siim-masks": Kind(siim_masks, special=cellwise),
    "rsna-labels": Kind(rsna_labels, special=cellwise),
}


def mutated(kind: str, seed: int, number: int) -> tuple[int, bytes]:
    """The damaged input of a number: the index of the original file, and its bytes with one to three damages."""
    rng = np.random.default_rng([seed, list(KINDS).index(kind), number])
    chosen = KINDS[kind]
    files = chosen.files()
    which = int(rng.integers(len(files)))
    data = files[which]
    parts, special = chosen.parts, chosen.special
    sample = rng.random()
    if special is not None and sample < 0.7:
        data = special(data, rng)
    elif parts is not None and sample < 0.6:
        data = partwise(data, parts(data), rng)
    else:
        data = bytewise(data, rng)
    for _ in range(int(rng.choice([0, 0, 0, 1, 2]))):
        data = bytewise(data, rng) if data else data
    return which, data
