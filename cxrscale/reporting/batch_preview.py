"""Training batches as a page: images before and after augmentation, and the sampling of the first epoch."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cxrscale.config import ABSENT, NO_FINDING, PRESENT, Augment, Data, Recipe
from cxrscale.io import decode_mask, load_image, storage
from cxrscale.loader import (
    POLICIES,
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
from cxrscale.reporting import html
from cxrscale.reporting.overlay import Thumbnail, thumbnail
from cxrscale.reporting.style import BLUE, RED, WIDE, styled, svg
from cxrscale.shards import Manifest, manifest
from cxrscale.types import Batch, UnreadableImageError

TEMPLATE = "batch_preview.html.jinja"
EXAMPLES = 16
"""Images on the page."""
VERSIONS = 4
"""Samples of each one's augmentation."""
SIDE = 224
"""Height and width of an image on the page in pixels, at most."""
PLOT_TITLE = "Steps by their images with a finding, and images by how often they were sampled, in the first epoch"


@dataclass(frozen=True, slots=True)
class Example:
    """A training image and samples of its augmentation."""

    image_id: str
    title: str
    thumbnails: tuple[tuple[str, Thumbnail], ...]
    """(caption, image): as stored, then the samples; empty where the image cannot be read."""


def write(recipe: Recipe, name: str, out: str) -> list[str]:
    """Write the page of a recipe's training batches; returns a line per sampling check: expected and observed.

    Raises:
        UserError: as `loader.training_batches`.
    """
    data = manifest.load(*recipe.data.shards)
    stats = count_sampling(data, recipe)
    storage.write(out, render(recipe, name, data, stats))
    return [f"{check.quantity}: expected {check.expected}; observed {check.observed}" for check in stats.checks]


def render(recipe: Recipe, name: str, data: Manifest, stats: SamplingStats) -> str:
    """The page, the same for the same recipe and dataset."""
    settings = {
        section: {key: "null" if value is None else value for key, value in tree.items()}
        for section, tree in recipe.model_dump(mode="json", include={"data", "loader", "sampler", "augment"}).items()
    }
    return html.render(
        TEMPLATE,
        name=name,
        recipe=recipe,
        policy=POLICIES[recipe.sampler.sampling].description,
        stats=stats,
        plot=svg(_plot(stats), PLOT_TITLE),
        examples=list(examples(data, recipe)),
        versions=VERSIONS,
        settings=settings,
        digest=data.digest,
    )


# Images


def examples(data: Manifest, recipe: Recipe) -> Iterator[Example]:
    """The images, through the recipe's own loader."""
    segment = recipe.data.task == "segment"
    rows = example_rows(data, usable_rows(data, recipe.data.train_split, recipe.data), recipe.data)
    stream_pos_V = np.arange(VERSIONS, dtype=np.int64)
    steps = [BatchIndices(np.full(VERSIONS, row), stream_pos_V, np.ones(VERSIONS, np.bool_)) for row in rows]
    source = ShardReader(data)
    batches = augmented_batches(data, steps, recipe)
    for row, batch in zip(rows, batches, strict=True):
        row_V = np.full(VERSIONS, row)
        height_V, width_V = source.sizes(row_V)
        params = sample_params(
            recipe.augment, recipe.sampler.seed, data.key[row_V], stream_pos_V, (height_V, width_V), training=True
        )
        size = int(width_V[0]), int(height_V[0])
        encoded = source.read(row_V[:1], segment)
        shown: list[tuple[str, Thumbnail]] = []
        if bool(batch.valid_B.all()):
            # The loader may decode an image that the strict reader rejects; the page then shows no images for it.
            with contextlib.suppress(UnreadableImageError):
                shown = [_stored(encoded.images[0], encoded.masks[0] if encoded.masks else None)]
                shown += [_augmented(batch, params, v, recipe.augment, size) for v in range(VERSIONS)]
        yield Example(str(data.image_id[row]), _title(data, row, recipe.data), tuple(shown))


def example_rows(data: Manifest, pool: Rows, settings: Data, count: int = EXAMPLES) -> list[int]:
    """Rows of the pool, ordered by hash: each finding in turn, then none; in segmentation by mask."""
    order = pool[np.argsort(data.key[pool].view(np.uint64))]
    label_NF = data.labels(settings.findings)[order]
    if settings.task == "segment":
        filled = np.nan_to_num(data.column("mask_pixels").astype(float))[order] > 0
        wanted = [filled, filled, ~filled]
    else:
        wanted = [*(label_NF == PRESENT).T, ~(label_NF == PRESENT).any(axis=1)]
    turns = itertools.zip_longest(*(order[has].tolist() for has in wanted))
    rows = dict.fromkeys(row for row in itertools.chain.from_iterable(turns) if row is not None)
    return list(itertools.islice(rows, count))


def describe_params(params: AugmentParams, index: int, augment: Augment, source: tuple[int, int]) -> str:
    """In words, what the parameters at this index of the batch do to an image of (width, height)."""
    matrix_23 = params.matrix_B23[index].astype(np.float64)
    # In units of the image's side, from output to input: flip, rotation by an angle, and 1 / zoom.
    linear_22 = matrix_23[:, :2] * augment.size / np.array(source)[:, None]
    center_2 = np.linalg.solve(matrix_23[:, :2], np.array(source) / 2 - matrix_23[:, 2]) / augment.size - 0.5
    zoom = 1 / np.sqrt(abs(np.linalg.det(linear_22)))
    angle = np.rad2deg(np.arctan2(-linear_22[1, 0], linear_22[1, 1]))
    brightness, contrast = float(params.brightness_B[index]), float(params.contrast_B[index])
    parts = [
        ("flipped", bool(np.linalg.det(linear_22) < 0)),
        (f"{angle:+.1f}°", abs(angle) > 0.05),
        (f"×{zoom:.2f}", abs(zoom - 1) > 0.005),
        (f"shift {round(100 * center_2[0]):+d}%, {round(100 * center_2[1]):+d}%", bool(np.abs(center_2).max() > 0.005)),
        (f"brightness {brightness:+.2f}", abs(brightness) > 0.005),
        (f"contrast ×{contrast:.2f}", abs(contrast - 1) > 0.005),
        ("blurred", bool(params.blur_B[index])),
        ("CLAHE", bool(params.clahe_B[index]) and augment.clahe == "random"),
        ("noise", bool(params.noise_on_B[index])),
    ]
    return ", ".join(text for text, applied in parts if applied).replace("-", "−") or "only resized"


def _title(data: Manifest, row: int, settings: Data) -> str:
    label_F = data.labels(settings.findings)[row]
    present = [name for name, label in zip(settings.findings, label_F, strict=True) if label == PRESENT]
    if present:
        return ", ".join(present)
    if (label_F == ABSENT).all():
        return NO_FINDING if len(label_F) > 1 else f"no {settings.findings[0]}"
    return "nothing present, some unlabeled" if (label_F == ABSENT).any() else "unlabeled"


def _stored(image: EncodedBytes, mask: EncodedBytes | None) -> tuple[str, Thumbnail]:
    image_HW = load_image(image.tobytes()).image_HW
    height, width = image_HW.shape
    # A mask that is stored at another size than its image is stretched over it, as the model's is.
    masks = {} if mask is None else {"mask": decode_mask(mask.tobytes())}
    return f"as stored, {width} × {height}", thumbnail(image_HW, SIDE, masks)


def _augmented(
    batch: Batch, params: AugmentParams, index: int, augment: Augment, source: tuple[int, int]
) -> tuple[str, Thumbnail]:
    masks = {} if batch.mask_B1HW is None else {"mask": batch.mask_B1HW[index, 0].numpy() > 0}
    image_HW = _gray_levels(batch, index, augment)
    return describe_params(params, index, augment, source), thumbnail(image_HW, SIDE, masks)


def _gray_levels(batch: Batch, index: int, augment: Augment) -> npt.NDArray[np.uint8]:
    """The model's input image, back on the scale of 0 to 255."""
    level_HW = batch.image_BCHW[index, 0].float().numpy()
    level_HW = 255 * (level_HW if augment.normalize == "minmax" else level_HW * augment.std + augment.mean)
    return np.asarray(np.clip(np.rint(level_HW), 0, 255), np.uint8)


# The plot


@styled
def _plot(stats: SamplingStats) -> Figure:
    """Steps by how many images with a finding they hold; images by how often they were sampled."""
    figure = Figure(figsize=(WIDE, 2.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _bars(left, stats.positives)
    left.axvline(stats.positives_expected, color=RED, linewidth=1.5, label="expected")
    left.set_xlabel("images with a finding in a step")
    left.set_ylabel("steps")
    left.legend(loc="best")
    _bars(right, stats.times)
    right.set_xlabel("times an image was sampled")
    right.set_ylabel("images")
    return figure


def _bars(axes: Axes, counts: Mapping[int, int]) -> None:
    axes.bar(list(counts), list(counts.values()), color=BLUE, width=0.85)
    # The axis spans at least five whole numbers: otherwise a single bar would fill the panel.
    low, high = min(counts), max(counts)
    spare = max(0, 4 - (high - low))
    start = max(-0.5, low - 0.5 - spare / 2)
    axes.set_xlim(start, max(high + 0.5, start + 5))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(axis="y")
    axes.set_axisbelow(True)
