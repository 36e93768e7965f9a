"""Datasets as inputs: one row per image, with the scores that the dataset's own split has."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from cxrscale.cli import app
from cxrscale.inference import Predictor, find_inputs, predict_files, split_scores, stored_images
from cxrscale.io import storage
from cxrscale.shards import manifest
from cxrscale.types import probabilities_of


@pytest.fixture(scope="module")
def predictor(classifier_run: str) -> Predictor:
    return Predictor(classifier_run, "cpu")


@pytest.fixture(scope="module")
def segmenter(segmenter_run: str) -> Predictor:
    return Predictor(segmenter_run, "cpu")


@pytest.fixture
def nih(nih_shards: str, tmp_path: Path) -> Path:
    """A copy of the dataset, to be damaged."""
    return Path(shutil.copytree(nih_shards, tmp_path / "nih"))


def test_a_split_of_a_dataset_gets_the_scores_of_that_split(
    predictor: Predictor, classifier_run: str, nih_shards: str, tmp_path: Path
) -> None:
    run = shutil.copytree(classifier_run, tmp_path / "run")
    scores = split_scores.predict_split(run, "test")
    paths = find_inputs([nih_shards], split="test").paths
    result = predict_files(predictor, paths, str(tmp_path / "out"), "parquet")
    assert (result.read, result.not_read) == (len(scores.image_id), 0)
    rows = pq.read_table(result.address).to_pylist()
    assert sorted(row["image_id"] for row in rows) == sorted(scores.image_id)
    expected = dict(zip(scores.image_id, scores.logit_NF, strict=True))
    for row in rows:
        assert row["path"].startswith(nih_shards)
        assert row["path"].endswith(f".tar/{row['image_id']}")
        for name, logit in zip(scores.findings, expected[row["image_id"]].tolist(), strict=True):
            assert row[f"{name}.logit"] == pytest.approx(logit, abs=1e-5)


def test_without_a_split_a_dataset_is_all_its_images(nih_shards: str) -> None:
    data = manifest.load(nih_shards)
    found = find_inputs([nih_shards, nih_shards])
    assert (len(found.paths), found.twice) == (len(data), len(data))
    assert [path.rpartition("/")[2] for path in found.paths] == data.image_id.tolist()


def test_a_mask_has_the_size_that_the_image_had(segmenter: Predictor, siim_shards: str) -> None:
    (path, *_) = find_inputs([siim_shards]).paths
    prediction = segmenter(path)
    assert (prediction.height, prediction.width, prediction.error) == (96, 96, "")
    assert prediction.spacing_mm is not None
    assert prediction.mask_area is not None
    assert prediction.mask_area_mm2 == pytest.approx(prediction.mask_area * np.prod(prediction.spacing_mm))
    assert storage.exists(path.rpartition("/")[0])


def test_an_image_of_another_size_is_stored_as_the_training_images_were(
    predictor: Predictor, nih_shards: str, nih: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = find_inputs([nih_shards]).paths[0]
    stored = stored_images.read_stored(path)
    assert stored is not None
    pixels = {"codec": "png", "size": 48, "quality": 95}
    smaller = stored.as_stored(pixels)
    decoded = cv2.imdecode(np.frombuffer(smaller, np.uint8), cv2.IMREAD_GRAYSCALE)
    assert decoded is not None
    assert decoded.shape == (48, 48)
    assert stored.as_stored(stored.pixels) == stored.data
    assert stored.warnings(pixels) == ()
    assert stored.warnings({**pixels, "size": 512}) == (
        "stored at 64 pixels; the training images are stored at 512 pixels",
    )
    monkeypatch.setattr(Predictor, "stores", ({**stored.pixels, "size": 96},))
    found = predictor(find_inputs([str(nih)]).paths[0])
    assert found.warnings == ("stored at 64 pixels; the training images are stored at 96 pixels",)
    assert found.probabilities


def test_damage_is_the_reason_of_its_image_alone(predictor: Predictor, nih: Path) -> None:
    data = manifest.load(str(nih))
    table, (first, second) = data.table, find_inputs([str(nih)]).paths[:2]
    shard = nih / table["shard"][0].as_py()
    content = bytearray(shard.read_bytes())
    content[table["image_offset"][0].as_py() + 40] ^= 255
    shard.write_bytes(content)
    damaged, whole = predictor.predict([first, second])
    assert "bytes do not match their CRC-32; run `cxrscale verify" in damaged.error
    assert damaged.path == first
    assert whole.probabilities
    assert predictor(f"{shard}/nothing").error.endswith(f"the dataset {nih} has no such image")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{nih}", "--split", "fold9"], r"--split fold9: .* has .*test \(\d+\).*; name one of these"),
        (["{nih}", "{run}", "--split", "test"], "--split test is one of datasets, and .* is none"),
        (["--split", "test", "--workers", "2"], "--workers goes with files or datasets"),
        ([], r"predict takes inputs, or --split train\|val\|test for the run's own images"),
    ],
)
def test_a_split_of_what_has_none_is_one_line(
    words: list[str], message: str, nih_shards: str, classifier_run: str, tmp_path: Path
) -> None:
    given = [word.format(nih=nih_shards, run=classifier_run) for word in words]
    done = CliRunner().invoke(app.app, ["predict", "--run", classifier_run, "--out", str(tmp_path / "out"), *given])
    assert done.exit_code == 2
    assert re.search(message, done.output)


def test_the_command_draws_overlays_of_a_dataset_and_makes_no_dicom_objects_of_it(
    segmenter_run: str, siim_shards: str, tmp_path: Path
) -> None:
    words = ["predict", siim_shards, "--split", "val", "--run", segmenter_run, "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app.app, [*words, "--overlay"])
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "out" / "predictions.json").read_text())["predictions"]
    drawn = cv2.imread(str(tmp_path / "out" / rows[0]["objects"]["overlay"]))
    assert drawn is not None
    assert drawn.shape[1] == rows[0]["width"] == 96
    assert CliRunner().invoke(app.app, [*words, "--format", "dicom-sr"]).exit_code == 3
    rows = json.loads((tmp_path / "out" / "predictions.json").read_text())["predictions"]
    assert all("name no patient" in row["object_errors"]["dicom-sr"] for row in rows)


def test_probabilities_are_those_of_the_logits(predictor: Predictor, nih_shards: str) -> None:
    found = predictor(find_inputs([nih_shards]).paths[0])
    assert found.probabilities == pytest.approx({k: probabilities_of(v) for k, v in found.logits.items()})
