"""The published system behind a recipe, and the figures that its authors report."""

from __future__ import annotations

from typing import ClassVar

from cxrscale.config.section import Section


class PublishedFigure(Section):
    """One figure that a publication reports, on images of its own."""

    name: str
    """What the figure is, as the report shows it."""
    value: float | str
    """The number, or text if it is more than one number."""
    metric: str = ""
    """Our metric beside it: a field of the first finding's metrics (auroc, recall), npv or mean_auroc; empty: none."""
    threshold: float | None = None
    """The decision threshold that the figure holds at; null: the stored one, or the figure has none."""


class Reference(Section):
    """The published system that a recipe reproduces. It is only shown in the report and changes nothing else."""

    learned: ClassVar[bool] = False

    system: str = ""
    """Its name, with the publication."""
    data: str = ""
    """The images that its figures were measured on."""
    figures: tuple[PublishedFigure, ...] = ()
    """Its figures: name, value, metric, threshold."""
