"""The preview of a recipe's batches: complete, self-contained, and true to the images and the sampling."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cxrscale import config
from cxrscale.config import Augment, Recipe
from cxrscale.loader.augment import sample_params
from cxrscale.loader.sampling_stats import count_sampling
from cxrscale.reporting import batch_preview
from cxrscale.shards.manifest import Manifest
from cxrscale.types import UserError
from tests.cli.test_app import run
from tests.loader.test_loader import spoil
from tests.loader.test_reader import flip
from tests.reporting.pages import read_page
from tests.small_datasets import MakeShards

MOVED: dict[str, Any] = {"size": 48, "hflip": 0.5, "rotation": 15.0, "translation": 0.1, "brightness": 0.1}


def recipe(manifest: Manifest, **sections: dict[str, Any]) -> Recipe:
    data = {"shards": [manifest.table["root"][0].as_py()], "findings": ["Effusion"], **sections.pop("data", {})}
    return config.parse(Recipe, {"data": data, "augment": MOVED, **sections}, where="test")


def test_a_page_of_masks(shards: Manifest, tmp_path: Path) -> None:
    settings = recipe(shards, data={"task": "segment"}, sampler={"sampling": "balanced", "batch_size": 4})
    lines = batch_preview.write(settings, "small", str(tmp_path / "page.html"))
    page = read_page(tmp_path / "page.html")
    assert lines[0] == "images with a finding per step: expected 2 in every step; observed 2 in every step"
    assert page.count["img"] == 16 * (1 + batch_preview.VERSIONS)
    # Of the training images every other one has an empty mask.
    assert page.source.count('preserveAspectRatio="none"') == 8 * (1 + batch_preview.VERSIONS)
    assert "violated</td>" not in page.source
    batch_preview.write(settings, "small", str(tmp_path / "again.html"))
    assert (tmp_path / "again.html").read_text() == page.source


@pytest.mark.parametrize("backend", ["dali", "opencv"])
def test_a_page_of_labels_with_unreadable_images(make_shards: MakeShards, tmp_path: Path, backend: str) -> None:
    manifest = make_shards()
    flip(manifest, 4)
    manifest = spoil(manifest, 6)
    settings = recipe(manifest, loader={"backend": backend}, augment={**MOVED, "normalize": "minmax"})
    batch_preview.write(settings, "small", str(tmp_path / "page.html"))
    page = read_page(tmp_path / "page.html")
    assert page.count["img"] == 14 * (1 + batch_preview.VERSIONS)
    assert page.text.count("This image cannot be read") == 2


def test_the_command(shards: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "small.yaml"
    path.write_text("data: {findings: [Effusion]}\n")
    root = shards.table["root"][0].as_py()
    out = str(tmp_path / "page.html")
    code, lines, _ = run(
        capsys, "preview", str(path), f"data.shards=[{root}]", "augment.size=48", "sampler.batch_size=4", "--out", out
    )
    assert (code, lines[-1]) == (0, out)
    assert "different images: expected 16; observed 16" in lines
    assert "Batches of small" in read_page(out).text
    code, _, error = run(capsys, "preview", str(path), f"data.shards=[{root}]", "augment.size=65", "--out", out)
    assert code == 2
    assert "64 pixels" in error


def test_captions_describe_the_sampled_parameters() -> None:
    one = np.ones(1, np.int64)

    def caption(**fields: Any) -> str:
        augment = Augment.model_validate({"size": 100, **fields})
        params = sample_params(augment, 0, one, one, (50 * one, 200 * one), training=True)
        return batch_preview.describe_params(params, 0, augment, (200, 50))

    assert caption() == "only resized"
    assert caption(hflip=1) == "flipped"
    assert caption(scale=(1.25, 1.25)) == "×1.25"
    assert caption(crop_area=(0.25, 0.25)).startswith("×2.00")
    assert caption(hflip=1, scale=(0.8, 0.8), blur=1, noise=0.1) == "flipped, ×0.80, blurred, noise"
    angle = float(caption(rotation=20).removesuffix("°").replace("−", "-"))
    flipped = float(caption(rotation=20, hflip=1).removeprefix("flipped, ").removesuffix("°").replace("−", "-"))
    assert angle == flipped
    assert 0 < abs(angle) <= 20
    assert re.fullmatch(r"shift [+−]\d+%, [+−]\d+%", caption(translation=0.2))


@pytest.mark.parametrize(
    ("fields", "first"),
    [
        ({"sampling": "positives"}, "4 in every step"),
        ({"sampling": "ratio", "positive_share": (0.6, 0.1)}, "2 to 3"),
        ({"sampling": "weighted", "weights": {"Effusion": 3}}, "about"),
        ({}, "about"),
    ],
)
def test_the_statistics_of_each_policy(shards: Manifest, fields: dict[str, Any], first: str) -> None:
    stats = count_sampling(shards, recipe(shards, sampler={"batch_size": 4, **fields}))
    assert stats.checks[0].expected.startswith(first)
    assert all(check.ok is not False for check in stats.checks)
    assert sum(stats.times.values()) == stats.pool
    assert sum(times * count for times, count in stats.times.items()) == stats.steps * stats.batch
    assert sum(stats.positives.values()) == stats.steps
    effusion = stats.findings[0]
    assert (effusion.pool, effusion.sampled) == (8, sum(k * n for k, n in stats.positives.items()))


def test_a_broken_promise_is_caption(shards: Manifest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    take = "cxrscale.loader.sampler.TrainingStream.take"
    rows = shards.rows("train")
    monkeypatch.setattr(take, lambda *_: (np.full((4, 4), rows[0]), np.arange(16).reshape(4, 4)))
    settings = recipe(shards, sampler={"sampling": "balanced", "batch_size": 4})
    assert [check.ok for check in count_sampling(shards, settings).checks] == [False, False, False]
    batch_preview.write(settings, "small", str(tmp_path / "page.html"))
    assert (tmp_path / "page.html").read_text().count("violated</td>") == 3


def test_user_errors_are_those_of_training(shards: Manifest, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no label 'Hernia'"):
        batch_preview.write(recipe(shards, data={"findings": ["Hernia"]}), "small", str(tmp_path / "page.html"))
    assert not (tmp_path / "page.html").exists()
