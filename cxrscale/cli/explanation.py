"""The command that shows where scores come from: explain."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from cxrscale.cli import progress
from cxrscale.cli.group import Resamples, app
from cxrscale.cli.prediction import Workers
from cxrscale.io import storage, terminal
from cxrscale.types import UnreadInputsError, UserError

if TYPE_CHECKING:
    from cxrscale.inference import Prediction


@app.command("explain")
def explain_command(
    run: Annotated[str, typer.Option(help="The run whose best checkpoint is explained.")],
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="INPUT", help="Files, folders, s3:// prefixes, patterns, @list.txt or -, as for `cxrscale predict`."
        ),
    ] = None,
    finding: Annotated[
        list[str] | None, typer.Option(help="Whose map; give it several times for several. Without it: all of the run.")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="train, val or test: score the maps against the boxes of the run's own images instead."),
    ] = None,
    out: Annotated[str | None, typer.Option(help="For files: the folder of maps ('explanations').")] = None,
    sanity: Annotated[
        bool,
        typer.Option("--sanity", help="With --split: also the maps of random weights, which must differ from these."),
    ] = False,
    occlusion: Annotated[
        bool,
        typer.Option(
            "--occlusion",
            help="With --split: also how the probability falls with the boxes, or other places, occluded.",
        ),
    ] = False,
    resamples: Resamples = 1000,
    workers: Workers = None,
) -> None:
    """Heat maps of images (explain a.dcm folder --run runs/NAME), or how good the run's maps are (--split test).

    DenseNet, ResNet and EfficientNet have exact class activation maps, whose mean is the logit; other classifiers get
    Grad-CAM (pip install 'cxrscale[explain]'), segmenters their score map. A map says where the score comes from, not
    where the disease is.

    Files: OUT/predictions.json, and in OUT/objects for each image a PNG per finding at the image's own size and the raw
    maps as .npz. A file that cannot be read is a row with the reason, and exit code 3. What is done when the command is
    stopped is kept; the same command goes on.

    --split: the pointing game, boxes drawn from maps as by Wang et al. 2017, and four baselines that do not see the
    image, with intervals over patients: explain.json and explain.html in the run. It needs a source with boxes: NIH
    (in its test list alone) or RSNA.
    """
    if (split is None) == (not inputs):
        raise UserError("explain takes either inputs or --split train|val|test")
    if split is None and (sanity or occlusion):
        raise UserError(f"--{'sanity' if sanity else 'occlusion'} goes with --split: it needs images with boxes")
    if split is not None and out is not None:
        raise UserError("--out goes with files; of a split the result is explain.json in the run")
    if split is not None and workers is not None:
        raise UserError("--workers goes with files")
    if split is not None:
        _explain_split(run, split, finding or [], resamples, sanity=sanity, occlusion=occlusion)
    else:
        _explain_files(run, inputs or [], finding or [], out or "explanations", workers)


def _explain_split(run: str, split: str, findings: list[str], resamples: int, *, sanity: bool, occlusion: bool) -> None:
    from cxrscale.reporting import tables
    from cxrscale.run import explain_split, explaining

    bars: dict[str, progress.Bar] = {}

    def tell(what: str, count: int, total: int) -> None:
        if what not in bars:
            for opened in bars.values():
                opened.close()
            bars[what] = progress.Bar(what, total, "images")
        bars[what].update(bars[what].done + count)

    try:
        report = explain_split(run, split, findings, resamples, tell, sanity=sanity, occlusion=occlusion)
    finally:
        for opened in bars.values():
            opened.close()
    tables.print_localization(report, run)
    if report.patients < explaining.FEW_PATIENTS:
        print(f"{report.boxes} boxes of {report.patients} patients: too few to compare anything")
    print(storage.absolute(explaining.report_path(run, split)))
    print(storage.absolute(explaining.page_path(run, split)))


def _explain_files(run: str, given: list[str], findings: list[str], out: str, workers: int | None) -> None:
    from cxrscale.inference import ClusterPredictor, Explainer, PredictorSpec, explain_files, find_inputs, objects

    if not storage.is_remote(out) and storage.exists(out) and not storage.is_folder(out):
        raise UserError(f"--out {out} is a file; give a folder")
    explainer = Explainer(run, "cpu" if workers else None, findings)
    spec = PredictorSpec((run,), explained=tuple(findings))
    cluster = ClusterPredictor(spec, workers) if workers else None
    found = find_inputs(given, sys.stdin)
    for line in found.left_out:
        print(terminal.printable(line))
    with progress.bar("explaining", len(found.paths), "images") as bar:

        def on_prediction(_prediction: Prediction) -> None:
            bar.update(bar.done + 1)

        result = explain_files(explainer, found.paths, out, on_prediction, cluster)
    if result.resumed:
        print(f"{result.resumed} of {len(found.paths)} were explained before")
    again = f" and {found.twice} given twice" if found.twice else ""
    words = {"exact": "exact class activation maps", "grad-cam": "Grad-CAM", "score map": "score maps"}
    print(f"{result.read} images explained by {words[explainer.method]}, {result.not_read} not read{again}")
    folder = storage.absolute(storage.join(out, objects.FOLDER))
    print(terminal.printable(f"maps and overlays of {', '.join(explainer.explained)} in {folder}"))
    print(storage.absolute(result.address))
    if result.without_object:
        raise UnreadInputsError(
            f"{result.without_object} of {result.read} images lack a map; `object_errors` in their rows says why"
            + (f"; {result.not_read} could not be read" if result.not_read else "")
        )
    if result.not_read:
        retry = f"; {result.unreachable} could not be reached, and the same command tries these again"
        raise UnreadInputsError(
            f"{result.not_read} of {len(found.paths)} inputs could not be read; `error` in their rows says why"
            + (retry if result.unreachable else "")
        )
