"""Named augmentations, for `augment.preset`."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    "chexnet": {"hflip": 0.5, "normalize": "fixed"},
    "effusion": {
        "probability": 0.5,
        "hflip": 0.5,
        "rotation": 10.0,
        "translation": 0.08,
        "scale": (0.9, 1.1),
        "crop_area": (0.85, 1.0),
        "brightness": 0.1,
        "contrast": 0.1,
        "noise": 0.02,
        "normalize": "minmax",
    },
    "rsna": {
        "crop_area": (0.8, 1.0),
        "rotation": 5.0,
        "translation": 0.05,
        "scale": (0.9, 1.1),
        "normalize": "fixed",
    },
    "siim": {
        "hflip": 0.5,
        "rotation": 10.0,
        "translation": 0.06,
        "scale": (0.9, 1.1),
        "brightness": 0.1,
        "contrast": 0.1,
        "blur": 0.1,
        "clahe": "always",
        "normalize": "fixed",
    },
}
"""Preset -> its values of the fields of `augment`; a field in the recipe overrides the preset."""
