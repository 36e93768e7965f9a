"""Several variants of a prediction on one page: each image with its masks and probabilities under every one."""

from __future__ import annotations

from collections.abc import Sequence

from cxrscale.evaluation import Variants
from cxrscale.reporting import html
from cxrscale.reporting.overlay import Thumbnail

TEMPLATE = "variants.html.jinja"
METRICS = {
    "AUROC": "AUROC",
    "passed on": "passed on",
    "dice_all": "Dice, all (empty = 1)",
    "dice_on_positives": "Dice, positives",
    "sensitivity": "positives with a mask",
    "false_masks": "negatives with a mask",
}
"""Key of `VariantScores.metrics` -> its heading."""


def render(result: Variants, thumbnails: Sequence[Sequence[Thumbnail]]) -> str:
    """The page as HTML.

    Args:
        thumbnails: of each image one per variant, with the outline `mask`; none where it could not be read.
    """
    read = [one for one in result.images if not one.error]
    columns = [name for name in METRICS if any(name in one.metrics for one in result.scores)]
    return html.render(
        TEMPLATE,
        result=result,
        images=list(zip(result.images, thumbnails, strict=True)),
        agreeing=sum(one.agree for one in read),
        read=len(read),
        columns=[(name, METRICS[name]) for name in columns],
    )
