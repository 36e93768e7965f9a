"""Probabilities, calls and masks of chest X-rays by the ONNX model of this folder: python predict.py IMAGE...

Needs onnxruntime, numpy, OpenCV and pydicom alone. What it cannot read exactly as cxrscale does (deep PNGs, look-up
tables, most compressed DICOM) it refuses: `cxrscale predict --run FOLDER` reads those. Not a medical device.
"""

import json
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime
import pydicom

ABOUT = json.loads(Path(__file__).with_name("export.json").read_text())
SESSION = onnxruntime.InferenceSession(str(Path(__file__).with_name("model.onnx")), providers=["CPUExecutionProvider"])


def read(path: str) -> Any:
    """(H, W) uint8, upright, bone bright."""
    data = Path(path).read_bytes()
    if data[128:132] != b"DICM":
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE | cv2.IMREAD_ANYDEPTH)
        if image is None or image.dtype != np.uint8:
            raise ValueError("not a DICOM file, nor a PNG or JPEG of 8 bits")
        return image
    ds = pydicom.dcmread(path)
    unsure = ("ModalityLUTSequence", "VOILUTSequence", "PixelPaddingValue", "NumberOfFrames")
    if any(name in ds for name in unsure) or ds.get("VOILUTFunction", "LINEAR") != "LINEAR" or ds.SamplesPerPixel != 1:
        raise ValueError("a DICOM file with tables, padding, frames or colors")
    if ds.file_meta.TransferSyntaxUID == pydicom.uid.JPEGBaseline8Bit:
        frame = np.frombuffer(next(pydicom.encaps.generate_frames(ds.PixelData, number_of_frames=1)), np.uint8)
        stored: Any = cv2.imdecode(frame, cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION)
        if stored is None:
            raise ValueError("a DICOM file whose JPEG is damaged")
    else:
        stored = ds.pixel_array
    slope, offset, signed = float(ds.get("RescaleSlope", 1)), float(ds.get("RescaleIntercept", 0)), stored.min() < 0
    # Writers declare 16 bits where they do not know: the range is then that of the bits in use.
    largest = max(int(stored.max()), -int(stored.min()) - 1)
    bits = ds.BitsStored if ds.BitsStored < 16 else max(8, largest.bit_length() + signed)
    signed = bool(ds.PixelRepresentation) if ds.BitsStored < 16 else signed
    ends = np.array([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1] if signed else [0, 2**bits - 1]) * slope + offset
    unit = (stored * slope + offset - ends.min()) / np.ptp(ends)
    if "WindowWidth" in ds:
        center, width = (np.atleast_1d(ds[name].value)[0] for name in ("WindowCenter", "WindowWidth"))
        unit = (stored * slope + offset - (float(center) - 0.5)) / max(float(width) - 1, 1e-9) + 0.5
    shape, dark = ds.get("PresentationLUTShape"), ds.PhotometricInterpretation == "MONOCHROME1"
    unit = np.clip(unit, 0, 1)
    return np.rint(255 * (1 - unit if (shape == "INVERSE" if shape else dark) else unit)).astype(np.uint8)


def model_input(image: Any) -> Any:
    """(1, 1, size, size) float32: the image as it would be stored in the dataset, and as the model then sees it."""
    know, side = ABOUT["input"], ABOUT["input"]["stored_size"]
    if know["codec"] != "source":
        down = (min(image.shape[1], side), min(image.shape[0], side))
        image = cv2.resize(cv2.resize(image, down, interpolation=cv2.INTER_AREA), (side, side))
    if know["codec"] == "jpeg":
        image = cv2.imdecode(cv2.imencode(".jpg", image, (cv2.IMWRITE_JPEG_QUALITY, know["quality"]))[1], 0)
    x, y = image.shape[1] / know["size"], image.shape[0] / know["size"]
    grid = np.array([[x, 0, 0.5 * x - 0.5], [0, y, 0.5 * y - 0.5]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    level: Any = cv2.warpAffine(image.astype(np.float32), grid, (know["size"], know["size"]), flags=flags)
    if know["clahe"]:
        tiles = (know["clahe_tiles"], know["clahe_tiles"])
        level = cv2.createCLAHE(know["clahe_clip"], tiles).apply(np.floor(level + 0.498).astype(np.uint8))
    level = np.clip(level.astype(np.float32), 0, 255)
    if know["normalize"] == "minmax":
        level = (level - level.min()) / max(np.ptp(level), np.float32(1e-6))
    else:
        level = (level / 255 - know["mean"]) / know["std"]
    return level.astype(np.float32)[None, None]


def final(logit: float, rule: Any) -> float:
    """The calibrated probability, corrected for another prevalence where the run knows one."""
    own = 1 / (1 + np.exp(-float(logit)))
    value = 1 / (1 + np.exp(-(rule["slope"] * float(logit) + rule["offset"])))
    if rule["knots"]:
        value = np.interp(own, [knot[0] for knot in rule["knots"]], [knot[1] for knot in rule["knots"]])
    if rule["prior"]:
        odds = rule["prior"][1] / rule["prior"][0], (1 - rule["prior"][1]) / (1 - rule["prior"][0])
        value = value * odds[0] / (value * odds[0] + (1 - value) * odds[1])
    return float(value)


def mask(logits: Any, shape: tuple[int, int]) -> Any:
    """(H, W) bool at the image's own size: no mask unless enough pixels score high, then all above the bottom."""
    rule = ABOUT["mask_rule"]
    score = 256 / (1 + np.exp(-logits.astype(np.float32)))
    own = cv2.resize(score, shape[::-1], interpolation=cv2.INTER_LINEAR) if shape != score.shape else score
    top, bottom = (min(255, max(0, round(rule[name] * 256))) for name in ("top", "bottom"))
    seen = own if rule["own_size"] else score
    return (own >= bottom) & bool((seen >= top).sum() >= max(1, rule["min_area"]))


def predict(path: str) -> dict[str, Any]:
    """Probabilities, calls (true: present) and, of a segmenter, the mask."""
    image = read(path)
    (logits,) = SESSION.run(["logits"], {"image": model_input(image)})
    peaks = logits.reshape(1, len(ABOUT["findings"]), -1).max(axis=2)[0]
    rules = ABOUT["findings"].items()
    found = {name: final(value, rule) for value, (name, rule) in zip(peaks, rules, strict=True)}
    called = {name: found[name] >= rule["threshold"] for name, rule in rules if rule["threshold"] is not None}
    result = {"path": path, "probabilities": found, "calls": called}
    return result | ({"mask": mask(logits[0, 0], image.shape)} if ABOUT["task"] == "segment" else {})


if __name__ == "__main__":
    for name in sys.argv[1:] or sys.exit(__doc__):
        try:
            one = predict(name)
        except (ValueError, AttributeError, OSError, NotImplementedError, pydicom.errors.InvalidDicomError) as error:
            one = {"path": name, "error": str(error)}
        if "mask" in one:  # in the current folder
            out = Path(Path(name).name + ".mask.png").resolve()
            cv2.imwrite(str(out), one["mask"].astype(np.uint8) * 255)
            one["mask"] = str(out)
        print(json.dumps(one))
