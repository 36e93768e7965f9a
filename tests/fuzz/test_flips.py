"""A changed bit in a dataset or a run is seen; `python -m tests.fuzz.flips` tries ten thousand."""

from __future__ import annotations

import shutil
from pathlib import Path

from cxrscale.sources.synthetic.archive import SyntheticPaths
from tests.fuzz.artifacts import cheap, make_world
from tests.fuzz.flips import complete, flips


def test_a_changed_bit_is_seen_by_verify_and_changes_no_label(
    classifier_run: str, nih_shards: str, drawn: SyntheticPaths, tmp_path: Path
) -> None:
    root = tmp_path / "world"
    root.mkdir()
    shutil.copy(next(drawn.nih.rglob("*.png")), root / "image.png")
    with cheap():
        world = complete(make_world(root, nih_shards, classifier_run))
    tried = list(flips(world, 120, 5))
    assert len(tried) == 120
    assert len({flip.name for flip in tried}) > 15
    assert [flip for flip in tried if flip.fault] == []
