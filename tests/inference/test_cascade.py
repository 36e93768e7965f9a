"""A classifier before a segmenter: predicted, chosen on validation, measured on the test split."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cxrscale.cli import app
from cxrscale.inference import GatedPredictor, Predictor, read_cascade
from cxrscale.io import storage
from cxrscale.run import Run, choose_cascade, evaluate_cascade
from cxrscale.sources.synthetic.archive import SyntheticPaths
from cxrscale.training import launch
from cxrscale.types import UserError
from tests.conftest import tiny
from tests.inference.test_ensemble import changed_copy


@pytest.fixture(scope="module")
def pair(segmenter_run: str, siim_shards: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A segmenter, and a classifier of the same images."""
    from cxrscale.cli.progress import watch_run

    root = tmp_path_factory.mktemp("cascade")
    recipe = tiny(siim_shards, root, "data.findings=[Pneumothorax]", "train.epochs=1", "threshold.calibration=platt")
    gate = launch.launch(recipe, "gate", watch_run, local=True)
    segmenter = changed_copy(segmenter_run, root / "segmenter", 1.0)
    for run in (gate, segmenter):
        Run(run).choose_thresholds(resamples=20)
    return segmenter, gate


@pytest.fixture(scope="module")
def dicoms(drawn: SyntheticPaths) -> list[str]:
    return sorted(map(str, drawn.siim.rglob("*.dcm")))[:12]


def test_only_what_the_classifier_calls_positive_goes_to_the_segmenter(
    pair: tuple[str, str], dicoms: list[str]
) -> None:
    gate, segmenter = Predictor(pair[1], "cpu"), Predictor(pair[0], "cpu")
    judged, masks = gate.predict(dicoms), segmenter.predict(dicoms)
    called = [one.calls["Pneumothorax"] for one in judged]
    assert set(called) == {True, False}
    cascade = GatedPredictor(*pair, device="cpu")
    assert cascade.provenance.gate is not None
    assert cascade.provenance.gate.threshold == gate.provenance.threshold["Pneumothorax"]
    for found, one, alone in zip(cascade.predict([*dicoms, "nothing.dcm"]), judged, masks, strict=False):
        assert found.gate["Pneumothorax"] == pytest.approx(one.probabilities["Pneumothorax"], abs=1e-6)
        assert found.gate_call == one.calls["Pneumothorax"]
        if found.gate_call:
            assert (found.mask_rle, found.calls) == (alone.mask_rle, alone.calls)
            assert found.probabilities == pytest.approx(alone.probabilities, abs=1e-5)
        else:
            assert (found.mask_rle, found.mask_area, found.calls) == ("-1", 0, {"Pneumothorax": False})
            assert found.probabilities == {}
    assert "does not exist" in cascade("nothing.dcm").error


def test_threshold_and_mask_rule_are_chosen_on_validation_and_measured_on_test(
    pair: tuple[str, str], tmp_path: Path
) -> None:
    segmenter = changed_copy(pair[0], tmp_path / "segmenter", 1.0)
    Run(segmenter).choose_thresholds(resamples=20)
    before = evaluate_cascade(segmenter, pair[1], resamples=20)
    assert not before.chosen_together
    chosen = choose_cascade(segmenter, pair[1], resamples=20)
    assert chosen.validation.cascade.dice_all.value == pytest.approx(chosen.mask_rule.dice)
    assert chosen.validation.difference.dice_all.value >= -0.02  # the search's grid is coarser than the rule's
    test = evaluate_cascade(segmenter, pair[1], resamples=20)
    assert test.chosen_together
    assert (test.threshold, test.mask_rule) == (chosen.threshold, chosen.mask_rule)
    scores = Run(segmenter).predictions("test")
    assert test.images == len(scores.image_id)
    predictor = GatedPredictor(segmenter, pair[1], "cpu")
    assert predictor.provenance.gate is not None
    assert predictor.provenance.gate.threshold == chosen.threshold
    assert predictor.provenance.gate.mask_rule.bottom == chosen.mask_rule.bottom
    checkpoint = predictor.provenance.checkpoint
    about = predictor.provenance.gate
    assert read_cascade(segmenter, checkpoint, "of other weights", about.thresholds) is None
    assert read_cascade(segmenter, checkpoint, about.checkpoint, about.thresholds) == chosen
    assert predictor.provenance.notes == ()
    # Another calibration gives other probabilities, which the threshold was not chosen for.
    gate = changed_copy(pair[1], tmp_path / "gate", 1.0)
    shutil.copy(f"{pair[1]}/best.pt", f"{gate}/best.pt")
    Run(gate).choose_thresholds(["threshold.calibration=temperature"], resamples=20)
    predictor = GatedPredictor(segmenter, gate, "cpu")
    assert predictor.provenance.gate is not None
    assert predictor.provenance.gate.threshold == Run(gate).thresholds().thresholds["Pneumothorax"].threshold.value
    assert "`cxrscale threshold" in predictor.provenance.notes[-1]
    assert not evaluate_cascade(segmenter, gate, resamples=20).chosen_together


@pytest.mark.parametrize(
    ("run", "gate", "message"),
    [
        ("gate", "gate", "is no segmenter"),
        ("segmenter", "segmenter", "is no classifier"),
        ("segmenter", "other", "does not know Pneumothorax, which .* segments; it knows Cardiomegaly"),
    ],
)
def test_runs_that_do_not_fit_are_one_line(
    run: str, gate: str, message: str, pair: tuple[str, str], classifier_run: str
) -> None:
    paths = {"segmenter": pair[0], "gate": pair[1], "other": classifier_run}
    with pytest.raises(UserError, match=message):
        GatedPredictor(paths[run], paths[gate], "cpu")
    with pytest.raises(UserError, match=message):
        evaluate_cascade(paths[run], paths[gate], resamples=20)


def test_a_gate_without_thresholds_is_one_line(pair: tuple[str, str], tmp_path: Path) -> None:
    gate = changed_copy(pair[1], tmp_path / "gate", 1.0)
    with pytest.raises(UserError, match=r"has no threshold for Pneumothorax; run `cxrscale threshold"):
        GatedPredictor(pair[0], gate, "cpu")


def test_the_commands(pair: tuple[str, str], dicoms: list[str], tmp_path: Path) -> None:
    def command(*arguments: str) -> str:
        done = CliRunner().invoke(app.app, list(arguments))
        assert done.exit_code == 0, done.output
        return done.output

    assert "negatives with a mask" in command("evaluate", pair[0], "--gate", pair[1], "--resamples", "20")
    out = tmp_path / "out"
    shown = command("predict", *dicoms, "--run", pair[0], "--gate", pair[1], "--out", str(out))
    assert "not passed on" in shown
    stored = json.loads((out / "predictions.json").read_text())
    assert stored["gate"]["finding"] == "Pneumothorax"
    calls = [row["gate_call"] for row in stored["predictions"]]
    command("predict", *dicoms, "--run", pair[0], "--gate", pair[1], "--out", str(out), "--format", "csv")
    with (out / "predictions.csv").open(newline="") as file:
        assert [bool(int(row["gate.call"])) for row in csv.DictReader(file)] == calls
    command("predict", *dicoms, "--run", pair[0], "--gate", pair[1], "--out", str(out), "--format", "rle")
    with (out / "submission.csv").open(newline="") as file:
        empty = [row["EncodedPixels"] == "-1" for row in csv.DictReader(file)]
    assert all(is_empty for is_empty, call in zip(empty, calls, strict=True) if not call)
    wrong = CliRunner().invoke(app.app, ["threshold", pair[0], "--gate", pair[1], "threshold.goal=f1"])
    assert wrong.exit_code == 2
    assert storage.exists(storage.join(pair[0], "cascade_metrics.json"))
