"""Files of a few megabytes that declare gigabytes cost at most 300 MB, and one line of the quarantine."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import uid

from cxrscale.config import Pack
from cxrscale.io import dicom, limits, load_image
from cxrscale.io.png import SIGNATURE, chunk
from cxrscale.shards import build_shards
from cxrscale.sources.synthetic import archive
from cxrscale.types import UnreadableImageError
from tests.dicom_files import Stored, dicom_file, encoded, gray_image

MOST_MB = 300
READ_AND_MEASURE = """
import sys
from pathlib import Path
from cxrscale.io import load_image
from cxrscale.types import UnreadableImageError
try:
    print(load_image(Path(sys.argv[1]).read_bytes(), name=sys.argv[1]).image_HW.shape)
except UnreadableImageError as error:
    print(error)
# Not getrusage: its peak begins with that of the process that started this one.
print(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line))
"""


def deflated_zeros(count: int) -> bytes:
    """A raw deflate stream of many zeros, from one block of a megabyte that is repeated."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return block * (count >> 20) + b"\x03\x00"


def png_bomb(size: int = 9999, bits: int = 16, color: int = 6, **chunks: bytes) -> bytes:
    """16-bit RGBA of 9999 x 9999: 800 MB in 0.8 MB."""
    header = struct.pack(">IIBBBBB", size, size, bits, color, 0, 0, 0)
    count = size * (1 + size * 8)
    body = b"\x78\xda" + deflated_zeros(count + (1 << 20)) + struct.pack(">I", ((count % 65521) << 16) | 1)
    named = [(name.encode(), text) for name, text in chunks.items()]
    parts = [(b"IHDR", header), *named, (b"IDAT", body), (b"IEND", b"")]
    return SIGNATURE + b"".join(chunk(kind, content) for kind, content in parts)


def text_bomb() -> bytes:
    """A compressed text of 1 GB before an image of 8 x 8."""
    text = b"Comment\0\0\x78\xda" + deflated_zeros(1 << 30) + struct.pack(">I", (((1 << 30) % 65521) << 16) | 1)
    header = struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", header), (b"zTXt", text), (b"IDAT", zlib.compress(bytes(72))), (b"IEND", b"")]
    return SIGNATURE + b"".join(chunk(kind, content) for kind, content in parts)


def deflated_bomb() -> bytes:
    """A deflated DICOM file of 2.1 GB, nearly all of it zeros behind its tags."""
    plain = dicom_file(gray_image(), syntax=uid.DeflatedExplicitVRLittleEndian, PixelData=None)
    start = 144 + int.from_bytes(plain[140:144], "little")
    body = zlib.decompress(plain[start:], -15) + b"\xe0\x7f\x10\x00OW\0\0" + struct.pack("<I", 2100 << 20)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return plain[:start] + packer.compress(body) + packer.flush(zlib.Z_FULL_FLUSH) + deflated_zeros(2100 << 20)


def rle_bomb() -> bytes:
    """Two segments of 268 million pixels each for an image of 16 x 16."""
    segment = b"\x81\0" * (1 << 21)
    header = np.array([2, 64, 64 + len(segment), *[0] * 13], dtype="<u4").tobytes()
    stored = np.zeros((16, 16), np.uint16)
    return dicom_file(stored, syntax=uid.RLELossless, frames=[header + segment + segment])


def large_frame(syntax: Any, size: int = 16384) -> bytes:
    """A small frame whose header, like the file's, declares `size` x `size` pixels."""
    frame = bytearray(encoded(gray_image(dtype="u2"), syntax))
    if syntax in uid.JPEG2000TransferSyntaxes:
        struct.pack_into(">6I", frame, 8, size, size, 0, 0, size, size)
    else:
        struct.pack_into(">HH", frame, frame.index(b"\xff\xf7") + 5, size, size)
    return dicom_file(gray_image(dtype="u2"), syntax=syntax, frames=[bytes(frame)], Rows=size, Columns=size)


def parts_bomb(tile: int, block: int, precinct: int | None, size: int = 4000) -> bytes:
    """JPEG 2000 of 120 bytes whose tiles, code-blocks or precincts outweigh its values."""
    width = size.to_bytes(4, "big")
    siz = b"\xff\x51\0\x29\0\0" + width * 2 + bytes(8) + tile.to_bytes(4, "big") * 2 + bytes(8) + b"\0\1\7\1\1"
    sizes = b"" if precinct is None else bytes([precinct << 4 | precinct] * 6)
    cod = b"\xff\x52" + struct.pack(">HBBHBBBBBB", 12 + len(sizes), bool(sizes), 0, 1, 0, 5, block - 2, block - 2, 0, 1)
    qcd = b"\xff\x5c\0\x13\x40" + b"\x48" * 16
    part = b"\xff\x90\0\x0a\0\0\0\0\0\x1e\0\1\xff\x93" + bytes(16)
    frame = b"\xff\x4f" + siz + cod + sizes + qcd + part + b"\xff\xd9"
    stored = gray_image()
    return dicom_file(stored, syntax=uid.JPEG2000Lossless, frames=[frame], Rows=size, Columns=size)


def progressive_bomb() -> bytes:
    """A progressive color JPEG of 10000 x 10000: its coefficients take 600 MB."""
    frame = bytes.fromhex("ffd8ffc20011082710271003011100021100031100")
    return frame + bytes.fromhex("ffda000c03010002000300000000003fffd9")


BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "png": (png_bomb, "PNG of 9999 x 9999 pixels takes"),
    "png-text": (text_bomb, "(8, 8)"),
    "deflated": (deflated_bomb, "is Deflated, and"),
    "rle": (rle_bomb, "cannot be decoded as RLE Lossless"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_memory_bomb_costs_little(name: str, tmp_path: Path) -> None:
    make, answer = BOMBS[name]
    path = tmp_path / name
    path.write_bytes(make())
    assert path.stat().st_size < 9 << 20
    done = subprocess.run(
        [sys.executable, "-c", READ_AND_MEASURE, str(path)], capture_output=True, text=True, check=True
    )
    *_, reason, peak_kb = done.stdout.splitlines()
    assert answer in reason
    assert int(peak_kb) / 1000 < MOST_MB


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (lambda: large_frame(uid.JPEGLSLossless), r"Rows \(0028,0010\) .* is 16384 x 16384: over 100,000,000 pixels"),
        (lambda: large_frame(uid.JPEG2000Lossless, 9000), r"JPEG 2000 .* takes [\d,]+ MiB to decode: over 256 MiB"),
        (lambda: large_frame(uid.JPEGLSLossless, 9000), r"JPEG-LS .* takes [\d,]+ MiB to decode: over 256 MiB"),
        (lambda: parts_bomb(16, 6, None), r"JPEG 2000 .* of 4000 x 4000 pixels takes [\d,]+ MiB to decode"),
        (lambda: parts_bomb(4000, 2, None), r"JPEG 2000 .* of 4000 x 4000 pixels takes [\d,]+ MiB to decode"),
        (lambda: parts_bomb(4000, 6, 2), r"JPEG 2000 .* of 4000 x 4000 pixels takes [\d,]+ MiB to decode"),
        (progressive_bomb, "JPEG of 10000 x 10000 pixels takes"),
        (lambda: png_bomb(60000, 8, 0), "PNG of 60000 x 60000 pixels: over 100,000,000"),
    ],
)
def test_the_memory_that_a_header_declares_is_counted_before_decoding(data: Callable[[], bytes], reason: str) -> None:
    with pytest.raises(UnreadableImageError, match=reason):
        load_image(data())


def test_the_header_of_a_deflated_bomb_is_not_inflated_either() -> None:
    with pytest.raises(UnreadableImageError, match="is Deflated"):
        dicom.read_header(deflated_bomb())


@pytest.mark.parametrize("bits", [8, 16])
def test_the_largest_detectors_are_far_from_the_limits(bits: int) -> None:
    """20 million pixels in the most expensive encodings: JPEG 2000 in DICOM, 16-bit gray and 8-bit RGBA in PNG."""
    for bytes_per_pixel in (2 * bits // 8 + 1 + 4, 2 + 3, 4 + 6):
        limits.check_memory(4800, 4267, bytes_per_pixel, "an image")
        assert 4800 * 4267 * bytes_per_pixel < 0.8 * limits.MAX_BYTES


def deflated(stored: Stored) -> bytes:
    return dicom_file(stored, syntax=uid.DeflatedExplicitVRLittleEndian)


def test_a_deflated_file_within_the_limits_is_read() -> None:
    stored = gray_image(400, 300)
    assert np.array_equal(load_image(deflated(stored)).image_HW, stored)
    assert dicom.read_header(deflated(stored)).sop_uid == "1.2.3.4"
    with pytest.raises(UnreadableImageError, match="truncated"):
        load_image(deflated(stored)[:-900])


def test_shard_quarantines_a_bomb_and_packs_the_rest(tmp_path: Path) -> None:
    drawn = archive.write(str(tmp_path / "archive"), images=10, size=64, seed=3)
    paths = sorted(Path(drawn.nih).rglob("*.png"))
    paths[2].write_bytes(png_bomb())
    result = build_shards("nih", str(drawn.nih), Pack(size=64), str(tmp_path / "out"), local=True)
    lines = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [line["reason"] for line in lines] == ["PNG of 9999 x 9999 pixels takes 1,620 MiB to decode: over 256 MiB"]
    assert (result.images, result.quarantined) == (len(paths) - 1, 1)
