"""`predict --format dicom-...`: one object per image and one row, over interruptions, in folders and in buckets."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from typer.testing import CliRunner

from cxrscale.cli import app
from cxrscale.evaluation import DEFAULT_MASK_RULE
from cxrscale.inference import FilePredictions, Prediction, Predictor, journal, predict_files
from cxrscale.inference.dicom_objects import SEG, SR
from cxrscale.io import rle_masks, storage
from cxrscale.sources.synthetic.archive import SyntheticPaths
from tests.inference.dicom_objects.made import PATIENT

ALWAYS = replace(DEFAULT_MASK_RULE, top=0.02, bottom=0.02, min_area=1)
"""A rule by which a hardly trained model finds masks."""


@pytest.fixture(scope="module")
def run(segmenter_run: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(shutil.copytree(segmenter_run, tmp_path_factory.mktemp("objects") / "run"))


@pytest.fixture(scope="module")
def predictor(run: str) -> Predictor:
    return Predictor(run, "cpu", ALWAYS)


@pytest.fixture
def folder(drawn: SyntheticPaths, tmp_path: Path) -> Path:
    """Four DICOM files with patients, two of them of one name, and a PNG."""
    root = tmp_path / "images"
    (root / "deep").mkdir(parents=True)
    for number, path in enumerate(sorted(drawn.siim.rglob("*.dcm"))[:4]):
        ds = pydicom.dcmread(path)
        for keyword in PATIENT:
            if not keyword.endswith("UID") and keyword != "PixelSpacing":
                setattr(ds, keyword, PATIENT[keyword])
        for keyword in ("StudyInstanceUID", "SeriesInstanceUID"):
            setattr(ds, keyword, ds.get(keyword) or f"1.2.3.{number}")
        ds.save_as(root / ("deep/0.dcm" if number == 3 else f"{number}.dcm"))
    shutil.copy(sorted(drawn.nih.rglob("*.png"))[0], root / "x.png")
    return root


def rows(result: FilePredictions) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(storage.read(result.address))["predictions"]
    return found


def paths(folder: Path) -> list[str]:
    return [str(path) for path in sorted(folder.rglob("*.*"))]


def test_each_image_has_an_object_or_a_reason(predictor: Predictor, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = predict_files(predictor, paths(folder), str(out), SEG)
    assert (result.read, result.objects, result.without_object) == (5, 4, 1)
    by_name = {row["path"]: row for row in rows(result)}
    assert list(by_name) == paths(folder)
    png = by_name.pop(str(folder / "x.png"))
    assert "PNG and JPEG files name no patient" in png["object_errors"][SEG]
    assert png["probabilities"]
    written = {row["objects"][SEG] for row in by_name.values()}
    assert {f"objects/{path.name}" for path in (out / "objects").iterdir()} == written
    assert len(written) == 4
    empty = 0
    for path, row in by_name.items():
        made = pydicom.dcmread(out / row["objects"][SEG])
        source = pydicom.dcmread(path)
        assert (made.PatientName, made.StudyInstanceUID) == (PATIENT["PatientName"], source.StudyInstanceUID)
        mask_HW = rle_masks.decode(row["mask_rle"], (row["height"], row["width"]))
        empty += not mask_HW.any()
        if mask_HW.any():
            assert np.array_equal(made.pixel_array.reshape(mask_HW.shape).astype(np.bool_), mask_HW)
        else:
            assert made.Modality == "SR"
    assert result.empty_masks == empty < 4
    assert "canary" not in Path(result.address).read_text().lower()


def test_negatives_are_reports(run: str, folder: Path, tmp_path: Path) -> None:
    never = Predictor(run, "cpu", replace(DEFAULT_MASK_RULE, min_area=10**9))
    result = predict_files(never, paths(folder)[:4], str(tmp_path / "out"), SEG)
    assert (result.objects, result.empty_masks) == (4, 4)
    assert all(row["objects"][SEG].endswith(".sr.dcm") for row in rows(result))


def test_an_interrupted_command_writes_each_object_once(
    predictor: Predictor, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "ROWS", 2)
    monkeypatch.setattr(Predictor, "batch_size", 2)
    out, seen = tmp_path / "out", list[str]()

    def interrupt(prediction: Prediction) -> None:
        seen.append(prediction.path)
        if len(seen) == 3:
            raise KeyboardInterrupt

    def written() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (out / "objects").iterdir()}

    with pytest.raises(KeyboardInterrupt):
        predict_files(predictor, paths(folder), str(out), SEG, interrupt)
    before = written()
    assert len(before) == 4  # whole batches
    # What a kill leaves: objects whose rows were not yet written.
    sorted((out / "parts").glob("*.parquet"))[-1].unlink()
    result = predict_files(predictor, paths(folder), str(out), SEG)
    assert (result.resumed, result.objects) == (2, 4)
    assert before.items() <= written().items()
    assert len(written()) == 4
    assert not list(out.rglob(".tmp-*"))


@pytest.mark.slow
def test_a_killed_command_goes_on(run: str, drawn: SyntheticPaths, folder: Path, tmp_path: Path) -> None:
    sources = sorted(drawn.siim.rglob("*.dcm"))
    for number in range(24):
        ds = pydicom.dcmread(folder / "0.dcm")
        ds.PixelData = pydicom.dcmread(sources[number % len(sources)]).PixelData
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.4.{number}"
        ds.save_as(folder / f"more{number}.dcm")
    (folder / "x.png").unlink()
    script = (
        "import sys; from cxrscale.inference import journal; journal.ROWS = 2\n"
        "from cxrscale.cli import app; sys.argv[0] = 'cxrscale'; app.main()"
    )

    def command(out: str) -> list[str]:
        words = ["predict", str(folder), "--run", run, "--out", str(tmp_path / out), "--format", SR]
        return [sys.executable, "-c", script, *words]

    def written(out: str) -> dict[str, str]:
        found = (tmp_path / out / "objects").glob("*.dcm")
        return {path.name: str(pydicom.dcmread(path).SOPInstanceUID) for path in found}

    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command("out"), env=environment, stdout=subprocess.DEVNULL) as process:
        while len(list((tmp_path / "out" / "objects").glob("*.dcm"))) < 5 and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    kept = written("out")
    for out in ("out", "whole"):
        ended = subprocess.run(command(out), env=environment, capture_output=True, text=True, timeout=120)
        assert ended.returncode == 0, ended.stderr
        assert "28 DICOM objects" in ended.stdout
    assert kept.items() <= written("out").items()
    assert len(kept) < 28
    assert written("out") == written("whole")
    assert not list((tmp_path / "out").rglob(".tmp-*"))


def test_another_format_makes_its_own_objects_of_unfinished_predictions(
    predictor: Predictor, folder: Path, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")

    def interrupt(prediction: Prediction) -> None:
        raise KeyboardInterrupt(prediction.path)

    with pytest.raises(KeyboardInterrupt):
        predict_files(predictor, paths(folder), out, "json", interrupt)
    result = predict_files(predictor, paths(folder), out, SR)
    assert (result.resumed, result.objects) == (0, 4)


def test_a_bucket_gets_the_same_objects(predictor: Predictor, folder: Path, s3: str) -> None:
    for path in paths(folder)[:2]:
        storage.write(f"{s3}/dicom/{Path(path).name}", Path(path).read_bytes())
    found = [f"{s3}/dicom/{Path(path).name}" for path in paths(folder)[:2]]
    result = predict_files(predictor, found, f"{s3}/dicom-out", SEG)
    for row in rows(result):
        assert storage.read(f"{s3}/dicom-out/{row['objects'][SEG]}")[128:132] == b"DICM"


def command(words: Sequence[str]) -> Any:
    return CliRunner().invoke(app.app, ["predict", *words])


def test_the_command_says_what_it_wrote(run: str, folder: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    given = ["--run", run, "--out", out, "--format", SR]
    done = command([str(folder / "0.dcm"), *given])
    assert done.exit_code == 0, done.output
    assert f"1 DICOM objects in {out}/objects" in done.output
    done = command([str(folder), *given])
    assert getattr(done.exception, "exit_code", done.exit_code) == 3
    assert "4 DICOM objects" in done.output
    assert "1 of 5 images lack an object or overlay; `object_errors`" in f"{done.output}{done.exception}"
    assert "canary" not in done.output.lower()
