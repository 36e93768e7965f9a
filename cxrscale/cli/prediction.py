"""The command of a trained model at work: predict."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from cxrscale.cli import progress
from cxrscale.cli.evaluation import parse_averaging
from cxrscale.cli.group import app
from cxrscale.io import storage, terminal
from cxrscale.types import UnreadInputsError, UserError

if TYPE_CHECKING:
    from cxrscale.inference import FilePredictions, GroupPredictor, Prediction, PredictorSpec
    from cxrscale.inference import Inputs as FoundInputs

SHOWN = 20
"""Predictions of up to so many inputs are printed one by one."""


Runs = Annotated[
    list[str], typer.Option(help="The run whose best checkpoint predicts; given several times, the mean of the runs.")
]
Inputs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="INPUT",
        help="DICOM, PNG or JPEG files, folders (at any depth), datasets, s3:// prefixes, quoted patterns "
        "('**/*.dcm'), @list.txt with one of these per line, or - for such a list on stdin.",
    ),
]
Split = Annotated[
    str | None,
    typer.Option(
        help="train, val or test: the run's own images, into RUN/predictions-SPLIT.parquet. With datasets as inputs: "
        "one of their splits."
    ),
]
GateOfFiles = Annotated[
    str | None,
    typer.Option(help="A classifier's run: only what it calls positive goes to the segmenter --run.", metavar="RUN"),
]
IdMap = Annotated[
    str | None,
    typer.Option(
        help="With --split of the run: the map written by `shard --keep-map`; --out is then a CSV under the source's "
        "own ids."
    ),
]
Out = Annotated[str | None, typer.Option(help="The folder of predictions ('predictions'); with an id map, the CSV.")]
Kind = Annotated[
    str,
    typer.Option(
        "--format",
        help="json, csv, parquet, or rle: masks as a submission of the SIIM challenge; dicom-seg (masks), dicom-sr "
        "(reports) or dicom-sc (captures): JSON, and in OUT/objects a DICOM object per image, in its study.",
    ),
]
Overlay = Annotated[
    bool, typer.Option("--overlay", help="Also a PNG per image in OUT/objects: mask outline, heat map, calls.")
]
Mean = Annotated[str, typer.Option(help="With several runs: the mean of their probabilities or logits.")]
Workers = Annotated[
    int | None, typer.Option(help="Share the images among so many Ray workers (RAY_ADDRESS, or this machine).", min=1)
]
Tta = Annotated[str | None, typer.Option(help="hflip: the mean with the mirrored image (test-time augmentation).")]


@app.command("predict")
def predict_command(
    run: Runs,
    inputs: Inputs = None,
    split: Split = None,
    gate: GateOfFiles = None,
    id_map: IdMap = None,
    out: Out = None,
    kind: Kind = "json",
    overlay: Overlay = False,
    mean: Mean = "probabilities",
    workers: Workers = None,
    tta: Tta = None,
) -> None:
    """Probabilities and calls for images (predict a.dcm folder --run runs/NAME), or scores of a split (--split train).

    An image's probabilities are calibrated and called present or absent at the run's stored thresholds, as by evaluate.
    A file that cannot be read is a row with the reason, and exit code 3. What is done when the command is stopped is
    kept; the same command goes on. A dataset (the folder that `shard` made) is one row per image, with its id there.

    Files whose gray values are certain are read even where `shard` would refuse them, with a warning in the result.

    DICOM objects take patient and study from their image's header. An image with an empty mask gets a report instead of
    a segmentation; a PNG or JPEG gets none, and exit code 3.
    """
    if not inputs:
        given = {"--gate": gate, "--tta": tta, "--workers": workers, "--overlay": overlay or None}
        _predict_split(run, split, id_map, out, [name for name, value in given.items() if value is not None])
        return
    if id_map is not None:
        raise UserError("--id-map goes with --split; predictions of files have the files' own names")
    from cxrscale.inference import Averaging, PredictorSpec

    averaging = parse_averaging(mean, tta)
    spec = PredictorSpec(tuple(run), gate, None if averaging == Averaging() else averaging, maps=overlay)
    job = _Job(inputs, split, out or "predictions", kind, overlay)
    job.predict(_predictor(spec, workers))


def _predictor(spec: PredictorSpec, workers: int | None) -> GroupPredictor:
    from cxrscale.inference import ClusterPredictor

    return spec.load() if workers is None else ClusterPredictor(spec, workers)


def _predict_split(
    runs: list[str], split: str | None, id_map: str | None, out: str | None, of_files: list[str]
) -> None:
    from cxrscale.inference import predictions, split_scores

    if split is None:
        raise UserError("predict takes inputs, or --split train|val|test for the run's own images")
    if len(runs) > 1 or "--tta" in of_files:
        raise UserError("--split takes one --run; make a run of an ensemble: cxrscale ensemble RUN... --name NAME")
    if "--gate" in of_files:
        raise UserError("--gate goes with files; of a split: cxrscale evaluate RUN --gate CLASSIFIER")
    if of_files:
        raise UserError(f"{of_files[0]} goes with files or datasets; --split {split} alone is the run's own images")
    scores = split_scores.predict_split(runs[0], split)
    print(storage.absolute(predictions.predictions_path(runs[0], split)))
    if id_map is not None:
        table = out or f"predictions-{split}.csv"
        predictions.write_under_source_ids(table, scores, id_map)
        print(storage.absolute(table))


@dataclass(frozen=True, slots=True)
class _Job:
    """What is predicted, into what."""

    inputs: list[str]
    split: str | None
    out: str
    kind: str
    overlays: bool

    def predict(self, predictor: GroupPredictor) -> None:
        """Predict and print.

        Raises:
            UnreadInputsError: an input could not be read, or lacks its object.
        """
        from cxrscale.inference import check_format, find_inputs, predict_files

        if not storage.is_remote(self.out) and storage.exists(self.out) and not storage.is_folder(self.out):
            raise UserError(f"--out {self.out} is a file; give a folder, in which the predictions are one file")
        check_format(self.kind, predictor.provenance)
        for note in predictor.provenance.notes:
            logging.getLogger("cxrscale").warning("%s: %s", predictor.provenance.run, note)
        found = find_inputs(self.inputs, sys.stdin, self.split)
        for line in found.left_out:
            print(terminal.printable(line))
        shown = len(found.paths) <= SHOWN
        with progress.bar("predicting", len(found.paths), "images") as bar:

            def on_prediction(prediction: Prediction) -> None:
                bar.update(bar.done + 1)
                if shown:
                    _show(prediction)

            result = predict_files(predictor, found.paths, self.out, self.kind, on_prediction, overlays=self.overlays)
        self._print(result, found)

    def _print(self, result: FilePredictions, found: FoundInputs) -> None:
        from cxrscale.inference import objects

        if result.resumed:
            print(f"{result.resumed} of {len(found.paths)} were predicted before")
        again = f" and {found.twice} given twice" if found.twice else ""
        print(f"{result.read} images predicted, {result.not_read} not read{again}")
        folder = storage.absolute(storage.join(self.out, objects.FOLDER))
        if result.objects:
            empty = f", {result.empty_masks} of them reports, since their masks are empty" if result.empty_masks else ""
            print(f"{result.objects} DICOM objects in {folder}{empty}")
        if self.overlays:
            print(f"overlays in {folder}")
        print(storage.absolute(result.address))
        if result.without_object:
            raise UnreadInputsError(
                f"{result.without_object} of {result.read} images lack an object or overlay; `object_errors` in their "
                "rows says why" + (f"; {result.not_read} could not be read" if result.not_read else "")
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
