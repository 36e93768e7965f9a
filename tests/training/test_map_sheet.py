"""The maps of fixed validation images that a tracker keeps on request."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from cxrscale.models import build_model
from cxrscale.shards import manifest
from cxrscale.training import map_sheet
from tests.conftest import tiny
from tests.tiny import TINY_SEGMENTER


def test_the_same_images_with_findings_come_first(nih_shards: str, tmp_path: Path) -> None:
    recipe, data = tiny(nih_shards, tmp_path, "tracking.map_images=3"), manifest.load(nih_shards)
    rows = map_sheet.fixed_rows(data, recipe)
    assert rows == map_sheet.fixed_rows(data, recipe)
    assert len(rows) == 3
    assert set(rows) <= set(data.rows("val").tolist())
    assert (data.labels(recipe.data.findings)[rows] == 1).any(axis=1).all()


@pytest.mark.parametrize("task", ["classify", "segment"])
def test_each_image_is_drawn_under_its_map(task: str, nih_shards: str, siim_shards: str, tmp_path: Path) -> None:
    shards, base = (nih_shards, ()) if task == "classify" else (siim_shards, TINY_SEGMENTER)
    recipe = tiny(shards, tmp_path, "tracking.map_images=3", **({"base": base} if base else {}))
    torch.manual_seed(0)
    model = build_model(recipe.model, recipe.data).train()
    sheet = map_sheet.draw(model, manifest.load(shards), recipe, torch.device("cpu"))
    side = map_sheet.SIDE
    assert sheet.shape == (2 * side, 2 * side, 3)
    assert not sheet[side:, side:].any()  # three of four places
    assert sheet.std(axis=2).max() > 0  # colors
    assert model.training


def test_a_run_keeps_a_sheet_per_epoch_on_request_and_none_else(
    nih_shards: str, classifier_run: str, tmp_path: Path
) -> None:
    from cxrscale.cli.progress import watch_run
    from cxrscale.training import launch

    recipe = tiny(nih_shards, tmp_path, "tracking.map_images=2", "train.epochs=2", "sampler.steps_per_epoch=2")
    run = Path(launch.launch(recipe, "tiny", watch_run, local=True))
    assert sorted(path.name for path in (run / "maps").iterdir()) == ["epoch-0001.png", "epoch-0002.png"]
    sheet = cv2.imread(str(run / "maps" / "epoch-0002.png"))
    assert sheet is not None
    assert sheet.shape == (map_sheet.SIDE, 2 * map_sheet.SIDE, 3)
    assert np.asarray(sheet).std() > 0
    assert not (Path(classifier_run) / "maps").exists()
