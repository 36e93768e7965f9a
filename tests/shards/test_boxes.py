"""The boxes of a source in the manifest."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from cxrscale.shards import manifest, verify
from cxrscale.sources import nih
from cxrscale.sources.synthetic.archive import SyntheticPaths
from cxrscale.types import UserError
from tests.conftest import keyed
from tests.small_datasets import rewrite_manifest


def copy_of(dataset: str, root: Path, boxes: list[str | None]) -> None:
    """The dataset with other boxes in its manifest."""
    for path in Path(dataset).iterdir():
        if path.is_file():
            (root / path.name).write_bytes(path.read_bytes())
    data = manifest.load(dataset)
    rows = data.table.drop_columns(["root"])
    column = rows.schema.get_field_index("boxes")
    rewrite_manifest(root, rows.set_column(column, "boxes", pa.array(boxes, pa.string())), data.metadata[0])


def test_boxes_are_in_pixels_of_the_image_at_its_own_size(drawn: SyntheticPaths, nih_shards: str) -> None:
    data = manifest.load(nih_shards)
    row_of = {image_id: row for row, image_id in enumerate(data.image_id.tolist())}
    published = nih.read_boxes(str(drawn.nih / "BBox_List_2017.csv"))
    assert published
    for name, boxes in published.items():
        row = row_of[keyed("nih", name)]
        scale = data.table["width"][row].as_py() / 1024
        for found, given in zip(data.boxes(row), boxes, strict=True):
            assert found.finding == given.finding
            assert (found.x, found.y) == pytest.approx((given.x * scale, given.y * scale))
            assert (found.width, found.height) == pytest.approx((given.width * scale, given.height * scale))
    assert sum(bool(data.boxes(row)) for row in range(len(data))) == len(published)


@pytest.mark.parametrize(
    "text",
    [
        "no JSON",
        '{"x": 1}',
        '[["Mass", 1, 2, 3]]',
        '[["Mass", 1, 2, -3, 4]]',
        '[["", 1, 2, 3, 4]]',
        '[["Mass", 1e999, 2, 3, 4]]',
    ],
)
def test_a_manifest_with_impossible_boxes_is_refused(text: str, nih_shards: str, tmp_path: Path) -> None:
    count = len(manifest.load(nih_shards))
    copy_of(nih_shards, tmp_path, [None, None, text, *[None] * (count - 3)])
    with pytest.raises(UserError, match=r"boxes of row 2 is .*, no boxes; shard it again"):
        manifest.load(str(tmp_path))


def test_verify_sees_boxes_that_are_not_those_of_the_sample(nih_shards: str, tmp_path: Path) -> None:
    data = manifest.load(nih_shards)
    boxes = data.table["boxes"].to_pylist()
    assert verify.verify(nih_shards) == []
    row = next(row for row, text in enumerate(boxes) if text)
    boxes[row] = json.dumps([["Mass", 1.0, 2.0, 3.0, 4.0]])
    copy_of(nih_shards, tmp_path, boxes)
    (fault,) = verify.verify(str(tmp_path))
    assert "has another boxes than" in fault
    assert data.image_id[row] in fault
