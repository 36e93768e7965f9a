"""Cut-offs searched on validation predictions alone, exactly, over all cut points."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

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
from cxrscale.types import ScoreHistograms

Counts = npt.NDArray[np.int64]
_Tables = tuple[Counts, Floats, Floats]


@dataclass(frozen=True, slots=True)
class MaskRule:
    """The SIIM winners' rule: no mask unless `min_area` pixels score >= top; then every pixel >= bottom."""

    top: float
    min_area: int
    bottom: float
    dice: float
    """Mean Dice over the images it was searched on, empty against empty = 1."""


def best_f1_threshold(score_N: npt.ArrayLike, label_N: npt.ArrayLike) -> Estimate:
    """The threshold of the highest F1 in `value`; calls are score >= threshold. NaN with the reason without positives.

    Every distinct score is a candidate; the one returned lies midway to the next lower score, so that a score that
    another machine computes a rounding error lower still falls on the same side.
    """
    return choose_threshold(score_N, label_N, Threshold())


def choose_threshold(
    score_N: npt.ArrayLike,
    label_N: npt.ArrayLike,
    rule: Threshold,
    draws_RN: BootstrapWeights | None = None,
    prior: float | None = None,
) -> Estimate:
    """The threshold that a rule asks for; calls are score >= threshold. NaN labels are left out.

    f1: highest F1. youden: highest recall + specificity - 1 (Youden 1950). recall: the highest threshold whose recall
    is at least `rule.min_rate`. precision: the lowest threshold whose precision is, so the best recall that keeps it.
    cost: lowest `miss_cost` x misses + `alarm_cost` x alarms, which may be to call nothing. fixed: `rule.value`.

    Every distinct score is a candidate, by one sort; `value` lies midway to the next lower score. Of equally good
    thresholds it is the highest, and the reason says how many there are. Where no threshold does what is asked (no
    image with the finding, precision out of reach), it is NaN with the reason.

    Args:
        score_N: probabilities in 0..1.
        draws_RN: `metrics.patient_draws`: adds the 95% interval of the threshold, searched anew in each resample.
        prior: choose as if this share of images had the finding (0..1), for use where it is rarer or commoner.
    """
    if rule.goal == "fixed":
        return Estimate(rule.value)
    score, label = known(score_N, label_N)
    assert not np.isnan(score).any(), "metrics.require comes first"
    absent = absent_class(label)
    if absent and (rule.goal == "youden" or prior is not None or absent != "no image without the finding"):
        return undefined(f"{absent} in validation")
    order = np.argsort(-score, kind="stable")
    cuts = _Cuts(score[order], label[order] == 1)
    one = np.ones((1, len(order)), dtype=np.uint8)
    calls, hits = cuts.count(one)
    merit = _merit(calls, hits, rule, prior)[0]
    best = int(merit.argmax())
    if merit[best] == -np.inf:
        precision = divide(hits[0], calls[0])
        top = float(np.nanmax(precision))
        return undefined(f"no threshold reaches precision {rule.min_rate:g} in validation; the highest is {top:.3f}")
    value = float(cuts.between(np.array([best]), calls)[0])
    reason = _remark(merit, best)
    if draws_RN is None:
        return Estimate(value, reason=reason)
    rows = np.flatnonzero(~np.isnan(np.asarray(label_N, dtype=np.float64)))[order]
    resampled = np.concatenate([_search(cuts, draws_RN[part][:, rows], rule, prior) for part in blocks(draws_RN)])
    found = interval(value, resampled)
    return Estimate(value, found.low, found.high, "; ".join(filter(None, (reason, found.reason))))


class _Cuts:
    """All cut points of scores sorted from the highest down: cut 0 calls nothing, cut k the k highest scores."""

    def __init__(self, ranked_N: Floats, present_N: npt.NDArray[np.bool_]) -> None:
        self.present_N = present_N
        self.last_K = np.flatnonzero(np.r_[ranked_N[1:] != ranked_N[:-1], True])
        self.score_C = np.r_[np.inf, ranked_N[self.last_K]]

    def count(self, drawn_RN: BootstrapWeights) -> tuple[Counts, Counts]:
        """(R, C) images called, and those of them that have the finding, at each cut of each resample."""
        calls, hits = np.zeros((2, len(drawn_RN), len(self.score_C)), dtype=np.int64)
        calls[:, 1:] = np.cumsum(drawn_RN, axis=1, dtype=np.int32)[:, self.last_K]
        hits[:, 1:] = np.cumsum(drawn_RN * self.present_N, axis=1, dtype=np.int32)[:, self.last_K]
        return calls, hits

    def between(self, best_R: npt.NDArray[np.intp], calls_RC: Counts) -> Floats:
        """(R,) thresholds midway between the chosen cut's score and the next lower one that is in the resample.

        To call nothing, midway between the highest score and 1.
        """
        more_RC = calls_RC > np.take_along_axis(calls_RC, best_R[:, None], axis=1)
        below = np.where(more_RC.any(axis=1), self.score_C[more_RC.argmax(axis=1)], 0.0)
        cut = np.where(best_R == 0, np.maximum(1.0, np.nextafter(below, np.inf)), self.score_C[best_R])
        middle = (cut + below) / 2
        return np.asarray(np.where(middle > below, middle, cut), dtype=np.float64)  # neighbors have no midpoint


def _search(cuts: _Cuts, drawn_RN: BootstrapWeights, rule: Threshold, prior: float | None) -> Floats:
    """(R,) the threshold of each resample; NaN where it has none."""
    calls, hits = cuts.count(drawn_RN)
    merit = _merit(calls, hits, rule, prior)
    merit[:, 1:][calls[:, 1:] == calls[:, :-1]] = -np.inf  # a score that was not drawn is no candidate
    best = merit.argmax(axis=1)
    found = np.take_along_axis(merit, best[:, None], axis=1)[:, 0] > -np.inf
    return np.where(found, cuts.between(best, calls), np.nan)


def _merit(calls: Counts, hits: Counts, rule: Threshold, prior: float | None) -> Floats:
    """(R, C) what the rule wants most; -inf where it forbids the cut. Exact in integers unless a prior is given."""
    positives, negatives = hits[:, -1:], calls[:, -1:] - hits[:, -1:]
    hit, alarm = hits.astype(np.float64), (calls - hits).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        if prior is not None:
            hit, alarm = hit * (prior / positives), alarm * ((1 - prior) / negatives)
        present, absent = hit[:, -1:], alarm[:, -1:]
        if rule.goal == "f1":
            merit = 2 * hit / (hit + alarm + present)
        elif rule.goal == "youden":
            merit = hit * absent - alarm * present
        elif rule.goal == "recall":
            merit = np.where(hits / positives >= rule.min_rate, -np.arange(calls.shape[1], dtype=np.float64), -np.inf)
        elif rule.goal == "precision":
            merit = np.where(hit / (hit + alarm) >= rule.min_rate, np.arange(calls.shape[1], dtype=np.float64), -np.inf)
        else:
            merit = -(rule.fn_cost * (present - hit) + rule.fp_cost * alarm)
    merit = np.where((positives > 0) & ~np.isnan(merit), merit, -np.inf)
    if rule.goal == "youden" or prior is not None:
        merit = np.where(negatives > 0, merit, -np.inf)
    if rule.goal != "cost":
        merit[:, 0] = -np.inf  # calling nothing finds nothing
    return merit


def _remark(merit_C: Floats, best: int) -> str:
    equal = int((merit_C == merit_C[best]).sum())
    if best == 0:
        return "calling nothing costs least"
    return f"{equal} thresholds are equally good; this is the highest" if equal > 1 else ""


def best_mask_rule(maps: ScoreHistograms, areas: tuple[int, ...] | None = None) -> MaskRule:
    """The triplet of the highest mean Dice, over all bins of top and bottom and the given minimum areas.

    Args:
        maps: histograms over N validation maps of T bins.
        areas: candidates of min_area in pixels; None: 0 and the squares up to a fiftieth of the image.

    With the gate G (N, tops x areas) and Dice D (N, bottoms), the mean is (G' D + (1 - G)' empty) / N: two matrix
    products instead of a loop over maps.
    """
    above, dice_NT, empty_N = _by_bin(maps)
    bins = above.shape[1]
    choices = _areas(int(maps.all_NT[0].sum())) if areas is None else areas
    best: tuple[float, int, int, int] = (-1.0, 0, 0, 0)
    for area in choices:
        gate_NT = (above >= max(1, area)).astype(np.float64)
        mean_TT = (gate_NT.T @ dice_NT + ((1 - gate_NT).T @ empty_N)[:, None]) / len(above)
        mean_TT[np.triu_indices(bins, 1)] = -1.0  # a bottom above the top would cut into what the gate has seen
        top, bottom = np.unravel_index(int(mean_TT.argmax()), mean_TT.shape)
        if mean_TT[top, bottom] > best[0] + 1e-12:
            best = (float(mean_TT[top, bottom]), int(top), area, int(bottom))
    return MaskRule(best[1] / bins, best[2], best[3] / bins, best[0])


def mask_rule_intervals(
    maps: ScoreHistograms,
    found: MaskRule,
    draws_RN: BootstrapWeights,
    areas: tuple[int, ...] | None = None,
    steps: int = 32,
) -> dict[str, Estimate]:
    """top, min_area, bottom of `found`, each with the 95% interval of the same search made anew in each resample.

    The resamples are searched over `found` and every bin that begins one of `steps` equal steps, so their thresholds
    are known to 1 / steps; where nothing is better they stay with `found`. A wide interval says that many triplets
    serve as well.
    """
    tables = _by_bin(maps)
    bins = maps.all_NT.shape[1]
    own = (bin_of(found.top, bins), found.min_area, bin_of(found.bottom, bins))
    even = np.linspace(0, bins, min(steps, bins), endpoint=False).astype(int)
    grid = np.unique(np.r_[even, bins - 1, own[0], own[2]])
    choices = _areas(int(maps.all_NT[0].sum())) if areas is None else areas
    triplet_R3 = np.concatenate(
        [_search_mask_rules(tables, draws_RN[part], own, choices, grid) for part in blocks(draws_RN)]
    )
    scaled = triplet_R3 / [bins, 1, bins]
    values = {"top": found.top, "min_area": float(found.min_area), "bottom": found.bottom}
    return {name: interval(value, scaled[:, column]) for column, (name, value) in enumerate(values.items())}


def _search_mask_rules(
    tables: _Tables,
    drawn_RN: BootstrapWeights,
    own: tuple[int, int, int],
    areas: tuple[int, ...],
    grid: npt.NDArray[np.intp],
) -> Floats:
    """(R, 3) bin of top, min_area and bin of bottom of the highest Dice in each resample."""
    above_NT, dice_NT, empty_N = tables
    weight = drawn_RN.astype(np.float32)
    triplet_R3 = np.tile(np.array(own, dtype=np.float64), (len(weight), 1))
    best_R = weight @ np.where(above_NT[:, own[0]] >= max(1, own[1]), dice_NT[:, own[2]], empty_N).astype(np.float32)
    for area in areas:
        for top in grid:
            bottoms = grid[grid <= top]
            gate_N1 = (above_NT[:, top] >= max(1, area))[:, None]
            sum_RB = weight @ np.where(gate_N1, dice_NT[:, bottoms], empty_N[:, None]).astype(np.float32)
            place = sum_RB.argmax(axis=1)
            sum_R = np.take_along_axis(sum_RB, place[:, None], axis=1)[:, 0]
            better = np.flatnonzero(sum_R > best_R + 1e-3)  # what float32 knows of the sum of some thousand Dice
            best_R[better] = sum_R[better]
            triplet_R3[better, 0], triplet_R3[better, 1], triplet_R3[better, 2] = top, area, bottoms[place[better]]
    return triplet_R3


def _by_bin(maps: ScoreHistograms) -> _Tables:
    """(N, T) pixels that score at least each bin's lower end, (N, T) Dice of just those, (N,) Dice of no mask."""
    above = maps.all_NT[:, ::-1].cumsum(axis=1, dtype=np.int64)[:, ::-1]
    inside = maps.true_NT[:, ::-1].cumsum(axis=1, dtype=np.int64)[:, ::-1]
    total = above + inside[:, :1]
    dice_NT = np.where(total == 0, 1.0, 2 * inside / np.maximum(total, 1))
    return above, dice_NT, (inside[:, 0] == 0).astype(np.float64)


def _areas(pixels: int) -> tuple[int, ...]:
    side = round((pixels / 50) ** 0.5)
    return tuple(sorted({step * step for step in range(0, side + 1, max(1, side // 16))}))
