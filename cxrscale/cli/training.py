"""Commands that train: overfit, train, tune."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cxrscale import config
from cxrscale.cli import progress
from cxrscale.cli.group import Local, Overrides, RecipePath, app
from cxrscale.io import storage, terminal

# Each command imports what it runs: torch, Ray and DALI take seconds that `--help` and a typing mistake need not.


@app.command("overfit")
def overfit_command(
    recipe: RecipePath,
    overrides: Overrides = None,
    images: Annotated[int, typer.Option(help="How many training images.", min=4)] = 100,
    epochs: Annotated[int, typer.Option(help="The most passes over them.", min=1)] = 30,
) -> None:
    """Start here: can the setup learn at all? Few images, no augmentation; the model must overfit them.

    Prints a verdict and, on failure, what to try; the exit code is 0 or 1. The learning curve is a PNG.
    """
    from cxrscale.reporting import plots, png
    from cxrscale.training import overfit

    resolved = config.load_recipe(recipe, overrides or [])
    with progress.bar("overfit", None, "steps") as bar:

        def on_step(done: int, total: int, note: str) -> None:
            bar.set_total(total)
            bar.update(done, note)

        result = overfit.overfit(resolved, Path(recipe).stem, images, epochs, on_step)
    storage.write(result.plot, png(plots.learning_curve(result.curve)))
    print(terminal.printable(result.report.verdict))
    if result.report.diagnosis:
        print(terminal.printable(result.report.diagnosis))
    print(storage.absolute(result.address))
    if not result.report.passed:
        raise typer.Exit(1)


@app.command()
def train(recipe: RecipePath, overrides: Overrides = None, local: Local = False) -> None:
    """Train a recipe: cxrscale train jobs/chexnet14.yaml data.shards=[shards/nih] scaling.num_workers=2."""
    from cxrscale.training import launch, run_info

    resolved = config.load_recipe(recipe, overrides or [])
    run = launch.launch(resolved, Path(recipe).stem, progress.watch_run, local=local)
    if not run_info.read_run_info(run).finished:
        name = run.rsplit("/", 1)[-1]
        print(f"stopped with a checkpoint; resume with tracking.name={name}", file=sys.stderr)
    print(run)


@app.command("tune")
def tune_command(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Annotated[str | None, typer.Option(help="Resume the search of this name.", metavar="NAME")] = None,
) -> None:
    """Search the fields in a recipe's tune.space, such as optim.lr: loguniform(1e-4, 1e-2); writes best.yaml."""
    from cxrscale.reporting import tables, tuning_page
    from cxrscale.tuning import results, sweep

    resolved = config.load_recipe(recipe, overrides or [])
    resolved = sweep.resumed(resolved, resume) if resume else resolved
    search = sweep.tune(resolved, Path(recipe).stem, progress.bar, tuning_page.write)
    if not search.finished:
        name = search.run.rsplit("/", 1)[-1]
        print(f"stopped; resume with: cxrscale tune {recipe} --resume {name}", file=sys.stderr)
        raise typer.Exit(130)
    tables.print_trials(results.read_results(search.run), resolved, list(resolved.tune.space), search.run)
    print(terminal.printable(search.verdict))
    print(storage.join(search.run, "tune.html"))
    print(search.run)
