"""Tags of a DICOM file as plain values, and as reasons name them."""

from __future__ import annotations

import logging
import math
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydicom.datadict import tag_for_keyword
from pydicom.multival import MultiValue
from pydicom.tag import Tag

from cxrscale.types import UnreadableImageError

# The filters of `warnings` belong to the process, and overlapping catch_warnings of two threads can leave the wrong
# ones in force. What is guarded holds the interpreter's lock anyway.
_ONE_AT_A_TIME = threading.Lock()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence pydicom, which warns of and logs all that is unusual: an image is usable, or has a reason why not."""
    log = logging.getLogger("pydicom")
    with _ONE_AT_A_TIME, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        level = log.level
        log.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            log.setLevel(level)


def named(keyword: str) -> str:
    """A tag as reasons name it: `Rows (0028,0010)`."""
    return f"{keyword} {Tag(tag_for_keyword(keyword))}"


def wrong(keyword: str, told: str) -> UnreadableImageError:
    """The reason that starts with a tag, to be raised."""
    return UnreadableImageError(f"{named(keyword)} {told}")


def one_line(error: BaseException) -> str:
    """An error of somebody else's code, as part of a reason."""
    text = "".join(letter if letter.isprintable() else " " for letter in f"{type(error).__name__}: {error}")
    return " ".join(text.split())[:200].rstrip(": ")


def value(ds: Any, keyword: str) -> Any:
    """A tag's value, or None where absent or empty; Unreadable where malformed."""
    try:
        found = ds.get(keyword)
    except Exception as error:  # values are converted here, by code that trusts them
        raise wrong(keyword, f"is malformed: {one_line(error)}") from error
    if found is None or (hasattr(found, "__len__") and len(found) == 0):
        return None
    return found


def number(ds: Any, keyword: str, default: float | None = None) -> float:
    """A tag's first value as a finite number; without a default the tag is required, else Unreadable."""
    found = value(ds, keyword)
    if found is None:
        if default is None:
            raise wrong(keyword, "is missing")
        return default
    try:
        first = float(found[0] if isinstance(found, MultiValue) else found)
    except (TypeError, ValueError):
        first = math.nan
    if not math.isfinite(first):
        raise wrong(keyword, f"is {str(found)[:40]!r}, not a number")
    return first


def whole(ds: Any, keyword: str, allowed: range | tuple[int, ...], wanted: str, default: int | None = None) -> int:
    """As `number`, and one of `allowed`, which `wanted` puts in words."""
    found = number(ds, keyword, default)
    if found not in allowed:
        raise wrong(keyword, f"is {found:g}, not {wanted}")
    return int(found)


def text(ds: Any, keyword: str) -> str:
    """A tag as text; "" where absent, empty or malformed, for tags that an image can do without."""
    try:
        return str(value(ds, keyword) or "").strip()
    except UnreadableImageError:
        return ""
