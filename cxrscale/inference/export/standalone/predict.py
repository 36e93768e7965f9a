"""Probabilities, calls and masks of chest X-rays by the ONNX model of this folder: python predict.py IMAGE...

Needs onnxruntime, numpy, OpenCV and pydicom alone, and image_input.py beside it. Not a medical device.
"""

import json
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime
from image_input import model_input, read

HERE = Path(__file__).parent


def final(logit: float, rule: Any) -> float:
    """The calibrated probability, corrected for another prevalence where the run knows one."""
    value: Any = 1 / (1 + np.exp(-(rule["slope"] * logit + rule["offset"])))
    if rule["knots"]:
        knots = np.array(rule["knots"])
        value = np.interp(1 / (1 + np.exp(-logit)), knots[:, 0], knots[:, 1])
    if rule["prior"]:
        old, new = rule["prior"]
        value = value * new / old / (value * new / old + (1 - value) * (1 - new) / (1 - old))
    return float(value)


def mask(logits: Any, shape: tuple[int, int], rule: Any) -> Any:
    """(H, W) bool at the image's own size: no mask unless enough pixels score high, then all above the bottom."""
    score = 256 / (1 + np.exp(-logits.astype(np.float32)))
    own = cv2.resize(score, shape[::-1], interpolation=cv2.INTER_LINEAR) if shape != score.shape else score
    top, bottom = (min(255, max(0, round(rule[name] * 256))) for name in ("top", "bottom"))
    return (own >= bottom) & bool(((own if rule["own_size"] else score) >= top).sum() >= max(1, rule["min_area"]))


def predict(path: str, about: dict[str, Any], session: Any) -> dict[str, Any]:
    """Probabilities, calls (true: present) and, of a segmenter, the mask, as a PNG in the current folder."""
    image, rules = read(path), about["findings"]
    (logits,) = session.run(["logits"], {"image": model_input(image, about["input"])})
    peaks = logits.reshape(len(rules), -1).max(axis=1).astype(np.float64)
    found = {name: final(value, rules[name]) for value, name in zip(peaks, rules, strict=True)}
    calls = {name: found[name] >= rule["threshold"] for name, rule in rules.items() if rule["threshold"] is not None}
    result: dict[str, Any] = {"path": path, "probabilities": found, "calls": calls}
    if about["task"] == "segment":
        result["mask"] = str(Path(Path(path).name + ".mask.png").resolve())
        cv2.imwrite(result["mask"], mask(logits[0, 0], image.shape, about["mask_rule"]).astype(np.uint8) * 255)
    return result


if __name__ == "__main__":
    model = onnxruntime.InferenceSession(str(HERE / "model.onnx"), providers=["CPUExecutionProvider"])
    for name in sys.argv[1:] or sys.exit(__doc__):
        try:
            print(json.dumps(predict(name, json.loads((HERE / "export.json").read_text()), model)))
        except Exception as error:  # whatever a decoder raises: the other files are predicted
            print(json.dumps({"path": name, "error": str(error)}))
