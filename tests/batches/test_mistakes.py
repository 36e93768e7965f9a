"""A user's mistakes about data, met on the way that a run takes: each one line that names the field and the remedy."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cxrscale import launch
from cxrscale.archives.phantom import PhantomPaths
from cxrscale.config import Pack
from cxrscale.progress import watch
from cxrscale.schema import InputError
from cxrscale.shards import build
from tests.conftest import TINY_SEGMENTER, tiny


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.findings=[Cardiomegaly, Rickets]", r"data.findings: the shards have no label 'Rickets'; they have Atel"),
        ("augment.size=65", r"augment.size=65 is more than the 64 pixels .*; lower it or shard again"),
        ("data.train_split=fold7", r"split 'fold7' has no pictures; .*train \(\d+\).*: name one of them"),
        ("plan.mix=[1, 2]", r"plan.mix=\[1.0, 2.0\] has 2 shares for 1 data.shards; give one for each"),
    ],
)
def test_shards_that_do_not_fit_the_recipe(nih_shards: str, tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        launch.preflight(tiny(nih_shards, tmp_path, override))
    assert "\n" not in str(error.value)


def test_a_segmenter_without_masks(nih_shards: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data.task=segment: .* has no masks; shard with pack.masks=true") as error:
        launch.preflight(tiny(nih_shards, tmp_path, base=TINY_SEGMENTER))
    assert "\n" not in str(error.value)


def test_no_picture_left_after_a_filter(nih_shards: str, tmp_path: Path) -> None:
    # The one picture that the subset leaves cannot be both with and without a finding.
    recipe = tiny(nih_shards, tmp_path, "plan.subset=1", "plan.sampling=balanced")
    with pytest.raises(InputError, match=r"plan.sampling=balanced: no picture .* plan.subset=1 leaves; raise plan.sub"):
        launch.preflight(recipe)


def test_a_run_does_not_go_on_with_other_shards(drawn: PhantomPaths, nih_shards: str, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(nih_shards, shards)
    recipe = tiny(str(shards), tmp_path / "runs", "train.epochs=1", "plan.steps_per_epoch=1")
    launch.launch(recipe, "tiny", watch, local=True)
    shutil.rmtree(shards)
    build.build("nih", str(drawn.nih), Pack(size=64, quality=80), str(shards), local=True)
    with pytest.raises(InputError, match=r"run tiny was trained on other shards; give another tracking.name") as error:
        launch.launch(recipe, "tiny", watch, local=True)
    assert "\n" not in str(error.value)
