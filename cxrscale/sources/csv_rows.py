"""Rows of a source's tables and lists, as a text editor or a spreadsheet may have saved them.

Read alike for all sources: UTF-8 and UTF-16, with or without a byte order mark; line ends of any system; commas,
semicolons or tabs between values (with the last two, a decimal comma); spaces around values; headers in any case.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from operator import itemgetter

from cxrscale.io import storage
from cxrscale.types import UserError

_BYTE_ORDER_MARKS = (
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
_DELIMITERS = (",", ";", "\t")
_DECIMAL_COMMA = re.compile(r"-?\d+,\d+(?:[eE][+-]?\d+)?")
_IMAGE_FILE = re.compile(r".+\.(?:png|jpe?g|dcm)", re.IGNORECASE)


def read_rows(path: str) -> Iterator[tuple[int, list[str]]]:
    """(line number, values without spaces around them) of the header and of every row that is not empty.

    Raises:
        UserError: the file does not exist, or is not a table of text.
    """
    text = _text(path, "CSV table")
    try:
        start, delimiter = _delimiter(text)
        lines = io.StringIO(text[start:], newline="")
        table = csv.reader(lines, strict=True, delimiter=delimiter, skipinitialspace=True)
        above = text[:start].count("\n")
        for row in table:
            if any(map(str.strip, row)):
                values = [value.strip(" \t") for value in row]
                if delimiter != ",":
                    values = [value.replace(",", ".") if _DECIMAL_COMMA.fullmatch(value) else value for value in values]
                yield table.line_num + above, values
    except csv.Error as error:
        raise UserError(f"{path} is not a readable CSV table ({error}); copy it again") from None


def table_rows(
    path: str, needed: tuple[str, ...], optional: tuple[str, ...] = ()
) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(line number, values of the needed and optional columns) of every row; '' for missing optional columns.

    The first needed column names an image and is never empty.

    Raises:
        UserError: as `read_rows`; or a needed column is missing, or a row has more or fewer values than the header.
    """
    rows = read_rows(path)
    if (top := next(rows, None)) is None:
        raise UserError(f"{path} is not a readable CSV table (it is empty); copy it again")
    header = [_folded(name) for name in top[1]]
    if missing := [name for name in needed if _folded(name) not in header]:
        raise UserError(f"{path}: no column {missing[0]!r}; use the table with the published header")
    # Headers may end with commas that some rows do not repeat: NIH's box table, and the older label table.
    named = max(at for at, name in enumerate(header, 1) if name)
    # Missing optional columns have index -1: an empty string that is appended to each row.
    wanted = [_folded(name) for name in (*needed, *optional)]
    chosen = itemgetter(*(header.index(name) if name in header else -1 for name in wanted), -1)
    for line, row in rows:
        # One value too many or too few moves the values after it to other columns, where they mean something else.
        # Trailing commas can hide a missing value, but then the last column is empty.
        ends_early = len(row) < named or (len(row) < len(header) and not row[named - 1])
        if ends_early or len(row) > len(header) or any(row[named:]):
            raise UserError(
                f"{path}, line {line}: the row of {row[0]!r:.80} needs {named} values, as many as the header; "
                "use the table as published"
            )
        values = chosen([*row, ""])[:-1]
        if not values[0] or not values[0].isprintable():  # an unclosed quote swallows line ends
            raise UserError(
                f"{path}, line {line}: {needed[0]} {values[0]!r:.80} is not the name of an image; correct the row"
            )
        yield line, values


def read_names(path: str) -> list[str]:
    """The image names in a list: the first value of each line, or all of them where a line holds several file names.

    Raises:
        UserError: the file does not exist, or is not text.
    """
    names: list[str] = []
    for line in _text(path, "list").splitlines():
        first = re.split(r"[,;\t]", line.strip(), maxsplit=1)[0].strip().strip("\"'").strip()
        words = first.split()
        names += words if all(map(_IMAGE_FILE.fullmatch, words)) else [first]
    return [name for name in names if name]


def _text(path: str, kind: str) -> str:
    data = storage.read(path)
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS if data.startswith(mark)), "")
    if not encoding and 0 in data[:2] and len(data) > 1:
        encoding = "utf-16-be" if data[0] == 0 else "utf-16-le"
    try:
        text = data.decode(encoding or "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a readable {kind} ({error}); copy it again, or save it as UTF-8") from None
    if "\0" in text:
        raise UserError(f"{path} is not a readable {kind} (it holds zero bytes); copy it again")
    return text


def _delimiter(text: str) -> tuple[int, str]:
    """(where the table begins, what separates its values), from the header; Excel may say it in a line of its own."""
    for line in re.finditer(r"[^\r\n]+", text):
        if said := re.fullmatch(r"sep=(.)", line[0].strip('\ufeff "')):
            return line.end(), said[1]
        bare = re.sub(r'"[^"]*"', "", line[0])
        if bare.strip():
            return 0, max(_DELIMITERS, key=bare.count)
    return 0, ","


def _folded(name: str) -> str:
    return " ".join(name.split()).casefold()
