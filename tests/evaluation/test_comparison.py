"""Two runs on the same images: pairing, differences, refusals, and the command on two real runs. Some 15 s."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from cxrscale.cli import app
from cxrscale.cli.progress import watch_run
from cxrscale.evaluation import comparison, metrics
from cxrscale.evaluation.thresholds import MaskRule
from cxrscale.reporting import tables
from cxrscale.training import launch
from cxrscale.types import ScoreHistograms, Scores, UserError
from tests.conftest import tiny

FINDINGS = ("Mass", "Hernia", "Effusion")


def run(noise: float, seed: int, images: int = 300) -> Scores:
    """Scores of 300 images of 100 patients; labels are the same for every noise and seed."""
    truth = np.random.default_rng(0)
    label = (truth.random((images, 3)) < (0.3, 0.0, 0.2)).astype(np.float32)
    label[:10, 2] = np.nan
    score = np.nan_to_num(label) + noise * np.random.default_rng(seed).normal(size=label.shape)
    ids = np.array([f"i{k:03}" for k in range(images)], dtype=object)
    patients = np.array([f"p{k // 3}" for k in range(images)], dtype=object)
    return Scores(ids, patients, (1 / (1 + np.exp(-score))).astype(np.float32), label, FINDINGS)


def shuffled(scores: Scores, rows: np.ndarray) -> Scores:
    maps = scores.maps and ScoreHistograms(scores.maps.all_NT[rows], scores.maps.true_NT[rows])
    return Scores(
        scores.image_id[rows],
        scores.patient[rows],
        scores.score_NF[rows],
        scores.label_NF[rows],
        scores.findings,
        maps,
    )


def with_maps(scores: Scores, seed: int) -> Scores:
    """Maps of 100 pixels whose scores tell the true mask apart, more or less."""
    rng, truth = np.random.default_rng(seed), np.random.default_rng(1)
    size = len(scores.image_id)
    inside = truth.integers(0, 40, size) * (truth.random(size) < 0.4)
    within = np.stack([rng.multinomial(n, [0.1, 0.2, 0.3, 0.4]) for n in inside]).astype(np.int32)
    outside = np.stack([rng.multinomial(100 - n, [0.7, 0.2, 0.1, 0.0]) for n in inside]).astype(np.int32)
    return replace(scores, maps=ScoreHistograms(within + outside, within))


def test_differences_are_those_of_paired_images() -> None:
    a, b = run(0.5, 1), run(1.5, 2)
    found = comparison.compare_scores(a, b, resamples=300, seed=5)
    for f, name in ((0, "Mass"), (2, "Effusion")):
        row = found["findings"][name]
        known = ~np.isnan(a.label_NF[:, f])
        each = [roc_auc_score(a.label_NF[known, f], scores.score_NF[known, f]) for scores in (a, b)]
        assert [row["a"], row["b"]] == pytest.approx(each)
        assert row["difference"]["value"] == pytest.approx(each[0] - each[1])
        assert row["difference"]["low"] > 0
        assert max(row["p_delong"], row["p_delong_patients"], row["p_bootstrap"]) < 0.02
        draws = metrics.bootstrap_weights(a.patient, 300, 5)
        gap = [metrics.bootstrap_auroc(s.score_NF[:, f], s.label_NF[:, f], draws) for s in (a, b)]
        expected = metrics.interval(each[0] - each[1], gap[0] - gap[1])
        assert (row["difference"]["low"], row["difference"]["high"]) == pytest.approx((expected.low, expected.high))
    tests = [found["findings"][name]["p_delong_patients"] for name in ("Mass", "Effusion")]
    assert [found["findings"][name]["p_holm"] for name in ("Mass", "Effusion")] == pytest.approx(metrics.holm(tests))
    hernia = found["findings"]["Hernia"]
    assert (hernia["a"], hernia["p_holm"], hernia["p_bootstrap"]) == (None, None, None)
    assert hernia["difference"]["reason"] == hernia["p_reason"] == "no image with the finding"
    mean = found["mean_auroc"]
    assert mean["findings"] == 2
    assert mean["a"] == pytest.approx(np.mean([found["findings"][name]["a"] for name in ("Mass", "Effusion")]))
    assert 0 < mean["difference"]["low"] < mean["difference"]["value"] < mean["difference"]["high"]
    json.dumps(found, allow_nan=False)


def test_the_order_of_images_and_findings_does_not_matter() -> None:
    a, b = with_maps(run(0.5, 1), 1), with_maps(run(1.5, 2), 2)
    found = comparison.compare_scores(a, b, resamples=50)
    order = np.random.default_rng(9).permutation(300)
    other = shuffled(b, order)
    other = replace(
        other, score_NF=other.score_NF[:, ::-1], label_NF=other.label_NF[:, ::-1], findings=other.findings[::-1]
    )
    assert comparison.compare_scores(a, other, resamples=50) == found


def test_a_run_does_not_differ_from_itself() -> None:
    a = with_maps(run(0.5, 1), 1)
    found = comparison.compare_scores(a, a, resamples=50)
    for row in (found["findings"]["Mass"], found["mean_auroc"], found["dice"]["all"], found["dice"]["on_positives"]):
        assert row["difference"] == {"value": 0, "low": 0, "high": 0}
        assert row["p_bootstrap"] == 1
    assert found["findings"]["Mass"]["p_delong_patients"] == 1


def test_without_a_difference_half_of_the_p_values_are_below_one_half() -> None:
    p = [
        comparison.compare_scores(run(1.0, 2 * k), run(1.0, 2 * k + 1), resamples=200)["findings"]["Mass"][
            "p_bootstrap"
        ]
        for k in range(40)
    ]
    assert 10 <= np.sum(np.array(p) < 0.5) <= 30
    assert np.sum(np.array(p) < 0.05) <= 6


def test_dice_is_compared_at_each_runs_own_triplet() -> None:
    a, b = with_maps(run(0.5, 1), 1), with_maps(run(0.5, 1), 2)
    rules = (MaskRule(0.75, 5, 0.5, 0.0), MaskRule(0.5, 0, 0.5, 0.0))
    found = comparison.compare_scores(a, b, resamples=100, triplets=rules)["dice"]
    assert a.maps is not None
    assert b.maps is not None
    first, second = metrics.map_dice(a.maps, 0.75, 5, 0.5), metrics.map_dice(b.maps, 0.5, 0, 0.5)
    positive = a.maps.true_NT.sum(axis=1) > 0
    assert found["positives"] == positive.sum()
    assert found["all"]["difference"]["value"] == pytest.approx((first - second).mean())
    assert found["on_positives"]["a"] == pytest.approx(first[positive].mean())
    assert found["on_positives"]["b"] == pytest.approx(second[positive].mean())
    empty = ScoreHistograms(a.maps.all_NT, np.zeros_like(a.maps.true_NT))
    nothing = comparison.compare_scores(replace(a, maps=empty), replace(b, maps=empty), resamples=10)["dice"][
        "on_positives"
    ]
    assert nothing["difference"]["reason"] == "no image with a mask"


def test_findings_of_one_run_are_named_and_left_out() -> None:
    a, b = run(0.5, 1), run(1.5, 2)
    less = replace(b, score_NF=b.score_NF[:, :1], label_NF=b.label_NF[:, :1], findings=("Mass",))
    found = comparison.compare_scores(a, less, resamples=20)
    assert list(found["findings"]) == ["Mass"]
    assert (found["only_in_a"], found["only_in_b"]) == (["Hernia", "Effusion"], [])
    assert found["findings"]["Mass"]["p_holm"] == found["findings"]["Mass"]["p_delong_patients"]


def test_what_cannot_be_compared_is_refused_in_one_line() -> None:
    a, b = run(0.5, 1), run(1.5, 2)
    wrong = b.score_NF.copy()
    wrong[7, 2] = np.nan
    labels = b.label_NF.copy()
    labels[4, 0] = 1 - labels[4, 0]
    cases = [
        (
            shuffled(a, np.arange(298)),
            shuffled(b, np.arange(1, 300)),
            "1 images of A are missing from B .e.g. i000. and 2 images of B are missing from A .e.g. i298.; "
            "compare runs on the same split of the same shards",
        ),
        (a, replace(b, findings=("X", "Y", "Z")), "A and B share no finding .Mass, Hernia, Effusion and X, Y, Z."),
        (a, replace(b, score_NF=wrong), "B: the score of Effusion of image i007 is nan"),
        (a, replace(b, label_NF=labels), "Mass of image i004 is . in A and . in B .1 such labels."),
        (shuffled(a, np.arange(3)), shuffled(b, np.arange(3)), "A: all 3 images are of one patient"),
    ]
    for first, second, message in cases:
        with pytest.raises(UserError, match=message) as raised:
            comparison.compare_scores(first, second, resamples=5)
        assert "\n" not in str(raised.value)


def test_the_table_says_what_the_json_says() -> None:
    found = comparison.compare_scores(with_maps(run(0.5, 1), 1), with_maps(run(1.5, 2), 2), resamples=50)
    table = tables.comparison_table(found)
    cells = {
        name: list(column.cells) for name, column in zip(("name", "n", "a", "b", "gap"), table.columns, strict=False)
    }
    assert cells["name"] == [*FINDINGS, "mean of 2", "Dice, positives", "Dice, all (empty = 1)"]
    assert cells["gap"][1] == "no image with the finding"
    assert str(cells["gap"][0]).startswith(f"{found['findings']['Mass']['difference']['value']:+.3f} (+")


def test_the_verb_compares_two_runs(nih_shards: str, tmp_path: Path) -> None:
    steps = ("train.epochs=1", "sampler.steps_per_epoch=2")
    runs = [
        launch.launch(tiny(nih_shards, tmp_path, *steps, f"tracking.name={name}", *more), "tiny", watch_run, local=True)
        for name, more in (("first", ()), ("second", ("sampler.seed=3", "data.findings=[Effusion, Mass]")))
    ]
    out = tmp_path / "compare.json"
    told = CliRunner().invoke(app.app, ["compare", *map(str, runs), "--resamples", "50", "--out", str(out)])
    assert told.exit_code == 0, told.output
    assert told.stdout.splitlines()[-1] == str(out)
    assert "only in first, not compared: Cardiomegaly" in told.stdout
    found = json.loads(out.read_text())
    assert (found["a"]["name"], found["b"]["name"], found["split"]) == ("first", "second", "test")
    assert found["a"]["manifest"] == found["b"]["manifest"]
    assert found["a"]["checkpoint"] != found["b"]["checkpoint"]
    assert set(found["findings"]) == {"Effusion", "Mass"}
    lost = CliRunner().invoke(app.app, ["compare", str(runs[0]), str(tmp_path / "nowhere")])
    assert lost.exit_code == 2
    assert lost.stderr.startswith("error: ")
    assert lost.stderr.count("\n") == 1
