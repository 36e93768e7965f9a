"""The images of a split that have boxes, and their maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cxrscale.config import Recipe
from cxrscale.evaluation import BoxedFinding, localization
from cxrscale.inference.explain import Explainer
from cxrscale.loader import usable_rows
from cxrscale.shards import Manifest
from cxrscale.types import UserError

Tell = Callable[[str, int, int], None]
"""Called with (what is done, images since the last call, images in all)."""


@dataclass(frozen=True, slots=True)
class BoxedRows:
    """Every finding of every image of a split that has boxes of it."""

    row_N: npt.NDArray[np.int64]
    """Of the manifest, ascending."""
    boxed: tuple[BoxedFinding, ...]
    """N."""
    left_out: int
    """Boxes without area inside their image."""

    @property
    def rows(self) -> list[int]:
        """The images, each once."""
        return sorted(set(self.row_N.tolist()))

    def only(self, chosen: Sequence[int]) -> BoxedRows:
        """Some of them."""
        return BoxedRows(self.row_N[list(chosen)], tuple(self.boxed[n] for n in chosen), self.left_out)


def boxed_rows(
    data: Manifest, person_N: npt.NDArray[np.object_], recipe: Recipe, split: str, findings: Sequence[str]
) -> BoxedRows:
    """The boxes of a split.

    Raises:
        UserError: there are none of these findings, or the datasets do not know their boxes.
    """
    names = {"train": recipe.data.train_split, "val": recipe.data.val_split, "test": recipe.data.test_split}
    if split not in names:
        raise UserError(f"--split {split}: give train, val or test")
    if not data.has_boxes:
        raise UserError(
            f"{', '.join(recipe.data.shards)}: no boxes in the manifest; datasets of earlier versions and sources "
            "without boxes have none: `cxrscale shard` again from NIH or RSNA"
        )
    rows, boxed, left_out = [], [], 0
    for row in usable_rows(data, names[split], recipe.data).tolist():
        given = data.boxes(row)
        height, width = data.table["height"][row].as_py(), data.table["width"][row].as_py()
        for finding in findings:
            own = [box for box in given if box.finding == finding]
            truth_K4 = localization.shares(own, width, height)
            left_out += len(own) - len(truth_K4)
            if len(truth_K4):
                rows.append(row)
                boxed.append(BoxedFinding(finding, str(person_N[row]), truth_K4))
    if not rows:
        raise UserError(
            f"--split {split}: no image has a box of {', '.join(findings)}; NIH has boxes in its official test list "
            "alone, RSNA in every split"
        )
    return BoxedRows(np.array(rows, dtype=np.int64), tuple(boxed), left_out)


def read_maps(
    explainer: Explainer, data: Manifest, boxed: BoxedRows, tell: Tell
) -> tuple[BoxedRows, list[npt.NDArray[np.float32]], npt.NDArray[np.float64]]:
    """What of the boxed findings could be read, and the map and probability of each. Large score maps are reduced to
    the grid that boxes are drawn on: a thousand of 1024 x 1024 would take 4 GB."""
    by_row: dict[int, list[int]] = {}
    for n, row in enumerate(boxed.row_N.tolist()):
        by_row.setdefault(row, []).append(n)
    maps: dict[int, npt.NDArray[np.float32]] = {}
    probabilities: dict[int, float] = {}
    rows = boxed.rows
    tell("maps", 0, len(rows))
    for mapped in explainer.rows(data, rows, lambda count: tell("maps", count, len(rows))):
        for n in by_row[mapped.row]:
            finding = boxed.boxed[n].finding
            maps[n] = localization.reduced(mapped.maps[finding])
            probabilities[n] = mapped.probabilities[finding]
    kept = sorted(maps)
    if not kept:
        raise UserError(f"none of the {len(rows)} images with boxes could be read; run `cxrscale verify`")
    return boxed.only(kept), [maps[n] for n in kept], np.array([probabilities[n] for n in kept])
