"""Variants side by side: runs behind gates, in float and exported, on files and over a split."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cxrscale.cli import app
from cxrscale.evaluation import Outcome, VariantImage, Variants, variants
from cxrscale.inference import Form, Gate, Predictor
from cxrscale.inference.export import latency
from cxrscale.io import read_artifact
from cxrscale.run import Run, compare_variants, evaluate_cascade, export, plan_variants
from cxrscale.sources.synthetic.archive import SyntheticPaths
from cxrscale.training import launch
from tests.conftest import tiny
from tests.inference.test_ensemble import changed_copy


@pytest.fixture(scope="module")
def runs(classifier_run: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """Two classifiers that differ, and an export of the first."""
    root = tmp_path_factory.mktemp("variants")
    first = changed_copy(classifier_run, root / "first", 1.0)
    second = changed_copy(classifier_run, root / "second", 3.0)
    for run in (first, second):
        Run(run).choose_thresholds(resamples=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "ROUNDS", 1)
        export(first, str(root / "exported"), Form(format="torch-export"))
    return first, second, str(root / "exported")


def test_each_run_and_its_exports_stand_side_by_side(
    runs: tuple[str, str, str], drawn: SyntheticPaths, tmp_path: Path
) -> None:
    first, second, exported = runs
    paths = [*sorted(map(str, drawn.nih.rglob("*.png")))[:3], str(tmp_path / "broken.png")]
    Path(paths[-1]).write_bytes(b"no image")
    out = tmp_path / "page.html"
    options = ["--run", first, "--run", second, "--quantized", exported, "--split", "val", "--out", str(out)]
    shown = CliRunner().invoke(app.app, ["variants", *paths, *options])
    assert shown.exit_code == 3, shown.output
    assert "1 of 4 inputs could not be read" in shown.output
    found = read_artifact(Variants, str(tmp_path / "page.json"), "")
    assert [one.name for one in found.variants] == ["first", "first, torch-export float", "second"]
    assert found.rows[1].largest_difference <= 1e-5
    assert found.rows[1].same_calls == 1
    assert found.rows[2].largest_difference > 0.01
    assert all(row.milliseconds > 0 and row.bytes > 0 for row in found.rows)
    own = Predictor(first).predict(paths)
    for image, prediction in zip(found.images, own, strict=True):
        assert bool(image.error) == bool(prediction.error)
        if not image.error:
            assert dict(image.outcomes[0].calls) == dict(prediction.calls)
            assert image.outcomes[0].probabilities == pytest.approx(dict(prediction.probabilities), abs=1e-6)
    scores = Run(first).predictions("val")
    assert found.split_images == len(scores.image_id)
    assert [one.same_calls == 1 for one in found.scores[:2]] == [True, True]
    page = out.read_text()
    assert page.count("<figure>") == 9
    assert "no image" not in page
    assert "Not read: " in page
    assert "torch-export float" in page
    # Nothing is loaded from elsewhere.
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)


def test_a_split_alone_is_timed_on_its_own_images(runs: tuple[str, str, str], tmp_path: Path) -> None:
    chosen = plan_variants(runs[:2])
    found = compare_variants(chosen, [], str(tmp_path / "page"), "test")
    assert found.images == ()
    assert set(found.scores[0].metrics) == {"AUROC"}
    assert all(row.milliseconds > 0 for row in found.rows)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--run", "first"], "variants takes inputs, --split val|test, or both"),
        (["--run", "first", "--split", "val"], "one variant has nothing beside it"),
        (["--run", "first", "--split", "train"], "give val or test"),
        (["--run", "first", "--quantized", "second", "--split", "val"], "is no export; make it with"),
        (["--run", "second", "--quantized", "exported", "--split", "val"], "which is none of the runs and gates given"),
    ],
)
def test_what_does_not_fit_is_one_line(words: list[str], message: str, runs: tuple[str, str, str]) -> None:
    places = {Path(run).name: run for run in runs}
    shown = CliRunner().invoke(app.app, ["variants", *(places.get(word, word) for word in words)])
    assert shown.exit_code == 2, shown.output
    assert message in shown.output


def test_agreement_counts_calls_and_whether_there_is_a_mask() -> None:
    first = Outcome(probabilities={"A": 0.9, "B": 0.1}, calls={"A": True, "B": False}, mask_area=5, mask_dice=1.0)
    far = first.model_copy(update={"probabilities": {"A": 0.4}, "mask_area": 9, "mask_dice": 0.5})
    empty = first.model_copy(update={"mask_area": 0, "mask_dice": 0.0})
    other = first.model_copy(update={"calls": {"A": False}})
    assert variants.same_calls(first, far)
    assert not variants.same_calls(first, empty)
    assert not variants.same_calls(first, other)
    images = [VariantImage(path=name, outcomes=(first, one)) for name, one in (("a", far), ("b", empty), ("c", other))]
    row = variants.row_of(1, [*images, VariantImage(path="d", error="no")], np.array([[2.0, 1.0]] * 3), 7)
    assert row.same_calls == pytest.approx(1 / 3)
    assert row.largest_difference == pytest.approx(0.5)
    assert row.mask_dice == pytest.approx(0.5)
    assert row.times_first == 2
    nothing = variants.row_of(0, [], np.empty((0, 1)), 7)
    assert np.isnan(nothing.same_calls)
    empty_HW, full_HW = np.zeros((2, 2), bool), np.ones((2, 2), bool)
    assert variants.mask_dice(empty_HW, empty_HW) == 1
    assert variants.mask_dice(full_HW, empty_HW) == 0


@pytest.mark.slow
def test_the_four_variants_of_a_cascade(
    segmenter_run: str, siim_shards: str, drawn: SyntheticPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two classifiers before a segmenter, float and quantized."""
    from cxrscale.cli.progress import watch_run

    monkeypatch.setattr(latency, "ROUNDS", 1)
    recipe = tiny(siim_shards, tmp_path, "data.findings=[Pneumothorax]", "train.epochs=1")
    plain = launch.launch(recipe, "plain", watch_run, local=True)
    oversampled = changed_copy(plain, tmp_path / "oversampled", 2.0)
    unet = shutil.copytree(segmenter_run, tmp_path / "unet")
    wide = Gate(maximum=1, mean=1, flipped=1)
    for run in (plain, oversampled, str(unet)):
        Run(run).choose_thresholds(resamples=20)
        export(run, f"{run}-int8", Form(quantization="int8-dynamic"), wide)
    quantized = [f"{run}-int8" for run in (plain, oversampled, unet)]
    chosen = plan_variants([str(unet)], [plain, oversampled], quantized)
    assert [one.name for one in chosen] == [
        *("unet behind tiny", "unet behind tiny, int8-dynamic"),
        *("unet behind oversampled", "unet behind oversampled, int8-dynamic"),
    ]
    partly = plan_variants([str(unet)], [plain], quantized[:1])
    assert partly[1].name == "unet behind tiny, int8-dynamic gate"
    assert (partly[1].run, partly[1].gate) == (str(unet), quantized[0])
    paths = sorted(map(str, drawn.siim.rglob("*.dcm")))[:5]
    found = compare_variants(chosen, paths, str(tmp_path / "page.html"), "test")
    test = evaluate_cascade(unet, plain)
    assert found.scores[0].metrics["dice_all"] == test.test.cascade.dice_all
    assert found.scores[0].metrics["passed on"] == test.test.passed
    for image in found.images:
        assert all(one.gate is not None and one.mask_dice is not None for one in image.outcomes)
    first = Predictor(unet, "cpu")(paths[0])
    assert first.mask_rle is not None
    passed = next((one for one in found.images if one.outcomes[0].probabilities), None)
    if passed is not None:
        own = Predictor(unet, "cpu")(passed.path)
        assert passed.outcomes[0].mask_area == own.mask_area
