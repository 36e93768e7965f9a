"""The page of a recipe's batches: whole, self-contained, and telling the truth about images and sampling."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cxrscale import config
from cxrscale.config import Augment, Data, Recipe, Sampler
from cxrscale.loader.augment import sample_params
from cxrscale.loader.sampling_stats import count_sampling
from cxrscale.reporting import batch_preview
from cxrscale.shards.manifest import Manifest
from cxrscale.types import UserError
from tests.cli.test_app import run
from tests.loader.conftest import MakeShards
from tests.loader.test_loader import spoil
from tests.loader.test_reader import flip

MOVED: dict[str, Any] = {"size": 48, "hflip": 0.5, "rotation": 15.0, "translation": 0.1, "brightness": 0.1}


def recipe(manifest: Manifest, **sections: dict[str, Any]) -> Recipe:
    data = {"shards": [manifest.table["root"][0].as_py()], "findings": ["Effusion"], **sections.pop("data", {})}
    return config.parse(Recipe, {"data": data, "augment": MOVED, **sections}, where="test")


class Tags(HTMLParser):
    """Collects the tags and every address that a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "img", "br", "path", "use"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "img", "br", "path", "use"):
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "use"):
            assert self.open.pop() == tag


def page(path: Path) -> tuple[str, Tags]:
    text, found = path.read_text(), Tags()
    found.feed(text)
    assert found.open == []
    assert all(address.startswith(("data:image/jpeg;base64,", "#")) for address in found.addresses)
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    return text, found


def test_a_page_of_masks(shards: Manifest, tmp_path: Path) -> None:
    settings = recipe(shards, data={"task": "segment"}, sampler={"sampling": "balanced", "batch_size": 4})
    lines = batch_preview.write(settings, "small", str(tmp_path / "page.html"))
    text, found = page(tmp_path / "page.html")
    assert lines[0] == "images with a finding in a step: promised 2 in every step; drawn 2 in every step"
    assert found.tags.count("img") == 16 * (1 + batch_preview.VERSIONS)
    # Of the training images every other one has an empty mask.
    assert text.count('preserveAspectRatio="none"') == 8 * (1 + batch_preview.VERSIONS)
    assert "broken</td>" not in text
    batch_preview.write(settings, "small", str(tmp_path / "again.html"))
    assert (tmp_path / "again.html").read_text() == text


@pytest.mark.parametrize("reader", ["dali", "reference"])
def test_a_page_of_labels_with_what_cannot_be_read(make_shards: MakeShards, tmp_path: Path, reader: str) -> None:
    manifest = make_shards()
    flip(manifest, 4)
    manifest = spoil(manifest, 6)
    settings = recipe(manifest, data={"reader": reader}, augment={**MOVED, "normalize": "minmax"})
    batch_preview.write(settings, "small", str(tmp_path / "page.html"))
    text, found = page(tmp_path / "page.html")
    assert found.tags.count("img") == 14 * (1 + batch_preview.VERSIONS)
    assert text.count("Cannot be read") == 2


def test_the_verb(shards: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "small.yaml"
    path.write_text("data: {findings: [Effusion]}\n")
    root = shards.table["root"][0].as_py()
    out = str(tmp_path / "page.html")
    code, lines, _ = run(
        capsys, "batches", str(path), f"data.shards=[{root}]", "augment.size=48", "sampler.batch_size=4", "--out", out
    )
    assert (code, lines[-1]) == (0, out)
    assert "different images: promised 16; drawn 16" in lines
    assert "Batches of small" in page(Path(out))[0]
    code, _, error = run(capsys, "batches", str(path), f"data.shards=[{root}]", "augment.size=65", "--out", out)
    assert code == 2
    assert "64 pixels" in error


def test_the_numbers_are_told_as_they_were_drawn() -> None:
    one = np.ones(1, np.int64)

    def told(**fields: Any) -> str:
        augment = Augment.model_validate({"size": 100, **fields})
        numbers = sample_params(augment, 0, one, one, 50 * one, 200 * one, training=True)
        return batch_preview.describe_params(numbers, 0, augment, (200, 50))

    assert told() == "only resized"
    assert told(hflip=1) == "flipped"
    assert told(scale=(1.25, 1.25)) == "×1.25"
    assert told(crop_area=(0.25, 0.25)).startswith("×2.00")
    assert told(hflip=1, scale=(0.8, 0.8), blur=1, noise=0.1) == "flipped, ×0.80, blurred, noise"
    angle = float(told(rotation=20).removesuffix("°").replace("−", "-"))
    flipped = float(told(rotation=20, hflip=1).removeprefix("flipped, ").removesuffix("°").replace("−", "-"))
    assert angle == flipped
    assert 0 < abs(angle) <= 20
    assert re.fullmatch(r"shift [+−]\d+%, [+−]\d+%", told(translation=0.2))


@pytest.mark.parametrize(
    ("fields", "first"),
    [
        ({"sampling": "positives"}, "4 in every step"),
        ({"sampling": "ratio", "positive_share": (0.6, 0.1)}, "2 to 3"),
        ({"sampling": "weighted", "weights": {"Effusion": 3}}, "about"),
        ({}, "about"),
    ],
)
def test_the_tally_of_each_sampling(shards: Manifest, fields: dict[str, Any], first: str) -> None:
    found = count_sampling(shards, Data(findings=("Effusion",)), Sampler.model_validate({"batch_size": 4, **fields}))
    assert found.lines[0].promised.startswith(first)
    assert all(line.kept is not False for line in found.lines)
    assert sum(found.times.values()) == found.pool
    assert sum(times * count for times, count in found.times.items()) == found.steps * found.batch
    assert sum(found.positives.values()) == found.steps
    effusion = found.findings[0]
    assert (effusion.pool, effusion.drawn) == (8, sum(k * n for k, n in found.positives.items()))


def test_a_broken_promise_is_told(shards: Manifest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    take = "cxrscale.loader.sampler.TrainingStream.take"
    rows = shards.rows("train")
    monkeypatch.setattr(take, lambda *_: (np.full((4, 4), rows[0]), np.arange(16).reshape(4, 4)))
    settings = recipe(shards, sampler={"sampling": "balanced", "batch_size": 4})
    assert [line.kept for line in count_sampling(shards, settings.data, settings.sampler).lines] == [
        False,
        False,
        False,
    ]
    batch_preview.write(settings, "small", str(tmp_path / "page.html"))
    assert page(tmp_path / "page.html")[0].count("broken</td>") == 3


def test_refusals_are_those_of_training(shards: Manifest, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no label 'Hernia'"):
        batch_preview.write(recipe(shards, data={"findings": ["Hernia"]}), "small", str(tmp_path / "page.html"))
    assert not (tmp_path / "page.html").exists()
