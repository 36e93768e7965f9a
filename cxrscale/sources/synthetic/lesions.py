"""Findings planted into a drawn thorax, with their masks and boxes, and the finished image."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from cxrscale.sources.synthetic.anatomy import (
    SIDES,
    Anatomy,
    Chest,
    Frame,
    Layer,
    Mask,
    background,
    bones,
    ellipse,
    fill,
    pose,
    smooth,
    stroke,
    vessels,
)
from cxrscale.types import Box, GrayImage

FINDINGS = ("Cardiomegaly", "Effusion", "Mass", "Nodule", "Consolidation", "Pneumothorax")
"""What can be planted, by NIH's names."""

# How visible the findings are: ranges from which each image draws. Lengths are shares of the image side; brightness is
# on the scale of the canvas, where lung and soft tissue differ by some 0.34 and the noise has a sigma of 0.01 to 0.02.
_LARGE_HEART = (0.55, 0.66)  # of the width of the thorax; normal hearts are 0.39 to 0.49
_SHRUNK_X, _SHRUNK_Y = (0.70, 0.88), (0.80, 0.94)
_AIR, _PLEURA = (0.04, 0.09), (0.10, 0.20)
_FLUID = (0.10, 0.26)  # its level above the costophrenic angle
_MASS_RADIUS, _MASS = (0.048, 0.078), (0.18, 0.30)
_NODULE_RADIUS, _NODULE = (0.020, 0.030), (0.20, 0.32)
_PATCH_RADIUS, _PATCH = (0.075, 0.12), (0.20, 0.32)


@dataclass(frozen=True, slots=True)
class DrawnImage:
    """One drawn image and its ground truth."""

    image: GrayImage
    boxes: tuple[Box, ...]
    """One box per planted finding, two for a finding on both sides; in pixels of the image."""
    crescents: tuple[Mask, ...]
    """The masks of a pneumothorax, one per side, which do not touch; empty without one."""


def draw(anatomy: Anatomy, size: int, planted: frozenset[str], view: str, rng: np.random.Generator) -> DrawnImage:
    """Draw one image of a patient.

    Args:
        anatomy: from `sample_anatomy`.
        size: side of the square image in pixels, 32 or more.
        planted: which of FINDINGS to plant; any combination is possible.
        view: PA or AP; in an AP image the heart is magnified.
        rng: decides pose, exposure, noise and the look of each finding; the image is a pure function of its state.
    """
    heart_share = rng.uniform(*_LARGE_HEART) if "Cardiomegaly" in planted else anatomy.heart_share
    chest = pose(anatomy, size, heart_share, view, rng)
    lungs = np.maximum(chest.lungs[-1], chest.lungs[1])
    nothing = np.zeros_like(lungs)
    canvas, skeleton, markings = background(anatomy, chest, rng), bones(anatomy, chest, rng), vessels(chest, rng)
    fluid, pools = _effusion(chest, rng) if "Effusion" in planted else (nothing, [])
    air, line, crescents = _pneumothorax(chest, fluid, rng) if "Pneumothorax" in planted else (nothing, nothing, [])
    boxes = [_box("Pneumothorax", mask) for mask in crescents] + [_box("Effusion", mask) for mask in pools]
    canvas += lungs * (markings * (1 - air) - rng.uniform(*_AIR) * air) + line * rng.uniform(*_PLEURA)
    taken = np.maximum.reduce([air, fluid, chest.heart])
    for finding, plant in _PLANTERS.items():
        if finding in planted:
            shape, brightness = plant(size, lungs * (1 - taken), rng)
            canvas += lungs * shape * brightness
            taken = np.maximum(taken, np.minimum(shape * 2, 1))
            boxes.append(_box(finding, shape > 0.3))
    heart = chest.heart * rng.uniform(0.84, 0.92)
    canvas = canvas * (1 - heart) + heart * (anatomy.tissue + rng.uniform(0.05, 0.10))
    canvas = canvas * (1 - fluid) + fluid * (anatomy.tissue + 0.05)
    if "Cardiomegaly" in planted:
        # The outline includes the great vessels; the box does not.
        top = round(chest.frame.pixels(np.array([[chest.midline, chest.apex + 0.26]]))[0, 1])
        boxes.append(_box("Cardiomegaly", (chest.heart > 0.5) & (np.arange(size)[:, None] >= top)))
    image = _expose(canvas + skeleton * (0.5 + 0.5 * lungs), view, rng)
    return DrawnImage(image, tuple(boxes), tuple(crescents))


def _pneumothorax(chest: Chest, fluid: Layer, rng: np.random.Generator) -> tuple[Layer, Layer, list[Mask]]:
    """Air between the chest wall and a collapsed lung: its layer, the pleural line, one mask per side."""
    size = chest.frame.size
    air, line = np.zeros_like(fluid), np.zeros_like(fluid)
    crescents: list[Mask] = []
    for side in _sides(0.08, rng):
        # The lung stays attached near the hilum and the base, so that the gap opens at the apex and laterally.
        anchor = np.array([chest.midline + side * 0.06, chest.domes[side] + 0.04])
        shrunk = anchor + (chest.contours[side] - anchor) * (rng.uniform(*_SHRUNK_X), rng.uniform(*_SHRUNK_Y))
        inside = fill(chest.frame, shrunk, 0.0)
        medial = chest.frame.pixels(np.array([[chest.midline + side * 0.10, 0.0]]))[0, 0]
        lateral_W = (np.arange(size) - medial) * side > 0
        crescent = _largest(
            lateral_W & (chest.lungs[side] * (1 - inside) > 0.5) & (np.maximum(fluid, chest.heart) < 0.4)
        )
        crescents.append(crescent)
        solid = crescent.astype(np.float32)
        air = np.maximum(air, cv2.GaussianBlur(solid, (0, 0), max(0.003 * size, 0.3)))
        rim = stroke(chest.frame, [np.vstack([shrunk, shrunk[:1]])], 0.005, 0.0)
        line = np.maximum(line, rim * cv2.dilate(solid, np.ones((3, 3), np.uint8)))
    return air, line, crescents


def _effusion(chest: Chest, rng: np.random.Generator) -> tuple[Layer, list[Mask]]:
    """Fluid at the base of a lung, its upper edge a meniscus along the chest wall: its layer, one mask per side."""
    fluid = np.zeros_like(chest.heart)
    pools: list[Mask] = []
    for side in _sides(0.2, rng):
        level = float(chest.contours[side][:, 1].max()) - rng.uniform(*_FLUID)
        climb = rng.uniform(0.05, 0.10)
        t = np.linspace(0, 1, 16)
        x = chest.midline + side * (0.04 + (chest.half_width - 0.02) * t)
        below = np.vstack([np.column_stack([x, level - climb * (t**3 - 0.3)]), [(x[-1], 1.0), (x[0], 1.0)]])
        # Up to the edge of the lung, or its blurred rim would stay dark.
        pool = fill(chest.frame, below, 0.008) * np.minimum(chest.lungs[side] * 3, 1)
        fluid = np.maximum(fluid, pool * rng.uniform(0.75, 0.95))
        pools.append(pool > 0.5)
    return fluid, pools


def _sides(both: float, rng: np.random.Generator) -> tuple[int, ...]:
    """One side, or with probability `both` the two."""
    first = SIDES[int(rng.integers(2))]
    return (first, -first) if rng.random() < both else (first,)


def _mass(size: int, free: Layer, rng: np.random.Generator) -> tuple[Layer, float]:
    """A large, bright, slightly lobed blob."""
    radius = rng.uniform(*_MASS_RADIUS)
    x, y = _position(free, radius * 0.7, rng)
    angles = np.linspace(0, 2 * math.pi, 12, endpoint=False)
    lobes = radius * (1 + rng.normal(0, 0.07, 12))
    outline = smooth(np.column_stack([x + lobes * np.cos(angles), y + lobes * np.sin(angles)]))
    return fill(_image_frame(size), outline, 0.008), rng.uniform(*_MASS)


def _nodule(size: int, free: Layer, rng: np.random.Generator) -> tuple[Layer, float]:
    """A small, round, bright spot."""
    radius = rng.uniform(*_NODULE_RADIUS)
    center = _position(free, radius * 1.2, rng)
    return ellipse(_image_frame(size), center, (radius, radius), 0.0, 0.004), rng.uniform(*_NODULE)


def _consolidation(size: int, free: Layer, rng: np.random.Generator) -> tuple[Layer, float]:
    """A fuzzy, patchy brightening in which the airways stay dark."""
    spread = rng.uniform(*_PATCH_RADIUS)
    center = _position(free, spread * 0.5, rng)
    blob = ellipse(
        _image_frame(size), center, (spread, spread * rng.uniform(0.7, 1.1)), rng.uniform(0, 180), spread * 0.35
    )
    patches = cv2.resize(rng.standard_normal((20, 20), dtype=np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
    airways = []
    for angle in rng.uniform(0, 2 * math.pi, 5):
        t = np.linspace(0.0, spread * 1.2, 5)
        path = np.column_stack([np.cos(angle) * t, np.sin(angle) * t])
        airways.append(np.array(center) + path + rng.normal(0, 0.006, path.shape))
    dark = stroke(_image_frame(size), airways, 0.008, 0.002)
    shape = blob * np.clip(0.85 + 0.30 * patches, 0.2, 1.3) * (1 - 0.45 * dark)
    return shape.astype(np.float32), rng.uniform(*_PATCH)


_PLANTERS: dict[str, Callable[[int, Layer, np.random.Generator], tuple[Layer, float]]] = {
    "Consolidation": _consolidation,
    "Mass": _mass,
    "Nodule": _nodule,
}


def _expose(canvas: Layer, view: str, rng: np.random.Generator) -> GrayImage:
    """The finished image: scatter, exposure, noise and a side marker."""
    size = canvas.shape[0]
    haze = cv2.resize(rng.standard_normal((5, 5), dtype=np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
    light = canvas + 0.012 * haze + (rng.uniform(0.0, 0.05) if view == "AP" else 0.0)
    light = np.clip((light - 0.02) * rng.uniform(1.15, 1.4), 0.0, 1.0) ** rng.uniform(0.85, 1.2)
    light += rng.uniform(0.008, 0.02) * rng.standard_normal((size, size), dtype=np.float32)
    image: GrayImage = np.clip(light * 255 + 0.5, 0, 255).astype(np.uint8)
    if rng.random() < 0.7:
        at = (int(size * rng.uniform(0.86, 0.92)), int(size * rng.uniform(0.06, 0.12)))
        cv2.putText(image, "L", at, cv2.FONT_HERSHEY_SIMPLEX, size / 500, 235, max(1, size // 170), cv2.LINE_AA)
    return image


def _position(free: Layer, margin: float, rng: np.random.Generator) -> tuple[float, float]:
    """A point in the unit square, `margin` deep inside the free lung, or as deep as there is room."""
    size = free.shape[0]
    depth = cv2.distanceTransform((free > 0.6).astype(np.uint8), cv2.DIST_L2, 3)
    inside = np.flatnonzero(depth >= min(margin * size, 0.9 * float(depth.max())))
    chosen = int(inside[rng.integers(inside.size)])
    return (chosen % size + 0.5) / size, (chosen // size + 0.5) / size


def _image_frame(size: int) -> Frame:
    """The unit square of the image itself, for shapes that are placed in the image and not in the patient."""
    return Frame(size, np.eye(2, 3))


def _largest(mask: Mask) -> Mask:
    """The largest connected part of a mask; slivers elsewhere are dropped."""
    count, parts, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    if count < 2:
        return mask
    largest: Mask = parts == 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))
    return largest


def _box(finding: str, mask: Mask) -> Box:
    """The bounding box of a mask in pixels; a shape that others hide completely still gets one pixel."""
    x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
    return Box(finding, float(x), float(y), float(max(width, 1)), float(max(height, 1)))
