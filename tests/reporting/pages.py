"""Reads a page as a browser would: which tags, ids and addresses it has, and whether its elements are closed."""

from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

VOID = frozenset({"meta", "img", "br", "link", "input", "hr"})


class Page(HTMLParser):
    """What a page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source = text
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.count: Counter[str] = Counter()
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] += 1
        self.open += [tag] if tag not in VOID else []
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open = self.open[:-1] if tag not in VOID else self.open

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        """The words, with one space between any two."""
        return " ".join(" ".join(self.words).split())


def read_page(path: str | Path) -> Page:
    """The page of a file, after the checks that every page must pass: it is complete and loads nothing."""
    page = Page(Path(path).read_text())
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert "script" not in page.count
    assert all(address.startswith(("data:image/jpeg;base64,", "#")) for address in page.addresses)
    assert not re.search(r"https?://|@import|url\((?!#)", page.source)
    assert all(clip in page.ids for clip in re.findall(r"url\(#([^)]+)\)", page.source))
    assert "prefers-color-scheme: dark" in page.source
    assert "@media print" in page.source
    return page
