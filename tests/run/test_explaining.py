"""`cxrscale explain`: maps of files, and of a split against its boxes."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from cxrscale.cli import app
from cxrscale.config import NIH14, Pack, Recipe
from cxrscale.evaluation import BASELINES, EXPLAIN, ExplainReport
from cxrscale.inference import Explainer, Predictor, boxed_rows, map_tests, read_maps
from cxrscale.io import read_artifact, seal, storage
from cxrscale.models import build_model
from cxrscale.run import explain_split, explaining
from cxrscale.shards import build, manifest
from cxrscale.sources import nih
from cxrscale.sources.synthetic.archive import SyntheticPaths
from cxrscale.training import checkpoint
from cxrscale.types import UserError
from tests.conftest import tiny
from tests.small_datasets import rewrite_manifest


@pytest.fixture(scope="module")
def scored(classifier_run: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ExplainReport]:
    """A copy of the small classifier, and its maps scored with everything on."""
    run = str(tmp_path_factory.mktemp("explained") / "run")
    storage.write(storage.join(run, "best.pt"), storage.read(storage.join(classifier_run, "best.pt")))
    return run, explain_split(run, resamples=30, sanity=True, occlusion=True)


def test_a_split_is_scored_beside_every_baseline(scored: tuple[str, ExplainReport]) -> None:
    run, report = scored
    assert read_artifact(ExplainReport, storage.join(run, EXPLAIN), "").model_dump_json() == report.model_dump_json()
    assert (report.method, report.split, report.unreadable, report.left_out) == ("exact", "test", 0, 0)
    assert set(report.findings) == {"Cardiomegaly", "Effusion", "Mass"}
    assert report.without_boxes == ("Hernia",)
    data = manifest.load(*report.recipe.data.shards)
    boxes = [box for row in data.rows("test") for box in data.boxes(row) if box.finding in report.findings]
    assert report.boxes == len(boxes)
    for row in (*report.findings.values(), report.mean):
        assert set(row.baselines) == set(row.gain) == set(BASELINES)
        assert 0 <= row.map.pointing.low <= row.map.pointing.value <= row.map.pointing.high <= 1
        # A higher T finds fewer boxes and leaves more of them false.
        found = [row.map.iobb[t].value for t in row.map.iobb]
        false = [row.map.false_positives_iobb[t].value for t in row.map.iobb]
        assert found == sorted(found, reverse=True)
        assert false == sorted(false)


def test_random_weights_give_other_maps(scored: tuple[str, ExplainReport]) -> None:
    sanity = scored[1].sanity
    assert sanity is not None
    assert sanity.maps == scored[1].mean.images
    stages = sanity.stages
    assert stages[0].randomized == "classifier"
    assert [stage.parameters for stage in stages] == sorted(stage.parameters for stage in stages)
    explainer = Explainer(scored[0], "cpu")
    assert stages[-1].parameters == sum(one.numel() for one in explainer.model.parameters())
    assert abs(stages[-1].correlation.value) < 0.6


def test_the_maps_of_equal_weights_are_equal(scored: tuple[str, ExplainReport]) -> None:
    """What `sanity` compares is really the same map of the same image and finding."""
    explainer = Explainer(scored[0], "cpu")
    data = manifest.load(*explainer.recipe.data.shards)
    boxed = boxed_rows(data, data.patient, explainer.recipe, "test", explainer.explained)
    found, maps, _ = read_maps(explainer, data, boxed, lambda *_: None)
    again = map_tests.maps_of(explainer, explainer.model, data, found)
    for a, b in zip(maps, again, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_occlusion_counts_every_boxed_image(scored: tuple[str, ExplainReport]) -> None:
    report = scored[1]
    assert report.occlusion is not None
    assert list(report.occlusion) == list(report.findings)
    for name, row in report.occlusion.items():
        assert row.images + row.left_out == report.findings[name].images
        if row.images:
            assert row.difference.value == pytest.approx(row.box.value - row.elsewhere.value)


def test_the_page_shows_hits_and_misses_and_is_whole(scored: tuple[str, ExplainReport]) -> None:
    page = storage.read(explaining.page_path(scored[0], "test"))
    assert seal.is_intact(page)
    text = page.decode()
    for words in ("Pointing game", "Other weights", "Occlusion", "Hits and misses", 'class="heat"', 'class="truth"'):
        assert words in text
    assert "too few to compare" in text
    assert 'src="http' not in text


def test_findings_can_be_chosen_and_paths_come_last(classifier_run: str, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    storage.write(storage.join(run, "best.pt"), storage.read(storage.join(classifier_run, "best.pt")))
    command = ["explain", "--split", "test", "--run", run, "--finding", "Mass", "--resamples", "10"]
    done = CliRunner().invoke(app.app, command)
    assert done.exit_code == 0, done.output
    assert done.stdout.rstrip().splitlines()[-2:] == [f"{run}/explain.json", f"{run}/explain.html"]
    report = read_artifact(ExplainReport, f"{run}/{EXPLAIN}", "")
    assert list(report.findings) == ["Mass"]
    assert report.sanity is None
    assert explaining.report_path(run, "val") == f"{run}/explain-val.json"


def test_files_get_raw_maps_and_an_overlay_per_finding(
    classifier_run: str, drawn: SyntheticPaths, tmp_path: Path
) -> None:
    paths = [*sorted(map(str, drawn.nih.rglob("*.png")))[:3], str(tmp_path / "not there.png")]
    out = tmp_path / "out"
    command = ["explain", *paths, "--run", classifier_run, "--out", str(out), "--finding", "Mass", "--finding"]
    done = CliRunner().invoke(app.app, [*command, "Effusion"])
    assert done.exit_code == 3, done.output
    assert "3 images explained by exact class activation maps, 1 not read" in done.output
    rows = json.loads((out / "predictions.json").read_text())["predictions"]
    expected = Predictor(classifier_run, "cpu", maps=True).predict(paths)
    for row, one in zip(rows[:3], expected[:3], strict=True):
        assert set(row["objects"]) == {"maps", "overlay.Effusion", "overlay.Mass"}
        with np.load(out / row["objects"]["maps"], allow_pickle=False) as stored:
            assert set(stored.files) == {"method", "Effusion", "Mass"}
            assert str(stored["method"]) == "exact"
            np.testing.assert_allclose(stored["Mass"], one.maps["Mass"], atol=1e-5)
            assert stored["Mass"].mean() == pytest.approx(row["logits"]["Mass"], abs=1e-4)
        picture = cv2.imread(str(out / row["objects"]["overlay.Mass"]))
        assert picture is not None
        assert picture.shape[1] == row["width"]
        assert picture.shape[0] > row["height"]
    assert rows[3]["error"]
    before = {path: path.stat().st_mtime_ns for path in (out / "objects").iterdir()}
    assert len(before) == 9
    CliRunner().invoke(app.app, [*command, "Effusion"])
    assert {path: path.stat().st_mtime_ns for path in (out / "objects").iterdir()} == before


def test_a_segmenter_is_explained_by_its_scores(segmenter_run: str, drawn: SyntheticPaths, tmp_path: Path) -> None:
    path = str(min(drawn.siim.rglob("*.dcm")))
    prediction = Explainer(segmenter_run, "cpu")(path)
    assert prediction.maps["Pneumothorax"].shape == (64, 64)
    done = CliRunner().invoke(app.app, ["explain", path, "--run", segmenter_run, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "1 images explained by score maps, 0 not read" in done.output
    (row,) = json.loads((tmp_path / "predictions.json").read_text())["predictions"]
    with np.load(tmp_path / row["objects"]["maps"], allow_pickle=False) as stored:
        assert str(stored["method"]) == "score map"
        np.testing.assert_allclose(stored["Pneumothorax"], prediction.maps["Pneumothorax"], atol=1e-5)
    picture = cv2.imread(str(tmp_path / row["objects"]["overlay.Pneumothorax"]))
    assert picture is not None
    assert picture.shape[1] == row["width"]
    with pytest.raises(UserError, match="no image has a box of Pneumothorax"):
        explain_split(segmenter_run)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--run", "{run}"], "explain takes either inputs or --split"),
        (["a.png", "--run", "{run}", "--split", "test"], "explain takes either inputs or --split"),
        (["a.png", "--run", "{run}", "--sanity"], "--sanity goes with --split"),
        (["--split", "test", "--run", "{run}", "--out", "there"], "--out goes with files"),
        (["--split", "test", "--run", "{run}", "--workers", "2"], "--workers goes with files"),
        (["a.png", "--run", "{run}", "--finding", "Masse"], "no such finding; did you mean Mass?"),
        (["--split", "all", "--run", "{run}"], "--split all: give train, val or test"),
        (["--split", "test", "--run", "{run}", "--finding", "Hernia"], "no image has a box of Hernia"),
        (["a.png", "--run", "{run}x"], "best.pt does not exist"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], said: str, scored: tuple[str, ExplainReport]) -> None:
    done = CliRunner().invoke(app.app, ["explain", *(word.format(run=scored[0]) for word in words)])
    assert done.exit_code == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_boxes_of_an_older_dataset_come_from_its_samples(nih_shards: str, tmp_path: Path) -> None:
    data = manifest.load(nih_shards)
    for path in Path(nih_shards).iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    rewrite_manifest(tmp_path, data.table.drop_columns(["boxes", "root"]), data.metadata[0])
    older = manifest.load(str(tmp_path))
    assert not older.has_boxes
    recipe, names = tiny(nih_shards, tmp_path), ["Mass", "Effusion"]
    found, expected = (boxed_rows(one, one.patient, recipe, "test", names) for one in (older, data))
    np.testing.assert_array_equal(found.row_N, expected.row_N)
    for a, b in zip(found.boxed, expected.boxed, strict=True):
        assert (a.finding, a.patient) == (b.finding, b.patient)
        np.testing.assert_array_equal(a.truth_K4, b.truth_K4)


@pytest.mark.slow
def test_the_real_boxes_at_hand_are_scored_and_called_few(real: Path, tmp_path: Path) -> None:
    root, boxes = tmp_path / "nih", nih.read_boxes(str(real / "nih" / "BBox_List_2017.csv"))
    (root / "images").mkdir(parents=True)
    images = sorted((real / "nih" / "images").glob("*.png"))
    boxed = [path for path in images if path.name in boxes]
    for path in (*boxed, *images[:12]):
        if not (root / "images" / path.name).exists():
            (root / "images" / path.name).symlink_to(path)
    for name in ("Data_Entry_2017_v2020.csv", "BBox_List_2017.csv", "train_val_list.txt", "test_list.txt"):
        (root / name).symlink_to(real / "nih" / name)
    shards = str(tmp_path / "shards")
    build.build_shards("nih", str(root), Pack(size=64), shards, local=True)
    findings = f"data.findings=[{', '.join(NIH14)}]"
    run = untrained(tmp_path / "run", tiny(shards, tmp_path, findings))
    done = CliRunner().invoke(app.app, ["explain", "--split", "test", "--run", run, "--resamples", "50"])
    assert done.exit_code == 0, done.output
    report = read_artifact(ExplainReport, f"{run}/{EXPLAIN}", "")
    assert report.images == len(boxed) == 6
    assert report.boxes == sum(len(boxes[path.name]) for path in boxed)
    assert f"{report.boxes} boxes of {report.patients} patients: too few to compare anything" in done.output
    assert "Wang et al." in Path(f"{run}/explain.html").read_text()


@pytest.mark.slow
def test_the_real_boxes_of_rsna_are_scored_the_same_way(real: Path, tmp_path: Path) -> None:
    shards = str(tmp_path / "shards")
    build.build_shards("rsna", str(real / "rsna"), Pack(size=64), shards, local=True)
    run = untrained(tmp_path / "run", tiny(shards, tmp_path, "data.findings=[Pneumonia]"))
    data, boxes = manifest.load(shards), 0
    for split in ("train", "val", "test"):
        report = explain_split(run, split, resamples=20)
        own = [len(data.boxes(row)) for row in data.rows(split)]
        assert (report.boxes, report.images) == (sum(own), sum(count > 0 for count in own))
        assert list(report.findings) == ["Pneumonia"]
        boxes += report.images
    assert boxes == 61


def test_another_network_is_explained_by_grad_cam(nih_shards: str, tmp_path: Path) -> None:
    pytest.importorskip("pytorch_grad_cam", reason="pip install 'cxrscale[explain]'")
    vit = ("model.arch=vit_tiny_patch16_224", "model.options={img_size: 48, depth: 2, embed_dim: 32, num_heads: 2}")
    run = untrained(tmp_path / "run", tiny(nih_shards, tmp_path, *vit))
    report = explain_split(run, findings=["Effusion"], resamples=20, sanity=True)
    assert (report.method, report.map_size) == ("grad-cam", (3, 3))
    assert list(report.findings) == ["Effusion"]
    assert report.sanity is not None
    assert report.sanity.stages[-1].randomized == "cls_token"


def untrained(folder: Path, recipe: Recipe) -> str:
    """A run of random weights."""
    torch.manual_seed(0)
    data = manifest.load(*recipe.data.shards)
    state = {
        "model": build_model(recipe.model, recipe.data).state_dict(),
        "recipe": recipe.model_dump(mode="json"),
        "manifest": data.digest,
        "pixels": {"codec": "jpeg", "size": 64, "quality": 95},
    }
    folder.mkdir()
    (folder / checkpoint.BEST).write_bytes(checkpoint.dump(state))
    return str(folder)
