"""A run's model in another form, refused where it is not the same model any more."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from cxrscale.evaluation import Thresholds
from cxrscale.inference.export import contract, latency, quantize, to_onnx
from cxrscale.inference.export.contract import Candidate, Difference, FormRow
from cxrscale.inference.export.judging import CALIBRATION, SAMPLE, Judge, sample
from cxrscale.inference.export.parity import Gate
from cxrscale.inference.export.runtime import exported_module
from cxrscale.inference.trained import TrainedModel
from cxrscale.io import scratch, storage
from cxrscale.shards import Manifest
from cxrscale.types import UserError

SEARCH_SAMPLE = 128
"""Validation images that ways to quantize are compared on; the chosen one is judged on all of the sample."""
KEPT = (0, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Shares of the nodes with weights, those that lose most first, that are kept in float until the gate is passed."""
OnStep = Callable[[str], None]
"""Called with what is done next."""


@dataclass(frozen=True, slots=True)
class Form:
    """What is wanted."""

    format: contract.Format = "onnx"
    quantization: contract.Quantization = "none"

    @property
    def name(self) -> str:
        """As a row of the table is called."""
        return self.format if self.quantization == "none" else self.quantization


@dataclass(frozen=True, slots=True)
class Made:
    """A model in another form."""

    content: bytes
    """Of its file."""
    float_content: bytes
    """Of the float form that it was made of; the same for a float form."""
    parity: Difference
    tried: tuple[Candidate, ...] = ()
    float_nodes: tuple[str, ...] = ()


def make_form(
    trained: TrainedModel, data: Manifest, form: Form, chosen: Thresholds | None, gate: Gate, on_step: OnStep
) -> Made:
    """The model in that form.

    Args:
        trained: the run's model, on the CPU.
        data: the run's datasets.
        chosen: the run's thresholds, where it has some.
        gate: what the form may change.

    Raises:
        UserError: it cannot be exported, or is not the same model any more.
    """
    # Of an ensemble whose members see an image at several sizes.
    if getattr(trained, "also", ()):
        raise UserError("the ensemble's members see an image differently; export each of them")
    splits, size = trained.recipe.data, trained.recipe.augment.size
    on_step(f"scoring up to {SAMPLE} validation images")
    judge = Judge(trained, sample(trained, data, splits.val_split, SAMPLE), chosen)
    on_step(f"exporting to {form.format}")
    export = to_onnx.to_onnx if form.format == "onnx" else to_onnx.to_program
    content = export(trained.model, size)
    exact = _hold_equal(judge, content, form.format, gate.exact)
    if form.quantization == "none":
        return Made(content, content, exact)
    if form.quantization == "int8-static":
        images = sample(trained, data, splits.train_split, CALIBRATION)
        return _static(judge, content, images, gate, on_step)
    on_step(f"quantizing ({form.quantization})")
    quantized = quantize.dynamic(content) if form.quantization == "int8-dynamic" else quantize.half(content)
    return Made(quantized, content, _pass(judge, quantized, gate, form.quantization))


def time_forms(trained: TrainedModel, form: Form, made: Made) -> tuple[FormRow, ...]:
    """The table of the forms, timed in turns: torch, the float form, and what was made of it."""
    files = {form.format: made.float_content, form.name: made.content}
    models: dict[str, nn.Module] = {"torch": trained.model.to(memory_format=torch.channels_last)}
    models |= {name: _load(content, form.format) for name, content in files.items()}
    times = latency.measure(models, trained.recipe.augment.size)
    weights = sum(value.numel() * value.element_size() for value in trained.model.state_dict().values())
    return tuple(
        FormRow(
            form=name,
            bytes=weights if name == "torch" else len(files[name]),
            milliseconds={batch: one.milliseconds for batch, one in found.items()},
            times_torch={batch: one.times_first for batch, one in found.items()},
            difference=made.parity if name == form.name else None,
        )
        for name, found in times.items()
    )


def export_info(
    run: str, trained: TrainedModel, form: Form, made: Made, table: tuple[FormRow, ...]
) -> contract.ExportInfo:
    """export.json of a form, before its thresholds are known.

    Args:
        run: absolute path or address of the run.
    """
    recipe = trained.recipe
    return contract.ExportInfo(
        format=form.format,
        quantization=form.quantization,
        run=run,
        checkpoint=trained.checkpoint,
        manifest=trained.manifest,
        model=storage.digest(made.content),
        task=recipe.data.task,
        input=contract.input_contract(recipe.augment, trained.pixels),
        findings=contract.finding_contracts(recipe.data.findings, None),
        parity=made.parity,
        tried=made.tried,
        float_nodes=made.float_nodes,
        table=table,
        threads=torch.get_num_threads(),
        notes=slower(table),
    )


def slower(table: tuple[FormRow, ...]) -> tuple[str, ...]:
    """Sentences on where the last form of a table takes longer than the others."""
    last = table[-1]
    return tuple(
        f"{last.form} is slower than {row.form} at batch {batch} on this CPU: {last.milliseconds[batch]:.1f} against "
        f"{row.milliseconds[batch]:.1f} ms per image"
        for row in table[:-1]
        for batch in last.milliseconds
        if last.times_torch[batch] < row.times_torch[batch]
    )


def _hold_equal(judge: Judge, content: bytes, form: contract.Format, limit: float) -> Difference:
    """Refuse a float form that is another model."""
    model = _load(content, form)
    for found in (judge.check_batches(model), judge.difference(model)):
        # A NaN passes no comparison.
        if not found.maximum <= limit:
            raise UserError(
                f"the {form} form differs from the run's own model by {found.maximum:.3g} in probability on "
                f"{found.images} validation images, more than --max-float {limit:g}; nothing was written (in float32 "
                f"the run's own model is off by {judge.rounding():.3g} itself)"
            )
    return found


def _pass(judge: Judge, content: bytes, gate: Gate, name: str) -> Difference:
    """Refuse a quantized form that the gate refuses."""
    model = _load(content, "onnx")
    judge.check_batches(model)
    found = judge.difference(model)
    if refusal := gate.refusal(found):
        raise UserError(f"{name}: {refusal}; nothing was written")
    return found


def _static(judge: Judge, content: bytes, images: list[torch.Tensor], gate: Gate, on_step: OnStep) -> Made:
    """Static quantization: the way to calibrate, and the nodes that stay in float, by what they do on validation."""
    singles = [image[None].numpy() for batch in images for image in batch]
    tried: list[Candidate] = []
    with _folder() as folder:
        quantizer = quantize.StaticQuantizer(content, singles, folder)
        found: dict[quantize.Method, bytes] = {}
        for method in quantize.METHODS:
            on_step(f"quantizing, {method} of {len(singles)} training images")
            found[method] = quantizer.quantized(method)
            tried.append(_candidate(judge, found[method], method, 0, 0))
        best = min(tried, key=lambda one: one.difference.mean).method
        method = next(one for one in quantize.METHODS if one == best)
        order = quantizer.nodes_by_loss(method)
        tried = [one.model_copy(update={"nodes": len(order)}) for one in tried]
        result, kept = found[method], 0
        passed = not gate.refusal(next(one for one in tried if one.method == best).difference)
        for share in KEPT[1:]:
            if passed:
                break
            kept = max(1, round(share * len(order)))
            on_step(f"quantizing, {kept} of {len(order)} nodes in float")
            result = quantizer.quantized(method, order[:kept])
            tried.append(_candidate(judge, result, method, kept, len(order)))
            passed = not gate.refusal(tried[-1].difference)
        difference = _pass(judge, result, gate, f"int8-static, {method}, {kept} of {len(order)} nodes in float")
        return Made(result, content, difference, tuple(tried), tuple(order[:kept]))


def _candidate(judge: Judge, content: bytes, method: str, kept: int, nodes: int) -> Candidate:
    found = judge.difference(_load(content, "onnx"), SEARCH_SAMPLE)
    return Candidate(method=method, float_nodes=kept, nodes=nodes, difference=found)


def _load(content: bytes, form: contract.Format) -> nn.Module:
    return exported_module(content, contract.FILES[form], torch.device("cpu"))


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=scratch.shared()) as name:
        yield Path(name)
