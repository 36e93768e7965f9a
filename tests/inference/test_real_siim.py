"""The 51 real SIIM images the whole way: a classifier before a segmenter, chosen, measured; DICOM objects of it."""

from __future__ import annotations

import csv
import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cxrscale.cli import app
from cxrscale.config import Pack
from cxrscale.evaluation import MaskRule
from cxrscale.inference import Predictor, predict_files
from cxrscale.inference.dicom_objects import KINDS, SEG
from cxrscale.io import rle_masks
from cxrscale.run import Run
from cxrscale.shards import build
from cxrscale.training import launch
from tests.conftest import tiny
from tests.inference.dicom_objects.made import errors, read
from tests.inference.dicom_objects.test_real import COUNTS, files
from tests.tiny import TINY_CLASSIFIER, TINY_SEGMENTER

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SHARES = {"test": (2, 14), "val": (2, 14)}
"""Split -> positive images and others; the rest is for training."""


@pytest.fixture(scope="module")
def dicoms(real: Path) -> list[str]:
    return [str(path) for folder in ("siim/dicom-images-train", "siim_more") for path in files(real, folder)]


@pytest.fixture(scope="module")
def shards(real: Path, dicoms: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("siim")
    (root / "dicom-images-train").mkdir()
    for path in dicoms:
        (root / "dicom-images-train" / Path(path).name).symlink_to(path)
    (root / "train-rle.csv").symlink_to(real / "siim" / "train-rle.csv")
    with (root / "train-rle.csv").open() as file:
        positive = {row[0] for row in csv.reader(file) if row[1].strip() != "-1"}
    names = [Path(path).stem for path in dicoms]
    left = {True: [one for one in names if one in positive], False: [one for one in names if one not in positive]}
    lists = {}
    for split, shares in {**SHARES, "train": (len(left[True]), len(left[False]))}.items():
        chosen = [
            left[kind].pop()
            for kind, share in zip((True, False), shares, strict=True)
            for _ in range(share)
            if left[kind]
        ]
        (root / f"{split}.txt").write_text("\n".join(chosen))
        lists[split] = str(root / f"{split}.txt")
    settings = Pack(size=128, masks=True, split="lists", split_lists=lists)
    build.build_shards("siim", str(root), settings, str(root / "shards"), local=True)
    return str(root / "shards")


@pytest.fixture(scope="module")
def pair(shards: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A segmenter and a classifier after some 60 steps."""
    root = tmp_path_factory.mktemp("runs")
    common = ("sampler.steps_per_epoch=20", "train.epochs=3", "optim.lr=3e-3", "sampler.sampling=balanced")
    runs = []
    for name, base in (("segmenter", TINY_SEGMENTER), ("classifier", TINY_CLASSIFIER)):
        more = ("data.findings=[Pneumothorax]", "augment.size=128", *common, f"tracking.name={name}")
        runs.append(launch.launch(tiny(shards, root, *more, base=base), name, lambda *_: nullcontext(), local=True))
        Run(runs[-1]).choose_thresholds(resamples=50)
    return runs[0], runs[1]


def command(*words: str) -> str:
    done = CliRunner().invoke(app.app, list(words))
    assert done.exit_code == 0, done.output
    return done.output


def test_a_cascade_is_chosen_measured_and_predicts(pair: tuple[str, str], dicoms: list[str], tmp_path: Path) -> None:
    segmenter, gate = pair
    print(command("threshold", segmenter, "--gate", gate, "--resamples", "50"))
    chosen = json.loads(Path(segmenter, "cascade.json").read_text())
    print(command("evaluate", segmenter, "--gate", gate, "--resamples", "50"))
    measured = json.loads(Path(segmenter, "cascade_metrics.json").read_text())
    assert (measured["images"], measured["chosen_together"]) == (16, True)
    assert measured["threshold"] == chosen["threshold"]
    words = ["predict", *dicoms, "--run", segmenter, "--gate", gate, "--out", str(tmp_path / "out")]
    command(*words)
    rows = json.loads((tmp_path / "out" / "predictions.json").read_text())["predictions"]
    assert [row["path"] for row in rows] == dicoms
    passed = [row["gate_call"] for row in rows]
    print(f"{sum(passed)} of {len(rows)} passed on")
    for row in rows:
        assert row["gate_call"] == (row["gate"]["Pneumothorax"] >= chosen["threshold"])
        assert row["gate_call"] or row["mask_rle"] == rle_masks.EMPTY
        assert ("Pneumothorax" in row.get("probabilities", {})) == row["gate_call"]
    command(*words, "--format", "rle")
    with (tmp_path / "out" / "submission.csv").open(newline="") as file:
        assert [row["EncodedPixels"] for row in csv.DictReader(file)] == [row["mask_rle"] for row in rows]


def test_objects_of_all_real_files_are_valid_and_hold_the_masks(
    pair: tuple[str, str], real: Path, tmp_path: Path
) -> None:
    """A mask for every image, and all of them again without one: then the report stands for the segmentation."""
    paths = [str(path) for folder in COUNTS for path in files(real, folder)]
    predictor, counted = Predictor(pair[0], "cpu", MaskRule(0.0, 0, 0.4)), 0
    for kind in KINDS:
        result = predict_files(predictor, paths, str(tmp_path / kind), kind)
        assert (result.objects, result.without_object, result.not_read) == (len(paths), 0, 0)
        for row in json.loads(Path(result.address).read_text())["predictions"]:
            made = tmp_path / kind / row["objects"][kind]
            assert errors(made) == [], (row["path"], kind)
            source, dataset = read(Path(row["path"])), read(made)
            assert (dataset.PatientID, dataset.StudyInstanceUID) == (source.PatientID, source.StudyInstanceUID)
            if kind == SEG and row["mask_rle"] != rle_masks.EMPTY:
                mask_HW = rle_masks.decode(row["mask_rle"], (row["height"], row["width"]))
                assert np.array_equal(dataset.pixel_array.reshape(mask_HW.shape).astype(np.bool_), mask_HW)
                counted += 1
            made.unlink()
    print(f"{counted} of {len(paths)} segmentations")
    assert counted > len(paths) / 2
