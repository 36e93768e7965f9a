"""Commands for other forms of a model: export, variants."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from cxrscale.cli import progress
from cxrscale.cli.group import RunFolder, app
from cxrscale.io import storage, terminal
from cxrscale.types import UnreadInputsError, UserError

# Each command imports what it runs: torch, Ray and DALI take seconds that `--help` and a typing mistake need not.


@app.command("export")
def export_command(
    run: RunFolder,
    out: Annotated[str, typer.Option(help="A new folder for the export; it is a run itself, for --run.")],
    kind: Annotated[
        str, typer.Option("--format", help="onnx, which ONNX Runtime runs anywhere, or torch-export.")
    ] = "onnx",
    quantize: Annotated[
        str, typer.Option(help="none, int8-dynamic, int8-static (calibrated on training images) or fp16.")
    ] = "none",
    max_float: Annotated[
        float, typer.Option(help="Float: the largest difference of any probability; deep UNets round more.", min=0)
    ] = 1e-5,
    max_flipped: Annotated[
        float, typer.Option(help="Quantized: the largest share of calls that may differ.", min=0, max=1)
    ] = 0.02,
    max_mean: Annotated[
        float, typer.Option(help="Quantized: the largest mean difference of probabilities.", min=0, max=1)
    ] = 0.01,
    max_difference: Annotated[
        float, typer.Option(help="Quantized: the largest difference of any probability.", min=0, max=1)
    ] = 0.25,
) -> None:
    """A run as a file for other programs: export RUN --out exports/NAME. An ONNX file has a predict.py without torch.

    The exported model is held against the run's own on 256 validation images: float probabilities have to be equal to
    --max-float, quantized ones within the three limits; else nothing is written. AUROC is no limit, since it can rise
    where half of the calls are wrong. Thresholds come along; those of a quantized model are fitted anew on validation.
    The table has size, time per image in turns, differences, and for a quantized model AUROC or Dice with interval.
    """
    from cxrscale.inference import FORMATS, QUANTIZATIONS, Form, Gate
    from cxrscale.reporting import tables
    from cxrscale.run import export, open_run

    if kind not in FORMATS:
        raise UserError(f"--format {kind}: give one of {', '.join(FORMATS)}")
    if quantize not in QUANTIZATIONS:
        raise UserError(f"--quantize {quantize}: give one of {', '.join(QUANTIZATIONS)}")
    form = Form(next(one for one in FORMATS if one == kind), next(one for one in QUANTIZATIONS if one == quantize))
    gate = Gate(exact=max_float, maximum=max_difference, mean=max_mean, flipped=max_flipped)
    with progress.bar("exporting", None, "images") as bar:
        info = export(
            open_run(run),
            out,
            form,
            gate,
            lambda stage: bar.update(bar.done, stage),
            lambda count: bar.update(bar.done + count, "scoring validation"),
        )
    tables.print_export(info)
    for note in info.notes:
        print(terminal.printable(note))
    print(storage.absolute(out))


@app.command("variants")
def variants_command(
    run: Annotated[list[str], typer.Option(help="A run; give the option several times for several.")],
    inputs: Annotated[
        list[str] | None,
        typer.Argument(metavar="INPUT", help="Files, folders, patterns or lists, as `cxrscale predict` takes them."),
    ] = None,
    gate: Annotated[
        list[str] | None, typer.Option(help="A classifier before the segmenters --run; several times for several.")
    ] = None,
    quantized: Annotated[
        list[str] | None, typer.Option(help="An export of one of these runs or gates; several times for several.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="val or test: also a table over that split.")] = None,
    out: Annotated[str, typer.Option(help="The page; the same as JSON stands beside it.")] = "variants.html",
) -> None:
    """Side by side: each run behind each gate, in float and quantized; variants a.dcm --run U --gate C1 --gate C2.

    The page shows each image with its masks, probabilities and calls under every variant, and says for how many images
    they agree with the first one, how large each is and how long it takes.
    """
    from cxrscale.inference import find_inputs
    from cxrscale.reporting import tables
    from cxrscale.run import compare_variants, plan_variants

    if not inputs and split is None:
        raise UserError("variants takes inputs, --split val|test, or both")
    if split not in (None, "val", "test"):
        raise UserError(f"--split {split}: give val or test")
    chosen = plan_variants(run, gate or [], quantized or [])
    found = find_inputs(inputs, sys.stdin) if inputs else None
    for line in found.left_out if found else ():
        print(terminal.printable(line))
    with progress.bar("variants", None, "images") as bar:
        result = compare_variants(
            chosen,
            found.paths if found else [],
            out,
            split,
            lambda count: bar.update(bar.done + count),
            lambda stage: bar.update(bar.done, stage),
        )
    tables.print_variants(result)
    for one in result.images:
        if one.error:
            print(terminal.printable(f"{one.path}: not read: {one.error}"))
    print(storage.absolute(out.removesuffix(".html").removesuffix(".json") + ".html"))
    unread = sum(bool(one.error) for one in result.images)
    if unread:
        raise UnreadInputsError(f"{unread} of {len(result.images)} inputs could not be read; the page says why")
