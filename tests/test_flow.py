"""The life of an image: one image followed from the raw archive to its prediction.

Read it from top to bottom; each test takes up what the one before left in `way`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from cxrscale import sources
from cxrscale.cli.progress import watch_run
from cxrscale.config import Pack
from cxrscale.inference import Predictor, predictions
from cxrscale.io.images import load_image, resize_image
from cxrscale.loader.loader import evaluation_batches, training_batches
from cxrscale.run import Run
from cxrscale.shards import build, manifest
from cxrscale.sources.synthetic.archive import SyntheticPaths
from cxrscale.training import launch
from cxrscale.types import Batch, ImageRecord
from tests.conftest import keyed, tiny


@dataclass
class Way:
    """What has become of our image so far."""

    folder: Path
    record: ImageRecord | None = None
    shards: str = ""
    row: int = -1
    run: Path = Path()
    facts: dict[str, Any] = field(default_factory=dict)


@pytest.fixture(scope="module")
def way(tmp_path_factory: pytest.TempPathFactory) -> Way:
    return Way(tmp_path_factory.mktemp("way"))


def test_1_an_archive_becomes_records(way: Way, drawn: SyntheticPaths) -> None:
    """A reader turns an archive's tables into one record an image; no pixel is read. Ours is a test image."""
    records = sources.read("nih", str(drawn.nih)).records
    way.record = next(r for r in records if r.split == "test" and r.findings["Effusion"] == 1)
    assert way.record.image_id.startswith(way.record.patient)
    assert way.record.findings["Hernia"] == 0
    assert Path(way.record.path).is_file()


def test_2_records_become_shards(way: Way, drawn: SyntheticPaths) -> None:
    """Packing decodes, resizes and encodes each image into a tar, and writes the manifest last."""
    way.shards = str(way.folder / "shards")
    packed = build.build_shards("nih", str(drawn.nih), Pack(size=64, samples_per_shard=20), way.shards, local=True)
    assert (packed.images, packed.quarantined) == (80, 0)


def test_3_the_manifest_is_the_data_set(way: Way) -> None:
    """One row an image: who (by a keyed hash), what, which split, and where its bytes lie, to read without the tar."""
    assert way.record is not None
    data = manifest.load(way.shards)
    way.row = int(np.flatnonzero(data.image_id == keyed("nih", way.record.image_id))[0])
    line = {name: data.table[name][way.row].as_py() for name in data.table.column_names}
    assert (line["split"], line["label.Effusion"]) == ("test", 1)
    assert line["patient"] == keyed("nih", way.record.patient)
    assert way.record.patient not in json.dumps(line, default=str)
    with (Path(way.shards) / line["shard"]).open("rb") as tar:
        tar.seek(line["image_offset"])
        stored = cv2.imdecode(np.frombuffer(tar.read(line["image_length"]), np.uint8), cv2.IMREAD_GRAYSCALE)
    assert stored is not None
    original = load_image(Path(way.record.path).read_bytes()).image_HW
    way.facts["stored"] = stored
    # JPEG at quality 95: on average within two gray levels of the resized original.
    difference = stored.astype(float) - resize_image(original, 64)
    assert np.abs(difference).mean() < 2


def test_4_a_batch_is_a_function_of_the_plan(way: Way, tmp_path: Path) -> None:
    """In evaluation every image comes once; ours is resized and normalized, not augmented."""
    recipe = tiny(way.shards, tmp_path, "augment.size=64", "augment.preset=chexnet")
    data = manifest.load(way.shards)

    def ours(batches: Any) -> Batch:
        found: Batch = next(batch for batch in batches if way.row in batch.row_B[batch.valid_B].tolist())
        return found

    batch = ours(evaluation_batches(data, ["test"], recipe))
    place = batch.row_B.tolist().index(way.row)
    assert batch.image_BCHW.shape == (8, 1, 64, 64)
    assert batch.label_BF[place].tolist()[1] == 1.0  # data.findings is Cardiomegaly, Effusion, Mass
    expected = (way.facts["stored"] / 255 - recipe.augment.mean) / recipe.augment.std
    assert np.abs(batch.image_BCHW[place, 0].numpy() - expected).max() < 0.02


def test_5_training_leaves_a_run(way: Way) -> None:
    """Our image is in the test split: no training batch holds it. The run keeps its recipe and its best weights."""
    recipe = tiny(way.shards, way.folder / "runs", "train.epochs=2", "sampler.steps_per_epoch=6", "optim.lr=3e-3")
    data = manifest.load(way.shards)
    batches = training_batches(data, recipe)
    seen = {row for _ in range(12) for row in next(batches).row_B.tolist()}
    batches.close()
    assert way.row not in seen
    assert set(data.split[sorted(seen)]) == {"train"}

    way.run = Path(launch.launch(recipe, "tiny", watch_run, local=True))
    about = json.loads((way.run / "run.json").read_text())
    assert about["finished"]
    assert about["manifest"] == data.digest
    lines = [json.loads(line) for line in (way.run / "train_log.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines].count("val") == 2


def test_6_thresholds_come_from_validation_alone(way: Way) -> None:
    """The cut-off of each finding is searched on validation scores; the test split has not been scored yet."""
    chosen = Run(way.run).choose_thresholds()
    assert chosen.split == "val"
    assert set(chosen.thresholds) == {"Cardiomegaly", "Effusion", "Mass"}
    assert not (way.run / "predictions-test.parquet").exists()


def test_7_metrics_have_intervals_and_count_each_image_once(way: Way) -> None:
    """Now the test split is scored, every image once, and the intervals come from resampled patients."""
    assert way.record is not None
    test = Run(way.run).evaluate(resamples=50)
    data = manifest.load(way.shards)
    assert test.images == (data.split == "test").sum()
    auroc = test.findings["Effusion"].auroc
    assert auroc.low <= auroc.value <= auroc.high
    scores = predictions.read_predictions(way.run / "predictions-test.parquet")
    assert sorted(scores.image_id) == sorted(data.image_id[data.split == "test"])
    place = scores.image_id.tolist().index(keyed("nih", way.record.image_id))
    way.facts["score"] = scores.probability_NF[place]


def test_8_a_file_is_predicted_as_its_shard_was(way: Way) -> None:
    """The raw file goes the shard's way in memory and comes to the very same probabilities."""
    assert way.record is not None
    good, bad = Predictor(way.run).predict([way.record.path, __file__])
    assert list(good.probabilities.values()) == pytest.approx(way.facts["score"].tolist(), abs=1e-5)
    assert bad.probabilities == {}
    assert bad.error
    assert torch.isfinite(torch.tensor(list(good.probabilities.values()))).all()
