"""How far two models' outputs are apart, and whether that is close enough: plain functions of arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cxrscale.inference.export.contract import Difference
from cxrscale.io import ArtifactPart

Floats = npt.NDArray[np.floating]
EXACT = 1e-5
"""Probabilities of a float32 form differ from the run's by at most this."""


class Gate(ArtifactPart):
    """What a form may change. AUROC is not part of it: it does not show a model that is broken."""

    exact: float = EXACT
    """Of a float form: the largest difference of probabilities. Rounding grows with a net's depth and logits: torch
    alone, in two memory layouts, differs by 3e-5 in a UNet with random weights. The other limits are of quantized
    forms."""
    maximum: float = 0.25
    """Of the absolute differences of probabilities."""
    mean: float = 0.01
    flipped: float = 0.02
    """Share of the calls."""

    def refusal(self, found: Difference) -> str:
        """Why the form does not pass; empty where it does."""
        for name, words in (
            ("flipped", "calls flipped"),
            ("mean", "mean difference of probabilities"),
            ("maximum", "largest difference of probabilities"),
        ):
            value, limit = getattr(found, name), getattr(self, name)
            # A NaN passes no comparison.
            if not value <= limit:
                return f"{words} {value:.3g} on {found.images} validation images, more than {limit:g}"
        return ""


@dataclass(frozen=True, slots=True)
class Tally:
    """Differences summed over batches."""

    images: int = 0
    values: int = 0
    total: float = 0.0
    maximum: float = 0.0
    of_a: int = 0
    """Calls, or pixels of masks, of the one model; of the other; of both."""
    of_b: int = 0
    of_both: int = 0
    flipped: int = 0
    calls: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.images + other.images,
            self.values + other.values,
            self.total + other.total,
            float(np.maximum(self.maximum, other.maximum)),  # a NaN stays
            self.of_a + other.of_a,
            self.of_b + other.of_b,
            self.of_both + other.of_both,
            self.flipped + other.flipped,
            self.calls + other.calls,
        )

    def difference(self, *, maps: bool) -> Difference:
        """What they sum up to.

        Args:
            maps: whether the calls are pixels of masks.
        """
        if maps:
            both = self.of_a + self.of_b
            flipped = 1 - 2 * self.of_both / both if both else 0.0
        else:
            flipped = self.flipped / max(1, self.calls)
        return Difference(
            images=self.images, maximum=self.maximum, mean=self.total / max(1, self.values), flipped=flipped
        )


def tally(
    probability_a: Floats, probability_b: Floats, called_a: npt.NDArray[np.bool_], called_b: npt.NDArray[np.bool_]
) -> Tally:
    """Compare two models' outputs for the same images.

    Args:
        probability_a: (B, F) or (B, H, W) in 0..1; of `probability_b` the same shape.
        called_a: the same shape: whether the finding is called, or the pixel is of the mask.
    """
    gap = np.abs(probability_a.astype(np.float64) - probability_b.astype(np.float64))
    return Tally(
        len(gap),
        gap.size,
        float(gap.sum()),
        float(gap.max(initial=0.0)),
        int(called_a.sum()),
        int(called_b.sum()),
        int((called_a & called_b).sum()),
        int((called_a != called_b).sum()),
        called_a.size,
    )
