"""Where a run is taken, an export is too; what it cannot do is one line. The exports are made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cxrscale.cli import app
from cxrscale.inference import Predictor, PredictorSpec
from cxrscale.inference.serve import load_served
from cxrscale.io import storage, write_sealed_yaml
from cxrscale.run import Run, compare_variants, explain_split, plan_variants
from cxrscale.sources.synthetic.archive import SyntheticPaths
from cxrscale.types import UserError
from tests.inference.test_ensemble import changed_copy
from tests.small_exports import write_export


@pytest.fixture(scope="module")
def classifier(classifier_run: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    made = write_export(classifier_run, tmp_path_factory.mktemp("exported") / "classifier")
    Run(made).choose_thresholds(resamples=20)
    return made


def test_maps_of_an_exported_classifier_are_one_line(classifier: str, classifier_run: str, tmp_path: Path) -> None:
    command = ["explain", str(tmp_path), "--run", classifier, "--out", str(tmp_path / "maps")]
    shown = CliRunner().invoke(app.app, command)
    assert shown.exit_code == 2
    assert shown.output.count("\n") == 1
    assert f"has no features to map; explain the run it was made of: {classifier_run}" in shown.output
    with pytest.raises(UserError, match="--sanity draws weights anew"):
        explain_split(classifier, sanity=True)


def test_an_exported_segmenter_is_explained_by_its_score_map(
    segmenter_run: str, drawn: SyntheticPaths, tmp_path: Path
) -> None:
    exported, path = write_export(segmenter_run, tmp_path / "exported"), str(min(drawn.siim.rglob("*.dcm")))
    command = ["explain", path, "--run", exported, "--out", str(tmp_path / "maps")]
    shown = CliRunner().invoke(app.app, command)
    assert shown.exit_code == 0, shown.output
    assert "1 images explained by score maps" in shown.output
    (row,) = json.loads((tmp_path / "maps" / "predictions.json").read_text())["predictions"]
    with np.load(tmp_path / "maps" / row["objects"]["maps"]) as stored:
        own = Predictor(exported, "cpu")(path).probabilities
        assert stored["Pneumothorax"].max() == pytest.approx(own["Pneumothorax"], abs=1e-6)


def test_an_export_is_served_and_stands_beside_its_run(classifier_run: str, tmp_path: Path) -> None:
    run = changed_copy(classifier_run, tmp_path / "run", 1.0)
    exported = write_export(run, tmp_path / "exported")
    Run(exported).choose_thresholds(resamples=20)
    served = load_served("exported", PredictorSpec((exported,), maps=True), "cpu")
    assert served.info.checkpoint == Predictor(exported, "cpu").provenance.checkpoint
    assert np.isfinite(served.info.findings["Effusion"].threshold)
    found = compare_variants(plan_variants([run], [], [exported]), [], str(tmp_path / "page"), "val")
    assert [one.run for one in found.variants] == [run, exported]
    assert found.scores[1].metrics["AUROC"].defined


def test_an_export_whose_files_contradict_each_other_is_refused(classifier_run: str, tmp_path: Path) -> None:
    made = write_export(classifier_run, tmp_path / "exported")
    path = storage.join(made, "recipe.yaml")
    text = Path(path).read_text()
    write_sealed_yaml(path, text[: text.rindex("# ")].replace("  size: 48", "  size: 64"))
    with pytest.raises(UserError, match=r"export\.json and recipe\.yaml differ; export the run again"):
        Predictor(made, "cpu")
    with pytest.raises(UserError, match=r"export\.json and recipe\.yaml differ; export the run again"):
        PredictorSpec((made,), light=True).load("cpu")
