"""Compare our DICOM reader with others over a folder of any files: `python -m tests.compare_dicom DIR...`.

Three comparisons of every file that starts as DICOM does or that pydicom can parse:

- values, GDCM: stored values as pydicom decodes them, by GDCM where they are encoded;
- values, DCMTK: stored values as dcmdjpeg, dcmdjpls, dcmdrle and dcmconv write them; left out where these are missing;
- gray, pydicom: gray values by pydicom's own windows and tables, for files whose range is not a matter of taste.

We read leniently, as for a prediction. A difference within 1 is rounding of a decoder or of a gray level.
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom import uid
from pydicom.pixels import apply_modality_lut, apply_voi_lut, get_decoder

from cxrscale.io.dicom import pixels, read_dicom, reader
from cxrscale.io.strictness import FormalFaults, Strictness
from cxrscale.types import UnreadableImageError, one_line

Values = npt.NDArray[Any]
EQUAL, WITHIN_1, DIFFERENT = "equal", "within 1", "different"
WE_REFUSE, THEY_REFUSE, BOTH_REFUSE, NOT_GRAY = (
    "only we refuse",
    "only they refuse",
    "both refuse",
    "not one gray image",
)
OUTCOMES = (EQUAL, WITHIN_1, DIFFERENT, WE_REFUSE, THEY_REFUSE, BOTH_REFUSE, NOT_GRAY)
DCMTK_SECONDS = 60


class RefusedError(Exception):
    """The other reader does not read a file, or does not say what its gray values are."""


@dataclass(frozen=True, slots=True)
class Compared:
    """How two readers agree on one file."""

    path: Path
    judge: str
    outcome: str
    detail: str = ""


def stored_values(data: bytes) -> tuple[Values, pydicom.Dataset]:
    """The stored values of a file, leniently read by our decoders, and its dataset."""
    faults = FormalFaults(Strictness.LENIENT)
    ds = reader._parse(io.BytesIO(data), force=True, stop_before_pixels=False)
    syntax, layout = reader._syntax(ds, force=True), reader._layout(ds, faults)
    value, vr = reader._pixels(ds, syntax)
    return pixels.decode_frame(value, vr, syntax, layout, faults)[0], ds


def by_gdcm(path: Path) -> Values:
    """Stored values by pydicom; encoded ones by GDCM."""
    ds = pydicom.dcmread(path, force=True)
    if not getattr(ds, "file_meta", None) or "TransferSyntaxUID" not in ds.file_meta:
        ds.file_meta = pydicom.dataset.FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = (
            uid.ImplicitVRLittleEndian if ds.original_encoding[0] else uid.ExplicitVRLittleEndian
        )
    syntax = ds.file_meta.TransferSyntaxUID
    decoder = get_decoder(syntax)
    plugin = "gdcm" if "gdcm" in decoder.available_plugins else ""
    values, _ = decoder.as_array(ds, index=0, raw=True, decoding_plugin=plugin)
    return _in_stored_bits(values, ds, syntax)


def by_dcmtk(path: Path) -> Values:
    """Stored values of the uncompressed file that DCMTK makes."""
    ds = pydicom.dcmread(path, force=True, stop_before_pixels=True)
    syntax = getattr(ds, "file_meta", {}).get("TransferSyntaxUID", uid.ExplicitVRLittleEndian)
    tools = {uid.RLELossless: "dcmdrle", uid.JPEGLSLossless: "dcmdjpls", uid.JPEGLSNearLossless: "dcmdjpls"}
    tool = tools.get(syntax, "dcmdjpeg" if syntax.is_encapsulated else "dcmconv")
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "plain.dcm"
        done = subprocess.run(
            [tool, "+te", str(path), str(plain)], capture_output=True, check=False, timeout=DCMTK_SECONDS
        )
        if done.returncode or not plain.exists():
            raise RefusedError(done.stderr.decode(errors="replace").strip().splitlines()[-1:])
        made = pydicom.dcmread(plain)
        kind = f"<{'i' if made.PixelRepresentation else 'u'}{made.BitsAllocated // 8}"
        values = np.frombuffer(made.PixelData, kind)[: made.Rows * made.Columns]
        return _in_stored_bits(values.reshape(made.Rows, made.Columns), made, syntax)


def _in_stored_bits(values: Values, ds: pydicom.Dataset, syntax: Any) -> Values:
    """The values without bits outside of HighBit and BitsStored; of a lossy frame, clipped to their range."""
    values = values.astype(values.dtype.newbyteorder("="))
    if syntax in pixels.LOSSY:
        return values if ds.PixelRepresentation else np.asarray(np.minimum(values, (1 << ds.BitsStored) - 1))
    above, kind = 8 * values.itemsize - 1 - ds.HighBit, "i" if ds.PixelRepresentation else "u"
    shifted: Values = (values.view(f"u{values.itemsize}") << above).view(f"{kind}{values.itemsize}")
    return np.asarray(shifted >> (8 * values.itemsize - ds.BitsStored))


def gray_by_pydicom(path: Path) -> Values:
    """Gray values by pydicom's modality and VOI steps, on our own stored values."""
    stored, ds = stored_values(path.read_bytes())
    has_table = "VOILUTSequence" in ds and ds.VOILUTSequence
    modality = apply_modality_lut(stored, ds).astype(np.float64)
    if has_table:
        bits = ds.VOILUTSequence[0].LUTDescriptor[2]
        if bits == 16:
            raise RefusedError("a table of 16 declared bits")
        gray = apply_voi_lut(modality.astype(np.int64), ds, index=0) * (255 / ((1 << bits) - 1))
    elif "WindowCenter" in ds and ds.WindowCenter is not None:
        windowed = apply_voi_lut(modality, ds, index=0).astype(np.float64)
        low, high = (float(end) for end in _window_range(ds))
        gray = (windowed - low) * (255 / (high - low))
    elif ds.BitsStored < 16 and not ds.PixelRepresentation and "ModalityLUTSequence" not in ds:
        gray = stored * (255 / ((1 << ds.BitsStored) - 1))
        gray = 255 - gray if float(ds.get("RescaleSlope") or 1) < 0 else gray
    else:
        raise RefusedError("no window, and no range that both agree on")
    shape = ds.get("PresentationLUTShape")
    inverse = shape == "INVERSE" if shape else ds.PhotometricInterpretation == "MONOCHROME1"
    return np.asarray(np.rint(255 - gray if inverse else gray))


def _window_range(ds: pydicom.Dataset) -> tuple[Any, Any]:
    """The range to which pydicom's windows map: a window over it, far wider than any, shows its two ends."""
    return tuple(apply_voi_lut(np.array([-1e12, 1e12]), ds, index=0).tolist())


def compare(path: Path, judge: str, theirs: Callable[[Path], Values], ours: Callable[[bytes], Values]) -> Compared:
    """Read one file by both sides."""
    try:
        mine, refusal = ours(path.read_bytes()), ""
    except UnreadableImageError as error:
        mine, refusal = None, str(error)
    if mine is None and any(word in refusal for word in ("Photometric", "SamplesPerPixel", "NumberOfFrames", "frames")):
        return Compared(path, judge, NOT_GRAY, refusal)
    try:
        other, objection = np.asarray(theirs(path)), ""
    except Exception as error:  # readers raise errors of any type
        other, objection = None, one_line(error, with_type=True, limit=120)
    if mine is None or other is None:
        outcome = BOTH_REFUSE if mine is None and other is None else WE_REFUSE if mine is None else THEY_REFUSE
        return Compared(path, judge, outcome, refusal or objection)
    if mine.shape != other.shape:
        return Compared(path, judge, DIFFERENT, f"{mine.shape} and {other.shape}")
    difference = np.abs(mine.astype(np.int64) - other.astype(np.int64))
    most = int(difference.max())
    detail = f"{np.count_nonzero(difference):,} of {difference.size:,} values, at most by {most}" if most else ""
    return Compared(path, judge, EQUAL if not most else WITHIN_1 if most == 1 else DIFFERENT, detail)


def dicom_files(folders: list[Path]) -> Iterator[Path]:
    """Files that start as DICOM does, with or without preamble."""
    for path in sorted(path for folder in folders for path in folder.rglob("*") if path.is_file()):
        start = path.read_bytes()[:132]
        if start[128:] == b"DICM" or start[:2] in (b"\x08\0", b"\x02\0", b"\0\x08"):
            yield path


def compare_folders(folders: list[Path]) -> list[Compared]:
    """Every comparison of every file."""
    judges: dict[str, Callable[[Path], Values]] = {"values, GDCM": by_gdcm}
    if shutil.which("dcmdjpeg"):
        judges["values, DCMTK"] = by_dcmtk
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for path in dicom_files(folders):
            found += [compare(path, name, judge, lambda data: stored_values(data)[0]) for name, judge in judges.items()]
            found.append(compare(path, "gray, pydicom", gray_by_pydicom, _gray))
    return found


def _gray(data: bytes) -> Values:
    return read_dicom(data, force=True, strictness=Strictness.LENIENT).image_HW


def table(found: list[Compared]) -> str:
    """A line per comparison with its counts."""
    lines = [f"{'':<16}" + "".join(f"{name:>20}" for name in OUTCOMES)]
    for judge in dict.fromkeys(one.judge for one in found):
        counts = Counter(one.outcome for one in found if one.judge == judge)
        lines.append(f"{judge:<16}" + "".join(f"{counts[name]:>20}" for name in OUTCOMES))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--all", action="store_true", help="list also what is no gray image and what both refuse")
    given = parser.parse_args()
    found = compare_folders(given.folders)
    for one in found:
        if one.outcome not in (EQUAL, NOT_GRAY, BOTH_REFUSE) or (given.all and one.outcome != EQUAL):
            print(f"{one.judge}: {one.path}: {one.outcome}: {one.detail}")
    print(table(found))
    return int(any(one.outcome == DIFFERENT for one in found))


if __name__ == "__main__":
    sys.exit(main())
