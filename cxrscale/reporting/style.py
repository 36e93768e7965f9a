"""The one style of all plots, and figures as SVG for the pages."""

from __future__ import annotations

import io
import re
import warnings
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure

from cxrscale.shards import UNLABELED, splits

INK, LINE = "#010101", "#020202"
"""Colors that no plot uses for anything else: the page replaces them by its own, which differ in light and dark."""


SPLIT_COLORS = {splits.TRAIN: "#4477aa", splits.VAL: "#c9a227", splits.TEST: "#dd5566", UNLABELED: "#999999"}
"""Told apart by the color-blind too (after Tol 2021), and visible on white and on black."""


COLORS = ("#4477aa", "#c9a227", "#dd5566", "#66a182", "#aa3377", "#66ccee")


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


def svg(figure: Figure, title: str) -> Markup:
    """The figure as an SVG element that takes letters and lines from the page, and points nowhere outside it."""
    buffer = io.StringIO()
    # Its ids depend on the title alone: the page is the same every time, and no two figures share an id.
    with warnings.catch_warnings(), mpl.rc_context({"svg.hashsalt": title}):
        # Letters are drawn by the reader's browser; that matplotlib's own font lacks one only misplaces it slightly.
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
