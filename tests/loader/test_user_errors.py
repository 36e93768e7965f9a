"""User errors about data, found where a run starts: each is one line that names the field and the remedy."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cxrscale.cli.progress import watch_run
from cxrscale.config import Pack
from cxrscale.shards import build
from cxrscale.sources.synthetic.archive import SyntheticPaths
from cxrscale.training import launch
from cxrscale.types import UserError
from tests.conftest import tiny
from tests.tiny import TINY_SEGMENTER


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.findings=[Cardiomegaly, Rickets]", r"data.findings: the shards have no label 'Rickets'; they have Atel"),
        ("augment.size=65", r"augment.size=65 is more than the 64 pixels .*; lower it or shard again"),
        ("data.train_split=fold7", r"split 'fold7' has no images; .*train \(\d+\).*: name one of them"),
        (
            "sampler.dataset_weights=[1, 2]",
            r"sampler.dataset_weights=\[1.0, 2.0\] has 2 weights for 1 data.shards; give one for each",
        ),
    ],
)
def test_shards_that_do_not_fit_the_recipe(nih_shards: str, tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        launch.preflight(tiny(nih_shards, tmp_path, override))
    assert "\n" not in str(error.value)


def test_a_segmenter_without_masks(nih_shards: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.task=segment: .* has no masks; shard with pack.masks=true") as error:
        launch.preflight(tiny(nih_shards, tmp_path, base=TINY_SEGMENTER))
    assert "\n" not in str(error.value)


def test_no_image_left_after_a_filter(nih_shards: str, tmp_path: Path) -> None:
    # The one image that the subset leaves cannot be both with and without a finding.
    recipe = tiny(nih_shards, tmp_path, "sampler.max_images=1", "sampler.sampling=balanced")
    with pytest.raises(
        UserError, match=r"sampler.sampling=balanced: no image .* sampler.max_images=1 leaves; raise sampler.max_i"
    ):
        launch.preflight(recipe)


def test_a_run_does_not_go_on_with_other_shards(drawn: SyntheticPaths, nih_shards: str, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(nih_shards, shards)
    recipe = tiny(str(shards), tmp_path / "runs", "train.epochs=1", "sampler.steps_per_epoch=1")
    launch.launch(recipe, "tiny", watch_run, local=True)
    shutil.rmtree(shards)
    build.build_shards("nih", str(drawn.nih), Pack(size=64, quality=80), str(shards), local=True)
    with pytest.raises(UserError, match=r"run tiny was trained on other shards; give another tracking.name") as error:
        launch.launch(recipe, "tiny", watch_run, local=True)
    assert "\n" not in str(error.value)
