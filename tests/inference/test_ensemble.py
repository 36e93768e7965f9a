"""Ensembles: averaged for a prediction, and as runs of their own."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from cxrscale.cli import app
from cxrscale.inference import Averaging, Predictor, predictions, read_ensemble
from cxrscale.io import storage
from cxrscale.run import Run, ensemble, ensemble_gains
from cxrscale.sources.synthetic.archive import SyntheticPaths
from cxrscale.training import checkpoint, run_files
from cxrscale.types import UserError, probabilities_of


def changed_copy(run: str, to: Path, factor: float = 1.5, **recipe: object) -> str:
    """A copy whose last weights are others, and so are fields of the recipe: augment__size=96."""
    shutil.copytree(run, to)
    for name in ("thresholds.json", "test_metrics.json"):
        (to / name).unlink(missing_ok=True)
    for path in to.glob("predictions-*.parquet"):
        path.unlink()
    state = checkpoint.read((to / "best.pt").read_bytes(), "best.pt")
    last = list(state["model"])[-2]
    state["model"][last] = state["model"][last].flip(0) * factor
    for field, value in recipe.items():
        section, name = field.split("__")
        state["recipe"][section][name] = value
    (to / "best.pt").write_bytes(checkpoint.dump(state))
    return str(to)


@pytest.fixture(scope="module")
def runs(classifier_run: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("ensemble")
    return [changed_copy(classifier_run, root / "a", 1.0), changed_copy(classifier_run, root / "b", 3.0)]


def test_an_ensemble_is_a_run_whose_scores_are_the_mean_of_its_members(runs: list[str], drawn: SyntheticPaths) -> None:
    made = ensemble(runs, "both")
    assert made.path == str(Path(runs[0]).parent / "both")
    made.choose_thresholds(resamples=20)
    test = made.evaluate(resamples=20)
    members = [Run(run).predictions("test") for run in runs]
    scores = made.predictions("test")
    expected = np.mean([one.probability_NF for one in members], axis=0)
    np.testing.assert_allclose(scores.probability_NF, expected, atol=1e-6)
    assert abs(members[0].probability_NF - members[1].probability_NF).max() > 0.01
    gains = ensemble_gains(made, resamples=20)
    for run, member in zip(runs, members, strict=True):
        gain = gains[run].mean_auroc
        assert gain.a == pytest.approx(test.mean_auroc.value)
        assert gain.difference.value == pytest.approx(gain.a - gain.b)
        assert gains[run].b.name == Path(run).name
        assert len(member.image_id) == gains[run].images
    stored = read_ensemble(made.path)
    assert stored is not None
    assert set(stored.gains) == set(runs)
    page = Path(made.report()).read_text()
    assert "2<small>models, mean of probabilities" in page
    assert runs[1] in page
    assert run_files.verify(made.path).faults == ()
    path = str(min(drawn.nih.rglob("*.png")))
    prediction = Predictor(made.path, "cpu")(path)
    both = [Predictor(run, "cpu")(path) for run in runs]
    for name, logit in prediction.logits.items():
        assert probabilities_of(logit) == pytest.approx(np.mean([b.probabilities[name] for b in both]), abs=1e-6)
    assert prediction.calls


def test_runs_are_averaged_for_one_prediction_without_calls(runs: list[str], drawn: SyntheticPaths) -> None:
    path = str(min(drawn.nih.rglob("*.png")))
    both = [Predictor(run, "cpu")(path) for run in runs]
    for mean in ("probabilities", "logits"):
        predictor = Predictor(runs, "cpu", averaging=Averaging.model_validate({"mean": mean}))
        prediction = predictor(path)
        for name in predictor.findings:
            values = [getattr(one, mean)[name] for one in both]
            assert getattr(prediction, mean)[name] == pytest.approx(np.mean(values), abs=1e-5)
        assert prediction.calls == {}
        assert "cxrscale ensemble" in predictor.provenance.notes[0]
        assert [member.run for member in predictor.provenance.members] == runs
    mirrored = Predictor(runs[0], "cpu", averaging=Averaging(hflip=True))
    assert mirrored(path).probabilities != both[0].probabilities
    assert mirrored.provenance.checkpoint != Predictor(runs[0], "cpu").provenance.checkpoint


def test_members_see_an_image_as_they_were_trained_to(runs: list[str], drawn: SyntheticPaths, tmp_path: Path) -> None:
    paths = sorted(map(str, drawn.nih.rglob("*.png")))[:3]
    given = [
        str(shutil.copytree(runs[0], tmp_path / "a")),
        changed_copy(runs[1], tmp_path / "large", 1.0, augment__size=64),
        changed_copy(runs[1], tmp_path / "minmax", 2.0, augment__normalize="minmax"),
        changed_copy(runs[0], tmp_path / "same", 2.0),
    ]
    made = ensemble(given, "sizes")
    each = [Predictor(run, "cpu").predict(paths) for run in given]
    for predictor in (Predictor(made.path, "cpu"), Predictor(given, "cpu")):
        for number, found in enumerate(predictor.predict(paths)):
            for name, logit in found.logits.items():
                expected = np.mean([one[number].probabilities[name] for one in each])
                assert probabilities_of(logit) == pytest.approx(expected, abs=1e-6)
    own = [Run(run).predictions("test").probability_NF for run in given]
    np.testing.assert_allclose(made.predictions("test").probability_NF, np.mean(own, axis=0), atol=1e-6)


def test_maps_of_several_sizes_are_averaged_at_the_first_one(
    segmenter_run: str, drawn: SyntheticPaths, tmp_path: Path
) -> None:
    given = [
        changed_copy(segmenter_run, tmp_path / "a", 1.0),
        changed_copy(segmenter_run, tmp_path / "small", 1.0, augment__size=32),
    ]
    made = ensemble(given, "sizes")
    path = str(min(drawn.siim.rglob("*.dcm")))
    maps = [Predictor(run, "cpu", maps=True)(path).maps["Pneumothorax"] for run in [*given, made.path]]
    assert [one.shape for one in maps] == [(64, 64), (32, 32), (64, 64)]
    expected_HW = (maps[0] + cv2.resize(maps[1], (64, 64), interpolation=cv2.INTER_LINEAR)) / 2
    np.testing.assert_allclose(maps[2], expected_HW, atol=1e-6)
    assert made.predictions("val").maps is not None


def test_weights_of_members_are_read_once(runs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, addresses = storage.read, list[str]()

    def counting_read(address: str) -> bytes:
        addresses.append(str(address))
        return read(address)

    copies = [str(shutil.copytree(run, tmp_path / Path(run).name)) for run in runs]
    monkeypatch.setattr(storage, "read", counting_read)
    ensemble(copies, "both")
    assert [one for one in addresses if one.endswith("best.pt")] == [f"{run}/best.pt" for run in copies]


def test_a_segmenter_and_its_mirrored_image_are_a_run(segmenter_run: str, tmp_path: Path) -> None:
    run = changed_copy(segmenter_run, tmp_path / "unet", 1.0)
    made = ensemble([run], "mirrored", hflip=True)
    made.choose_thresholds(resamples=20)
    test = made.evaluate(resamples=20)
    assert test.dice is not None
    assert made.predictions("test").maps is not None
    own, mirrored = Run(run).predictions("test"), made.predictions("test")
    assert (own.logit_NF != mirrored.logit_NF).any()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["a"], "give two runs or more, or --tta hflip"),
        (["a", "a"], "is given twice; name each member once"),
        (["a", "other"], r"data.findings is .* and .*; an ensemble's members share datasets and findings"),
        (["a", "both"], "is an ensemble itself; name its members"),
        (["a", "nothing"], "best.pt does not exist"),
    ],
)
def test_what_cannot_be_averaged_is_one_line(given: list[str], message: str, runs: list[str]) -> None:
    root = Path(runs[0]).parent
    if "other" in given and not (root / "other").exists():
        findings = ["Cardiomegaly", "Effusion", "Mass", "Edema"]
        changed_copy(runs[0], root / "other", data__findings=findings)
    if "both" in given:
        ensemble(runs, "both")
    with pytest.raises(UserError, match=message):
        ensemble([str(root / name) for name in given], "new")
    assert not (root / "new" / "best.pt").exists()


def test_a_name_is_given_once(runs: list[str]) -> None:
    ensemble(runs, "both")
    with pytest.raises(UserError, match="is an ensemble of other models; give another --name"):
        ensemble(runs, "both", "logits")
    with pytest.raises(UserError, match="is a run or a search; give another --name"):
        ensemble(runs, "b")
    for name in ("", "../up", "of two"):
        with pytest.raises(UserError, match=r"--name: tracking\.name"):
            ensemble(runs, name)


def test_a_member_that_was_trained_on_is_noticed(runs: list[str], tmp_path: Path) -> None:
    copies = [str(shutil.copytree(run, tmp_path / Path(run).name)) for run in runs]
    made = ensemble(copies, "both")
    made.choose_thresholds(resamples=20)
    made.evaluate(resamples=20)
    shutil.rmtree(copies[1])
    changed_copy(runs[1], Path(copies[1]), 2.0)
    with pytest.raises(UserError, match="has other weights than when the ensemble was made"):
        ensemble_gains(made, resamples=20)


def test_the_commands(runs: list[str], drawn: SyntheticPaths, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    command = ["ensemble", *runs, "--name", "of-command", "--mean", "logits", "--resamples", "20"]
    made = CliRunner().invoke(app.app, command)
    assert made.exit_code == 0, made.output
    folder = made.output.splitlines()[-1]
    assert "A = of-command, B = a:" in made.output
    assert json.loads(Path(folder, "ensemble.json").read_text())["averaging"] == {"mean": "logits", "hflip": False}
    path = str(min(drawn.nih.rglob("*.png")))
    out = tmp_path / "out"
    command = ["predict", path, "--run", runs[0], "--run", runs[1], "--out", str(out)]
    done = CliRunner().invoke(app.app, [*command, "--tta", "hflip"])
    assert done.exit_code == 0, done.output
    assert "no calls" in caplog.text
    assert json.loads((out / "predictions.json").read_text())["averaging"]["hflip"]
    assert CliRunner().invoke(app.app, [*command, "--tta", "vflip"]).exit_code == 2
    assert CliRunner().invoke(app.app, [*command, "--mean", "scores"]).exit_code == 2
    assert CliRunner().invoke(app.app, ["predict", "--split", "val", *command[2:6]]).exit_code == 2


def test_an_older_split_of_a_member_is_used_again(runs: list[str]) -> None:
    made = ensemble(runs, "both")
    made.predictions("val")
    path = predictions.predictions_path(made.path, "val")
    before = storage.read(path)
    made.predictions("val")
    assert storage.read(path) == before
