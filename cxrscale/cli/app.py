"""`cxrscale COMMAND ...`: every command, and the entry point."""

from __future__ import annotations

import io
import logging
import signal
import sys
from types import FrameType
from typing import Annotated

import typer

from cxrscale import __version__
from cxrscale.cli import basics, datasets, evaluation, explanation, exporting, machines, prediction, serving, training
from cxrscale.cli.group import app
from cxrscale.io import scratch

__all__ = ["COMMANDS", "app", "main"]

COMMANDS = (basics, datasets, training, evaluation, prediction, explanation, exporting, serving, machines)
"""The modules whose commands make up the application, in the order of the data's way."""


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if show:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A file's name need not be UTF-8; its bytes go out as they came in.
            stream.reconfigure(errors="surrogateescape")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    end_as_ctrl_c()
    scratch.remove_stale()
    app()


def end_as_ctrl_c() -> None:
    """SIGTERM and SIGHUP end a command as Ctrl-C does: it cleans up behind it, and the same command goes on later.

    One that the process ignores, as SIGHUP under nohup, stays ignored.
    """

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, interrupt)
