"""The ablation: a sound set-up passes, an unsound one fails with the reason."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrscale.config import Recipe
from cxrscale.io import storage
from cxrscale.training import overfit
from cxrscale.training.overfit import LearningCurve, choose, diagnosis, passed
from cxrscale.types import UserError
from tests.cli.test_app import run
from tests.conftest import TINY_CLASSIFIER, TINY_SEGMENTER, tiny

CLASSIFIER = (*TINY_CLASSIFIER, "optim.lr=5e-3", "augment.hflip=0.5", "loader.backend=opencv")
SEGMENTER = (*TINY_SEGMENTER, "optim.lr=5e-3", "loader.backend=opencv")


def found(recipe: Recipe, images: int, epochs: int) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(storage.read(overfit.overfit(recipe, "small", images, epochs)))
    return result


def test_a_classifier_learns_its_images_by_heart(nih_shards: str, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    recipe = tiny(nih_shards, tmp_path, base=CLASSIFIER)
    address = overfit.overfit(recipe, "small", 24, 30, lambda done, total, _note: told.append((done, total)))
    result = json.loads(storage.read(address))
    assert result["passed"], result["verdict"]
    assert result["auroc"] >= 0.95
    assert result["images"] == len(set(result["image_ids"])) == 24
    assert all(counts["present"] > 1 and counts["absent"] > 1 for counts in result["findings"].values())
    assert result["loss"]["end"] < 0.8 * result["loss"]["start"]
    assert len(result["curve"]["loss"]) == told[-1][0]
    assert (tmp_path / "tiny" / "ablation.png").read_bytes().startswith(b"\x89PNG")
    # A training run of that name is not touched.
    assert not (tmp_path / "tiny" / "metrics.jsonl").exists()


def test_a_segmenter_learns_its_images_by_heart(siim_shards: str, tmp_path: Path) -> None:
    result = found(tiny(siim_shards, tmp_path, base=SEGMENTER), 12, 40)
    assert result["passed"], result["verdict"]
    assert result["dice_positives"] >= 0.8
    assert result["findings"]["Pneumothorax"]["present"] >= 4


def test_a_rate_of_nothing_is_diagnosed_and_exits_1(
    nih_shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text("optim: {lr: 1.0e-12}\n")
    overrides = [*CLASSIFIER, f"data.shards=[{nih_shards}]", f"tracking.runs_dir={tmp_path}", "optim.lr=1e-12"]
    code, out, _ = run(capsys, "ablation", str(recipe), *overrides, "--images", "16", "--epochs", "2")
    assert code == 1
    assert out[-1] == str(tmp_path / "small-ablation" / "ablation.json")
    assert out[-3].startswith("FAILED: the set-up does not learn: AUROC of 16 trained images 0.")
    assert "raise optim.lr=1e-12" in out[-2]


def test_a_rate_of_far_too_much_is_diagnosed(nih_shards: str, tmp_path: Path) -> None:
    result = found(tiny(nih_shards, tmp_path, "optim.lr=1e30", base=CLASSIFIER), 16, 2)
    assert not result["passed"]
    assert "optim.lr=1e+30 is too high" in result["diagnosis"]


def test_a_finding_that_nobody_has_is_said(nih_shards: str, tmp_path: Path) -> None:
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
    positives, there = positive_N[chosen].sum(), positive_N.sum()
    negatives = int(np.sum(known_N & ~positive_N))
    assert positives == min(there, max(count // 2, count - negatives))
    # Findings take turns: none is left out that exists while another is there twice over.
    if positives >= 3:
        assert all((label_NF[chosen, f] == 1).any() == (label_NF[:, f] == 1).any() for f in range(3))


def course(**changed: Any) -> LearningCurve:
    """A course that passes, but for what is changed."""
    plainly: dict[str, Any] = {
        "losses": (0.7, 0.6, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1),
        "scores": (0.5, 0.9, 1.0),
        "eval_loss": 0.1,
        "steps": 2,
        "moved": 0.3,
        "gradient": 1.0,
        "trained": 1.0,
        "diverged": False,
    }
    return LearningCurve(**(plainly | changed))


FLAT = (0.7,) * 8


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"diverged": True}, "the loss is no number after step 8: optim.lr=0.001 is too high"),
        ({"diverged": True, "losses": ()}, "the loss is no number after step 0"),
        ({"losses": FLAT, "gradient": 0.0}, "no gradient reaches the weights"),
        ({"losses": FLAT, "moved": 1e-9}, "the weights moved by 1.0e-09 of their size: raise optim.lr=0.001"),
        ({"losses": (0.7, 2.0, 3.0)}, "the loss rises: optim.lr=0.001 is too high"),
        ({"losses": FLAT, "trained": 0.001}, "only 0.1% of the weights are trained: lower model.freeze_children"),
        ({"losses": FLAT}, "the weights move but the loss does not fall"),
        ({"scores": (0.5, 0.9, 0.7)}, "unsteady: 0.900 after 1 epochs was lost again; optim.lr=0.001 is too high"),
        ({"scores": (0.5, 0.6), "eval_loss": 2.0}, "batch normalization's averages lag"),
        ({"scores": (0.5, 0.6), "losses": (0.7, 0.6, 0.5, 0.4, 0.3, 0.2)}, "still falling: give more --epochs"),
        ({"scores": (0.5, 0.6)}, "the loss falls but AUROC does not"),
        ({"scores": (0.5, float("nan"))}, "the loss falls but AUROC does not"),
    ],
)
def test_each_failure_has_its_diagnosis(changed: dict[str, Any], said: str) -> None:
    assert passed(course(), Recipe())
    assert not passed(course(**changed), Recipe())
    assert said in diagnosis(course(**changed), Recipe())


def test_a_frozen_model_says_how_much_of_it_is_trained(nih_shards: str, tmp_path: Path) -> None:
    changes = ("model.arch=resnet10t", "model.options={}", "model.freeze_children=7")
    result = found(tiny(nih_shards, tmp_path, *changes, base=CLASSIFIER), 16, 1)
    assert 0 < result["trained"] < 0.9
