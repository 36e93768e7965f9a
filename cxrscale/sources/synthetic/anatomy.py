"""The healthy thorax of the synthetic images: organs as curves, and layers of brightness made from them.

Shapes are closed curves in the unit square, x to the right and y down, with the patient's right side on the left as in
radiology. Layers add and remove brightness on a 0..1 scale before one tone curve makes them 8-bit. Nothing here is
copied from a real image, and no medical conclusion should be drawn from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

Layer = npt.NDArray[np.float32]
"""(H, W) float32 in 0..1: the share of each pixel that a shape covers."""
Mask = npt.NDArray[np.bool_]
"""(H, W) bool."""
Points = npt.NDArray[np.float64]
"""(N, 2) x and y in the unit square."""

# -1 is the viewer's left, the patient's right lung; the x of a side's points is midline + side * offset.
SIDES = (-1, 1)
# The points of a lung's smooth outline that are its dome, from the costophrenic angle to the mediastinum.
_DOME = slice(88, 121)


@dataclass(frozen=True, slots=True)
class Anatomy:
    """What is the same in all images of a patient; lengths are shares of the image side."""

    sex: str
    half_width: float
    """Midline to the outer edge of a lung at its widest."""
    apex: float
    dome: float
    """y of the right diaphragm's top."""
    midline: float
    heart_share: float
    """Width of the normal heart over the width of the thorax."""
    ribs: int
    rib_slope: float
    tissue: float
    """Brightness of the soft tissue."""
    breast: float
    spine_width: float


@dataclass(frozen=True, slots=True)
class Frame:
    """How the unit square is placed in the image: its pose, and the side of the image in pixels."""

    size: int
    matrix: npt.NDArray[np.float64]
    """(2, 3): unit square to unit square."""

    def pixels(self, points: Points) -> Points:
        """(N, 2) points of the unit square as x and y in pixels; (0, 0) is the upper left corner."""
        posed: Points = (points @ self.matrix[:, :2].T + self.matrix[:, 2]) * self.size
        return posed


@dataclass(frozen=True, slots=True)
class Chest:
    """The posed organs of one image; findings are planted relative to them."""

    frame: Frame
    midline: float
    half_width: float
    apex: float
    domes: dict[int, float]
    contours: dict[int, Points]
    """Side -> outline of the lung."""
    lungs: dict[int, Layer]
    heart: Layer


def sample_anatomy(rng: np.random.Generator) -> Anatomy:
    """Draw a patient's anatomy."""
    sex = "F" if rng.random() < 0.44 else "M"
    return Anatomy(
        sex=sex,
        half_width=rng.uniform(0.335, 0.39),
        apex=rng.uniform(0.09, 0.14),
        dome=rng.uniform(0.69, 0.76),
        midline=rng.uniform(0.485, 0.515),
        heart_share=rng.uniform(0.40, 0.47),
        ribs=int(rng.integers(9, 11)),
        rib_slope=rng.uniform(0.09, 0.16),
        tissue=rng.uniform(0.56, 0.64),
        breast=rng.uniform(0.04, 0.10) if sex == "F" else 0.0,
        spine_width=rng.uniform(0.040, 0.050),
    )


def pose(anatomy: Anatomy, size: int, heart_share: float, view: str, rng: np.random.Generator) -> Chest:
    """Positions of the organs in one image: from the patient's anatomy, posture and breathing.

    Args:
        anatomy: from `sample_anatomy`.
        size: side of the square image in pixels.
        heart_share: width of the heart over the width of the thorax, in a PA image.
        view: PA or AP; in an AP image the heart is magnified.
        rng: decides the pose.
    """
    angle, scale = math.radians(rng.normal(0, 1.5)), rng.uniform(0.95, 1.04)
    shift = rng.uniform(-0.02, 0.02, 2)
    turn = scale * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    frame = Frame(size, np.column_stack([turn, 0.5 - turn @ (0.5, 0.5) + shift]))
    dome = anatomy.dome + rng.uniform(-0.025, 0.025)
    domes = {-1: dome, 1: dome + rng.uniform(0.005, 0.03)}
    contours = {side: _lung(anatomy, side, domes[side], rng) for side in SIDES}
    lungs = {side: fill(frame, contours[side], 0.004) for side in SIDES}
    share = heart_share + rng.uniform(-0.01, 0.02) + (0.015 if view == "AP" else 0.0)
    outline = _heart(anatomy, share, dome, rng)
    return Chest(
        frame=frame,
        midline=anatomy.midline,
        half_width=anatomy.half_width,
        apex=anatomy.apex,
        domes=domes,
        contours=contours,
        lungs=lungs,
        heart=fill(frame, outline, 0.006),
    )


def _lung(anatomy: Anatomy, side: int, dome: float, rng: np.random.Generator) -> Points:
    """A lung's outline: the mediastinum, the apex, the chest wall, the sharp costophrenic angle, the dome."""
    w, top, reach = anatomy.half_width, anatomy.apex, dome - anatomy.apex
    angle = dome + rng.uniform(0.09, 0.13)
    offsets = [
        (0.07, dome + 0.015),
        (0.065, top + 0.72 * reach),
        (0.055, top + 0.42 * reach),
        (0.052, top + 0.18 * reach),
        (0.075, top + 0.05 * reach),
        (0.36 * w, top),
        (0.58 * w, top + 0.05 * reach),
        (0.77 * w, top + 0.20 * reach),
        (0.90 * w, top + 0.45 * reach),
        (0.97 * w, top + 0.75 * reach),
        (1.00 * w, angle - 0.03),
        (0.99 * w, angle),
        (0.95 * w, angle - 0.03),
        (0.80 * w, dome + 0.025),
        (0.52 * w, dome),
    ]
    points = np.array(offsets) * (side, 1) + (anatomy.midline, 0)
    return smooth(points + rng.normal(0, 0.0025, points.shape))


def _heart(anatomy: Anatomy, share: float, dome: float, rng: np.random.Generator) -> Points:
    """The outline of the heart with the great vessels above it; the heart is `share` of the thorax wide."""
    width = share * 2 * anatomy.half_width
    right = width * rng.uniform(0.30, 0.36)
    left, base = width - right, dome + 0.05
    wide = base - rng.uniform(0.09, 0.12)
    points = [
        (-0.035, anatomy.apex + 0.12),
        (0.030, anatomy.apex + 0.12),
        (0.060, anatomy.apex + 0.20),
        (0.052, anatomy.apex + 0.26),
        (0.45 * left, anatomy.apex + 0.36),
        (0.86 * left, wide - 0.06),
        (left, wide + 0.02),
        (0.90 * left, base - 0.02),
        (0.20 * left, base + 0.02),
        (-0.75 * right, base - 0.01),
        (-right, wide - 0.01),
        (-0.80 * right, wide - 0.10),
        (-0.045, anatomy.apex + 0.24),
    ]
    return smooth(np.array(points) + np.array([anatomy.midline, 0]))


def background(anatomy: Anatomy, chest: Chest, rng: np.random.Generator) -> Layer:
    """Air around the patient, soft tissue, mediastinum, abdomen, and the empty lungs."""
    frame, mid, w = chest.frame, chest.midline, chest.half_width
    neck, shoulder, flank = rng.uniform(0.085, 0.11), rng.uniform(0.06, 0.12), w + rng.uniform(0.05, 0.10)
    half = [(neck, -0.1), (neck, 0.02), (0.30, shoulder + 0.02), (0.46, shoulder + 0.07), (0.62, 0.30)]
    half += [(flank + 0.05, 0.42), (flank, 0.60), (flank + 0.01, 1.1)]
    outline = [(mid + x, y) for x, y in half] + [(mid - x, y) for x, y in reversed(half)]
    canvas = fill(frame, np.array(outline), 0.012) * anatomy.tissue
    rows = np.linspace(0, 1, frame.size, dtype=np.float32)[:, None]
    canvas *= 0.88 + 0.12 * rows
    lungs = np.maximum(chest.lungs[-1], chest.lungs[1])
    canvas -= lungs * rng.uniform(0.30, 0.38) * (1.04 - 0.12 * rows)
    belly = np.array([(0.0, 1.1), *chest.contours[-1][_DOME], *chest.contours[1][_DOME][::-1], (1.0, 1.1)])
    canvas += 0.06 * fill(frame, belly, 0.008) * (canvas > 0.1) * (1 - lungs)
    middle = np.array([(mid - 0.05, -0.1), (mid + 0.05, -0.1), (mid + 0.06, 1.1), (mid - 0.06, 1.1)])
    canvas += 0.08 * fill(frame, middle, 0.02) * (1 - 0.3 * lungs)
    if rng.random() < 0.6:
        x, y = mid + rng.uniform(0.14, 0.24), chest.domes[1] + rng.uniform(0.06, 0.09)
        bubble = ellipse(frame, (x, y), (rng.uniform(0.03, 0.07), rng.uniform(0.015, 0.03)), 0.0, 0.006)
        canvas -= rng.uniform(0.05, 0.15) * bubble * (1 - lungs)
    if anatomy.breast:
        for side in SIDES:
            center = (mid + side * 0.56 * w, chest.domes[side] - 0.01)
            canvas += anatomy.breast * ellipse(frame, center, (0.45 * w, 0.11), 0.0, 0.02)
    return canvas


def bones(anatomy: Anatomy, chest: Chest, rng: np.random.Generator) -> Layer:
    """Spine, posterior and anterior ribs, and clavicles."""
    frame, mid, w = chest.frame, chest.midline, chest.half_width
    layer = np.zeros((frame.size, frame.size), np.float32)
    step = (chest.domes[-1] + 0.12 - chest.apex) / anatomy.ribs
    back, front = [], []
    across = np.linspace(0, 1, 16)
    for number in range(anatomy.ribs):
        y = chest.apex - 0.015 + number * step
        reach = w * min(1.0, 0.62 + 0.14 * number) * 1.02
        fall = anatomy.rib_slope * (0.4 + 0.09 * number)
        for side in SIDES:
            x = mid + side * (0.03 + (reach - 0.03) * np.sin(across * math.pi / 2))
            back.append(np.column_stack([x, y - 0.02 * np.sin(across * math.pi) + fall * across**1.8]))
            x = mid + side * (reach - (reach - 0.42 * w) * across)
            front.append(np.column_stack([x, y + fall + 0.11 * across**0.8]))
    layer += rng.uniform(0.050, 0.075) * stroke(frame, back, 0.020, 0.003)
    layer += rng.uniform(0.015, 0.035) * stroke(frame, front[: -4 * 2], 0.022, 0.004)
    tilt = rng.uniform(-0.02, 0.04)
    collar = np.array([(0.03, chest.apex + 0.075), (0.16, chest.apex + 0.045), (0.38, chest.apex - tilt)])
    clavicles = [collar * (side, 1) + (mid, 0) for side in SIDES]
    layer += rng.uniform(0.07, 0.11) * stroke(frame, clavicles, 0.024, 0.003)
    levels = np.arange(-0.02, 1.02, step * 0.92)
    bodies = [np.array([(mid - anatomy.spine_width, y), (mid + anatomy.spine_width, y)]) for y in levels]
    layer += 0.025 * stroke(frame, bodies, step * 0.66, 0.004)
    return layer


def vessels(chest: Chest, rng: np.random.Generator) -> Layer:
    """Lung markings: vessels that branch from the hila and fade outwards, over a fine mottle; signed brightness."""
    frame, w = chest.frame, chest.half_width
    layer = np.zeros((frame.size, frame.size), np.float32)
    for width, start, stop in ((0.011, 0.0, 0.3), (0.007, 0.2, 0.6), (0.0045, 0.45, 1.0)):
        branches = []
        for side in SIDES:
            hilum = np.array([chest.midline + side * 0.07, chest.apex + 0.46 * (chest.domes[side] - chest.apex)])
            for angle in rng.uniform(-1.35, 1.35, 14):
                length = rng.uniform(0.6, 1.0) * w * (1.0 if abs(angle) < 0.8 else 1.25)
                t = np.linspace(start, stop, 6)
                bent = angle + rng.normal(0, 0.35) * t
                path = np.column_stack([side * np.cos(bent), np.sin(bent)]) * (t * length)[:, None]
                branches.append(hilum + path + rng.normal(0, 0.004, path.shape))
        layer += 0.055 * stroke(frame, branches, width, 0.002)
    mottle = rng.standard_normal((48, 48), dtype=np.float32)
    layer += 0.012 * cv2.resize(mottle, (frame.size, frame.size), interpolation=cv2.INTER_CUBIC)
    return layer


def smooth(points: Points) -> Points:
    """A closed Catmull-Rom curve through (N, 2) points, eight steps per segment."""
    before, after, beyond = np.roll(points, 1, 0), np.roll(points, -1, 0), np.roll(points, -2, 0)
    t = np.linspace(0, 1, 8, endpoint=False)[:, None, None]
    curve = 0.5 * (
        2 * points
        + (after - before) * t
        + (2 * before - 5 * points + 4 * after - beyond) * t**2
        + (3 * points - before - 3 * after + beyond) * t**3
    )
    smooth: Points = curve.transpose(1, 0, 2).reshape(-1, 2)
    return smooth


def _fixed(frame: Frame, points: Points) -> npt.NDArray[np.int32]:
    """Pixel coordinates in OpenCV's fixed point, 4 fractional bits; OpenCV's pixel centers are integers."""
    fixed: npt.NDArray[np.int32] = np.rint((frame.pixels(points) - 0.5) * 16).astype(np.int32)
    return fixed


def _soften(frame: Frame, layer: npt.NDArray[np.uint8], blur: float) -> Layer:
    """0..255 to 0..1, blurred by a Gaussian whose sigma is the share `blur` of the image side."""
    soft: Layer = layer.astype(np.float32) / np.float32(255)
    if blur * frame.size >= 0.3:
        soft = cv2.GaussianBlur(soft, (0, 0), blur * frame.size)
    return soft


def fill(frame: Frame, contour: Points, blur: float) -> Layer:
    """The inside of a closed curve, blurred by a Gaussian whose sigma is the share `blur` of the image side."""
    layer = np.zeros((frame.size, frame.size), np.uint8)
    cv2.fillPoly(layer, [_fixed(frame, contour)], 255, cv2.LINE_AA, 4)
    return _soften(frame, layer, blur)


def ellipse(
    frame: Frame, center: tuple[float, float], radii: tuple[float, float], degrees: float, blur: float
) -> Layer:
    """The inside of a rotated ellipse, blurred as in `fill`; center and radii in the unit square."""
    t = np.linspace(0, 2 * math.pi, 40, endpoint=False)
    turn = math.radians(degrees)
    x, y = radii[0] * np.cos(t), radii[1] * np.sin(t)
    rim = np.column_stack([x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn)])
    return fill(frame, rim + center, blur)


def stroke(frame: Frame, lines: list[Points], width: float, blur: float) -> Layer:
    """Open lines of a given width; lines thinner than a pixel are drawn one pixel wide and fainter."""
    layer = np.zeros((frame.size, frame.size), np.uint8)
    pixels = width * frame.size
    shade = round(255 * min(1.0, pixels))
    fixed = [_fixed(frame, line) for line in lines]
    cv2.polylines(layer, fixed, False, shade, max(1, round(pixels)), cv2.LINE_AA, 4)
    return _soften(frame, layer, blur)
