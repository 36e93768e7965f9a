"""Rows of a source's CSV tables, with the line numbers that error messages need."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from cxrscale.io import storage
from cxrscale.types import UserError


def read_rows(path: str) -> Iterator[tuple[int, list[str]]]:
    """(line number, values) of the header and of every row that is not empty.

    Raises:
        UserError: the file does not exist, or is not a CSV table in UTF-8.
    """
    try:
        table = csv.reader(io.StringIO(storage.read(path).decode("utf-8-sig"), newline=""), strict=True)
        for row in table:
            if any(map(str.strip, row)):
                yield table.line_num, row
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a readable CSV table ({error}); copy it again") from None
