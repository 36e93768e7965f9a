"""What is tried and counted before a worker starts or a file is written: in this process, in seconds.

The tables of jobs/README.md ('Before it starts') say what is refused, and what is warned of in numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from cxrscale.config import ABSENT, METRICS, PRESENT, Recipe, unused_settings
from cxrscale.loader import expected_prevalence, open_training_stream, sampler, usable_rows
from cxrscale.models import build_model, forward, losses, train_mode
from cxrscale.shards import Manifest
from cxrscale.training import scoring
from cxrscale.types import Batch, UserError, one_line

LOG = logging.getLogger("cxrscale")
TWICE = 1.5
"""Odds that sampling and loss weights each change at least by this factor, and that both together overshoot by it."""
NAMES_SHOWN = 4


def check(recipe: Recipe, data: Manifest, workers: int) -> list[str]:
    """Refuse what cannot be trained; returns what is odd about the rest, a sentence each.

    Args:
        workers: the most workers that will train.

    Raises:
        UserError: what cannot be trained.
    """
    refuse(recipe, data, workers)
    return warnings(recipe, data)


def refuse(recipe: Recipe, data: Manifest, workers: int, tried: set[str] | None = None) -> None:
    """The part of `check` that refuses.

    Args:
        workers: the most workers that will train.
        tried: steps that have been tried, which are not tried again; this one is added.

    Raises:
        UserError: what cannot be trained.
    """
    check_batch(recipe, workers)
    check_training_labels(recipe, data)
    check_monitor(recipe, data)
    shape = (recipe.model, recipe.data.task, recipe.augment.size, smallest_microbatch(recipe, workers))
    if tried is None or repr(shape) not in tried:
        try_step(recipe, workers)
    if tried is not None:
        tried.add(repr(shape))


def check_batch(recipe: Recipe, workers: int) -> None:
    """Every worker needs an image of every batch.

    Raises:
        UserError: there are fewer.
    """
    if recipe.sampler.batch_size < workers:
        raise UserError(
            f"sampler.batch_size={recipe.sampler.batch_size} is less than {workers} workers; raise it, or lower "
            "scaling.num_workers"
        )


def smallest_microbatch(recipe: Recipe, workers: int) -> int:
    """Images in the smallest forward pass of a worker."""
    rows = -(-recipe.sampler.batch_size // workers)
    return rows // min(recipe.optim.grad_accum_steps, rows)


def try_step(recipe: Recipe, workers: int) -> None:
    """A forward and backward pass in training mode at the smallest batch that a worker will see.

    It runs on the meta device: shapes without values, so that it takes neither memory nor much time.

    Raises:
        UserError: the model cannot take such a batch, or several workers cannot train it.
    """
    rows, size = smallest_microbatch(recipe, workers), recipe.augment.size
    model = _meta_model(recipe)
    if model is None:
        return
    try:
        _meta_step(model, recipe, rows)
    except NotImplementedError:  # an operation that the meta device lacks: nothing is known
        return
    # Whatever a model raises at a shape that it does not take.
    except (ValueError, RuntimeError, AssertionError, ArithmeticError, AttributeError, LookupError, TypeError) as error:
        reason = one_line(error, limit=200)
        if "meta" in reason:
            return
        if "more than 1 value per channel" in reason:
            shared = f" ({workers} workers and optim.grad_accum_steps={recipe.optim.grad_accum_steps} share it)"
            remedy = f"raise sampler.batch_size={recipe.sampler.batch_size}{shared}, or augment.size"
            reason = "batch normalization needs more than one value per channel"
        else:
            remedy = "set another augment.size, or another model"
        raise UserError(
            f"model.arch={recipe.model.arch} cannot train on {_images(rows)} of {size} x {size} pixels per forward pass"
            f": {reason}; {remedy}"
        ) from None
    without = [name for name, parameter in model.named_parameters() if parameter.requires_grad and not _used(parameter)]
    if without and workers > 1:
        prefixes = _common_prefixes(without, [name for name, _ in model.named_parameters()])
        shown = ", ".join(without[:NAMES_SHOWN]) + (", ..." if len(without) > NAMES_SHOWN else "")
        raise UserError(
            f"model.arch={recipe.model.arch}: {len(without)} parameters get no gradient, which several workers cannot "
            f"train ({shown}); set model.freeze_prefixes=[{', '.join(prefixes)}] or scaling.num_workers=1"
        )


def _images(count: int) -> str:
    return f"{count} image{'s' * (count != 1)}"


def _meta_model(recipe: Recipe) -> nn.Module | None:
    """The model without memory; None where its constructor needs values."""
    try:
        with torch.device("meta"):
            return build_model(recipe.model.without_weights(), recipe.data)
    except UserError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        if "meta" in str(error):
            return None
        raise


def _meta_step(model: nn.Module, recipe: Recipe, rows: int) -> None:
    device, size, findings = torch.device("meta"), recipe.augment.size, len(recipe.data.findings)
    with device:
        batch = Batch(
            image_BCHW=torch.zeros(rows, 1, size, size),
            label_BF=torch.zeros(rows, findings),
            mask_B1HW=torch.zeros(rows, 1, size, size) if recipe.data.task == "segment" else None,
            row_B=torch.zeros(rows, dtype=torch.int64),
            valid_B=torch.ones(rows, dtype=torch.bool),
        )
    train_mode(model)
    logits = forward(model, batch, recipe.train.model_copy(update={"precision": "fp32"}), device)
    target = batch.label_BF if batch.mask_B1HW is None else batch.mask_B1HW
    if logits.shape != target.shape:
        raise ValueError(f"its output is {tuple(logits.shape)}, not {tuple(target.shape)}")
    weights = losses.class_weights(recipe.loss, np.zeros((1, findings), np.float32), device)
    torch.autograd.backward(losses.terms(logits, batch, recipe.loss, weights).sum())


def _used(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None


def _common_prefixes(unused: Sequence[str], names: Sequence[str]) -> list[str]:
    """The shortest module names that cover all unused parameters and no other one."""
    others = set(names) - set(unused)
    prefixes: list[str] = []
    for name in unused:
        parts = name.split(".")
        candidates = [".".join(parts[:count]) + "." for count in range(1, len(parts))] + [name]
        prefix = next(one for one in candidates if not any(other.startswith(one) for other in others))
        if prefix.rstrip(".") not in prefixes:
            prefixes.append(prefix.rstrip("."))
    return prefixes


def check_training_labels(recipe: Recipe, data: Manifest) -> None:
    """What loss and sampling need of each finding.

    Raises:
        UserError: a finding is not labeled in the training split, or class balance leaves its loss without effect.
    """
    if recipe.data.task == "segment":
        return
    rows = usable_rows(data, recipe.data.train_split, recipe.data)
    present_F, absent_F = _label_counts(data, rows, recipe)
    split = ", ".join(recipe.data.train_split)
    unlabeled = [name for name, n in zip(recipe.data.findings, present_F + absent_F, strict=True) if not n]
    if unlabeled:
        raise UserError(
            f"data.findings: none of the {len(rows)} images of split {split} is labeled for {', '.join(unlabeled)}; "
            "leave it out, or check data.train_split"
        )
    loss = recipe.loss
    others = [name for name in losses.active(loss) if name != "bce"]
    one_sided = _one_sided(recipe.data.findings, present_F, absent_F)
    if loss.class_balance and one_sided and not others:
        raise UserError(
            f"loss.class_balance: {one_sided[0]} labeled images of split {split}, so that its weights are 0 and 1 and "
            "nothing is learned; set loss.class_balance=false, or leave the finding out"
        )


def _label_counts(
    data: Manifest, rows: npt.NDArray[np.int64], recipe: Recipe
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(F,) images with each finding present, and absent."""
    label_NF = data.labels(recipe.data.findings)[rows]
    return (label_NF == PRESENT).sum(axis=0), (label_NF == ABSENT).sum(axis=0)


def check_monitor(recipe: Recipe, data: Manifest) -> None:
    """`train.monitor` against what validation will report, with the labels at hand.

    Raises:
        UserError: it is undefined there.
    """
    monitor, rows = recipe.train.monitor, usable_rows(data, recipe.data.val_split, recipe.data)
    split = ", ".join(recipe.data.val_split)
    if monitor in ("dice", "iou") or (recipe.data.task == "segment" and monitor == "loss"):
        return
    if monitor == "dice_positives":
        if not (np.nan_to_num(data.column("mask_pixels")[rows]) > 0).any():
            raise UserError(
                f"train.monitor=dice_positives: no image of split {split} has a mask; set train.monitor=dice"
            )
        return
    label_NF = data.labels(recipe.data.findings)[rows]
    if monitor == "loss":
        if np.isnan(label_NF).all():
            raise UserError(
                f"train.monitor=loss: none of the {len(rows)} images of split {split} is labeled for "
                f"{', '.join(recipe.data.findings)}; check data.val_split"
            )
        return
    defined = _defined_metrics(label_NF, recipe.data.findings)
    if monitor not in defined:
        present_F, absent_F = _label_counts(data, rows, recipe)
        counts = ", ".join(
            f"{name} is present in {present} and absent in {absent} of {len(rows)}"
            for name, present, absent in zip(recipe.data.findings, present_F, absent_F, strict=True)
            if "." not in monitor or monitor.endswith(f".{name}")
        )
        remedy = f"; set train.monitor={' or '.join(defined[:3])}" if defined else ""
        raise UserError(f"train.monitor={monitor} is undefined on split {split}: {one_line(counts, limit=200)}{remedy}")


def _defined_metrics(label_NF: npt.NDArray[np.float32], findings: Sequence[str]) -> list[str]:
    """The metrics that validation can report whatever the scores: those of perfect ones."""
    logit_NF = np.where(label_NF == PRESENT, 1, -1).astype(np.float32)
    rows = scoring.ScoredRows(np.arange(len(label_NF)), logit_NF, None, 0.0, 0)
    values = scoring.summary(rows, label_NF, findings)
    return [name for name, value in values.items() if np.isfinite(value) and name.partition(".")[0] in METRICS]


def warnings(recipe: Recipe, data: Manifest) -> list[str]:
    """What can be trained and is hardly meant, a sentence each."""
    found = [f"{name} changes nothing: it needs {needs}" for name, needs in unused_settings(recipe).items()]
    stream = open_training_stream(data, recipe)
    steps = sampler.steps_per_epoch(stream.epoch_length, recipe.sampler) * recipe.train.epochs
    optim = recipe.optim
    if optim.warmup_steps >= steps:
        reached = optim.lr * steps / optim.warmup_steps
        found.append(
            f"optim.warmup_steps={optim.warmup_steps} is no less than the run's {steps} steps: the learning rate ends "
            f"at {reached:.2g} instead of {optim.lr:g}"
        )
    if optim.ema_decay and (left := optim.ema_decay**steps) > 0.5:
        found.append(
            f"optim.ema_decay={optim.ema_decay:g}: after the run's {steps} steps, {left:.0%} of the average are still "
            "the initial weights; lower it"
        )
    if optim.name == "adamw" and optim.lr * optim.weight_decay >= 1:
        found.append(
            f"optim.lr times optim.weight_decay is {optim.lr * optim.weight_decay:g}: AdamW takes that share off the "
            "weights in every step; lower one of them"
        )
    if recipe.data.task == "classify":
        rows = usable_rows(data, recipe.data.train_split, recipe.data)
        one_sided = _one_sided(recipe.data.findings, *_label_counts(data, rows, recipe))
        found += [f"{sentence} labeled training images: nothing tells them apart" for sentence in one_sided]
        found += _corrected_twice(recipe, data)
    return found


def _one_sided(findings: Sequence[str], present_F: npt.NDArray[np.int64], absent_F: npt.NDArray[np.int64]) -> list[str]:
    """The beginning of a sentence on each finding that all labeled images have, or none."""
    return [
        f"{name} is {'present' if present else 'absent'} in all {present + absent}"
        for name, present, absent in zip(findings, present_F, absent_F, strict=True)
        if not (present and absent)
    ]


def _corrected_twice(recipe: Recipe, data: Manifest) -> list[str]:
    """Sampling and loss weights that correct the same imbalance.

    The loss w+ y log p + w- (1 - y) log(1 - p) of a constant p over images of which a share s has the finding is lowest
    at p = s w+ / (s w+ + (1 - s) w-): the prediction of a model that has learned nothing yet.
    """
    if recipe.sampler.sampling == "all" or not recipe.loss.bce:
        return []
    rows = usable_rows(data, recipe.data.train_split, recipe.data)
    label_NF = data.labels(recipe.data.findings)[rows]
    weights = losses.class_weights(recipe.loss, label_NF, torch.device("cpu"))
    share_F = expected_prevalence(data, recipe)
    found = []
    for f, finding in enumerate(recipe.data.findings):
        labeled = ~np.isnan(label_NF[:, f])
        prevalence, share = float((label_NF[labeled, f] == PRESENT).mean()), float(share_F[f])
        positive, negative = float(weights.positive_F[f]), float(weights.negative_F[f])
        if not (0 < prevalence < 1 and 0 < share < 1 and positive > 0 < negative):
            continue
        sampled, weighted = _odds(share) / _odds(prevalence), positive / negative
        constant = share * positive / (share * positive + (1 - share) * negative)
        if min(sampled, weighted) > TWICE and _odds(constant) > TWICE:
            found.append(
                f"sampler.sampling={recipe.sampler.sampling} and the weights of the loss correct twice: {finding} is "
                f"in {prevalence:.3f} of the training images and in {share:.3f} of those sampled, times {positive:.3g} "
                f"against {negative:.3g}; the best constant prediction becomes {constant:.3f}. Drop one of them"
            )
    if len(found) > 1:
        found[1:] = [f"so do {len(found) - 1} more findings"]
    return found


def _odds(share: float) -> float:
    return share / (1 - share)
