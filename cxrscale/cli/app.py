"""`cxrscale COMMAND ...`: every command, and the entry point."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from cxrscale import __version__
from cxrscale.cli import basics, datasets, evaluation, machines, training
from cxrscale.cli.group import app

__all__ = ["COMMANDS", "app", "main"]

COMMANDS = (basics, datasets, training, evaluation, machines)
"""The modules whose commands make up the application, in the order of the data's way."""


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if show:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    app()
