"""Several runs, gates and quantized forms on the same images, side by side."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cxrscale.evaluation import (
    Outcome,
    Variant,
    VariantImage,
    Variants,
    VariantScores,
    artifacts,
    calls,
    cascade,
    comparison,
    metrics,
    variants,
)
from cxrscale.evaluation.metrics import Estimate
from cxrscale.io import Strictness, load_image, rle_masks, storage, write_artifact
from cxrscale.run.cascades import Pair
from cxrscale.run.trained_run import RESAMPLES, Progress, Run
from cxrscale.types import GrayImage, Scores, UnreadableImageError, UserError, probabilities_of

if TYPE_CHECKING:
    from cxrscale.inference import ImagePredictor, Prediction
    from cxrscale.reporting import Thumbnail

SIDE = 256
"""Of an image on the page, in pixels."""
TIMED = 16
"""Images of a split that the variants are timed on where no files are given."""


def plan_variants(runs: Sequence[str], gates: Sequence[str] = (), quantized: Sequence[str] = ()) -> tuple[Variant, ...]:
    """Each run behind each gate (or alone), in float, and again with each kind of quantized form that fits.

    Args:
        quantized: exports of these runs and gates: of each kind (int8-static, ...) those at hand take the place of the
            run that they were made of.

    Raises:
        UserError: a folder is no export, or was made of other weights than those of these runs and gates.
    """
    from cxrscale.inference import read_exported
    from cxrscale.training import run_files

    digest_of = {one: storage.digest(storage.read(run_files.weights_file(one))) for one in (*runs, *gates)}
    kinds: dict[str, dict[str, str]] = {"": {}}
    for folder in quantized:
        info = read_exported(folder)
        if info is None:
            raise UserError(f"--quantized {folder} is no export; make it with `cxrscale export RUN --quantize ...`")
        of = [one for one, digest in digest_of.items() if digest == info.checkpoint]
        if not of:
            raise UserError(f"--quantized {folder} was made of {info.run}, which is none of the runs and gates given")
        kind = info.quantization if info.quantization != "none" else f"{info.format} float"
        kinds.setdefault(kind, {}).update(dict.fromkeys(of, folder))
    found = []
    for run, gate, (kind, replaced) in itertools.product(runs, gates or [""], kinds.items()):
        if kind and run not in replaced and gate not in replaced:
            continue
        behind = f" behind {Run(gate).name}" if gate else ""
        parts = [] if not kind else [one for one in (run, gate) if one in replaced]
        partly = "" if not kind or len(parts) == (2 if gate else 1) else f" {'masks' if run in parts else 'gate'}"
        name = f"{Run(run).name}{behind}{f', {kind}{partly}' if kind else ''}"
        found.append(Variant(name=name, run=replaced.get(run, run), gate=replaced.get(gate, gate)))
    return tuple(found)


def compare_variants(
    chosen: Sequence[Variant],
    paths: Sequence[str],
    out: str,
    split: str | None = None,
    progress: Progress | None = None,
    on_step: Callable[[str], None] | None = None,
) -> Variants:
    """Predict images by every variant; writes a page and, beside it, the same as JSON.

    Args:
        chosen: the first is what the others are compared with.
        paths: DICOM, PNG or JPEG files; each is decoded once.
        out: path or address of the page, with or without .html.
        split: val or test: also a table over that split of the runs' datasets.
        progress: called with the number of images that were done since the last call.
        on_step: called with what is done next.

    Raises:
        UserError: there are fewer than two variants, a run cannot be loaded, a gate has no threshold, or the runs do
            not have the same images.
    """
    from cxrscale.reporting import variants_page

    if len(chosen) < 2:
        raise UserError("one variant has nothing beside it; give --run or --gate again, or --quantized EXPORT")
    say, count = on_step or (lambda _: None), progress or (lambda _: None)
    say("loading")
    predictors = _load(chosen)
    images, shown, seconds = _files(predictors, paths, count)
    scores: tuple[VariantScores, ...] = ()
    number = 0
    if split is not None:
        say(f"scoring {split}")
        scores, number = _split(chosen, split, count)
        if not seconds:
            seconds = _time_split(chosen[0], predictors, split)
    seconds_IV = np.array(seconds, dtype=np.float64).reshape(-1, len(chosen))
    rows = tuple(variants.row_of(index, images, seconds_IV, _weights_bytes(one)) for index, one in enumerate(chosen))
    result = Variants(
        variants=tuple(chosen),
        images=images,
        rows=rows,
        split=split or "",
        split_images=number,
        scores=scores,
    )
    stem = out.removesuffix(".html").removesuffix(".json")
    write_artifact(f"{stem}.json", result)
    storage.write(f"{stem}.html", variants_page.render(result, shown))
    return result


def _load(chosen: Sequence[Variant]) -> list[ImagePredictor]:
    from cxrscale.inference import PredictorSpec

    return [PredictorSpec((one.run,), one.gate or None).load() for one in chosen]


def _files(
    predictors: Sequence[ImagePredictor], paths: Sequence[str], progress: Progress
) -> tuple[tuple[VariantImage, ...], list[list[Thumbnail]], list[list[float]]]:
    """What the variants say of the files, their pictures, and the seconds that each took."""
    images: list[VariantImage] = []
    shown: list[list[Thumbnail]] = []
    seconds: list[list[float]] = []
    for path in paths:
        try:
            image_HW = load_image(storage.read(path), name=path, strictness=Strictness.LENIENT).image_HW
        except (UnreadableImageError, UserError) as error:
            images.append(VariantImage(path=path, error=str(error)))
            shown.append([])
            progress(1)
            continue
        predictions, took = _in_turns(predictors, image_HW, warm=bool(seconds))
        seconds.append(took)
        masks = [_mask(one, image_HW.shape) for one in predictions]
        images.append(_outcomes(path, predictions, masks))
        shown.append([_picture(image_HW, mask_HW) for mask_HW in masks])
        progress(1)
    return tuple(images), shown, seconds


def _in_turns(
    predictors: Sequence[ImagePredictor], image_HW: GrayImage, *, warm: bool
) -> tuple[list[Prediction], list[float]]:
    predictions, took = [], []
    for predictor in predictors:
        if not warm:
            predictor(image_HW)
        began = time.perf_counter()
        predictions.append(predictor(image_HW))
        took.append(time.perf_counter() - began)
    return predictions, took


def _mask(prediction: Prediction, shape: tuple[int, ...]) -> npt.NDArray[np.bool_] | None:
    if prediction.mask_rle is None:
        return None
    return rle_masks.union((prediction.mask_rle,), (shape[0], shape[1]))


def _outcomes(
    path: str, predictions: Sequence[Prediction], masks: Sequence[npt.NDArray[np.bool_] | None]
) -> VariantImage:
    first_HW, outcomes = masks[0], []
    for one, mask_HW in zip(predictions, masks, strict=True):
        both = first_HW is not None and mask_HW is not None
        outcomes.append(
            Outcome(
                gate=next(iter(one.gate.values()), None),
                probabilities=dict(one.probabilities),
                calls=dict(one.calls),
                mask_area=one.mask_area,
                mask_dice=variants.mask_dice(first_HW, mask_HW) if both else None,  # type: ignore[arg-type]
            )
        )
    return VariantImage(path=path, outcomes=tuple(outcomes))


def _picture(image_HW: GrayImage, mask_HW: npt.NDArray[np.bool_] | None) -> Thumbnail:
    from cxrscale.io import resize_mask
    from cxrscale.reporting import thumbnail

    return thumbnail(image_HW, SIDE, {} if mask_HW is None else {"mask": resize_mask(mask_HW, SIDE)})


def _weights_bytes(variant: Variant) -> int:
    from cxrscale.training import run_files

    files = {run_files.weights_file(one) for one in (variant.run, variant.gate) if one}
    return sum(len(storage.read(path)) for path in files)


# Over a split


def _split(chosen: Sequence[Variant], split: str, progress: Progress) -> tuple[tuple[VariantScores, ...], int]:
    """Each variant's metrics, and its calls against those of the first."""
    first: tuple[Scores, npt.NDArray[np.float64]] | None = None
    result = []
    for variant in chosen:
        scores, called_NF, found = _variant_scores(variant, split, progress)
        first = first or (scores, called_NF)
        row_N = comparison.rows_in_b(first[0], scores, (chosen[0].name, variant.name))
        mine_NF = called_NF[row_N]
        shared = mine_NF.shape == first[1].shape
        same = float((mine_NF == first[1]).all(axis=1).mean()) if shared else float("nan")
        result.append(VariantScores(metrics=found, same_calls=same))
    assert first is not None
    return tuple(result), len(first[0].image_id)


def _variant_scores(
    variant: Variant, split: str, progress: Progress
) -> tuple[Scores, npt.NDArray[np.float64], dict[str, Estimate]]:
    """(scores, (N, F) calls or (N, 1) whether there is a mask, metrics); a finding without a call is -1."""
    run = Run(variant.run)
    if variant.gate:
        pair = Pair(run, variant.gate)
        scores, gate_N, maps = pair.split(split, progress)
        threshold, rule = pair.decision()
        passed_N = gate_N >= threshold
    else:
        scores = run.predictions(split, progress)
        metrics.require(scores, run.path)
        if scores.maps is None:
            return _classifier_scores(run, scores)
        maps, rule = scores.maps, Pair.rule_of(run)
        passed_N = np.ones(len(scores.image_id), dtype=np.bool_)
    weights_RN = metrics.bootstrap_weights(scores.patient, RESAMPLES, seed=0)
    found = cascade.evaluate_cascade(maps, rule, rule, passed_N, weights_RN)
    masked_N = passed_N & cascade.has_predicted_mask(maps, rule)
    values = {"passed on": found.passed, **dict(found.cascade)} if variant.gate else dict(found.cascade)
    return scores, masked_N[:, None].astype(np.float64), values


def _classifier_scores(run: Run, scores: Scores) -> tuple[Scores, npt.NDArray[np.float64], dict[str, Estimate]]:
    weights_RN = metrics.bootstrap_weights(scores.patient, RESAMPLES, seed=0)
    columns = range(len(scores.findings))
    auroc_FR = [metrics.bootstrap_auroc(scores.logit_NF[:, f], scores.label_NF[:, f], weights_RN) for f in columns]
    values = [metrics.auroc(scores.logit_NF[:, f], scores.label_NF[:, f]).value for f in columns]
    if storage.exists(run.artifact(artifacts.THRESHOLDS)):
        called_NF = calls.call_split(scores.logit_NF, scores.findings, run.thresholds()).called_NF
    else:
        called_NF = (probabilities_of(scores.logit_NF) >= 0.5).astype(np.float64)
    return scores, np.nan_to_num(called_NF, nan=-1.0), {"AUROC": metrics.macro(values, np.stack(auroc_FR))}


def _time_split(variant: Variant, predictors: Sequence[ImagePredictor], split: str) -> list[list[float]]:
    """The seconds of the variants on images of the split."""
    from cxrscale.loader import ShardReader, usable_rows
    from cxrscale.shards import manifest

    recipe = Run(variant.run).recipe
    data = manifest.load(*recipe.data.shards)
    roles = {"train": recipe.data.train_split, "val": recipe.data.val_split, "test": recipe.data.test_split}
    rows = usable_rows(data, roles.get(split, (split,)), recipe.data)
    chosen = rows[np.linspace(0, len(rows) - 1, min(TIMED, len(rows))).astype(int)]
    encoded, seconds = ShardReader(data).read(chosen, masks=False), list[list[float]]()
    for index in np.flatnonzero(encoded.valid_B):
        image_HW = load_image(encoded.images[index].tobytes()).image_HW
        seconds.append(_in_turns(predictors, image_HW, warm=bool(seconds))[1])
    return seconds
