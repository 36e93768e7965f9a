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
from cxrscale.evaluation.artifacts import Comparison
from cxrscale.evaluation.thresholds import MaskRule
from cxrscale.io import read_artifact
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
    return Scores(ids, patients, score.astype(np.float32), label, FINDINGS)


def shuffled(scores: Scores, rows: np.ndarray) -> Scores:
    maps = scores.maps and ScoreHistograms(scores.maps.all_NT[rows], scores.maps.true_NT[rows])
    return Scores(
        scores.image_id[rows],
        scores.patient[rows],
        scores.logit_NF[rows],
        scores.label_NF[rows],
        scores.findings,
        maps,
    )


def with_maps(scores: Scores, seed: int) -> Scores:
    """Maps of 100 pixels whose scores are higher inside the true mask."""
    rng, truth = np.random.default_rng(seed), np.random.default_rng(1)
    size = len(scores.image_id)
    inside = truth.integers(0, 40, size) * (truth.random(size) < 0.4)
    within = np.stack([rng.multinomial(n, [0.1, 0.2, 0.3, 0.4]) for n in inside]).astype(np.int32)
    outside = np.stack([rng.multinomial(100 - n, [0.7, 0.2, 0.1, 0.0]) for n in inside]).astype(np.int32)
    return replace(scores, maps=ScoreHistograms(within + outside, within))


def test_differences_are_those_of_paired_images() -> None:
    a, b = run(0.5, 1), run(1.5, 2)
    result = comparison.compare_scores(a, b, resamples=300, seed=5)
    for f, name in ((0, "Mass"), (2, "Effusion")):
        row = result.findings[name]
        known = ~np.isnan(a.label_NF[:, f])
        auroc = [roc_auc_score(a.label_NF[known, f], scores.logit_NF[known, f]) for scores in (a, b)]
        assert [row.a, row.b] == pytest.approx(auroc)
        assert row.difference.value == pytest.approx(auroc[0] - auroc[1])
        assert row.difference.low > 0
        assert max(row.p_delong, row.p_delong_patients, row.p_bootstrap) < 0.02
        weights_RN = metrics.bootstrap_weights(a.patient, 300, 5)
        auroc_2R = [metrics.bootstrap_auroc(s.logit_NF[:, f], s.label_NF[:, f], weights_RN) for s in (a, b)]
        expected = metrics.interval(auroc[0] - auroc[1], auroc_2R[0] - auroc_2R[1])
        assert (row.difference.low, row.difference.high) == pytest.approx((expected.low, expected.high))
    tested = [result.findings[name] for name in ("Mass", "Effusion")]
    adjusted = metrics.holm([row.p_delong_patients for row in tested])
    assert [row.p_holm for row in tested] == pytest.approx(adjusted)
    hernia = result.findings["Hernia"]
    assert np.isnan([hernia.a, hernia.p_holm, hernia.p_bootstrap]).all()
    assert hernia.difference.reason == hernia.p_reason == "no image with the finding"
    mean = result.mean_auroc
    assert mean.findings == 2
    assert mean.a == pytest.approx(np.mean([row.a for row in tested]))
    assert 0 < mean.difference.low < mean.difference.value < mean.difference.high
    as_json = json.loads(result.model_dump_json(), parse_constant=pytest.fail)
    assert Comparison.model_validate(as_json).model_dump_json() == result.model_dump_json()


def test_the_order_of_images_and_findings_does_not_matter() -> None:
    a, b = with_maps(run(0.5, 1), 1), with_maps(run(1.5, 2), 2)
    expected = comparison.compare_scores(a, b, resamples=50)
    order = np.random.default_rng(9).permutation(300)
    other = shuffled(b, order)
    other = replace(
        other, logit_NF=other.logit_NF[:, ::-1], label_NF=other.label_NF[:, ::-1], findings=other.findings[::-1]
    )
    result = comparison.compare_scores(a, other, resamples=50)
    assert result.model_dump_json() == expected.model_dump_json()


def test_a_run_does_not_differ_from_itself() -> None:
    a = with_maps(run(0.5, 1), 1)
    result = comparison.compare_scores(a, a, resamples=50)
    assert result.dice is not None
    for row in (result.findings["Mass"], result.mean_auroc, result.dice.all, result.dice.on_positives):
        assert row.difference == metrics.Estimate(0, 0, 0)
        assert row.p_bootstrap == 1
    assert result.findings["Mass"].p_delong_patients == 1


def test_without_a_difference_half_of_the_p_values_are_below_one_half() -> None:
    p = [
        comparison.compare_scores(run(1.0, 2 * k), run(1.0, 2 * k + 1), resamples=200).findings["Mass"].p_bootstrap
        for k in range(40)
    ]
    assert 10 <= np.sum(np.array(p) < 0.5) <= 30
    assert np.sum(np.array(p) < 0.05) <= 6


def test_dice_is_compared_at_each_runs_own_mask_rule() -> None:
    a, b = with_maps(run(0.5, 1), 1), with_maps(run(0.5, 1), 2)
    rules = (MaskRule(0.75, 5, 0.5, 0.0), MaskRule(0.5, 0, 0.5, 0.0))
    dice = comparison.compare_scores(a, b, resamples=100, mask_rules=rules).dice
    assert dice is not None
    assert a.maps is not None
    assert b.maps is not None
    first, second = metrics.map_dice(a.maps, 0.75, 5, 0.5), metrics.map_dice(b.maps, 0.5, 0, 0.5)
    positive = a.maps.true_NT.sum(axis=1) > 0
    assert dice.positives == positive.sum()
    assert dice.all.difference.value == pytest.approx((first - second).mean())
    assert dice.on_positives.a == pytest.approx(first[positive].mean())
    assert dice.on_positives.b == pytest.approx(second[positive].mean())
    empty = ScoreHistograms(a.maps.all_NT, np.zeros_like(a.maps.true_NT))
    nothing = comparison.compare_scores(replace(a, maps=empty), replace(b, maps=empty), resamples=10).dice
    assert nothing is not None
    assert nothing.on_positives.difference.reason == "no image with a mask"


def test_findings_of_one_run_are_named_and_left_out() -> None:
    a, b = run(0.5, 1), run(1.5, 2)
    less = replace(b, logit_NF=b.logit_NF[:, :1], label_NF=b.label_NF[:, :1], findings=("Mass",))
    result = comparison.compare_scores(a, less, resamples=20)
    assert list(result.findings) == ["Mass"]
    assert (result.only_in_a, result.only_in_b) == (("Hernia", "Effusion"), ())
    assert result.findings["Mass"].p_holm == result.findings["Mass"].p_delong_patients


def test_what_cannot_be_compared_is_refused_in_one_line() -> None:
    a, b = run(0.5, 1), run(1.5, 2)
    wrong = b.logit_NF.copy()
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
        (a, replace(b, logit_NF=wrong), "B: the score of Effusion of image i007 is nan"),
        (a, replace(b, label_NF=labels), "Mass of image i004 is . in A and . in B .1 such labels."),
        (shuffled(a, np.arange(3)), shuffled(b, np.arange(3)), "A: all 3 images are of one patient"),
    ]
    for first, second, message in cases:
        with pytest.raises(UserError, match=message) as raised:
            comparison.compare_scores(first, second, resamples=5)
        assert "\n" not in str(raised.value)


def test_the_table_shows_the_values_of_the_json_file() -> None:
    result = comparison.compare_scores(with_maps(run(0.5, 1), 1), with_maps(run(1.5, 2), 2), resamples=50)
    table = tables.comparison_table(result)
    cells = {
        name: list(column.cells) for name, column in zip(("name", "n", "a", "b", "gap"), table.columns, strict=False)
    }
    assert cells["name"] == [*FINDINGS, "mean of 2", "Dice, positives", "Dice, all (empty = 1)"]
    assert cells["gap"][1] == "no image with the finding"
    assert str(cells["gap"][0]).startswith(f"{result.findings['Mass'].difference.value:+.3f} (+")


def test_the_command_compares_two_runs(nih_shards: str, tmp_path: Path) -> None:
    steps = ("train.epochs=1", "sampler.steps_per_epoch=2")
    runs = [
        launch.launch(tiny(nih_shards, tmp_path, *steps, f"tracking.name={name}", *more), "tiny", watch_run, local=True)
        for name, more in (("first", ()), ("second", ("sampler.seed=3", "data.findings=[Effusion, Mass]")))
    ]
    out = tmp_path / "compare.json"
    done = CliRunner().invoke(app.app, ["compare", *map(str, runs), "--resamples", "50", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == str(out)
    assert "only in first, not compared: Cardiomegaly" in done.stdout
    result = read_artifact(Comparison, str(out), "compare again")
    assert (result.a.name, result.b.name, result.split) == ("first", "second", "test")
    assert result.a.manifest == result.b.manifest
    assert result.a.checkpoint != result.b.checkpoint
    assert set(result.findings) == {"Effusion", "Mass"}
    missing = CliRunner().invoke(app.app, ["compare", str(runs[0]), str(tmp_path / "nowhere")])
    assert missing.exit_code == 2
    assert missing.stderr.startswith("error: ")
    assert missing.stderr.count("\n") == 1
