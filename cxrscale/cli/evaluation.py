"""Commands on trained runs: threshold, evaluate, compare, predict."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from typing import Annotated

import typer

from cxrscale.cli import progress
from cxrscale.cli.group import Overrides, Resamples, RunFolder, app
from cxrscale.io import storage, terminal
from cxrscale.types import UserError

# Each command imports what it runs: torch, Ray and DALI take seconds that `--help` and a typing mistake need not.


@app.command()
def threshold(run: RunFolder, overrides: Overrides = None, resamples: Resamples = 1000) -> None:
    """Choose thresholds on validation: cxrscale threshold RUN threshold.goal=recall threshold.min_rate=0.9.

    Goals: f1, youden, recall, precision, cost, fixed. threshold.calibration=platt|temperature|isotonic also makes
    probabilities of the scores. The test split is not looked at.
    """
    from cxrscale.evaluation import artifacts
    from cxrscale.reporting import tables
    from cxrscale.run import open_run

    trained = open_run(run)
    with progress.bar("scoring validation", None, "images") as bar:
        thresholds = trained.choose_thresholds(overrides or [], resamples, lambda count: bar.update(bar.done + count))
    tables.print_thresholds(thresholds, run)
    print(storage.absolute(trained.artifact(artifacts.THRESHOLDS)))


@app.command("evaluate")
def evaluate_command(run: RunFolder, resamples: Resamples = 1000) -> None:
    """Metrics of the test split at the stored thresholds, with intervals: test_metrics.json, plots/, report.html."""
    from cxrscale.evaluation import artifacts
    from cxrscale.reporting import tables
    from cxrscale.run import open_run

    trained = open_run(run)
    with progress.bar("scoring test", None, "images") as bar:
        test = trained.evaluate(resamples, lambda count: bar.update(bar.done + count))
    tables.print_metrics(test, run)
    print(storage.absolute(trained.artifact(artifacts.TEST_METRICS)))
    print(storage.absolute(trained.report()))


@app.command("compare")
def compare_command(
    run_a: Annotated[str, typer.Argument(help="A run's folder.", metavar="RUN_A")],
    run_b: Annotated[
        str | None, typer.Argument(help="Another run's folder, over the same datasets.", metavar="RUN_B")
    ] = None,
    readers: Annotated[
        list[str] | None,
        typer.Option(
            help="Instead of RUN_B: a CSV table of what readers said; its first column names the image, the others are "
            "findings (1, 0, -1 for uncertain). One file per reader (give the option several times), or one with a "
            "column 'reader'."
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="The split that both are scored on: val or test.")] = "test",
    resamples: Annotated[int, typer.Option(help="Bootstrap resamples of the patients.", min=2)] = 2000,
    out: Annotated[str, typer.Option(help="The JSON file of differences.")] = "compare.json",
) -> None:
    """Is one run better than another, or than readers, or is it chance?

    Two runs: AUROC and Dice as A - B on the same images. Intervals and p-values count patients, not images; 'Holm'
    adjusts for the number of findings. --readers: F1 of the run's calls, and of each radiologist, against all others.
    """
    from cxrscale.io import write_artifact
    from cxrscale.reporting import tables
    from cxrscale.run import compare_runs, compare_with_readers

    if (run_b is None) == (not readers):
        raise UserError("compare takes either a second run or --readers TABLE.csv")
    if run_b is None:
        against = compare_with_readers(run_a, readers or [], split, resamples)
        tables.print_readers(against)
        write_artifact(out, against)
        print(storage.absolute(out))
        return
    comparison = compare_runs(run_a, run_b, split, resamples)
    tables.print_comparison(comparison)
    for side, findings in ((comparison.a, comparison.only_in_a), (comparison.b, comparison.only_in_b)):
        if findings:
            print(terminal.printable(f"only in {side.name}, not compared: {', '.join(findings)}"))
    write_artifact(out, comparison)
    print(storage.absolute(out))


@app.command("predict")
def predict_command(
    run: Annotated[str, typer.Option(help="The run whose best checkpoint predicts.")],
    files: Annotated[list[str] | None, typer.Argument(help="DICOM, PNG or JPEG files.")] = None,
    split: Annotated[
        str | None, typer.Option(help="train, val or test: the run's own images, into RUN/predictions-SPLIT.parquet.")
    ] = None,
    id_map: Annotated[
        str | None,
        typer.Option(
            help="With --split: the map of `shard --keep-map`; --out is then a CSV under the source's own ids."
        ),
    ] = None,
    out: Annotated[str | None, typer.Option(help="The file of predictions; a CSV with an id map.")] = None,
) -> None:
    """Probabilities and calls for image files (predict a.dcm b.png --run runs/NAME), or scores of a split (--split
    train).

    A file's probabilities are calibrated and called present or absent at the run's stored thresholds, as by evaluate.

    Files whose gray values are certain are read even where `shard` would refuse them, with a warning in the result.
    """
    from cxrscale.inference import Predictor, predictions

    if (split is None) == (not files):
        raise UserError("predict takes either files or --split train|val|test")
    if id_map is not None and split is None:
        raise UserError("--id-map goes with --split; predictions of files have the files' own names")
    if split is not None:
        scores = predictions.predict_split(run, split)
        print(storage.absolute(predictions.predictions_path(run, split)))
        if id_map is not None:
            table = out or f"predictions-{split}.csv"
            predictions.write_under_source_ids(table, scores, id_map)
            print(storage.absolute(table))
        return
    out = out or "predictions.json"
    predictor = Predictor(run)
    for note in predictor.provenance.notes:
        logging.getLogger("cxrscale").warning("%s: %s", run, note)
    results = predictor.predict(files or [])
    for prediction in results:
        print(terminal.printable(prediction.path))
        for name, value in prediction.probabilities.items():
            call = "" if name not in prediction.calls else "  present" if prediction.calls[name] else "  absent"
            print(f"  {terminal.printable(name):<20} {value:.4f}{call}")
        if prediction.error:
            print(terminal.printable(f"  not read: {prediction.error}"))
        for warning in prediction.warnings:
            print(terminal.printable(f"  warning: {warning}"))
    listed = [{key: value for key, value in asdict(prediction).items() if value} for prediction in results]
    content = {"predictions": listed, **predictor.provenance.model_dump(mode="json")}
    storage.write(out, json.dumps(content, indent=2) + "\n")
    print(storage.absolute(out))
    if all(prediction.error for prediction in results):
        raise UserError("none of the files could be read; see the reasons above")
