"""What training will see, as a page: images before and after augmentation, and the first epoch's sampling."""

from __future__ import annotations

import base64
import contextlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources

import cv2
import jinja2
import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cxrscale import __version__
from cxrscale.config import ABSENT, NO_FINDING, PRESENT, Augment, Data, Recipe
from cxrscale.io import decode_mask, encode_jpeg, load_image, resize_image, storage
from cxrscale.loader import (
    AugmentParams,
    BatchIndices,
    EncodedBytes,
    Rows,
    SamplingStats,
    ShardReader,
    augmented_batches,
    count_sampling,
    sample_params,
    usable_rows,
)
from cxrscale.reporting.style import SPLIT_COLORS, STYLE, svg
from cxrscale.shards import TRAIN, Manifest, manifest
from cxrscale.types import Batch, UnreadableImageError

TEMPLATE = "batch_preview.html.jinja"
EXAMPLES = 16
"""Images on the page."""
VERSIONS = 4
"""Draws of each one's augmentation."""
SIDE = 224
"""Side of an image on the page in pixels; smaller ones stay as they are."""
POLICY_DESCRIPTIONS = {
    "all": "Every image once a pass, in a new order each time.",
    "positives": "Only images with a finding present, each once a pass.",
    "balanced": "As many images with a finding present as without in every step.",
    "ratio": "A set share of images with a finding present in every step, sliding over the epochs.",
    "weighted": "Each image as often as its findings' weight says, drawn with replacement.",
    "hard": "Every image once a pass, and those that a model got most wrong several times.",
}


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """One image on the page."""

    jpeg: str
    """Base64."""
    side: tuple[int, int]
    """(width, height) that the outline is counted in."""
    outline: str
    """The mask's border as an SVG path; empty where there is none."""
    caption: str


@dataclass(frozen=True, slots=True)
class Example:
    """A training image and what may become of it."""

    image_id: str
    title: str
    images: tuple[Thumbnail, ...]
    """As stored, then the draws; empty where the image cannot be read."""


def write(recipe: Recipe, name: str, out: str) -> list[str]:
    """Write the page of a recipe's training batches; returns the promises and what came of them, a line each.

    Raises:
        UserError: as `feed.training`.
    """
    data = manifest.load(*recipe.data.shards)
    counted = count_sampling(data, recipe.data, recipe.sampler)
    storage.write(out, render(recipe, name, data, counted))
    return [f"{line.what}: promised {line.promised}; drawn {line.drawn}" for line in counted.lines]


def render(recipe: Recipe, name: str, data: Manifest, counted: SamplingStats) -> str:
    """The page, the same for the same recipe and shards."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"thousands": lambda count: f"{count:,}", "share": lambda share: f"{share:.1%}"}
    template = environment.from_string(
        resources.files("cxrscale.reporting").joinpath("templates").joinpath(TEMPLATE).read_text("utf-8")
    )
    with mpl.rc_context(STYLE):
        plot = _plot(counted)
    settings = {
        section: {key: "null" if value is None else value for key, value in tree.items()}
        for section, tree in recipe.model_dump(mode="json", include={"data", "sampler", "augment"}).items()
    }
    return template.render(
        name=name,
        recipe=recipe,
        promise=POLICY_DESCRIPTIONS[recipe.sampler.sampling],
        counted=counted,
        plot=plot,
        examples=list(examples(data, recipe)),
        settings=settings,
        digest=data.digest,
        version=__version__,
    )


# Images


def examples(data: Manifest, recipe: Recipe) -> Iterator[Example]:
    """The contact sheet, through the recipe's own reader."""
    segment = recipe.data.task == "segment"
    rows = chosen(data, usable_rows(data, recipe.data.train_split, recipe.data), recipe.data)
    draw_V = np.arange(VERSIONS, dtype=np.int64)
    steps = [BatchIndices(np.full(VERSIONS, row), draw_V, np.ones(VERSIONS, np.bool_)) for row in rows]
    source = ShardReader(data)
    batches = augmented_batches(data, steps, recipe.data, recipe.sampler, recipe.augment)
    for row, batch in zip(rows, batches, strict=True):
        row_V = np.full(VERSIONS, row)
        height_V, width_V = source.sizes(row_V)
        numbers = sample_params(
            recipe.augment, recipe.sampler.seed, data.key[row_V], draw_V, height_V, width_V, training=True
        )
        size = int(width_V[0]), int(height_V[0])
        encoded = source.read(row_V[:1], segment)
        films: list[Thumbnail] = []
        if bool(batch.valid_B.all()):
            # What a strict reader refuses the model may still get; the page then shows the draws' place empty.
            with contextlib.suppress(UnreadableImageError):
                films = [_stored(encoded.images[0], encoded.masks[0] if encoded.masks else None)]
                films += [_drawn(batch, numbers, v, recipe.augment, size) for v in range(VERSIONS)]
        yield Example(str(data.image_id[row]), _title(data, row, recipe.data), tuple(films))


def chosen(data: Manifest, pool: Rows, settings: Data, count: int = EXAMPLES) -> list[int]:
    """Rows of the pool by the images' numbers alone: each finding in turn, then none; in segmentation by mask."""
    order = pool[np.argsort(data.key[pool].view(np.uint64))]
    label_NF = data.labels(settings.findings)[order]
    if settings.task == "segment":
        filled = np.nan_to_num(data.column("mask_pixels").astype(float))[order] > 0
        wanted = [filled, filled, ~filled]
    else:
        wanted = [*(label_NF == PRESENT).T, ~(label_NF == PRESENT).any(axis=1)]
    turns = itertools.zip_longest(*(order[has].tolist() for has in wanted))
    found = dict.fromkeys(row for row in itertools.chain.from_iterable(turns) if row is not None)
    return list(itertools.islice(found, count))


def describe_params(numbers: AugmentParams, index: int, augment: Augment, source: tuple[int, int]) -> str:
    """What the index-th numbers do to an image of (width, height), in words."""
    matrix_23 = numbers.matrix_B23[index].astype(np.float64)
    # In units of the image's side, from the output backwards: flip, rotation by an angle, and 1 / zoom.
    linear = matrix_23[:, :2] * augment.size / np.array(source)[:, None]
    center = np.linalg.solve(matrix_23[:, :2], np.array(source) / 2 - matrix_23[:, 2]) / augment.size - 0.5
    zoom = 1 / np.sqrt(abs(np.linalg.det(linear)))
    angle = np.rad2deg(np.arctan2(-linear[1, 0], linear[1, 1]))
    brightness, contrast = float(numbers.brightness_B[index]), float(numbers.contrast_B[index])
    parts = [
        ("flipped", bool(np.linalg.det(linear) < 0)),
        (f"{angle:+.1f}°", abs(angle) > 0.05),
        (f"×{zoom:.2f}", abs(zoom - 1) > 0.005),
        (f"shift {round(100 * center[0]):+d}%, {round(100 * center[1]):+d}%", bool(np.abs(center).max() > 0.005)),
        (f"brightness {brightness:+.2f}", abs(brightness) > 0.005),
        (f"contrast ×{contrast:.2f}", abs(contrast - 1) > 0.005),
        ("blurred", bool(numbers.blur_B[index])),
        ("CLAHE", bool(numbers.clahe_B[index]) and augment.clahe == "random"),
        ("noise", bool(numbers.noise_on_B[index])),
    ]
    return ", ".join(text for text, told in parts if told).replace("-", "−") or "only resized"


def _title(data: Manifest, row: int, settings: Data) -> str:
    label_F = data.labels(settings.findings)[row]
    present = [name for name, label in zip(settings.findings, label_F, strict=True) if label == PRESENT]
    if present:
        return ", ".join(present)
    if (label_F == ABSENT).all():
        return NO_FINDING if len(label_F) > 1 else f"no {settings.findings[0]}"
    return "nothing present, some unlabelled" if (label_F == ABSENT).any() else "unlabelled"


def _stored(image: EncodedBytes, mask: EncodedBytes | None) -> Thumbnail:
    gray = load_image(image.tobytes()).image_HW
    height, width = gray.shape
    # A mask packed at another size than its image is stretched over it, as the model's is.
    mask_HW = None if mask is None else decode_mask(mask.tobytes())
    return _thumbnail(gray, mask_HW, f"as stored, {width} × {height}")


def _drawn(batch: Batch, numbers: AugmentParams, index: int, augment: Augment, source: tuple[int, int]) -> Thumbnail:
    mask_HW = None if batch.mask_B1HW is None else batch.mask_B1HW[index, 0].numpy() > 0
    return _thumbnail(_levels(batch, index, augment), mask_HW, describe_params(numbers, index, augment, source))


def _levels(batch: Batch, index: int, augment: Augment) -> npt.NDArray[np.uint8]:
    """The image that the model gets, back on the gray scale."""
    level = batch.image_BCHW[index, 0].float().numpy()
    level = 255 * (level if augment.normalize == "minmax" else level * augment.std + augment.mean)
    return np.asarray(np.clip(np.rint(level), 0, 255), np.uint8)


def _thumbnail(gray: npt.NDArray[np.uint8], mask_HW: npt.NDArray[np.bool_] | None, caption: str) -> Thumbnail:
    outline, side = "", (gray.shape[1], gray.shape[0])
    if mask_HW is not None:
        contours, _ = cv2.findContours(mask_HW.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_TC89_L1)
        # A pixel's center lies half a pixel from its corner, from which SVG counts.
        lines = (" ".join(f"{x + 0.5:g},{y + 0.5:g}" for (x, y) in contour[:, 0].tolist()) for contour in contours)
        outline, side = " ".join(f"M{line}Z" for line in lines), (mask_HW.shape[1], mask_HW.shape[0])
    small = resize_image(gray, SIDE) if max(gray.shape) > SIDE else gray
    return Thumbnail(base64.b64encode(encode_jpeg(small, 85)).decode(), side, outline, caption)


# The plot


def _plot(counted: SamplingStats) -> Markup:
    """Steps by how many images with a finding they hold; images by how often they came."""
    figure = Figure(figsize=(9, 2.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _bars(left, counted.positives)
    left.axvline(counted.positives_promised, color=SPLIT_COLORS["test"], linewidth=1.5, label="promised")
    left.set_xlabel("images with a finding in a step")
    left.set_ylabel("steps")
    left.legend(loc="best")
    _bars(right, counted.times)
    right.set_xlabel("times an image came")
    right.set_ylabel("images")
    title = "Steps by their images with a finding, and images by how often they came, in the first epoch"
    return svg(figure, title)


def _bars(axes: Axes, counts: Mapping[int, int]) -> None:
    axes.bar(list(counts), list(counts.values()), color=SPLIT_COLORS[TRAIN], width=0.85)
    # At least five whole numbers wide: one lonely bar would fill the panel.
    low, high = min(counts), max(counts)
    spare = max(0, 4 - (high - low))
    start = max(-0.5, low - 0.5 - spare / 2)
    axes.set_xlim(start, max(high + 0.5, start + 5))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(axis="y")
    axes.set_axisbelow(True)
