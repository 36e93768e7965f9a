"""Reading the tags of a DICOM file as plain values, and naming them in error messages."""

from __future__ import annotations

import logging
import math
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydicom import uid
from pydicom.datadict import tag_for_keyword
from pydicom.multival import MultiValue
from pydicom.tag import Tag

from cxrscale.types import UnreadableImageError, one_line

JPEG_2000 = uid.JPEG2000TransferSyntaxes
"""Transfer syntaxes of JPEG 2000, also high-throughput."""

# The filters of `warnings` are global, and overlapping catch_warnings of two threads can leave the wrong ones active.
# The lock costs nothing: the guarded code holds the interpreter's lock anyway.
_WARNINGS_LOCK = threading.Lock()


@contextmanager
def silence_pydicom() -> Iterator[None]:
    """Silence pydicom's warnings and log messages: an image is either usable or unreadable for a given reason."""
    log = logging.getLogger("pydicom")
    with _WARNINGS_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        level = log.level
        log.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            log.setLevel(level)


def label(keyword: str) -> str:
    """A tag's name and number for messages: `Rows (0028,0010)`."""
    return f"{keyword} {Tag(tag_for_keyword(keyword))}"


def unreadable(keyword: str, message: str, cause: Exception | None = None) -> UnreadableImageError:
    """The error to raise when a tag makes the image unreadable: the tag, the message, and another library's error."""
    reason = f": {one_line(cause, with_type=True, limit=200)}" if cause is not None else ""
    return UnreadableImageError(f"{label(keyword)} {message}{reason}")


def value(ds: Any, keyword: str) -> Any:
    """A tag's value, or None if absent or empty. Raises UnreadableImageError if it is malformed."""
    try:
        result = ds.get(keyword)
    except Exception as error:  # pydicom converts the value here and may fail in any way
        raise unreadable(keyword, "is malformed", error) from error
    if result is None or (hasattr(result, "__len__") and len(result) == 0):
        return None
    return result


def number(ds: Any, keyword: str, default: float | None = None) -> float:
    """A tag's first value as a finite number; UnreadableImageError if it is not one, or absent without a default."""
    result = value(ds, keyword)
    if result is None:
        if default is None:
            raise unreadable(keyword, "is missing")
        return default
    try:
        first = float(result[0] if isinstance(result, MultiValue) else result)
    except (TypeError, ValueError):
        first = math.nan
    if not math.isfinite(first):
        raise unreadable(keyword, f"is {str(result)[:40]!r}, not a number")
    return first


def integer(ds: Any, keyword: str, allowed: range | tuple[int, ...], expected: str, default: int | None = None) -> int:
    """As `number`, but one of `allowed`; `expected` describes these in the message."""
    result = number(ds, keyword, default)
    if result not in allowed:
        raise unreadable(keyword, f"is {result:g}, not {expected}")
    return int(result)


def text(ds: Any, keyword: str) -> str:
    """A tag as text, for tags that an image does not need; "" if absent, empty or malformed."""
    try:
        return str(value(ds, keyword) or "").strip()
    except UnreadableImageError:
        return ""
