"""A chest X-ray as the model of this folder takes it; needs numpy, OpenCV and pydicom alone.

What cannot be read exactly as cxrscale does (deep PNGs, look-up tables, signed pixels, most compressed DICOM) is
refused: `cxrscale predict --run FOLDER` reads it.
"""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pydicom

REFUSED = ("ModalityLUTSequence", "VOILUTSequence", "PixelPaddingValue", "NumberOfFrames")


def read(path: str) -> Any:
    """(H, W) uint8, upright, bone bright: a PNG or JPEG as it is, a DICOM file by its window or its range of bits."""
    data = Path(path).read_bytes()
    if data[128:132] != b"DICM":
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE | cv2.IMREAD_ANYDEPTH)
        if image is None or image.dtype != np.uint8:
            raise ValueError("not a DICOM file, nor a PNG or JPEG of 8 bits")
        return image
    ds = pydicom.dcmread(path)
    plain = ds.SamplesPerPixel == 1 and not ds.PixelRepresentation and ds.get("VOILUTFunction", "LINEAR") == "LINEAR"
    if not plain or any(name in ds for name in REFUSED):
        raise ValueError("a DICOM file with tables, padding, frames, colors or signed pixels")
    if ds.file_meta.TransferSyntaxUID == pydicom.uid.JPEGBaseline8Bit:
        frame = np.frombuffer(next(pydicom.encaps.generate_frames(ds.PixelData, number_of_frames=1)), np.uint8)
        stored: Any = cv2.imdecode(frame, cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION)
        if stored is None:
            raise ValueError("a DICOM file whose JPEG is damaged")
    else:
        stored = ds.pixel_array
    slope, offset = float(ds.get("RescaleSlope", 1)), float(ds.get("RescaleIntercept", 0))
    # Writers declare 16 bits where they do not know: the range is then that of the bits in use.
    bits = ds.BitsStored if ds.BitsStored < 16 else max(8, int(stored.max()).bit_length())
    ends = np.array([0, 2**bits - 1]) * slope + offset
    unit = (stored * slope + offset - ends.min()) / np.ptp(ends)
    if "WindowWidth" in ds:
        center, width = (float(np.atleast_1d(ds[name].value)[0]) for name in ("WindowCenter", "WindowWidth"))
        unit = (stored * slope + offset - (center - 0.5)) / max(width - 1, 1e-9) + 0.5
    shape = ds.get("PresentationLUTShape") or ("INVERSE" if ds.PhotometricInterpretation == "MONOCHROME1" else "")
    unit = np.clip(unit, 0, 1)
    return np.rint(255 * (1 - unit if shape == "INVERSE" else unit)).astype(np.uint8)


def model_input(image: Any, know: dict[str, Any]) -> Any:
    """(1, 1, size, size) float32: the image as it would be stored in the dataset, and as the model then sees it."""
    side = know["stored_size"]
    if know["codec"] != "source":
        down = (min(image.shape[1], side), min(image.shape[0], side))
        image = cv2.resize(cv2.resize(image, down, interpolation=cv2.INTER_AREA), (side, side))
    if know["codec"] == "jpeg":
        image = cv2.imdecode(cv2.imencode(".jpg", image, (cv2.IMWRITE_JPEG_QUALITY, know["quality"]))[1], 0)
    return seen(image, know)[None, None]


def seen(image: Any, know: dict[str, Any]) -> Any:
    """(size, size) float32: what the model sees of an image as it is stored."""
    size = know["size"]
    x, y = image.shape[1] / size, image.shape[0] / size
    grid, flags = np.array([[x, 0, 0.5 * x - 0.5], [0, y, 0.5 * y - 0.5]]), cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    level: Any = cv2.warpAffine(image.astype(np.float32), grid, (size, size), flags=flags)
    if know["clahe"]:
        equalizer = cv2.createCLAHE(know["clahe_clip"], (know["clahe_tiles"], know["clahe_tiles"]))
        level = equalizer.apply(np.floor(level + 0.498).astype(np.uint8))
    level = np.clip(level.astype(np.float32), 0, 255)
    if know["normalize"] == "minmax":
        return (level - level.min()) / max(np.ptp(level), np.float32(1e-6))
    return ((level / 255 - know["mean"]) / know["std"]).astype(np.float32)
