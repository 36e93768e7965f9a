"""Decision thresholds, searched exactly over all candidates on validation predictions alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field

from cxrscale.config import Threshold
from cxrscale.evaluation.metrics import (
    BootstrapWeights,
    Estimate,
    Floats,
    absent_class,
    bin_of,
    blocks,
    divide,
    interval,
    known,
    undefined,
)
from cxrscale.io import Number
from cxrscale.types import ScoreHistograms

Counts = npt.NDArray[np.int64]
_Tables = tuple[Counts, Floats, Floats]


Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
"""A probability that a score is compared with: never NaN, with which no comparison would be true."""


@dataclass(frozen=True, slots=True)
class MaskRule:
    """The SIIM winners' rule: no mask unless `min_area` pixels score >= top; then all pixels that score >= bottom."""

    top: Share
    min_area: Annotated[int, Field(ge=0)]
    bottom: Share
    dice: Number = float("nan")
    """Mean Dice over the images that it was searched on, empty against empty counting 1; NaN where it was not."""
    own_size: bool = False
    """Whether `min_area` counts pixels of the image itself; else of the model's input."""


DEFAULT_MASK_RULE = MaskRule(0.5, 0, 0.5, own_size=True)
"""The mask rule of a run without thresholds: every pixel that scores at least 0.5."""


@dataclass(frozen=True, slots=True)
class MaskRuleIntervals:
    """The thresholds of a mask rule with their 95% intervals."""

    top: Estimate
    min_area: Estimate
    bottom: Estimate


def best_f1_threshold(score_N: npt.ArrayLike, label_N: npt.ArrayLike) -> Estimate:
    """The threshold of the highest F1, called positive where score >= threshold; NaN with the reason without positives.

    Every distinct score is a candidate; the returned threshold lies midway to the next lower score, so that a score
    that another machine computes a rounding error lower still falls on the same side.
    """
    return choose_threshold(score_N, label_N, Threshold())


def choose_threshold(
    score_N: npt.ArrayLike,
    label_N: npt.ArrayLike,
    rule: Threshold,
    weights_RN: BootstrapWeights | None = None,
    prior: float | None = None,
) -> Estimate:
    """The threshold by a rule; an image is called positive where score >= threshold. NaN labels are left out.

    f1: highest F1. youden: highest recall + specificity - 1 (Youden 1950). recall: the highest threshold whose recall
    is at least `rule.min_rate`. precision: the lowest threshold whose precision is, which has the highest recall.
    cost: the lowest `fn_cost` x FN + `fp_cost` x FP, which may be to call no image positive. fixed: `rule.value`.

    Every distinct score is a candidate, by one sort; `value` lies midway to the next lower score. Of equally good
    thresholds it is the highest, and the reason has their number. Where no threshold fulfills the rule (no image with
    the finding, precision out of reach), it is NaN with the reason.

    Args:
        score_N: probabilities in 0..1.
        weights_RN: `metrics.bootstrap_weights`: adds the threshold's 95% interval, by the same search in each resample.
        prior: choose as if this share of images had the finding (0..1), for use where it is rarer or more common.
    """
    if rule.goal == "fixed":
        return Estimate(rule.value)
    score, label = known(score_N, label_N)
    assert not np.isnan(score).any(), "call metrics.require first"
    absent = absent_class(label)
    if absent and (rule.goal == "youden" or prior is not None or absent != "no image without the finding"):
        return undefined(f"{absent} in validation")
    order = np.argsort(-score, kind="stable")
    candidates = _Candidates(score[order], label[order] == 1)
    one = np.ones((1, len(order)), dtype=np.uint8)
    calls, tp = candidates.count(one)
    merit = _merit(calls, tp, rule, prior)[0]
    best = int(merit.argmax())
    if merit[best] == -np.inf:
        highest = float(np.nanmax(divide(tp[0], calls[0])))
        return undefined(
            f"no threshold reaches precision {rule.min_rate:g} in validation; the highest is {highest:.3f}"
        )
    value = float(candidates.midway(np.array([best]), calls)[0])
    reason = _remark(merit, best)
    if weights_RN is None:
        return Estimate(value, reason=reason)
    rows = np.flatnonzero(~np.isnan(np.asarray(label_N, dtype=np.float64)))[order]
    parts = [_search(candidates, weights_RN[part][:, rows], rule, prior) for part in blocks(weights_RN)]
    resampled = interval(value, np.concatenate(parts))
    return Estimate(value, resampled.low, resampled.high, "; ".join(filter(None, (reason, resampled.reason))))


class _Candidates:
    """The candidates from C - 1 distinct scores, highest first: 0 calls no image positive, k the k highest scores."""

    def __init__(self, ranked_N: Floats, positive_N: npt.NDArray[np.bool_]) -> None:
        self.positive_N = positive_N
        self.last_K = np.flatnonzero(np.r_[ranked_N[1:] != ranked_N[:-1], True])
        self.score_C = np.r_[np.inf, ranked_N[self.last_K]]

    def count(self, weights_RN: BootstrapWeights) -> tuple[Counts, Counts]:
        """(R, C) images called positive, and those of them that are, at each candidate in each resample."""
        calls, tp = np.zeros((2, len(weights_RN), len(self.score_C)), dtype=np.int64)
        calls[:, 1:] = np.cumsum(weights_RN, axis=1, dtype=np.int32)[:, self.last_K]
        tp[:, 1:] = np.cumsum(weights_RN * self.positive_N, axis=1, dtype=np.int32)[:, self.last_K]
        return calls, tp

    def midway(self, best_R: npt.NDArray[np.intp], calls_RC: Counts) -> Floats:
        """(R,) thresholds midway between the best candidate's score and the next lower one in the resample.

        To call no image positive, midway between the highest score and 1.
        """
        more_RC = calls_RC > np.take_along_axis(calls_RC, best_R[:, None], axis=1)
        below = np.where(more_RC.any(axis=1), self.score_C[more_RC.argmax(axis=1)], 0.0)
        score = np.where(best_R == 0, np.maximum(1.0, np.nextafter(below, np.inf)), self.score_C[best_R])
        middle = (score + below) / 2
        return np.asarray(np.where(middle > below, middle, score), dtype=np.float64)  # neighbors have no midpoint


def _search(candidates: _Candidates, weights_RN: BootstrapWeights, rule: Threshold, prior: float | None) -> Floats:
    """(R,) the threshold of each resample; NaN where it has none."""
    calls, tp = candidates.count(weights_RN)
    merit = _merit(calls, tp, rule, prior)
    merit[:, 1:][calls[:, 1:] == calls[:, :-1]] = -np.inf  # a score that was not drawn is no candidate
    best = merit.argmax(axis=1)
    allowed = np.take_along_axis(merit, best[:, None], axis=1)[:, 0] > -np.inf
    return np.where(allowed, candidates.midway(best, calls), np.nan)


def _merit(calls: Counts, tps: Counts, rule: Threshold, prior: float | None) -> Floats:
    """(R, C) what the rule maximizes; -inf where it forbids the candidate. Exact in integers without a prior."""
    positives, negatives = tps[:, -1:], calls[:, -1:] - tps[:, -1:]
    tp, fp = tps.astype(np.float64), (calls - tps).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        if prior is not None:
            tp, fp = tp * (prior / positives), fp * ((1 - prior) / negatives)
        present, absent = tp[:, -1:], fp[:, -1:]
        if rule.goal == "f1":
            merit = 2 * tp / (tp + fp + present)
        elif rule.goal == "youden":
            merit = tp * absent - fp * present
        elif rule.goal == "recall":
            merit = np.where(tps / positives >= rule.min_rate, -np.arange(calls.shape[1], dtype=np.float64), -np.inf)
        elif rule.goal == "precision":
            merit = np.where(tp / (tp + fp) >= rule.min_rate, np.arange(calls.shape[1], dtype=np.float64), -np.inf)
        else:
            merit = -(rule.fn_cost * (present - tp) + rule.fp_cost * fp)
    merit = np.where((positives > 0) & ~np.isnan(merit), merit, -np.inf)
    if rule.goal == "youden" or prior is not None:
        merit = np.where(negatives > 0, merit, -np.inf)
    if rule.goal != "cost":
        merit[:, 0] = -np.inf  # no call, no true positive
    return merit


def _remark(merit_C: Floats, best: int) -> str:
    equal = int((merit_C == merit_C[best]).sum())
    if best == 0:
        return "calling nothing costs least"
    return f"{equal} thresholds are equally good; this is the highest" if equal > 1 else ""


def best_mask_rule(maps: ScoreHistograms, areas: tuple[int, ...] | None = None) -> MaskRule:
    """The mask rule of the highest mean Dice, over all bins of top and bottom and the given minimum areas.

    Args:
        maps: histograms over N validation maps of T bins.
        areas: candidates of min_area in pixels; None: 0 and the squares up to a fiftieth of the image.

    With the gate G (N, tops x areas) and Dice D (N, bottoms), the mean is (G' D + (1 - G)' empty) / N: two matrix
    products instead of a loop over maps.
    """
    above_NT, dice_NT, empty_N = rule_tables(maps)
    bins = above_NT.shape[1]
    candidates = rule_areas(maps) if areas is None else areas
    best: tuple[float, int, int, int] = (-1.0, 0, 0, 0)
    for area in candidates:
        gate_NT = (above_NT >= max(1, area)).astype(np.float64)
        mean_TT = (gate_NT.T @ dice_NT + ((1 - gate_NT).T @ empty_N)[:, None]) / len(above_NT)
        mean_TT[np.triu_indices(bins, 1)] = -1.0  # a bottom above top would remove pixels that the gate has counted
        top, bottom = np.unravel_index(int(mean_TT.argmax()), mean_TT.shape)
        if mean_TT[top, bottom] > best[0] + 1e-12:
            best = (float(mean_TT[top, bottom]), int(top), area, int(bottom))
    return MaskRule(best[1] / bins, best[2], best[3] / bins, best[0], maps.own_size)


def mask_rule_intervals(
    maps: ScoreHistograms,
    rule: MaskRule,
    weights_RN: BootstrapWeights,
    areas: tuple[int, ...] | None = None,
    steps: int = 32,
) -> MaskRuleIntervals:
    """The thresholds of `rule`, each with the 95% interval of the same search in each resample.

    The resamples are searched over `rule` and every bin at which one of `steps` equal steps begins, so their thresholds
    are known to 1 / steps; where nothing is better they keep `rule`. A wide interval means that many rules are
    equally good.
    """
    tables = rule_tables(maps)
    bins = maps.all_NT.shape[1]
    own = (bin_of(rule.top, bins), rule.min_area, bin_of(rule.bottom, bins))
    even = np.linspace(0, bins, min(steps, bins), endpoint=False).astype(int)
    grid = np.unique(np.r_[even, bins - 1, own[0], own[2]])
    candidates = rule_areas(maps) if areas is None else areas
    rule_R3 = np.concatenate(
        [_search_mask_rules(tables, weights_RN[part], own, candidates, grid) for part in blocks(weights_RN)]
    )
    top_R, min_area_R, bottom_R = (rule_R3 / [bins, 1, bins]).T
    return MaskRuleIntervals(
        interval(rule.top, top_R), interval(float(rule.min_area), min_area_R), interval(rule.bottom, bottom_R)
    )


def _search_mask_rules(
    tables: _Tables,
    weights_RN: BootstrapWeights,
    own: tuple[int, int, int],
    areas: tuple[int, ...],
    grid: npt.NDArray[np.intp],
) -> Floats:
    """(R, 3) bin of top, min_area and bin of bottom of the highest Dice in each resample."""
    above_NT, dice_NT, empty_N = tables
    weights = weights_RN.astype(np.float32)
    rule_R3 = np.tile(np.array(own, dtype=np.float64), (len(weights), 1))
    best_R = weights @ np.where(above_NT[:, own[0]] >= max(1, own[1]), dice_NT[:, own[2]], empty_N).astype(np.float32)
    for area in areas:
        for top in grid:
            bottoms = grid[grid <= top]
            gate_N1 = (above_NT[:, top] >= max(1, area))[:, None]
            sum_RB = weights @ np.where(gate_N1, dice_NT[:, bottoms], empty_N[:, None]).astype(np.float32)
            best = sum_RB.argmax(axis=1)
            sum_R = np.take_along_axis(sum_RB, best[:, None], axis=1)[:, 0]
            better = np.flatnonzero(sum_R > best_R + 1e-3)  # the precision of a float32 sum of some thousand Dice
            best_R[better] = sum_R[better]
            rule_R3[better, 0], rule_R3[better, 1], rule_R3[better, 2] = top, area, bottoms[best[better]]
    return rule_R3


def rule_tables(maps: ScoreHistograms) -> _Tables:
    """What a search for mask rules needs: (N, T) pixels that score at least each bin's lower end, (N, T) Dice of these,
    (N,) Dice of no mask."""
    above = maps.all_NT[:, ::-1].cumsum(axis=1, dtype=np.int64)[:, ::-1]
    inside = maps.true_NT[:, ::-1].cumsum(axis=1, dtype=np.int64)[:, ::-1]
    total = above + inside[:, :1]
    dice_NT = np.where(total == 0, 1.0, 2 * inside / np.maximum(total, 1))
    return above, dice_NT, (inside[:, 0] == 0).astype(np.float64)


def rule_areas(maps: ScoreHistograms) -> tuple[int, ...]:
    """Candidates of a mask rule's min_area: 0 and the squares up to a fiftieth of the image, of the usual one where
    images have several sizes."""
    pixels = float(np.median(maps.all_NT.sum(axis=1)))
    side = round((pixels / 50) ** 0.5)
    return tuple(sorted({step * step for step in range(0, side + 1, max(1, side // 16))}))
