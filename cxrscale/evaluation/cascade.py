"""A classifier before a segmenter: what it does to the masks, and the best threshold and mask rule together."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cxrscale.config import Data
from cxrscale.evaluation.cascade_models import CascadeMetrics, MaskMetrics
from cxrscale.evaluation.metrics import (
    BootstrapWeights,
    Estimate,
    Floats,
    bin_of,
    has_mask,
    interval,
    map_dice,
    pixels_above,
    undefined,
    weighted_means,
)
from cxrscale.evaluation.thresholds import MaskRule, rule_areas, rule_tables
from cxrscale.types import ScoreHistograms, UserError

STEPS = 64
"""Equal steps of the map's thresholds that the search tries."""


def common_finding(segmenter: tuple[str, Data], gate: tuple[str, Data]) -> str:
    """The finding that a segmenter and the classifier before it are about.

    Args:
        segmenter: the run's folder or address, and its recipe's section `data`.
        gate: those of the classifier.

    Raises:
        UserError: they are no segmenter and classifier, or not of one finding.
    """
    for (run, data), task, word in ((segmenter, "segment", "segmenter"), (gate, "classify", "classifier")):
        if data.task != task:
            raise UserError(
                f"{run} is no {word}: a gate is a classifier (--gate), and stands before a segmenter (--run)"
            )
    finding, known = segmenter[1].findings[0], gate[1].findings
    if finding not in known:
        raise UserError(
            f"{gate[0]} does not know {finding}, which {segmenter[0]} segments; it knows {', '.join(known)}"
        )
    return finding


def evaluate_cascade(
    maps: ScoreHistograms,
    rule: MaskRule,
    alone: MaskRule,
    passed_N: npt.NDArray[np.bool_],
    weights_RN: BootstrapWeights,
) -> CascadeMetrics:
    """Masks of a segmenter that sees only what a classifier passes, against the same segmenter alone.

    Args:
        maps: of all N images of the split.
        rule: the mask rule behind the classifier.
        alone: the segmenter's own.
        passed_N: whether the classifier calls the finding present.
        weights_RN: `metrics.bootstrap_weights` of the patients.
    """
    gated, single = _per_image(maps, rule, passed_N), _per_image(maps, alone, np.ones(len(passed_N), bool))
    return CascadeMetrics(
        cascade=MaskMetrics(**{name: _mean(value_N, weights_RN) for name, value_N in gated.items()}),
        segmenter=MaskMetrics(**{name: _mean(value_N, weights_RN) for name, value_N in single.items()}),
        difference=MaskMetrics(**{name: _mean(gated[name] - single[name], weights_RN) for name in gated}),
        passed=_mean(passed_N.astype(np.float64), weights_RN),
    )


def search_cascade(maps: ScoreHistograms, gate_N: npt.ArrayLike, steps: int = STEPS) -> tuple[float, MaskRule]:
    """The gate's threshold and the mask rule whose cascade has the highest mean Dice over all images.

    Every distinct gate score is a candidate, midway to the next lower one; 0 passes every image. Of equally good ones
    the lowest threshold is taken: it passes most.

    Args:
        maps: of N validation images.
        gate_N: the classifier's final probabilities, 0..1.
        steps: of the map's thresholds; the minimum areas are those of `thresholds.best_mask_rule`.
    """
    score_N = np.asarray(gate_N, dtype=np.float64)
    order = np.argsort(-score_N, kind="stable")
    ranked_N = score_N[order]
    # After the k-th image the gate may close only where the next one scores less.
    last_K = np.flatnonzero(np.r_[ranked_N[1:] != ranked_N[:-1], True])
    above_NT, dice_NT, empty_N = (table[order] for table in rule_tables(maps))
    bins = above_NT.shape[1]
    grid = np.unique(np.linspace(0, bins - 1, min(steps, bins)).astype(int))
    best, found = -np.inf, (0.0, MaskRule(0.5, 0, 0.5))
    for area in rule_areas(maps):
        for top in grid:
            bottoms = grid[grid <= top]
            enough_N1 = (above_NT[:, top] >= max(1, area))[:, None]
            gain_NB = np.where(enough_N1, dice_NT[:, bottoms] - empty_N[:, None], 0.0)
            sum_KB = np.cumsum(gain_NB, axis=0)[last_K]
            highest = float(sum_KB.max())
            if highest > best + 1e-9:
                best = highest
                k, b = np.argwhere(sum_KB >= highest - 1e-9)[-1]
                dice = (highest + float(empty_N.sum())) / len(score_N)
                rule = MaskRule(top / bins, area, float(bottoms[b]) / bins, dice, maps.own_size)
                found = _midway(ranked_N, int(last_K[k])), rule
    return found


def has_predicted_mask(maps: ScoreHistograms, rule: MaskRule) -> npt.NDArray[np.bool_]:
    """(N,) whether the rule gives an image a mask that is not empty."""
    top = pixels_above(maps, bin_of(rule.top, maps.all_NT.shape[1]))
    return np.asarray(top >= max(1, rule.min_area))


def _midway(ranked_N: Floats, last: int) -> float:
    """The threshold that the image at `last` and all before it pass."""
    if last + 1 == len(ranked_N):
        return 0.0
    middle = float(ranked_N[last] + ranked_N[last + 1]) / 2
    return middle if middle > ranked_N[last + 1] else float(ranked_N[last])


def _per_image(maps: ScoreHistograms, rule: MaskRule, passed_N: npt.NDArray[np.bool_]) -> dict[str, Floats]:
    """(N,) of each metric's values, NaN where it does not count an image."""
    positive_N = has_mask(maps)
    masked_N = passed_N & has_predicted_mask(maps, rule)
    dice_N = np.where(passed_N, map_dice(maps, rule.top, rule.min_area, rule.bottom), (~positive_N).astype(np.float64))
    return {
        "dice_all": dice_N,
        "dice_on_positives": np.where(positive_N, dice_N, np.nan),
        "sensitivity": np.where(positive_N, masked_N, np.nan),
        "false_masks": np.where(positive_N, np.nan, masked_N),
    }


def _mean(value_N: Floats, weights_RN: BootstrapWeights) -> Estimate:
    known = value_N[np.isfinite(value_N)]
    if not len(known):
        return undefined("no such image")
    return interval(float(known.mean()), weighted_means(value_N, weights_RN))
