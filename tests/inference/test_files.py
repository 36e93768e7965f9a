"""Predictions of many files: which files, in what form, interrupted and resumed."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cxrscale.evaluation import DEFAULT_MASK_RULE
from cxrscale.inference import Prediction, Predictor, find_inputs, formats, journal, predict_files
from cxrscale.io import rle_masks, storage
from cxrscale.sources.synthetic.archive import SyntheticPaths
from cxrscale.types import UserError


@pytest.fixture(scope="module")
def run(classifier_run: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(shutil.copytree(classifier_run, tmp_path_factory.mktemp("files") / "run"))


@pytest.fixture(scope="module")
def predictor(run: str) -> Predictor:
    return Predictor(run, "cpu")


@pytest.fixture
def folder(drawn: SyntheticPaths, tmp_path: Path) -> Path:
    """Images in several forms and depths, and what is none."""
    root = tmp_path / "images"
    (root / "deep" / "er").mkdir(parents=True)
    pngs, dicoms = sorted(drawn.nih.rglob("*.png")), sorted(drawn.siim.rglob("*.dcm"))
    for number, path in enumerate(pngs[:5]):
        shutil.copy(path, root / f"{number}.png")
    shutil.copy(dicoms[0], root / "deep" / "a.DCM")
    shutil.copy(dicoms[1], root / "deep" / "er" / "without_suffix")
    (root / "notes.txt").write_text("no image")
    (root / "old.tiff").write_bytes(b"II*\0")
    return root


def names(paths: Sequence[str]) -> list[str]:
    return [Path(path).name for path in paths]


def test_folders_patterns_lists_and_files_name_images_once(folder: Path) -> None:
    found = find_inputs([str(folder), str(folder / "0.png"), str(folder / "none.png")])
    assert names(found.paths) == ["0.png", "1.png", "2.png", "3.png", "4.png", "a.DCM", "without_suffix", "none.png"]
    assert found.twice == 1
    assert found.left_out == ("left out: 1 files: .tiff is not read",)
    assert names(find_inputs([str(folder / "[12].png")]).paths) == ["1.png", "2.png"]
    assert names(find_inputs([str(folder / "**" / "*.DCM")]).paths) == ["a.DCM"]
    listed = folder / "list.txt"
    listed.write_text(f"\ufeff{folder / '3.png'}\n\n{folder / 'deep'}\n")
    expected = ["3.png", "a.DCM", "without_suffix"]
    assert names(find_inputs([f"@{listed}"]).paths) == expected
    assert names(find_inputs(["-"], io.StringIO(listed.read_text().removeprefix("\ufeff"))).paths) == expected


def test_a_bucket_is_read_like_a_folder(folder: Path, s3: str) -> None:
    for path in (path for path in folder.rglob("*") if path.is_file()):
        storage.write(f"{s3}/predict/{path.relative_to(folder)}", path.read_bytes())
    found = find_inputs([f"{s3}/predict"])
    assert names(found.paths) == ["0.png", "1.png", "2.png", "3.png", "4.png", "a.DCM", "without_suffix"]
    assert find_inputs([f"{s3}/predict/0.png"]).paths == (f"{s3}/predict/0.png",)
    assert find_inputs([f"{s3}/predict/[01].png"]).paths == (f"{s3}/predict/0.png", f"{s3}/predict/1.png")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{0}/empty", "empty names no image; give DICOM, PNG or JPEG"),
        ("{0}/*.bmp", r"matches no file; quote it"),
        ("@{0}/no.txt", "no.txt does not exist"),
        ("@{0}/0.png", "is no text"),
    ],
)
def test_nothing_to_predict_is_one_line(given: str, message: str, folder: Path) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        find_inputs([given.format(folder)])


def test_each_format_holds_one_row_for_each_input(predictor: Predictor, folder: Path, tmp_path: Path) -> None:
    (folder / "1.png").write_bytes(b"no image")
    paths = find_inputs([str(folder), str(folder / "none.png")]).paths
    expected = {one.path: one for one in predictor.predict(paths)}
    assert sum(bool(one.error) for one in expected.values()) == 2
    read = {kind: tmp_path / "out" / formats.FORMATS[kind].file for kind in ("json", "csv", "parquet")}
    for kind in read:
        result = predict_files(predictor, paths, str(tmp_path / "out"), kind)
        assert (result.address, result.read, result.not_read) == (str(read[kind]), 6, 2)
    assert not (tmp_path / "out" / "parts").exists()
    stored = json.loads(read["json"].read_text())
    assert stored["checkpoint"] == predictor.provenance.checkpoint
    assert [row["path"] for row in stored["predictions"]] == list(paths)
    for row in stored["predictions"]:
        assert row.get("probabilities", {}) == pytest.approx(dict(expected[row["path"]].probabilities), abs=1e-6)
        assert row.get("error", "") == expected[row["path"]].error
    rows = pq.read_table(read["parquet"]).to_pylist()
    assert [row["path"] for row in rows] == list(paths)
    with read["csv"].open(newline="") as file:
        texts = list(csv.DictReader(file))
    for row, text in zip(rows, texts, strict=True):
        one = expected[row["path"]]
        assert text["path"] == one.path
        assert (row["error"] or "", text["error"]) == (one.error, one.error)
        for name in predictor.findings:
            assert row[name] == (pytest.approx(one.probabilities[name], abs=1e-6) if one.probabilities else None)
            assert text[name] == ("" if row[name] is None else repr(row[name]))
        assert (row["height"], row["width"]) == (one.height, one.width)


def test_masks_are_a_submission_of_the_challenge(segmenter_run: str, drawn: SyntheticPaths, tmp_path: Path) -> None:
    predictor = Predictor(segmenter_run, "cpu")
    paths = [str(path) for path in sorted(drawn.siim.rglob("*.dcm"))[:6]]
    (tmp_path / "broken.dcm").write_bytes(b"no image")
    result = predict_files(predictor, [*paths, str(tmp_path / "broken.dcm")], str(tmp_path / "out"), "rle")
    with Path(result.address).open(newline="") as file:
        rows = list(csv.reader(file))
    expected = predictor.predict(paths)
    assert rows[0] == ["ImageId", "EncodedPixels"]
    assert rows[1:-1] == [[Path(one.path).stem, one.mask_rle] for one in expected]
    assert rows[-1] == ["broken", "-1"]
    for one in expected:
        assert one.height is not None
        assert one.width is not None
        assert one.mask_rle is not None
        assert one.mask_area is not None
        assert one.mask_area == rle_masks.decode(one.mask_rle, (one.height, one.width)).astype(bool).sum()
        assert one.spacing_mm is not None
        assert one.mask_area_mm2 == pytest.approx(one.mask_area * one.spacing_mm[0] * one.spacing_mm[1])
    never = Predictor(segmenter_run, "cpu", replace(DEFAULT_MASK_RULE, min_area=10**9))
    for model, areas in ((predictor, [one.mask_area for one in expected]), (never, [0] * len(paths))):
        address = predict_files(model, paths, str(tmp_path / "areas"), "parquet").address
        assert pq.read_table(address)["mask_area"].to_pylist() == areas


def test_masks_of_a_classifier_and_other_formats_are_refused(predictor: Predictor, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a classifier"):
        predict_files(predictor, ["a.png"], str(tmp_path / "out"), "rle")
    with pytest.raises(UserError, match="--format xml: give one of json, csv, parquet, rle"):
        predict_files(predictor, ["a.png"], str(tmp_path / "out"), "xml")


def test_an_interrupted_command_keeps_what_is_done(
    predictor: Predictor, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "ROWS", 2)
    monkeypatch.setattr(Predictor, "batch_size", 2)
    paths, out = find_inputs([str(folder)]).paths, str(tmp_path / "out")
    predict_files(predictor, paths, str(tmp_path / "whole"))
    seen: list[str] = []

    def interrupt(prediction: Prediction) -> None:
        seen.append(prediction.path)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_files(predictor, paths, out, on_prediction=interrupt)
    result = predict_files(predictor, paths, out, on_prediction=lambda one: seen.append(one.path))
    assert seen == [*paths[:3], *paths[4:]]
    assert result.resumed == 4  # whole batches
    whole, again = (Path(tmp_path, name, "predictions.json").read_text() for name in ("whole", "out"))
    assert json.loads(again) == json.loads(whole)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["predictions-of.json", "predictions.json"]


@pytest.mark.slow
def test_a_killed_command_goes_on_and_writes_the_same(run: str, drawn: SyntheticPaths, tmp_path: Path) -> None:
    script = (
        "import sys; from cxrscale.inference import journal; journal.ROWS = 2\n"
        "from cxrscale.cli import app; sys.argv[0] = 'cxrscale'; app.main()"
    )

    def command(out: str) -> list[str]:
        words = ["predict", str(drawn.nih), "--run", run, "--out", str(tmp_path / out), "--format", "csv"]
        return [sys.executable, "-c", script, *words]

    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command("out"), env=environment, stdout=subprocess.DEVNULL) as process:
        while len(list((tmp_path / "out" / "parts").glob("*.parquet"))) < 3 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    for out in ("out", "whole"):
        ended = subprocess.run(command(out), env=environment, capture_output=True, text=True, timeout=120)
        assert ended.returncode == 0, ended.stderr
        assert ("were predicted before" in ended.stdout) == (out == "out")
    assert (tmp_path / "out" / "predictions.csv").read_text() == (tmp_path / "whole" / "predictions.csv").read_text()


def test_predictions_of_another_run_stay(
    predictor: Predictor, segmenter_run: str, folder: Path, tmp_path: Path
) -> None:
    paths, out = find_inputs([str(folder)]).paths, tmp_path / "out"
    predict_files(predictor, paths, str(out), "csv")
    before = (out / "predictions.csv").read_bytes()
    with pytest.raises(UserError, match=r"out holds predictions of run .*; give another --out, or remove it"):
        predict_files(Predictor(segmenter_run, "cpu"), paths, str(out), "csv")
    assert (out / "predictions.csv").read_bytes() == before
    predict_files(predictor, paths, str(out), "json")


def test_parts_of_another_run_and_damaged_ones_are_one_line(
    predictor: Predictor, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "out")
    kept = journal.Journal(out, predictor.provenance)
    kept.add(predictor.predict([str(folder / "0.png")]))
    kept.flush()
    other = predictor.provenance.model_copy(update={"run": "/runs/other", "checkpoint": "x"})
    with pytest.raises(UserError, match=r"holds unfinished predictions of run .*; give another --out, or remove it"):
        journal.Journal(out, other)
    (part,) = (tmp_path / "out" / "parts").glob("*.parquet")
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    with pytest.raises(UserError, match="remove it: its images are predicted again"):
        journal.Journal(out, predictor.provenance)
    monkeypatch.undo()


def test_what_could_not_be_reached_is_tried_again(
    predictor: Predictor, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, out = find_inputs([str(folder)]).paths, str(tmp_path / "out")
    stream = Predictor.stream

    def without_the_third(self: Predictor, items: Sequence[str]) -> Iterator[Prediction]:
        for one in stream(self, items):
            yield Prediction(one.path, error="cannot be reached", unreachable=True) if one.path == paths[2] else one

    monkeypatch.setattr(Predictor, "stream", without_the_third)
    result = predict_files(predictor, paths, out)
    assert (result.read, result.not_read, result.unreachable) == (6, 1, 1)
    assert (tmp_path / "out" / "parts").exists()
    monkeypatch.undo()
    result = predict_files(predictor, paths, out)
    assert (result.read, result.not_read, result.resumed) == (7, 0, 6)
    rows = json.loads(Path(result.address).read_text())["predictions"]
    assert sorted(row["path"] for row in rows) == sorted(paths)
    assert not (tmp_path / "out" / "parts").exists()


def test_memory_does_not_grow_with_the_number_of_files(predictor: Predictor, folder: Path) -> None:
    """No more images are read than two batches ahead of what is handed out."""
    read = 0

    def inputs() -> Iterator[str]:
        nonlocal read
        for _ in range(60):
            read += 1
            yield str(folder / "0.png")

    ahead = [read - given for given, _ in enumerate(predictor.stream(inputs(), batch_size=4), start=1)]
    assert read == 60
    assert max(ahead) <= 2 * 4
