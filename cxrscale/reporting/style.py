"""The one style of every plot: its palette, and figures as SVG for the pages and as PNG for the files."""

from __future__ import annotations

import functools
import io
import re
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure

from cxrscale.shards import UNLABELED, splits

INK, LINE = "#010101", "#020202"
"""Colors that no plot uses for anything else: the page replaces them by its own, which differ in light and dark."""

BLUE, YELLOW, RED, GREEN, PURPLE, CYAN, GRAY = (
    *("#4477aa", "#c9a227", "#dd5566", "#66a182", "#aa3377", "#66ccee"),
    "#999999",
)
"""Readers with color blindness can tell them apart (after Tol 2021), on white and on black."""

COLORS = (BLUE, YELLOW, RED, GREEN, PURPLE, CYAN)
"""In the order in which a plot with several series takes them."""

SPLIT_COLORS = {splits.TRAIN: BLUE, splits.VAL: YELLOW, splits.TEST: RED, UNLABELED: GRAY}
"""The color of each split, the same in every plot."""

WIDE = 9.0
"""Width in inches of a figure that fills a page."""

DPI = 130
"""Pixels per inch of a PNG."""

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.edgecolor": LINE,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "grid.color": LINE,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
}
"""Matplotlib settings under which every figure is drawn and saved."""

P = ParamSpec("P")


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Decorate a function that draws a figure: it draws in STYLE.

    Matplotlib fixes the colors of text and lines when it draws them, so the style must hold at that moment.
    """

    @functools.wraps(draw)
    def draw_in_style(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with mpl.rc_context(STYLE):
            return draw(*args, **kwargs)

    return draw_in_style


def svg(figure: Figure, title: str) -> Markup:
    """The figure as an SVG element that takes the colors of text and lines from the page and loads nothing."""
    buffer = io.StringIO()
    # Its ids depend on the title alone: the page is the same every time, and no two figures share an id.
    with warnings.catch_warnings(), mpl.rc_context({**STYLE, "svg.hashsalt": title}):
        # The reader's browser draws the text; a glyph missing from matplotlib's own font only shifts it slightly.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"| version="1.1"|(?<=<svg) (width|height)="[^"]*"', "", text)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text)
    # The groups' names repeat from figure to figure, and an id may stand only once in a page.
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font-size: \1", text)
    text = text.replace(INK, "currentColor").replace(LINE, "var(--line)")
    return Markup(text.replace("<svg", Markup('<svg role="img" aria-label="{}"').format(title), 1).strip())


def png(figure: Figure) -> bytes:
    """The figure as a PNG on a white background, byte for byte the same for the same figure."""
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    # Layout is most of the work, and an SVG of the same figure need not repeat it.
    figure.set_layout_engine("none")
    return buffer.getvalue()
