"""Images unlike the training images: measured with the scores, warned of by predictions, counted by the evaluation."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from cxrscale.evaluation import ood
from cxrscale.inference import Predictor
from cxrscale.run import Run
from cxrscale.sources.synthetic.archive import SyntheticPaths
from tests.inference.test_ensemble import changed_copy


@pytest.fixture(scope="module")
def run(classifier_run: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    made = Run(changed_copy(classifier_run, tmp_path_factory.mktemp("ood") / "run", 1.0))
    made.choose_thresholds(resamples=20)
    made.evaluate(resamples=20)
    return made


def test_distances_are_kept_with_the_scores_and_are_those_of_a_prediction(run: Run, drawn: SyntheticPaths) -> None:
    assert Path(run.artifact(ood.NAME)).exists()
    limit = run.thresholds().ood_limit
    scores = run.predictions("val")
    assert scores.ood_distance_N is not None
    assert limit == pytest.approx(np.quantile(scores.ood_distance_N, 0.99))
    predictor = Predictor(run.path, "cpu")
    predicted = [one.ood_distance for one in predictor.predict(sorted(map(str, drawn.nih.rglob("*.png"))))]
    for split in ("val", "test"):
        distance_N = run.predictions(split).ood_distance_N
        assert distance_N is not None
        for distance in distance_N.tolist():
            assert min(abs(one - distance) for one in predicted if one is not None) < 1e-4


def test_false_alarms_on_the_test_split_are_reported(run: Run) -> None:
    found = run.test_metrics().ood
    scores = run.predictions("test")
    assert found is not None
    assert scores.ood_distance_N is not None
    assert found.images == (scores.ood_distance_N > found.limit).sum()
    assert found.false_alarms.value == found.images / len(scores.image_id)
    assert "false alarms" in Path(run.report()).read_text()


def test_a_turned_inverted_or_other_image_gets_a_warning(run: Run, drawn: SyntheticPaths) -> None:
    predictor = Predictor(run.path, "cpu")
    paths = sorted(map(str, drawn.nih.rglob("*.png")))[:20]
    images = [image for path in paths if (image := cv2.imread(path, cv2.IMREAD_GRAYSCALE)) is not None]
    changes = {
        "inverted": [255 - image for image in images],
        "upside down": [np.ascontiguousarray(image[::-1]) for image in images],
        "lateral": [lateral(seed) for seed in range(20)],
        "hand": [hand(seed) for seed in range(20)],
        "photograph": [photograph(seed) for seed in range(20)],
    }
    for name, others in changes.items():
        warned = ["unlike the training images" in " ".join(one.warnings) for one in predictor.predict(others)]
        assert np.mean(warned) >= 0.9, name
    plain = ["unlike the training images" in " ".join(one.warnings) for one in predictor.predict(images)]
    assert np.mean(plain) <= 0.1


def lateral(seed: int) -> np.ndarray:
    """One lung behind the heart, the spine at the right, as from the side."""
    rng = np.random.default_rng(seed)
    image_HW = np.zeros((96, 96), np.float32)
    cv2.ellipse(image_HW, (48, 50), (40, 46), 0, 0, 360, 0.7, -1)
    cv2.ellipse(image_HW, (50 + int(rng.integers(-3, 4)), 42), (22, 30), 15, 0, 360, 0.25, -1)
    cv2.ellipse(image_HW, (36, 58), (14, 16), 0, 0, 360, 0.8, -1)
    cv2.rectangle(image_HW, (76, 8), (86, 94), 1.0, -1)
    return noisy(image_HW, rng)


def hand(seed: int) -> np.ndarray:
    """A palm and five fingers on black."""
    rng = np.random.default_rng(seed)
    image_HW = np.zeros((96, 96), np.float32)
    cv2.ellipse(image_HW, (48, 68), (20, 22), 0, 0, 360, 0.8, -1)
    for number, angle in enumerate(np.linspace(-50, 40, 5) + rng.normal(0, 3)):
        tip = (int(48 + 42 * np.sin(np.radians(angle))), int(62 - (44 - 6 * (number == 0)) * np.cos(np.radians(angle))))
        cv2.line(image_HW, (48, 64), tip, 0.9, 6)
    return noisy(image_HW, rng)


def photograph(seed: int) -> np.ndarray:
    """Sky over ground, with something in front of it."""
    rng = np.random.default_rng(seed)
    image_HW = np.repeat(np.linspace(1.0, 0.2, 96, dtype=np.float32)[:, None], 96, axis=1)
    for _ in range(4):
        corner = rng.integers(0, 80, 2).tolist()
        end = (corner[0] + 16, corner[1] + 30)
        cv2.rectangle(image_HW, corner, end, float(rng.uniform(0, 1)), -1)
    return noisy(image_HW, rng)


def noisy(image_HW: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    blurred_HW = cv2.GaussianBlur(image_HW, (0, 0), 1.5) + rng.normal(0, 0.02, image_HW.shape)
    return np.asarray(np.clip(blurred_HW, 0, 1) * 255, dtype=np.uint8)
