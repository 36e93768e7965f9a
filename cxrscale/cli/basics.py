"""Commands to begin with: demo, config."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cxrscale import config
from cxrscale.cli.group import Local, Overrides, app
from cxrscale.config import Recipe

# Each command imports what it runs: torch, Ray and DALI take seconds that `--help` and a typing mistake need not.


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option(help="Where synthetic data, datasets and runs go.")] = Path("runs/demo"),
    local: Local = False,
) -> None:
    """Draw synthetic data and take it the whole way: datasets, audit, two models, thresholds, test metrics."""
    from cxrscale.cli import demo
    from cxrscale.reporting import tables

    for run, test in demo.run_demo(out, local=local):
        tables.print_metrics(test, run.path)
        print(f"artifacts: {run.path}")
    print(out.resolve())


@app.command("config")
def config_command(
    recipe: Annotated[str | None, typer.Argument(help="A recipe; without one, the defaults.", metavar="RECIPE")] = None,
    overrides: Overrides = None,
    help_fields: Annotated[bool, typer.Option("--help-fields", help="List every field with its meaning.")] = False,
) -> None:
    """Print the resolved recipe with every field, as `train` would see it."""
    if help_fields:
        values = config.ranges(Recipe)
        for name, sentence in config.fields(Recipe).items():
            print(f"{name}\n    {sentence}\n    ({values[name]})")
        return
    if recipe is not None and "=" in recipe and not Path(recipe).exists():
        resolved = config.parse(Recipe, config.override({}, [recipe, *(overrides or [])]), where="defaults")
    else:
        resolved = config.load_recipe(recipe, overrides or []) if recipe else Recipe()
    print(config.to_yaml(resolved), end="")
