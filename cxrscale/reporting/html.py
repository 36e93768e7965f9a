"""The one environment of all pages: their templates, and the filters that turn values into text."""

from __future__ import annotations

import functools
import json
import math
import re
from typing import Any

import jinja2
from markupsafe import Markup, escape

from cxrscale import __version__
from cxrscale.evaluation import Estimate
from cxrscale.reporting import tables

DASH = "–"
"""What stands where there is no value, and between the ends of an interval."""


def render(template_name: str, /, **context: Any) -> str:
    """A page as one HTML document, the same for the same context.

    Args:
        template_name: a file of templates/, such as audit.html.jinja.
        context: what the template uses; a name that it uses and that is not given is an error.
    """
    return _environment().get_template(template_name).render(**context)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cxrscale.reporting", "templates"),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["version"] = __version__
    environment.filters |= {
        "thousands": thousands,
        "percent": percent,
        "share": share,
        "number": number,
        "significant": significant,
        "estimate": estimate,
        "signed": signed,
        "interval": interval,
        "stacked": stacked,
        "duration": duration,
        "plain": plain,
        "code": code,
        "compact": compact,
    }
    return environment


# Filters


def thousands(count: int) -> str:
    """25,596."""
    return f"{count:,}"


def percent(value: float | None) -> str:
    """12.3%, or a dash."""
    return DASH if value is None or math.isnan(value) else f"{value:.1%}"


def share(value: float | None) -> str:
    """A share of the total as a percentage of two digits (0.42%, 4.2%, 42%), or a dash."""
    if value is None or math.isnan(value):
        return DASH
    return f"{value * 100:.2g}%" if value < 0.1 else f"{value * 100:.0f}%"


def number(value: float | None, digits: int = 3) -> str:
    """So many digits after the point, or a dash."""
    return DASH if value is None or math.isnan(value) else f"{value:.{digits}f}"


def significant(value: Any, digits: int = 4) -> str:
    """A float with that many significant digits, or a dash where it is not finite; anything else as text."""
    if isinstance(value, float):
        return f"{value:.{digits}g}".replace("-", "−") if math.isfinite(value) else DASH
    return DASH if value is None else str(value)


def estimate(value: Estimate | None) -> str:
    """0.912 (0.871–0.944), or the reason for no value, or a dash."""
    return DASH if value is None else tables.estimate(value).replace("-", DASH)


def signed(value: Estimate | None) -> str:
    """+0.041 (−0.003 to +0.082), or the reason for no value, or a dash: for what may be negative."""
    return DASH if value is None else tables.signed(value).replace("-", "\N{MINUS SIGN}")


def interval(value: Estimate, digits: int = 3) -> str:
    """The interval of an estimate without its value: 0.871–0.944; empty where there is none."""
    return "" if math.isnan(value.low) else f"{value.low:.{digits}f}{DASH}{value.high:.{digits}f}"


def stacked(value: Estimate | None, digits: int = 3) -> Markup | str:
    """The value over its interval, or a dash over the reason for no value: for tables with many columns."""
    if value is None:
        return DASH
    below = interval(value, digits) if value.defined else value.reason
    return Markup("{}<br><small>{}</small>").format(number(value.value, digits), below)


def duration(seconds: float) -> str:
    """3 d 4 h, 2 h 5 min, 7 min, 12 s."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    hours, days = minutes // 60, minutes // 1440
    if days:
        return f"{days} d {hours % 24} h"
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min"


def plain(name: str) -> str:
    """A finding's or metric's name in words: Pleural Thickening for Pleural_Thickening."""
    return name.replace("_", " ")


def code(text: str) -> Markup:
    """The text with everything between `backticks` set as code."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def compact(value: Any) -> Any:
    """A recipe's value in one line: JSON where it is no number or text."""
    return json.dumps(value) if isinstance(value, list | dict | bool | None) else value
