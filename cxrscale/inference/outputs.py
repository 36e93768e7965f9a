"""From what a model gives for an image to what is said of it: calibrated probabilities, calls, the mask, warnings."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from cxrscale.evaluation import MaskRule, calls, ood, score_maps
from cxrscale.evaluation.metrics import bin_of
from cxrscale.inference.decision import Decision
from cxrscale.inference.prediction import Prediction
from cxrscale.io import rle_masks
from cxrscale.types import probabilities_of


@dataclass(frozen=True, slots=True, eq=False)
class Output:
    """What a model gives for one image."""

    logit_F: npt.NDArray[np.float32]
    """For segmentation of the map's highest pixel."""
    score_HW: npt.NDArray[np.float32] | None
    """For segmentation: the map's probabilities."""
    map_Fhw: npt.NDArray[np.float32] | None = None
    """For classification, where it was asked for: class activation maps."""
    gray: tuple[float, float] | None = None
    """Mean and standard deviation of the thumbnail."""
    ood_distance: float | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """How a model's output is read."""

    findings: tuple[str, ...]
    decision: Decision
    mask_rule: MaskRule
    maps: bool
    """Whether predictions have their `maps`."""

    def prediction(self, known: Prediction, output: Output) -> Prediction:
        """What is said of an image.

        Args:
            known: what is known of it without the model.
        """
        logit_F = output.logit_F
        known = replace(known, logits=dict(zip(self.findings, logit_F.tolist(), strict=True)), gray=output.gray)
        if output.score_HW is not None and known.height is not None and known.width is not None:
            mask_HW = apply_mask_rule(output.score_HW, self.mask_rule, (known.height, known.width))
            area = int(mask_HW.sum())
            area_mm2 = None if known.spacing_mm is None else area * known.spacing_mm[0] * known.spacing_mm[1]
            known = replace(known, mask_rle=rle_masks.encode(mask_HW), mask_area=area, mask_area_mm2=area_mm2)
        if output.map_Fhw is not None:
            known = replace(known, maps=dict(zip(self.findings, output.map_Fhw, strict=True)))
        elif self.maps and output.score_HW is not None:
            known = replace(known, maps={self.findings[0]: output.score_HW})
        chosen = self.decision.thresholds
        # Behind a gate the image has been measured.
        if output.ood_distance is not None and known.ood_distance is None:
            known = _measured(known, output.ood_distance, None if chosen is None else chosen.ood_limit)
        if chosen is None:
            own = dict(zip(self.findings, probabilities_of(logit_F).tolist(), strict=True))
            return replace(known, probabilities=own)
        found = calls.call_images(logit_F[None], self.findings, chosen, self.decision.estimated)
        final = dict(zip(self.findings, found.probability_NF[0].tolist(), strict=True))
        called = {
            name: bool(value)
            for name, value in zip(self.findings, found.called_NF[0].tolist(), strict=True)
            if not math.isnan(value)
        }
        return replace(known, probabilities=final, calls=called)


def _measured(known: Prediction, distance: float, limit: float | None) -> Prediction:
    """What is known of an image, with its distance to the training images, and a warning where that is too large."""
    if limit is None or not distance > limit:
        return replace(known, ood_distance=distance)
    warning = (
        f"unlike the training images: distance {distance:.2f}, where {ood.QUANTILE:.0%} of the validation images lie "
        f"below {limit:.2f}; another view or body part, turned, inverted or cut? The probabilities say little"
    )
    return replace(known, ood_distance=distance, warnings=(*known.warnings, warning))


def apply_mask_rule(score_HW: npt.NDArray[np.float32], rule: MaskRule, shape: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """The mask of a score map at the size (H, W) of its image: empty unless `min_area` pixels score >= top, else all
    pixels that score >= bottom.

    The probabilities are enlarged, not the mask. `min_area` counts pixels of the image, or of the map where the rule
    was chosen at that size.
    """
    bins = score_maps.BINS
    own_HW = score_maps.enlarged(score_HW, shape)
    gate_HW = own_HW if rule.own_size else score_HW
    enough = (gate_HW * bins >= bin_of(rule.top, bins)).sum() >= max(1, rule.min_area)
    return np.asarray((own_HW * bins >= bin_of(rule.bottom, bins)) & enough)
