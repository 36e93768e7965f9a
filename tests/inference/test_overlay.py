"""Overlays: what is drawn where."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from cxrscale.cli import app
from cxrscale.inference import Prediction, Predictor
from cxrscale.inference.overlay import OUTLINE, draw_overlay, overlay_drafter
from cxrscale.io import rle_masks, storage
from cxrscale.sources.synthetic.archive import SyntheticPaths
from cxrscale.types import probabilities_of

GRAY_HW = np.full((120, 100), 90, np.uint8)


def test_the_mask_is_outlined_and_the_image_stays() -> None:
    mask_HW = np.zeros(GRAY_HW.shape, bool)
    mask_HW[30:60, 20:50] = True
    prediction = Prediction(
        probabilities={"Pneumothorax": 0.8}, mask_rle=rle_masks.encode(mask_HW), mask_area=900, mask_area_mm2=225.0
    )
    drawn = draw_overlay(GRAY_HW, prediction, {})
    assert drawn.shape[1] == 100
    assert drawn.shape[0] > 120
    outlined = (drawn[:120] == OUTLINE).all(axis=2)
    assert outlined[30:60, 20].all()
    assert outlined[45, 20]
    assert not outlined[35:55, 25:45].any()
    assert (drawn[:120][~outlined] == 90).all()
    assert drawn[120:].any()


def test_heat_lies_where_the_map_is_high_and_nowhere_else() -> None:
    map_hw = np.full((6, 5), -1.0, np.float32)
    map_hw[1, 1] = 4.0
    maps = {"Mass": map_hw, "Nodule": -map_hw}
    probabilities, thresholds = {"Mass": 0.3, "Nodule": 0.6}, {"Mass": 0.1, "Nodule": 0.9}
    prediction = Prediction(probabilities=probabilities, maps=maps, calls={"Mass": True, "Nodule": False})
    drawn = draw_overlay(GRAY_HW, prediction, thresholds)[:120].astype(int)
    change_HW = abs(drawn - 90).sum(axis=2)
    assert np.unravel_index(change_HW.argmax(), change_HW.shape) == pytest.approx((30, 30), abs=12)
    assert (change_HW[80:] == 0).all()
    assert (draw_overlay(GRAY_HW, Prediction(probabilities=probabilities), thresholds)[:120] == 90).all()


def test_a_name_that_the_font_has_not_does_not_stop_it() -> None:
    drawn = draw_overlay(GRAY_HW, Prediction(probabilities={"Pleurale Verdickung \u00fc\u202e": 0.5}), {})
    assert drawn[120:].any()


def test_maps_of_a_model_average_to_its_logits_and_are_drawn(classifier_run: str, drawn: SyntheticPaths) -> None:
    predictor = Predictor(classifier_run, "cpu", maps=True)
    path = str(min(drawn.nih.rglob("*.png")))
    prediction = predictor(path)
    assert set(prediction.maps) == set(predictor.findings)
    for name, map_hw in prediction.maps.items():
        assert map_hw.mean() == pytest.approx(prediction.logits[name], abs=1e-4)
    assert Predictor(classifier_run, "cpu")(path).maps == {}
    draft = overlay_drafter(predictor.provenance)(prediction)
    decoded = cv2.imdecode(np.frombuffer(draft.encode(), np.uint8), cv2.IMREAD_COLOR)
    assert decoded is not None
    assert decoded.shape[1] == prediction.width
    assert (decoded[: prediction.height].std(axis=2) > 0).any()


def test_the_map_of_a_segmenter_is_its_probabilities(segmenter_run: str, drawn: SyntheticPaths) -> None:
    predictor = Predictor(segmenter_run, "cpu", maps=True)
    prediction = predictor(str(min(drawn.siim.rglob("*.dcm"))))
    assert prediction.maps["Pneumothorax"].max() == pytest.approx(
        probabilities_of(prediction.logits["Pneumothorax"]), abs=1e-6
    )


def test_what_is_drawn_depends_on_the_file_and_the_model(classifier_run: str, drawn: SyntheticPaths) -> None:
    predictor = Predictor(classifier_run, "cpu")
    paths = sorted(map(str, drawn.nih.rglob("*.png")))[:2]
    draft = overlay_drafter(predictor.provenance)
    first, second = (draft(Prediction(path)).identity for path in paths)
    assert first != second
    assert storage.digest(storage.read(paths[0])) in first
    other = predictor.provenance.model_copy(update={"checkpoint": "other"})
    assert overlay_drafter(other)(Prediction(paths[0])).identity != first


def test_predict_draws_one_picture_per_image_and_names_it(
    classifier_run: str, drawn: SyntheticPaths, tmp_path: Path
) -> None:
    paths = [*sorted(map(str, drawn.nih.rglob("*.png")))[:3], str(tmp_path / "not there.png")]
    command = ["predict", *paths, "--run", classifier_run, "--overlay", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app.app, command)
    assert done.exit_code == 3
    assert "overlays in" in done.output
    rows = json.loads((tmp_path / "out" / "predictions.json").read_text())["predictions"]
    assert "maps" not in rows[0]
    for row in rows[:3]:
        picture = cv2.imread(str(tmp_path / "out" / row["objects"]["overlay"]))
        assert picture is not None
        assert (picture.std(axis=2) > 0).any()
    assert "objects" not in rows[3]
    assert len(list((tmp_path / "out" / "objects").iterdir())) == 3
