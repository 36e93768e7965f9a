"""Overfitting on purpose: a sound setup passes, an unsound one fails with the likely cause."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrscale.config import Recipe
from cxrscale.io import read_artifact
from cxrscale.training import overfit, tracking
from cxrscale.training.overfit import LearningCurve, OverfitReport, choose, diagnosis
from cxrscale.types import UserError
from tests.cli.test_app import run
from tests.conftest import tiny
from tests.tiny import TINY_CLASSIFIER, TINY_SEGMENTER

CLASSIFIER = (*TINY_CLASSIFIER, "optim.lr=5e-3", "augment.hflip=0.5", "loader.backend=opencv")
SEGMENTER = (*TINY_SEGMENTER, "optim.lr=5e-3", "loader.backend=opencv")


def report_of(recipe: Recipe, images: int, epochs: int) -> OverfitReport:
    return overfit.overfit(recipe, "small", images, epochs).report


def test_a_classifier_learns_its_images_by_heart(nih_shards: str, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    recipe = tiny(nih_shards, tmp_path, base=CLASSIFIER)
    result = overfit.overfit(recipe, "small", 24, 30, lambda done, total, _note: steps.append((done, total)))
    report = result.report
    assert report.passed, report.verdict
    assert report.metric == "auroc"
    assert report.score >= 0.95
    assert report.images == len(set(report.image_ids)) == 24
    assert all(counts["present"] > 1 and counts["absent"] > 1 for counts in report.findings.values())
    assert report.loss.end < 0.8 * report.loss.start
    assert len(report.curve.loss) == steps[-1][0]
    assert result.address == str(tmp_path / "tiny" / "overfit.json")
    assert read_artifact(OverfitReport, result.address, "") == report
    assert result.plot == str(tmp_path / "tiny" / "overfit.png")
    # A training run of that name is not touched.
    assert not (tmp_path / "tiny" / tracking.TRAIN_LOG).exists()


def test_a_segmenter_learns_its_images_by_heart(siim_shards: str, tmp_path: Path) -> None:
    report = report_of(tiny(siim_shards, tmp_path, base=SEGMENTER), 12, 40)
    assert report.passed, report.verdict
    assert report.metric == "dice_positives"
    assert report.score >= 0.8
    assert report.findings["Pneumothorax"]["present"] >= 4


def test_a_learning_rate_near_zero_is_diagnosed_and_exits_1(
    nih_shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text("optim: {lr: 1.0e-12}\n")
    overrides = [*CLASSIFIER, f"data.shards=[{nih_shards}]", f"tracking.runs_dir={tmp_path}", "optim.lr=1e-12"]
    code, out, _ = run(capsys, "overfit", str(recipe), *overrides, "--images", "16", "--epochs", "2")
    assert code == 1
    assert out[-1] == str(tmp_path / "small-overfit" / "overfit.json")
    assert out[-3].startswith("FAILED: the setup does not learn: AUROC of 16 trained images 0.")
    assert "raise optim.lr=1e-12" in out[-2]
    assert (tmp_path / "small-overfit" / "overfit.png").read_bytes().startswith(b"\x89PNG")


def test_a_learning_rate_that_is_far_too_high_is_diagnosed(nih_shards: str, tmp_path: Path) -> None:
    report = report_of(tiny(nih_shards, tmp_path, "optim.lr=1e30", base=CLASSIFIER), 16, 2)
    assert not report.passed
    assert "optim.lr=1e+30 is too high" in report.diagnosis


def test_a_finding_that_no_image_has_is_a_user_error(nih_shards: str, tmp_path: Path) -> None:
    recipe = tiny(nih_shards, tmp_path, "data.findings=[Hernia]", base=CLASSIFIER)
    with pytest.raises(UserError, match="none of Hernia is present in some and absent in others of"):
        overfit.overfit(recipe, "small", 16, 1)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_half_of_the_chosen_have_a_finding_where_there_are_as_many(drawn: st.DataObject) -> None:
    label_NF = np.array(
        drawn.draw(st.lists(st.tuples(*[st.sampled_from([0.0, 1.0, np.nan])] * 3), min_size=1, max_size=40)), np.float32
    )
    hash_N = np.array(drawn.draw(st.permutations(range(len(label_NF)))), np.uint64)
    count = drawn.draw(st.integers(2, 40))
    chosen = choose(label_NF, hash_N, count)
    known_N = np.asarray(~np.isnan(label_NF).all(axis=1))
    positive_N = np.asarray((label_NF == 1).any(axis=1))
    assert len(chosen) == min(count, known_N.sum())
    assert known_N[chosen].all()
    assert (np.diff(chosen) > 0).all()
    positives, available = positive_N[chosen].sum(), positive_N.sum()
    negatives = int(np.sum(known_N & ~positive_N))
    assert positives == min(available, max(count // 2, count - negatives))
    # Findings take turns: none that exists is left out while another is chosen twice.
    if positives >= 3:
        assert all((label_NF[chosen, f] == 1).any() == (label_NF[:, f] == 1).any() for f in range(3))


def curve(**changed: Any) -> LearningCurve:
    """A curve that passes, but for what is changed."""
    passing: dict[str, Any] = {
        "losses": (0.7, 0.6, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1),
        "metric": "auroc",
        "scores": (0.5, 0.9, 1.0),
        "eval_loss": 0.1,
        "steps": 2,
        "weight_change": 0.3,
        "gradient_norm": 1.0,
        "trainable": 1.0,
        "diverged": False,
    }
    return LearningCurve(**(passing | changed))


FLAT = (0.7,) * 8


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"diverged": True}, "the loss is not a number after step 8: optim.lr=0.001 is too high"),
        ({"diverged": True, "losses": ()}, "the loss is not a number after step 0"),
        ({"losses": FLAT, "gradient_norm": 0.0}, "no gradient reaches the weights"),
        (
            {"losses": FLAT, "weight_change": 1e-9},
            "the weights change by only 1.0e-09 of their norm; raise optim.lr=0.001",
        ),
        ({"losses": (0.7, 2.0, 3.0)}, "the loss rises: optim.lr=0.001 is too high"),
        ({"losses": FLAT, "trainable": 0.001}, "only 0.1% of the weights are trained: lower model.freeze_children"),
        ({"losses": FLAT}, "the weights change but the loss does not fall"),
        ({"scores": (0.5, 0.9, 0.7)}, "unstable: 0.900 after 1 epochs was lost again; optim.lr=0.001 is too high"),
        ({"scores": (0.5, 0.6), "eval_loss": 2.0}, "the averages of batch normalization lag"),
        ({"scores": (0.5, 0.6), "losses": (0.7, 0.6, 0.5, 0.4, 0.3, 0.2)}, "still falling: raise --epochs"),
        ({"scores": (0.5, 0.6)}, "the loss falls but AUROC does not"),
        ({"scores": (0.5, float("nan"))}, "the loss falls but AUROC does not"),
    ],
)
def test_each_failure_has_its_diagnosis(changed: dict[str, Any], message: str) -> None:
    assert curve().passed
    assert not curve(**changed).passed
    assert message in diagnosis(curve(**changed), Recipe())


def test_a_frozen_model_says_how_much_of_it_is_trained(nih_shards: str, tmp_path: Path) -> None:
    changes = ("model.arch=resnet10t", "model.options={}", "model.freeze_children=7")
    report = report_of(tiny(nih_shards, tmp_path, *changes, base=CLASSIFIER), 16, 1)
    assert 0 < report.trainable < 0.9
