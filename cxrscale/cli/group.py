"""The command line's application: what all commands share. The commands stand in the files beside this one."""

from __future__ import annotations

import signal
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cxrscale.io import terminal
from cxrscale.types import UserError

RENAMED_COMMANDS = {"batches": "preview", "ablation": "overfit"}
RENAMED_OPTIONS = {"--twins": "--patients-from", "--free-orphans": "--remove-orphans"}
"""Old name -> new one, so that an old command line is told."""


class CommandGroup(TyperGroup):
    """Turns a user's mistake into one line and its exit code, and Ctrl-C into what to do next."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command of that name; an old name is told the new one."""
        if args and args[0] in RENAMED_COMMANDS:
            print(f"error: `{args[0]}` is now called `{RENAMED_COMMANDS[args[0]]}`", file=sys.stderr)
            raise typer.Exit(2)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            print(f"error: {terminal.printable(error)}", file=sys.stderr)
            raise typer.Exit(error.exit_code) from None
        except Exception as error:
            # Typer brings its own copy of click since 0.21: its class of this error cannot be imported from either.
            old = getattr(error, "option_name", None) if type(error).__name__ == "NoSuchOption" else None
            if old in RENAMED_OPTIONS:
                print(f"error: {old} is now called {RENAMED_OPTIONS[old]}", file=sys.stderr)
                raise typer.Exit(2) from None
            raise
        except (KeyboardInterrupt, SystemExit) as ended:
            # Ray, once connected, turns SIGTERM into this exit.
            if isinstance(ended, SystemExit) and ended.code != signal.SIGTERM:
                raise
            print("stopped; run the same command again to resume", file=sys.stderr)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Rich would read the brackets of data.shards=[shards/nih] as markup.
    rich_markup_mode=None,
    help="Chest X-rays from raw archives to honest metrics. Every command prints the path of its output last.",
)

Overrides = Annotated[list[str] | None, typer.Argument(help="section.field=value, e.g. optim.lr=3e-4", metavar="A.B=C")]
Local = Annotated[bool, typer.Option("--local", help="In this process, without Ray: breakpoints work.")]
RunFolder = Annotated[str, typer.Argument(help="A run's folder, as `cxrscale train` printed it.", metavar="RUN")]
Resamples = Annotated[int, typer.Option(help="Bootstrap resamples of the patients.", min=2)]
RecipePath = Annotated[str, typer.Argument(help="A recipe of jobs/, or your own.", metavar="RECIPE")]
