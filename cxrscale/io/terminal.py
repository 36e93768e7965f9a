"""What is shown in a terminal: names from outside are text there, never markup, symbols or control codes."""

from __future__ import annotations

import re
from typing import Any

from rich.console import Console
from rich.text import Text

_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""Control codes, with which a file's name could rewrite the screen, line breaks, and marks that turn the direction of
the text after them."""


class _Console(Console):
    """Shows texts and cells of tables as they are, without what would steer the terminal."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str("\n".join(map(printable, text.split("\n"))), **options)


def console(*, stderr: bool = False, width: int | None = None) -> Console:
    """A console that prints `[x]` and `:x:` in a name as they are."""
    return _Console(stderr=stderr, width=width, markup=False, emoji=False)


def printable(text: Any) -> str:
    """The text for one line of a terminal: line breaks, control codes and direction marks become escapes (\\x1b)."""
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def show(table: Any, width: int = 200) -> None:
    """Print a table; into a file it is not squeezed to the 80 columns of a terminal that is not there."""
    terminal = console()
    (terminal if terminal.is_terminal else console(width=width)).print(table)
