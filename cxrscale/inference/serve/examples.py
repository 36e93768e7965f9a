"""Images for the first minute, drawn and not anybody's: one normal, one with two findings, one that cannot be read."""

from __future__ import annotations

from functools import cache

import numpy as np

from cxrscale.io import encode_png
from cxrscale.sources import synthetic

EXAMPLES = {
    "normal.png": frozenset[str](),
    "effusion-and-mass.png": frozenset({"Effusion", "Mass"}),
    "unreadable.png": frozenset[str](),
}
"""Name -> what is planted."""
SIZE = 512


@cache
def example(name: str) -> bytes:
    """The file of an example.

    Raises:
        KeyError: there is none of that name.
    """
    rng = np.random.default_rng(7)
    drawn = synthetic.draw(synthetic.sample_anatomy(rng), SIZE, EXAMPLES[name], "PA", rng)
    content = encode_png(drawn.image)
    return content[: len(content) // 2] if name.startswith("unreadable") else content
