"""Names from outside are text in a terminal."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

from cxrscale.io import terminal


def test_a_table_shows_brackets_and_colons_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("[bold]head", title="[red]title[/]")
    table.add_row("a[/b] :smile:")
    terminal.show(table)
    shown = capsys.readouterr().out
    for text in ("[bold]head", "[red]title[/]", "a[/b] :smile:"):
        assert text in shown


@given(st.text())
def test_a_line_stays_one_line_and_holds_no_control_code(text: str) -> None:
    shown = terminal.printable(text)
    assert not any(ord(character) < 32 or 127 <= ord(character) < 160 for character in shown)
    assert "\u202e" not in shown


def test_letters_of_any_language_stay() -> None:
    assert terminal.printable("Röntgen 胸部X線 صدر") == "Röntgen 胸部X線 صدر"
    assert terminal.printable("a\x1b[2Jb\n\u202e") == "a\\x1b[2Jb\\n\\u202e"
