"""Two tests of maps that need the model again: other weights, and occluded boxes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from cxrscale.evaluation import Occlusion, Sanity, SanityStage, localization, map_checks
from cxrscale.evaluation.metrics import BootstrapWeights, Floats
from cxrscale.inference.boxed_rows import BoxedRows, Tell
from cxrscale.inference.explain import Explainer
from cxrscale.models import build_model
from cxrscale.shards import Manifest
from cxrscale.types import Batch

SANITY_IMAGES = 128
"""Images whose maps are compared, evenly spaced over those with boxes."""
_CONSTANT = "the maps of random weights are constant or not finite"


def sanity(
    explainer: Explainer,
    data: Manifest,
    boxed: BoxedRows,
    maps: Sequence[npt.NDArray[np.float32]],
    weights_RN: BootstrapWeights,
    tell: Tell,
) -> Sanity:
    """Compare maps with those of a model whose weights are drawn anew, part by part from the output to the input
    (Adebayo et al. 2018, arXiv 1810.03292, section 3).

    Args:
        maps: of the trained model, one per boxed finding.
        weights_RN: (R, N) bootstrap weights of the boxed findings.
    """
    rows = boxed.rows
    chosen = set(rows[:: -(-len(rows) // SANITY_IMAGES)])
    pairs = [n for n, row in enumerate(boxed.row_N.tolist()) if row in chosen]
    part = boxed.only(pairs)
    model = copy.deepcopy(explainer.model)
    fresh = _fresh(explainer).state_dict()
    own, learned = [maps[n] for n in pairs], {name for name, _ in model.named_parameters()}
    parts, stages, random = _parts(model), [], 0
    for name, keys in reversed(parts):
        state = model.state_dict()
        for key in keys:
            state[key].copy_(fresh[key])
        random += sum(state[key].numel() for key in keys if key in learned)
        other = maps_of(explainer, model, data, part, partial(_told, tell, f"random {name}", len(chosen)))
        signed = [map_checks.rank_correlation(a, b) for a, b in zip(own, other, strict=True)]
        absolute = [map_checks.rank_correlation(np.abs(a), np.abs(b)) for a, b in zip(own, other, strict=True)]
        stages.append(
            SanityStage(
                randomized=name,
                parameters=random,
                correlation=map_checks.mean_over_patients(signed, weights_RN[:, pairs], _CONSTANT),
                absolute=map_checks.mean_over_patients(absolute, weights_RN[:, pairs], _CONSTANT),
            )
        )
    return Sanity(images=len(chosen), maps=len(pairs), stages=tuple(stages))


def maps_of(
    explainer: Explainer, model: nn.Module, data: Manifest, boxed: BoxedRows, tell: Callable[[int], None] | None = None
) -> list[npt.NDArray[np.float32]]:
    """The maps of another model, one per boxed finding; NaN for what could not be read."""
    maker = explainer.maker(model)
    names = list(dict.fromkeys(one.finding for one in boxed.boxed))
    indices, by_row = [explainer.findings.index(name) for name in names], _pairs_of(boxed)
    maps = [np.full((1, 1), np.nan, np.float32)] * len(boxed.boxed)
    for batch in explainer.batches(data, boxed.rows):
        _, map_BFhw = maker(batch, indices)
        for index in np.flatnonzero(batch.valid_B.cpu().numpy()):
            for n in by_row[int(batch.row_B[index])]:
                maps[n] = localization.reduced(map_BFhw[index, names.index(boxed.boxed[n].finding)])
        if tell is not None:
            tell(int(batch.valid_B.sum()))
    return maps


def _told(tell: Tell, what: str, total: int, count: int) -> None:
    tell(what, count, total)


def _fresh(explainer: Explainer) -> nn.Module:
    """A model of the same recipe with weights as training begins with, without any pretraining."""
    recipe = explainer.recipe
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_model(recipe.model.without_weights(), recipe.data)


def _parts(model: nn.Module) -> list[tuple[str, list[str]]]:
    """(name, keys of the state) of the model's parts, from the input to the output: its children that have parameters;
    of a child that holds most of them, its own children."""
    sizes = {name: value.numel() for name, value in model.state_dict().items()}
    total, parts = sum(sizes.values()), dict[str, list[str]]()
    first = {name.partition(".")[0] for name in sizes}
    heavy = {
        child
        for child in first
        if sum(size for name, size in sizes.items() if name.partition(".")[0] == child) > total / 2
    }
    for name in sizes:
        words = name.split(".")
        parts.setdefault(".".join(words[: 2 if words[0] in heavy and len(words) > 2 else 1]), []).append(name)
    learned = {name for name, _ in model.named_parameters()}
    return [(name, keys) for name, keys in parts.items() if learned & set(keys)]


def occlusion(
    explainer: Explainer, data: Manifest, boxed: BoxedRows, weights_RN: BootstrapWeights, tell: Tell
) -> dict[str, Occlusion]:
    """By finding: how its probability falls when its boxes are occluded, and when as large areas elsewhere are."""
    by_row, rows = _pairs_of(boxed), boxed.rows
    fall_N2 = np.full((len(boxed.boxed), 2), np.nan)
    for batch in explainer.batches(data, rows):
        for index in np.flatnonzero(batch.valid_B.cpu().numpy()):
            for n in by_row.get(int(batch.row_B[index]), ()):
                fall_N2[n] = _falls(explainer, batch, int(index), boxed, n)
        tell("occluded", int(batch.valid_B.sum()), len(rows))
    result = {}
    present = {one.finding for one in boxed.boxed}
    for finding in (name for name in explainer.explained if name in present):
        pairs = [n for n, one in enumerate(boxed.boxed) if one.finding == finding]
        own_N2, weights = fall_N2[pairs], weights_RN[:, pairs]
        why = "no image has room for its boxes beside themselves"
        result[finding] = Occlusion(
            images=int(np.isfinite(own_N2).all(axis=1).sum()),
            left_out=int((~np.isfinite(own_N2).all(axis=1)).sum()),
            box=map_checks.mean_over_patients(own_N2[:, 0], weights, why),
            elsewhere=map_checks.mean_over_patients(own_N2[:, 1], weights, why),
            difference=map_checks.mean_over_patients(own_N2[:, 0] - own_N2[:, 1], weights, why),
        )
    return result


def _falls(explainer: Explainer, batch: Batch, index: int, boxed: BoxedRows, n: int) -> tuple[float, float]:
    """The fall of the finding's probability in (the boxes, other places); NaN without room for the latter."""
    one = boxed.boxed[n]
    places = map_checks.other_places(one.truth_K4, map_checks.PLACES, seed=int(boxed.row_N[n]))
    if not places:
        return float("nan"), float("nan")
    image_1HW = batch.image_BCHW[index]
    variants = [image_1HW, *(_occluded(image_1HW, box_K4) for box_K4 in (one.truth_K4, *places))]
    logit_VF = explainer.logits(torch.stack(variants))
    before, inside, *elsewhere = logit_VF[:, explainer.findings.index(one.finding)].double().sigmoid().tolist()
    return before - inside, before - float(np.mean(elsewhere))


def _occluded(image_1HW: torch.Tensor, box_K4: Floats) -> torch.Tensor:
    """The image with the mean of all its pixels in the boxes."""
    occluded_1HW = image_1HW.clone()
    height, width = image_1HW.shape[1:]
    for left, top, right, bottom in box_K4:
        x, columns = _extent(left, right, width)
        y, rows = _extent(top, bottom, height)
        occluded_1HW[:, y : y + rows, x : x + columns] = image_1HW.mean()
    return occluded_1HW


def _extent(low: float, high: float, size: int) -> tuple[int, int]:
    """(first pixel, pixels) of a share of a side: as many wherever it lies."""
    return min(int(low * size), size - 1), max(1, round((high - low) * size))


def _pairs_of(boxed: BoxedRows) -> dict[int, list[int]]:
    """Row of the manifest -> its boxed findings."""
    pairs: dict[int, list[int]] = {}
    for n, row in enumerate(boxed.row_N.tolist()):
        pairs.setdefault(row, []).append(n)
    return pairs
