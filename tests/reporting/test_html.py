"""The environment of all pages and its filters. Milliseconds."""

from __future__ import annotations

import math
from importlib import resources

import jinja2
import pytest

from cxrscale import __version__
from cxrscale.reporting import html

PAGES = [
    path.name
    for path in resources.files("cxrscale.reporting").joinpath("templates").iterdir()
    if path.is_file() and "base" not in path.name
]
"""Reports. The page of the service has a folder of its own: it is an application."""


def test_a_name_that_is_not_given_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError):
        html.render("audit.html.jinja")


SHARED = ("colors.css.jinja",)


@pytest.mark.parametrize("name", sorted(set(PAGES) - {"macros.html.jinja", *SHARED}))
def test_every_page_extends_the_base(name: str) -> None:
    source = resources.files("cxrscale.reporting").joinpath("templates").joinpath(name).read_text("utf-8")
    assert source.startswith('{% extends "base.html.jinja" %}')
    assert "<html" not in source
    assert ":root" not in source
    for block in ("title", "content", "footer"):
        assert f"{{% block {block} %}}" in source


def test_values_are_escaped_and_the_version_stands_below() -> None:
    template = html._environment().from_string(
        '{% extends "base.html.jinja" %}{% block title %}{{ name }}{% endblock %}'
        "{% block content %}{{ name }}{% endblock %}{% block footer %}End.{% endblock %}"
    )
    page = template.render(name="<b>")
    assert page.startswith("<!doctype html>")
    assert page.count("&lt;b&gt;") == 3  # title, heading and content
    assert "<b>" not in page
    assert f"End. Page by cxrscale {__version__}.</p>" in page


def test_numbers() -> None:
    assert html.thousands(25_596) == "25,596"
    assert html.percent(0.1234) == "12.3%"
    assert html.percent(None) == "–"
    assert [html.share(value) for value in (0.0042, 0.042, 0.42, None)] == ["0.42%", "4.2%", "42%", "–"]
    assert html.number(0.12345) == "0.123"
    assert html.number(None) == "–"
    assert html.significant(-0.000123456, 3) == "−0.000123"
    assert [html.significant(value) for value in (math.nan, None, 7, "all")] == ["–", "–", "7", "all"]


def test_text() -> None:
    assert html.plain("Pleural_Thickening") == "Pleural Thickening"
    assert html.code("run `cxrscale verify <x>`") == "run <code>cxrscale verify &lt;x&gt;</code>"
    assert [html.compact(value) for value in ([1, "a"], True, None, 0.5, "a b")] == [
        '[1, "a"]',
        "true",
        "null",
        0.5,
        "a b",
    ]


@pytest.mark.parametrize(
    ("seconds", "words"), [(3.2, "3 s"), (119, "2 min"), (3 * 3600 + 240, "3 h 4 min"), (90_000, "1 d 1 h")]
)
def test_durations(seconds: float, words: str) -> None:
    assert html.duration(seconds) == words
