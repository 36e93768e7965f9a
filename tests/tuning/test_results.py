"""Rows of trials, the noise of the seeds, the best recipe, the table and the page."""

import io
import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from cxrscale import config
from cxrscale.config import Recipe
from cxrscale.reporting import tables
from cxrscale.tuning import results, search_space
from cxrscale.tuning.results import FINISHED, STOPPED, TrialRow
from cxrscale.tuning.search_space import Space
from cxrscale.types import UserError

SPACE = {"optim.lr": "loguniform(1e-4, 1e-2)", "sampler.sampling": ["all", "balanced"], "loss.bce": "uniform(0.5, 2)"}


def recipe(*overrides: str) -> Recipe:
    tree = config.override({"tune": {"space": SPACE}}, overrides)
    return config.parse(Recipe, tree, where="test")


@pytest.fixture
def domains() -> Space:
    return search_space.parse_space(SPACE)


def row(name: str, curve: list[float], status: str = FINISHED, lr: float = 1e-3, **more: object) -> TrialRow:
    point = {"optim.lr": lr, "sampler.sampling": "all", "loss.bce": 1.0}
    given: dict[str, Any] = {
        "reason": "",
        "own": 0.5,
        "seconds": 60.0,
        "worker_hours": 1 / 60,
        "gpu_hours": 0.0,
        "cost": None,
    } | more
    return TrialRow(
        name, name.startswith("seed"), status, point=point, curve=tuple(curve), run=f"/runs/s/trials/{name}", **given
    )


SEEDS = [row("seed-0", [0.6, 0.70]), row("seed-1", [0.6, 0.72]), row("seed-2", [0.71, 0.68])]
TRIALS = [
    row("trial-000", [0.5, math.nan, 0.65]),
    row("trial-001", [0.8, 0.9, 0.85], lr=3e-3),
    row("trial-002", [0.4], STOPPED),
]


def test_the_gain_is_measured_in_the_seeds_standard_deviations() -> None:
    result = results.judge([*SEEDS, *TRIALS], recipe())
    assert result.best.name == "trial-001"
    assert result.value == 0.9
    assert result.mean == pytest.approx(statistics.mean([0.70, 0.72, 0.71]))
    assert result.sd == pytest.approx(statistics.stdev([0.70, 0.72, 0.71]))
    assert result.ratio == pytest.approx((0.9 - 0.71) / 0.01)
    assert "it beats the default by 0.1900, 19.0 times the seed sd, more than the 0.8 sd" in result.sentence


def test_where_lower_is_better_the_lowest_wins() -> None:
    result = results.judge([*SEEDS, *TRIALS], recipe("train.monitor=brier"))
    assert (result.best.name, result.value) == ("trial-002", 0.4)
    # The seeds' best epochs are now 0.6, 0.6 and 0.68.
    assert result.gain == pytest.approx(1.88 / 3 - 0.4)


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        ([], "the unchanged recipe was not trained: tune.baseline_seeds=3"),
        (SEEDS[:1], "with one seed: it beats the default by 0.2000"),
        ([row("seed-0", [0.95]), row("seed-1", [0.93])], "no trial beats the default. Keep the recipe."),
        ([row("seed-0", [0.5]), row("seed-1", [1.2])], "0.1 times the seed sd, no more than the 0.8 sd"),
    ],
)
def test_noise_is_not_reported_as_a_gain(seeds: list[TrialRow], message: str) -> None:
    assert message in results.judge([*seeds, *TRIALS], recipe()).sentence


def test_a_trial_that_failed_is_never_chosen() -> None:
    failed = row("trial-003", [0.99], "failed", reason="the loss is nan at step 9")
    assert results.judge([*SEEDS, *TRIALS, failed], recipe()).best.name == "trial-001"
    with pytest.raises(UserError, match="no trial has a auroc: the loss is nan at step 9"):
        results.judge([*SEEDS, failed], recipe())


def test_trials_that_are_all_the_same_have_no_effect() -> None:
    same = [row(f"trial-00{number}", [0.5, 0.8], lr=10.0**-number) for number in range(3)]
    stopped = row("trial-003", [0.5], STOPPED)
    result = results.judge([*SEEDS, *same, stopped], recipe())
    assert result.sentence.startswith(
        "no effect: the 4 trials are the same in every epoch to the last digit; optim.lr,"
    )
    assert result.gain == 0
    unchanged = row("trial-000", list(SEEDS[0].curve))
    result = results.judge([*SEEDS, unchanged, row("trial-001", [0.1, 0.2])], recipe())
    assert "trial-000, the best trial, is the same in every epoch to the last digit as the unchanged" in result.sentence


@pytest.mark.parametrize("count", [1, 2, 12, 100])
def test_the_lead_by_chance_is_the_expected_maximum_of_normal_samples(count: int) -> None:
    largest = np.random.default_rng(0).standard_normal((20_000, count)).max(axis=1)
    assert results.expected_lead(count) == pytest.approx(largest.mean(), abs=4 * largest.std() / 20_000**0.5)


def test_a_search_without_any_metric_is_a_one_line_error() -> None:
    with pytest.raises(UserError, match=r"^no trial has a auroc: the loss is nan$"):
        results.judge([*SEEDS, row("trial-000", [], "failed", reason="the loss is nan")], recipe())


def test_the_table_has_one_row_per_trial_and_one_column_per_field(domains: Space) -> None:
    result = results.results_table([*SEEDS, *TRIALS], recipe(), domains).to_pylist()
    assert [line["trial"] for line in result] == [item.name for item in (*SEEDS, *TRIALS)]
    best = result[4]
    assert (best["optim.lr"], best["sampler.sampling"], best["auroc"], best["last"]) == (3e-3, "all", 0.9, 0.85)
    assert (best["epochs"], best["best_epoch"], best["stopped_early"]) == (3, 2, False)
    assert best["curve"] == [0.8, 0.9, 0.85]
    assert result[5]["stopped_early"] is True
    assert best["f1_at_own_thresholds"] == 0.5
    segment = recipe("data.task=segment", "data.findings=[Pneumothorax]", "train.monitor=dice")
    assert "dice_at_own_thresholds" in results.results_table(TRIALS, segment, domains).column_names


def test_the_best_trial_is_a_recipe_that_states_only_what_differs(domains: Space, tmp_path: Path) -> None:
    base = recipe("augment.preset=chexnet", "train.epochs=3", "tracking.name=s")
    text = results.best_recipe(results.judge([*SEEDS, *TRIALS], base), base, domains, "/runs/s")
    (tmp_path / "best.yaml").write_text(text)
    again = config.load_recipe(tmp_path / "best.yaml")
    assert again.optim.lr == 3e-3
    assert again.model_copy(update={"tune": base.tune, "tracking": base.tracking}) == search_space.apply_point(
        base, {"optim.lr": 3e-3, "sampler.sampling": "all", "loss.bce": 1.0}
    )
    assert yaml.safe_load(text)["augment"] == {"preset": "chexnet"}
    assert "cxrscale train /runs/s/best.yaml" in text
    assert "Validation auroc: 0.9000" in text


def test_hours_and_costs_add_up() -> None:
    rows = [row("trial-000", [0.5], gpu_hours=0.5, cost=1.0), row("trial-001", [0.5], gpu_hours=1.5, cost=3.0)]
    totals = results.totals(rows)
    assert totals.worker_hours == pytest.approx(2 / 60, abs=1e-3)
    assert (totals.gpu_hours, totals.cost) == (2.0, 4.0)
    assert results.totals(TRIALS).cost is None


def test_the_written_table_is_read_back_best_first(
    domains: Space, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = tmp_path / "trials" / "trial-001"
    best.mkdir(parents=True)
    (best / "best.pt").write_bytes(b"weights")
    rows = [
        TrialRow(**{**{f: getattr(each, f) for f in TrialRow.__slots__}, "run": str(tmp_path / "trials" / each.name)})
        for each in (*SEEDS, *TRIALS)
    ]
    results.write_results(rows, recipe(), domains, str(tmp_path))
    assert (tmp_path / "best.pt").read_bytes() == b"weights"
    stored = pq.read_table(io.BytesIO((tmp_path / results.PARQUET).read_bytes()))
    assert stored.num_rows == len(rows)
    tables.print_trials(results.read_results(str(tmp_path)), recipe(), list(domains), "search")
    lines = [line for line in capsys.readouterr().out.splitlines() if "trial-" in line or "seed-" in line]
    assert ["trial-001" in lines[0], "trial-002" in lines[-1]] == [True, True]
    assert json.dumps(stored["curve"].to_pylist()[3][0]) == "0.5"
