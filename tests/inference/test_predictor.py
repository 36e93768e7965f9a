"""The predictor: the scores of the shards from the raw files, one load for many calls, any number of threads."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from cxrscale import sources
from cxrscale.evaluation import DEFAULT_MASK_RULE, summary
from cxrscale.inference import Prediction, Predictor, apply_mask_rule, predictions, split_scores
from cxrscale.io import load_image, rle_masks, storage
from cxrscale.run import Run
from cxrscale.shards import manifest
from cxrscale.sources.synthetic.archive import SyntheticPaths
from cxrscale.training import checkpoint
from cxrscale.types import UserError
from tests.conftest import keyed
from tests.dicom_files import dicom_file, gray_image


@pytest.fixture(scope="module")
def classifier_run(classifier_run: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A copy, since predictions are kept in the run."""
    return str(shutil.copytree(classifier_run, tmp_path_factory.mktemp("predictor") / "run"))


@pytest.fixture(scope="module")
def predictor(classifier_run: str) -> Predictor:
    return Predictor(classifier_run, "cpu")


@pytest.fixture(scope="module")
def paths(drawn: SyntheticPaths) -> list[str]:
    """The files of the test split."""
    return [record.path for record in sources.read("nih", str(drawn.nih)).records if record.split == "test"]


def assert_close(ours: Sequence[Prediction], theirs: Sequence[Prediction]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.probabilities == pytest.approx(dict(other.probabilities), abs=1e-5)


def test_raw_files_get_the_scores_that_their_shards_got(
    predictor: Predictor, classifier_run: str, paths: list[str]
) -> None:
    scores = split_scores.predict_split(classifier_run, "test")
    expected = {
        name: dict(zip(scores.findings, row, strict=True))
        for name, row in zip(scores.image_id, scores.probability_NF, strict=True)
    }
    assert len(paths) == len(expected)
    for path, prediction in zip(paths, predictor.predict(paths), strict=True):
        assert (prediction.path, prediction.error, prediction.mask_rle) == (path, "", None)
        assert prediction.probabilities == pytest.approx(expected[keyed("nih", Path(path).name)], abs=1e-5)


CORRECTIONS: dict[str, list[str]] = {
    "none": [],
    "platt": ["threshold.calibration=platt"],
    "temperature": ["threshold.calibration=temperature", "threshold.goal=recall", "threshold.min_rate=0.8"],
    "isotonic": ["threshold.calibration=isotonic", "threshold.goal=youden"],
    "known": ["threshold.calibration=platt", "threshold.prior_shift=known", "threshold.priors={Effusion: 0.1}"],
    "em": ["threshold.calibration=platt", "threshold.prior_shift=em"],
}
"""Ways from a logit to a call."""


@pytest.mark.parametrize("way", CORRECTIONS)
def test_a_file_is_called_as_evaluate_calls_it(way: str, classifier_run: str, paths: list[str], tmp_path: Path) -> None:
    """Image by image: the probabilities behind the Brier score, and the calls behind the confusion matrix."""
    run = Run(shutil.copytree(classifier_run, tmp_path / "run"))
    run.choose_thresholds(CORRECTIONS[way], 20)
    test = run.evaluate(20)
    scores, chosen = run.predictions("test"), run.thresholds()
    found = run.predictor("cpu").predict(paths)
    row_of = {name: row for row, name in enumerate(scores.image_id.tolist())}
    row_N = np.array([row_of[keyed("nih", Path(path).name)] for path in paths])
    counted = 0
    for f, name in enumerate(scores.findings):
        metrics_of_finding, label_N = test.findings[name], scores.label_NF[row_N, f]
        probability_N = np.array([prediction.probabilities[name] for prediction in found])
        fitted, prior = chosen.calibration[name], chosen.rule.priors.get(name)
        expected = summary.final_probabilities(scores.logit_NF[:, f], fitted, chosen.rule, prior)
        assert probability_N == pytest.approx(expected.final_N[row_N], abs=1e-5)
        known_N = np.isfinite(label_N)
        if metrics_of_finding.brier.defined:
            error = np.square(probability_N - label_N)[known_N].mean()
            assert error == pytest.approx(metrics_of_finding.brier.value, abs=1e-5)
        at = metrics_of_finding.at_threshold
        if at is None:
            assert all(name not in prediction.calls for prediction in found)
            continue
        called_N = np.array([prediction.calls[name] for prediction in found])
        cells = {"tp": called_N & (label_N == 1), "fp": called_N & (label_N == 0)}
        cells |= {"fn": ~called_N & (label_N == 1), "tn": ~called_N & (label_N == 0)}
        assert {cell: int(rows.sum()) for cell, rows in cells.items()} == dict(at.confusion)
        counted += 1
    assert counted >= 2
    assert run.predictor("cpu").provenance.thresholds == test.thresholds


def test_what_a_file_cannot_be_told_yet_is_noted(classifier_run: str, paths: list[str], tmp_path: Path) -> None:
    run = Run(shutil.copytree(classifier_run, tmp_path / "run"))
    predictor = run.predictor("cpu")
    assert predictor(paths[0]).calls == {}
    note = f"no thresholds.json: probabilities are the model's own and no calls; run `cxrscale threshold {run.path}`"
    assert predictor.provenance.notes == (note,)
    run.choose_thresholds(CORRECTIONS["em"], 20)
    predictor = run.predictor("cpu")
    assert predictor(paths[0]).calls.keys() == {"Cardiomegaly", "Effusion"}
    assert predictor.provenance.notes[0].startswith("not corrected for the prevalence that threshold.prior_shift=em")
    run.evaluate(20)
    assert run.predictor("cpu").provenance.notes == ()


def test_paths_bytes_and_arrays_are_the_same_image(predictor: Predictor, paths: list[str]) -> None:
    content = Path(paths[0]).read_bytes()
    found = [predictor(source) for source in (paths[0], Path(paths[0]), content, load_image(content).image_HW)]
    assert [prediction.path for prediction in found] == [paths[0], paths[0], "", ""]
    assert all(prediction.probabilities == found[0].probabilities for prediction in found)


def test_threads_get_the_predictions_of_one_caller(predictor: Predictor, paths: list[str]) -> None:
    alone = [predictor(path) for path in paths[:6]]
    with ThreadPoolExecutor(4) as pool:
        assert_close(list(pool.map(predictor, paths[:6] * 3)), alone * 3)


def test_the_batch_size_changes_neither_order_nor_predictions(predictor: Predictor, paths: list[str]) -> None:
    alone = [predictor(path) for path in paths[:5]]
    for batch_size in (2, 5, 64):
        together = predictor.predict(paths[:5], batch_size)
        assert [prediction.path for prediction in together] == paths[:5]
        assert_close(together, alone)
    assert predictor.predict([]) == []


def test_the_weights_are_read_once(classifier_run: str, paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    read, addresses = storage.read, list[str]()

    def counting_read(address: str) -> bytes:
        addresses.append(str(address))
        return read(address)

    monkeypatch.setattr(storage, "read", counting_read)
    predictor = Predictor(classifier_run, "cpu")
    for _ in range(2):
        predictor.predict(paths[:2])
    assert predictor.provenance.checkpoint
    assert [address for address in addresses if address.endswith(checkpoint.BEST)] == [
        storage.join(classifier_run, checkpoint.BEST)
    ]


def test_an_unreadable_image_gets_the_reason_and_the_others_their_scores(
    predictor: Predictor, paths: list[str], tmp_path: Path
) -> None:
    text, missing = tmp_path / "notes.png", tmp_path / "missing.dcm"
    text.write_text("not an image")
    found = predictor.predict([text, paths[0], missing, b"", np.zeros((4, 4), np.float32)])
    assert [bool(prediction.probabilities) for prediction in found] == [False, True, False, False, False]
    assert [bool(prediction.error) for prediction in found] == [True, False, True, True, True]
    assert "missing.dcm" in found[2].error
    assert "float32" in found[4].error
    assert all("\n" not in prediction.error for prediction in found)


def test_a_file_that_a_dataset_refuses_is_predicted_with_a_warning(predictor: Predictor, tmp_path: Path) -> None:
    gray = gray_image(96, 96)
    bare, nameless = tmp_path / "chest", tmp_path / "nameless.dcm"
    bare.write_bytes(dicom_file(gray)[132:])
    nameless.write_bytes(dicom_file(gray, SOPInstanceUID=None))
    found = predictor.predict([bare, nameless, nameless.read_bytes(), gray])
    assert [len(prediction.warnings) for prediction in found] == [1, 1, 1, 0]
    assert "neither preamble nor suffix" in found[0].warnings[0]
    assert "SOPInstanceUID (0008,0018) is missing" in found[1].warnings[0]
    assert not any(prediction.error for prediction in found)
    assert_close(found[:3], [found[3]] * 3)


def test_the_provenance_names_weights_datasets_and_recipe(predictor: Predictor, classifier_run: str) -> None:
    info = predictions.read_info(predictions.predictions_path(classifier_run, "test"))
    provenance = predictor.provenance
    assert provenance.run == storage.absolute(classifier_run)
    assert (provenance.checkpoint, provenance.manifest) == (info.checkpoint, info.manifest)
    assert provenance.recipe == info.recipe == predictor.recipe
    assert predictor.findings == predictor.recipe.data.findings


def test_a_mask_is_that_of_the_shards_at_the_size_of_the_file(
    segmenter_run: str, siim_shards: str, drawn: SyntheticPaths
) -> None:
    paths = {keyed("siim", record.image_id): record.path for record in sources.read("siim", str(drawn.siim)).records}
    data = manifest.load(siim_shards)
    predictor = Predictor(segmenter_run, "cpu")
    for row, score_HW, _ in split_scores.score_maps(segmenter_run, data, range(4)):
        path = paths[data.image_id[row]]
        prediction = predictor(path)
        assert prediction.probabilities["Pneumothorax"] == pytest.approx(float(score_HW.max()), abs=1e-5)
        height, width = load_image(storage.read(path), name=path).image_HW.shape
        expected_HW = apply_mask_rule(score_HW, DEFAULT_MASK_RULE, (height, width))
        assert prediction.mask_rle is not None
        # Pixels next to the threshold may fall on either side in a batch of another size.
        assert (rle_masks.decode(prediction.mask_rle, (height, width)) != expected_HW).mean() < 1e-3


def test_a_folder_without_weights_is_a_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}/best.pt does not exist; give the folder")):
        Predictor(tmp_path)
