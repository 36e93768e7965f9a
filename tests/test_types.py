"""Errors as one line, and the defaults of shared types."""

import pytest

from cxrscale.types import DistContext, last_line, one_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("two\n  lines\tand a tab"), "two lines and a tab"),
        (ValueError("\x1b[31mred\x1b[0m"), "[31mred [0m"),
        (ValueError(), "ValueError"),
        (KeyError("name"), "'name'"),
        (ValueError("ends with a colon: "), "ends with a colon"),
        ("plain\ntext", "plain text"),
        ("", "no reason given"),
    ],
)
def test_an_error_becomes_one_line(error: Exception | str, line: str) -> None:
    assert one_line(error) == line


def test_one_line_can_have_the_type_and_a_limit() -> None:
    assert one_line(ValueError("a\nb"), with_type=True) == "ValueError: a b"
    assert one_line(ValueError(), with_type=True) == "ValueError"
    assert one_line(ValueError("x" * 300), limit=120) == "x" * 120


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("Traceback:\n  File ...\n  KeyError: 'a'\n\n"), "KeyError: 'a'"),
        (RuntimeError("  \n"), "RuntimeError"),
        ("first\nsecond", "second"),
        ("", "no reason given"),
    ],
)
def test_the_last_line_of_a_traceback_is_the_cause(error: Exception | str, line: str) -> None:
    assert last_line(error) == line


def test_a_process_on_its_own_is_rank_0_of_1_on_the_cpu() -> None:
    context = DistContext()
    assert (context.rank, context.world, str(context.device)) == (0, 1, "cpu")
