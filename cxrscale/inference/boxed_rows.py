"""The images of a split that have boxes, and their maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cxrscale.config import PRESENT, Recipe
from cxrscale.evaluation import BoxedFinding, localization
from cxrscale.inference.explain import Explainer
from cxrscale.loader import ShardReader, usable_rows
from cxrscale.shards import Manifest
from cxrscale.types import Box, UserError

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
        UserError: there are none of these findings.
    """
    names = {"train": recipe.data.train_split, "val": recipe.data.val_split, "test": recipe.data.test_split}
    if split not in names:
        raise UserError(f"--split {split}: give train, val or test")
    rows, boxed, left_out = [], [], 0
    for row, given in _boxes(data, usable_rows(data, names[split], recipe.data).tolist(), findings):
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


def _boxes(data: Manifest, rows: Sequence[int], findings: Sequence[str]) -> Iterator[tuple[int, tuple[Box, ...]]]:
    """(row, its boxes) of the rows that have some. Where a dataset's manifest has none, as those of earlier versions,
    they are looked for in the JSON of the samples that have one of the findings."""
    present_N, root_N = (data.labels(findings) == PRESENT).any(axis=1), data.column("root")
    filled_N = data.table["boxes"].is_valid().to_numpy() if data.has_boxes else np.zeros(len(data), bool)
    silent = {root for root in set(root_N.tolist()) if not filled_N[root_N == root].any()}
    reader = ShardReader(data) if silent else None
    for row in rows:
        if reader is not None and root_N[row] in silent:
            sample = reader.sample_json(row) if present_N[row] else None
            given = _parsed(sample)
        else:
            given = data.boxes(row) if filled_N[row] else ()
        if given:
            yield row, given


def _parsed(sample: Any) -> tuple[Box, ...]:
    """The boxes of a sample's JSON; none where it has no such field or they cannot be."""
    listed = sample.get("boxes", ()) if isinstance(sample, dict) else ()
    try:
        boxes = tuple(Box(str(finding), *map(float, place)) for finding, *place in listed)
    except (TypeError, ValueError):
        return ()
    return boxes if all(np.isfinite([box.x, box.y, box.width, box.height]).all() for box in boxes) else ()


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
