"""The command of a trained model at work: predict."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from cxrscale.cli import progress
from cxrscale.cli.evaluation import parse_averaging
from cxrscale.cli.group import app
from cxrscale.io import storage, terminal
from cxrscale.types import UnreadInputsError, UserError

if TYPE_CHECKING:
    from cxrscale.inference import GroupPredictor, Prediction, PredictorSpec

SHOWN = 20
"""Predictions of up to so many inputs are printed one by one."""


@app.command("predict")
def predict_command(
    run: Annotated[
        list[str],
        typer.Option(help="The run whose best checkpoint predicts; given several times, the mean of the runs."),
    ],
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="INPUT",
            help="DICOM, PNG or JPEG files, folders (at any depth), s3:// prefixes, quoted patterns ('**/*.dcm'), "
            "@list.txt with one of these per line, or - for such a list on stdin.",
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="train, val or test: the run's own images, into RUN/predictions-SPLIT.parquet.")
    ] = None,
    gate: Annotated[
        str | None,
        typer.Option(
            help="A classifier's run: only what it calls positive goes to the segmenter --run.", metavar="RUN"
        ),
    ] = None,
    id_map: Annotated[
        str | None,
        typer.Option(
            help="With --split: the map of `shard --keep-map`; --out is then a CSV under the source's own ids."
        ),
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="The folder of predictions ('predictions'); with an id map, the CSV.")
    ] = None,
    kind: Annotated[
        str,
        typer.Option(
            "--format",
            help="json, csv, parquet, or rle: masks as a submission of the SIIM challenge; dicom-seg (masks), dicom-sr "
            "(reports) or dicom-sc (captures): JSON, and in OUT/objects a DICOM object per image, in its study.",
        ),
    ] = "json",
    overlay: Annotated[
        bool, typer.Option("--overlay", help="Also a PNG per image in OUT/objects: mask outline, heat map, calls.")
    ] = False,
    mean: Annotated[
        str, typer.Option(help="With several runs: the mean of their probabilities or logits.")
    ] = "probabilities",
    workers: Annotated[
        int | None,
        typer.Option(help="Share the files among so many Ray workers (RAY_ADDRESS, or this machine).", min=1),
    ] = None,
    tta: Annotated[
        str | None, typer.Option(help="hflip: the mean with the mirrored image (test-time augmentation).")
    ] = None,
) -> None:
    """Probabilities and calls for images (predict a.dcm folder --run runs/NAME), or scores of a split (--split train).

    An image's probabilities are calibrated and called present or absent at the run's stored thresholds, as by evaluate.
    A file that cannot be read is a row with the reason, and exit code 3. What is done when the command is stopped is
    kept; the same command goes on.

    Files whose gray values are certain are read even where `shard` would refuse them, with a warning in the result.

    DICOM objects take patient and study from their image's header. An image with an empty mask gets a report instead of
    a segmentation; a PNG or JPEG gets none, and exit code 3.
    """
    if (split is None) == (not inputs):
        raise UserError("predict takes either inputs or --split train|val|test")
    if split is not None:
        if len(run) > 1 or tta is not None:
            raise UserError("--split takes one --run; make a run of an ensemble: cxrscale ensemble RUN... --name NAME")
        if gate is not None:
            raise UserError("--gate goes with files; of a split: cxrscale evaluate RUN --gate CLASSIFIER")
        _predict_split(run[0], split, id_map, out)
        return
    if id_map is not None:
        raise UserError("--id-map goes with --split; predictions of files have the files' own names")
    from cxrscale.inference import Averaging, PredictorSpec

    averaging = parse_averaging(mean, tta)
    spec = PredictorSpec(tuple(run), gate, None if averaging == Averaging() else averaging, maps=overlay)
    _predict_files(_predictor(spec, workers), inputs or [], out or "predictions", kind, overlays=overlay)


def _predictor(spec: PredictorSpec, workers: int | None) -> GroupPredictor:
    from cxrscale.inference import ClusterPredictor

    if spec.gate is not None and (len(spec.runs) > 1 or spec.averaging is not None):
        raise UserError("--gate takes one --run; make a run of an ensemble: cxrscale ensemble RUN... --name NAME")
    return spec.load() if workers is None else ClusterPredictor(spec, workers)


def _predict_split(run: str, split: str, id_map: str | None, out: str | None) -> None:
    from cxrscale.inference import predictions

    scores = predictions.predict_split(run, split)
    print(storage.absolute(predictions.predictions_path(run, split)))
    if id_map is not None:
        table = out or f"predictions-{split}.csv"
        predictions.write_under_source_ids(table, scores, id_map)
        print(storage.absolute(table))


def _predict_files(predictor: GroupPredictor, given: list[str], out: str, kind: str, *, overlays: bool) -> None:
    from cxrscale.inference import check_format, find_inputs, objects, predict_files

    if not storage.is_remote(out) and storage.exists(out) and not storage.is_folder(out):
        raise UserError(f"--out {out} is a file; give a folder, in which the predictions are one file")
    check_format(kind, predictor.provenance)
    for note in predictor.provenance.notes:
        logging.getLogger("cxrscale").warning("%s: %s", predictor.provenance.run, note)
    found = find_inputs(given, sys.stdin)
    for line in found.left_out:
        print(terminal.printable(line))
    shown = len(found.paths) <= SHOWN
    with progress.bar("predicting", len(found.paths), "images") as bar:

        def on_prediction(prediction: Prediction) -> None:
            bar.update(bar.done + 1)
            if shown:
                _show(prediction)

        result = predict_files(predictor, found.paths, out, kind, on_prediction, overlays=overlays)
    if result.resumed:
        print(f"{result.resumed} of {len(found.paths)} were predicted before")
    again = f" and {found.twice} given twice" if found.twice else ""
    print(f"{result.read} images predicted, {result.not_read} not read{again}")
    folder = storage.absolute(storage.join(out, objects.FOLDER))
    if result.objects:
        empty = f", {result.empty_masks} of them reports, since their masks are empty" if result.empty_masks else ""
        print(f"{result.objects} DICOM objects in {folder}{empty}")
    if overlays:
        print(f"overlays in {folder}")
    print(storage.absolute(result.address))
    if result.without_object:
        raise UnreadInputsError(
            f"{result.without_object} of {result.read} images lack an object or overlay; `object_errors` in their rows "
            "says why" + (f"; {result.not_read} could not be read" if result.not_read else "")
        )
    if result.not_read:
        retry = f"; {result.unreachable} could not be reached, and the same command tries these again"
        raise UnreadInputsError(
            f"{result.not_read} of {len(found.paths)} inputs could not be read; `error` in their rows says why"
            + (retry if result.unreachable else "")
        )


def _show(prediction: Prediction) -> None:
    print(terminal.printable(prediction.path))
    for name, value in prediction.gate.items():
        print(
            f"  {terminal.printable(name):<20} {value:.4f}  {'passed on' if prediction.gate_call else 'not passed on'}"
        )
    for name, value in prediction.probabilities.items():
        call = "" if name not in prediction.calls else "  present" if prediction.calls[name] else "  absent"
        print(f"  {terminal.printable(name):<20} {value:.4f}{call}")
    if prediction.error:
        print(terminal.printable(f"  not read: {prediction.error}"))
    for warning in prediction.warnings:
        print(terminal.printable(f"  warning: {warning}"))
