"""Several ways to predict the same images, side by side: artifact models, and in what they agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from cxrscale.evaluation.metrics import Estimate
from cxrscale.io import Artifact, ArtifactPart, Number


class Variant(ArtifactPart):
    """A run, alone or behind a classifier, in float or quantized."""

    name: str
    run: str
    """Its folder or address."""
    gate: str = ""
    """That of the classifier before it; empty without one."""


class Outcome(ArtifactPart):
    """What a variant says of an image."""

    gate: Number | None = None
    """The classifier's probability; None without one."""
    probabilities: Mapping[str, Number] = {}
    """Finding -> probability; empty where the classifier did not pass the image on."""
    calls: Mapping[str, bool] = {}
    mask_area: int | None = None
    """Of a segmenter: pixels of the mask at the image's own size."""
    mask_dice: Number | None = None
    """Of a segmenter: Dice of the mask against that of the first variant; two empty masks agree fully."""


class VariantImage(ArtifactPart):
    """One image under every variant."""

    path: str
    error: str = ""
    """Why it could not be read; there are no outcomes then."""
    outcomes: tuple[Outcome, ...] = ()
    """One per variant."""

    @property
    def agree(self) -> bool:
        """Whether all variants make the same calls, and masks that are empty or not alike."""
        return all(same_calls(self.outcomes[0], other) for other in self.outcomes[1:])


class VariantRow(ArtifactPart):
    """A variant over all images."""

    bytes: int
    """Of its files of weights."""
    milliseconds: Number
    """Median per image, from decoded image to prediction, batches of one, variants in turns."""
    times_first: Number
    """Median over images of the first variant's time over this one's: above 1 it is faster."""
    same_calls: Number
    """Share of the images with the same calls, and a mask or none alike, as the first variant; NaN without images."""
    largest_difference: Number
    """Of a probability from the first variant's; NaN where they share none."""
    mask_dice: Number
    """Mean of `Outcome.mask_dice`; NaN without masks."""


class VariantScores(ArtifactPart):
    """A variant on a split."""

    metrics: Mapping[str, Estimate]
    """AUROC (mean over findings) of a classifier; Dice and shares of a segmenter, as in cascade_metrics.json."""
    same_calls: Number
    """Share of the images with the same calls, or a mask or none alike, as the first variant."""


class Variants(Artifact):
    """The JSON file of `cxrscale variants`."""

    schema_version: int = 1
    variants: tuple[Variant, ...]
    images: tuple[VariantImage, ...] = ()
    rows: tuple[VariantRow, ...]
    """One per variant."""
    split: str = ""
    """That `scores` are of; empty without one."""
    split_images: int = 0
    scores: tuple[VariantScores, ...] = ()
    """One per variant."""


def same_calls(first: Outcome, other: Outcome) -> bool:
    """Whether two outcomes say the same of the findings that both call, and both have a mask or none."""
    both = [name for name in first.calls if name in other.calls]
    if any(first.calls[name] != other.calls[name] for name in both):
        return False
    return first.mask_area is None or other.mask_area is None or (first.mask_area > 0) == (other.mask_area > 0)


def mask_dice(first_HW: npt.NDArray[np.bool_], other_HW: npt.NDArray[np.bool_]) -> float:
    """Dice of two masks in 0..1; 1 where both are empty."""
    total = int(first_HW.sum()) + int(other_HW.sum())
    return 2 * int((first_HW & other_HW).sum()) / total if total else 1.0


def row_of(
    index: int, images: Sequence[VariantImage], seconds_IV: npt.NDArray[np.float64], weights_bytes: int
) -> VariantRow:
    """A variant over all images that could be read.

    Args:
        index: of the variant.
        seconds_IV: (I, V) of each such image and variant.
        weights_bytes: of its files.
    """
    pairs = [(one.outcomes[0], one.outcomes[index]) for one in images if not one.error]
    gaps = [
        abs(first.probabilities[name] - other.probabilities[name])
        for first, other in pairs
        for name in first.probabilities
        if name in other.probabilities
    ]
    dice = [other.mask_dice for _, other in pairs if other.mask_dice is not None]
    nothing = float("nan")
    return VariantRow(
        bytes=weights_bytes,
        milliseconds=float(np.median(seconds_IV[:, index]) * 1000) if len(seconds_IV) else nothing,
        times_first=float(np.median(seconds_IV[:, 0] / seconds_IV[:, index])) if len(seconds_IV) else nothing,
        same_calls=float(np.mean([same_calls(*pair) for pair in pairs])) if pairs else nothing,
        largest_difference=max(gaps, default=nothing),
        mask_dice=float(np.mean(dice)) if dice else nothing,
    )
