"""The page of a search: complete, self-contained, and its importances point to the right field. Some 5 s."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from cxrscale.reporting import tuning_page
from cxrscale.tuning.results import FINISHED, STOPPED, TrialRow
from cxrscale.tuning.search_space import Space, parse_space
from tests.reporting.pages import read_page
from tests.tuning.test_results import SEEDS, SPACE, TRIALS, recipe, row


@pytest.fixture
def space() -> Space:
    return parse_space(SPACE)


def many_trials() -> list[TrialRow]:
    """24 trials whose metric depends on the learning rate only."""
    rng = np.random.default_rng(0)
    rows = []
    for number, unit in enumerate(rng.random(24)):
        value = 0.6 + 0.3 * unit + 0.01 * rng.standard_normal()
        trial = row(f"trial-{number:03d}", [value - 0.1, value], STOPPED if unit < 0.3 else FINISHED)
        point = {
            "optim.lr": 1e-4 * 100**unit,
            "sampler.sampling": ["all", "balanced"][number % 2],
            "loss.bce": 0.5 + rng.random(),
        }
        rows.append(dataclasses.replace(trial, point=point))
    return rows


def test_importance_finds_the_field_that_matters(space: Space) -> None:
    importance = tuning_page.importances([*SEEDS, *many_trials()], recipe(), space)
    assert importance is not None
    assert importance.fields[0] == "optim.lr"
    assert importance.mean[0] > 5 * max(importance.mean[1:])
    assert importance.explained > 0.5
    assert tuning_page.importances(TRIALS, recipe(), space) is None


def test_the_page_needs_no_network_and_shows_every_trial(space: Space, tmp_path: Path) -> None:
    rows = [*SEEDS, *many_trials(), row("trial-024", [], "failed", reason="the loss is nan <b>")]
    tuning_page.write(rows, recipe(), space, str(tmp_path))
    page = read_page(tmp_path / tuning_page.PAGE)
    assert all(f"<td>{trial.name}</td>" in page.source for trial in rows)
    assert "the loss is nan &lt;b&gt;" in page.source
    assert "times the seed" in page.text
    assert page.count["svg"] == 5
    for name in ("noise", "curves", "parameters", "parallel", "importance"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_a_search_of_few_trials_has_a_page_too(space: Space, tmp_path: Path) -> None:
    tuning_page.write(TRIALS[:1], recipe(), space, str(tmp_path))
    page = read_page(tmp_path / tuning_page.PAGE)
    assert "Fewer than 6 trials" in page.text
    assert "nan" not in page.source.lower()
