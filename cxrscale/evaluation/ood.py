"""Whether an image is unlike the training images (out of distribution): the distance of its thumbnail to theirs.

The check looks at coarse gray values alone: a lateral view, another body part, a photograph, an image that lies on its
side or upside down, has inverted gray or is cut differently. It says nothing about how sure a model is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from pydantic import model_validator

from cxrscale.evaluation.drift import Reference
from cxrscale.evaluation.drift import fit_reference as fit_statistic
from cxrscale.evaluation.metrics import Floats
from cxrscale.io import Artifact, Number

NAME = "ood.json"
SIDE = 16
"""Of a thumbnail in pixels."""
COMPONENTS = 16
"""Principal components in which thumbnails are compared; what they do not explain counts as one more."""
FEWEST = 20
"""Training images below which nothing is fitted."""
QUANTILE = 0.99
"""Share of the validation images that lie below the limit."""
TINY = 1e-9
"""Spread of standardized thumbnails that is only rounding: the images are all alike."""
FAR = 1000.0
"""The distance of an image without any contrast, and the highest."""


class OodReference(Artifact):
    """ood.json: what thumbnails of the training images look like, D = SIDE x SIDE pixels, K components."""

    schema_version: int = 1
    manifest: str
    """Digest of the datasets."""
    images: int
    """Training images that it was fitted on."""
    mean: tuple[Number, ...]
    """(D,) of the standardized thumbnails."""
    components: tuple[tuple[Number, ...], ...]
    """(K, D) unit vectors: their principal components."""
    scale: tuple[Number, ...]
    """(K,) standard deviation along each."""
    residual: Number
    """Median squared length of what the components leave."""
    brightness: Reference | None = None
    """Of the means of the thumbnails, before they are standardized; None in files of earlier versions."""
    contrast: Reference | None = None
    """Of their standard deviations."""

    @model_validator(mode="after")
    def _check_shapes(self) -> OodReference:
        pixels, kept = SIDE * SIDE, len(self.components)
        if len(self.mean) != pixels or not kept or any(len(row) != pixels for row in self.components):
            raise ValueError(f"mean and components have not {pixels} values each")
        if len(self.scale) != kept or not all(value > 0 for value in (*self.scale, self.residual)):
            raise ValueError("scale and residual are not all above 0, one scale per component")
        if not all(math.isfinite(value) for row in (self.mean, self.scale, *self.components) for value in row):
            raise ValueError("a value is not finite")
        return self

    def distance(self, thumbnail_ND: npt.ArrayLike) -> Floats:
        """(N,) how far thumbnails lie from those of the training images: 1 is usual.

        The square root of the mean squared coordinate along the components, each in standard deviations (a Mahalanobis
        distance), plus the squared residual in units of the usual one.
        """
        thumbnails = np.asarray(thumbnail_ND, dtype=np.float64)
        if not len(thumbnails):
            return np.zeros(0)
        standard_ND, contrast_N = _standardized(thumbnails)
        inside_NK, outside_N = _split(standard_ND - np.array(self.mean), np.array(self.components))
        squared_N = ((inside_NK / np.array(self.scale)) ** 2).mean(axis=1) + outside_N / self.residual
        return np.where(contrast_N > 0, np.minimum(np.sqrt(squared_N), FAR), FAR)


def fit_reference(thumbnail_ND: npt.ArrayLike, manifest: str) -> OodReference | None:
    """Fit the reference on thumbnails of training images, (N, D); None where they are too few or all alike.

    Args:
        manifest: digest of the datasets.
    """
    standard_ND, contrast_N = _standardized(np.asarray(thumbnail_ND, dtype=np.float64))
    standard_ND = standard_ND[contrast_N > 0]
    count = len(standard_ND)
    if count < FEWEST:
        return None
    mean_D = standard_ND.mean(axis=0)
    _, length_K, component_KD = np.linalg.svd(standard_ND - mean_D, full_matrices=False)
    kept = min(COMPONENTS, count // 4)
    scale_K = length_K[:kept] / np.sqrt(count - 1)
    _, outside_N = _split(standard_ND - mean_D, component_KD[:kept])
    residual = float(np.median(outside_N))
    if min(residual, scale_K.min()) < TINY:
        return None
    return OodReference(
        manifest=manifest,
        images=count,
        mean=_rounded(mean_D),
        components=tuple(_rounded(row_D) for row_D in component_KD[:kept]),
        scale=_rounded(scale_K),
        residual=residual,
        brightness=fit_statistic(brightness(thumbnail_ND)),
        contrast=fit_statistic(contrast(thumbnail_ND)),
    )


def brightness(thumbnail_ND: npt.ArrayLike) -> Floats:
    """(N,) mean gray value of each image, as the model sees it."""
    return np.asarray(np.asarray(thumbnail_ND, dtype=np.float64).mean(axis=1))


def contrast(thumbnail_ND: npt.ArrayLike) -> Floats:
    """(N,) standard deviation of the gray values of each thumbnail."""
    return np.asarray(np.asarray(thumbnail_ND, dtype=np.float64).std(axis=1))


def choose_limit(distance_N: npt.ArrayLike) -> float:
    """The distance that `QUANTILE` of the validation images stay below; NaN where none was measured."""
    known = np.asarray(distance_N, dtype=np.float64)
    known = known[np.isfinite(known)]
    return float(np.quantile(known, QUANTILE)) if len(known) else float("nan")


def _standardized(thumbnail_ND: Floats) -> tuple[Floats, Floats]:
    """Thumbnails with mean 0 and standard deviation 1, and (N,) what theirs was; 0 where it is only rounding."""
    contrast_N = thumbnail_ND.std(axis=1)
    contrast_N = np.where(contrast_N > 1e-4, contrast_N, 0.0)
    centered_ND = thumbnail_ND - thumbnail_ND.mean(axis=1, keepdims=True)
    return centered_ND / np.where(contrast_N > 0, contrast_N, 1.0)[:, None], contrast_N


def _split(centered_ND: Floats, component_KD: Floats) -> tuple[Floats, Floats]:
    """(N, K) coordinates along the components, and (N,) squared length of the rest."""
    inside_NK = centered_ND @ component_KD.T
    return inside_NK, ((centered_ND - inside_NK @ component_KD) ** 2).sum(axis=1)


def _rounded(value: Floats) -> tuple[float, ...]:
    """Seven digits: the file stays small, and a distance changes by less than 1e-5."""
    numbers: Sequence[float] = value.tolist()
    return tuple(float(f"{number:.7g}") for number in numbers)
