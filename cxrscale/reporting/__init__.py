"""Everything that people read: tables for the terminal, plots, and self-contained HTML pages.

A page is a template of templates/ that extends base.html.jinja and is rendered by `html.render`; a plot is drawn in the
one style of `style`; an image with outlines of masks is a `Thumbnail` of `overlay`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
