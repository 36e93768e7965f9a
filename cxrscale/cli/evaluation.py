"""Commands on trained runs: threshold, evaluate, compare, ensemble."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cxrscale.cli import progress
from cxrscale.cli.group import Overrides, Resamples, RunFolder, app
from cxrscale.io import storage, terminal
from cxrscale.types import UserError

if TYPE_CHECKING:
    from cxrscale.inference import Averaging

# Each command imports what it runs: torch, Ray and DALI take seconds that `--help` and a typing mistake need not.


GateRun = Annotated[
    str | None, typer.Option(help="A classifier's run: it decides which images the segmenter RUN sees.", metavar="RUN")
]


@app.command()
def threshold(run: RunFolder, overrides: Overrides = None, resamples: Resamples = 1000, gate: GateRun = None) -> None:
    """Choose thresholds on validation: cxrscale threshold RUN threshold.goal=recall threshold.min_rate=0.9.

    Goals: f1, youden, recall, precision, cost, fixed. threshold.calibration=platt|temperature|isotonic also makes
    probabilities of the scores. The test split is not looked at. --gate CLASSIFIER chooses the classifier's threshold
    and the segmenter's mask rule together instead: cascade.json.
    """
    if gate is not None:
        _choose_cascade(run, gate, overrides or [], resamples)
        return
    from cxrscale.evaluation import artifacts
    from cxrscale.reporting import tables
    from cxrscale.run import open_run

    trained = open_run(run)
    with progress.bar("scoring validation", None, "images") as bar:
        thresholds = trained.choose_thresholds(overrides or [], resamples, lambda count: bar.update(bar.done + count))
    tables.print_thresholds(thresholds, run)
    print(storage.absolute(trained.artifact(artifacts.THRESHOLDS)))


@app.command("evaluate")
def evaluate_command(run: RunFolder, resamples: Resamples = 1000, gate: GateRun = None) -> None:
    """Metrics of the test split at the stored thresholds, with intervals: test_metrics.json, plots/, report.html.

    --gate CLASSIFIER measures the segmenter RUN behind a classifier, against RUN alone: cascade_metrics.json.
    """
    if gate is not None:
        _evaluate_cascade(run, gate, resamples)
        return
    from cxrscale.evaluation import artifacts
    from cxrscale.reporting import tables
    from cxrscale.run import open_run

    trained = open_run(run)
    with progress.bar("scoring test", None, "images") as bar:
        test = trained.evaluate(resamples, lambda count: bar.update(bar.done + count))
    tables.print_metrics(test, run)
    print(storage.absolute(trained.artifact(artifacts.TEST_METRICS)))
    print(storage.absolute(trained.report()))


def _choose_cascade(run: str, gate: str, overrides: list[str], resamples: int) -> None:
    from cxrscale.evaluation import CASCADE
    from cxrscale.reporting import tables
    from cxrscale.run import choose_cascade, open_run

    if overrides:
        raise UserError(f"{overrides[0]}: threshold --gate takes no fields; it maximizes Dice over all images")
    segmenter = open_run(run)
    with progress.bar("scoring validation", None, "images") as bar:
        chosen = choose_cascade(segmenter, open_run(gate), resamples, lambda count: bar.update(bar.done + count))
    tables.print_cascade(chosen)
    print(storage.absolute(segmenter.artifact(CASCADE)))


def _evaluate_cascade(run: str, gate: str, resamples: int) -> None:
    from cxrscale.evaluation import CASCADE_METRICS
    from cxrscale.reporting import tables
    from cxrscale.run import evaluate_cascade, open_run

    segmenter = open_run(run)
    with progress.bar("scoring test", None, "images") as bar:
        test = evaluate_cascade(segmenter, open_run(gate), resamples, lambda count: bar.update(bar.done + count))
    tables.print_cascade(test)
    if not test.chosen_together:
        again = f"`cxrscale threshold {run} --gate {gate}` chooses them together"
        print(terminal.printable(f"each run's own threshold and mask rule; {again}"))
    print(storage.absolute(segmenter.artifact(CASCADE_METRICS)))


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


@app.command("ensemble")
def ensemble_command(
    runs: Annotated[
        list[str],
        typer.Argument(help="Runs over the same datasets and findings, of any input size.", metavar="RUN..."),
    ],
    name: Annotated[str, typer.Option(help="Of the new run; its folder stands beside the first of the runs.")],
    mean: Annotated[str, typer.Option(help="Of what: probabilities or logits.")] = "probabilities",
    tta: Annotated[
        str | None, typer.Option(help="hflip: each model also sees the image mirrored (test-time augmentation).")
    ] = None,
    resamples: Resamples = 1000,
) -> None:
    """Several runs as one: the mean of their scores, with thresholds, test metrics and report of its own.

    Thresholds are chosen on validation, as for any run. The test split then says what the ensemble gains over each of
    its members, with the interval of the paired difference: ensemble.json.
    """
    from cxrscale.reporting import tables
    from cxrscale.run import ensemble, ensemble_gains

    averaging = parse_averaging(mean, tta)
    made = ensemble(runs, name, averaging.mean, hflip=averaging.hflip)
    with progress.bar("scoring validation", None, "images") as bar:
        made.choose_thresholds((), resamples, lambda count: bar.update(bar.done + count))
    with progress.bar("scoring test", None, "images") as bar:
        test = made.evaluate(resamples, lambda count: bar.update(bar.done + count))
        gains = ensemble_gains(made, resamples, lambda count: bar.update(bar.done + count))
    tables.print_metrics(test, made.path)
    for gain in gains.values():
        tables.print_comparison(gain)
    print(storage.absolute(made.report()))
    print(storage.absolute(made.path))


def parse_averaging(mean: str, tta: str | None) -> Averaging:
    """What --mean and --tta say.

    Raises:
        UserError: one of them is no word that is known.
    """
    from cxrscale.inference import Averaging
    from cxrscale.models import MEANS

    if mean not in MEANS:
        raise UserError(f"--mean {mean}: give one of {', '.join(MEANS)}")
    if tta not in (None, "hflip"):
        raise UserError(f"--tta {tta}: give hflip, the one that keeps a chest X-ray a chest X-ray")
    return Averaging(mean=mean, hflip=tta is not None)
