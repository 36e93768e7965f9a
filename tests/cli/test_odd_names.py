"""Names that a user chooses are text on every page, in every figure and in every terminal, never markup or marks.

`test_app.py` takes a folder of such a name the whole way, from `shard` to `predict`. Here are the other commands, and
the other names: of recipes, findings, readers, runs, trials, jobs and machines.
"""

from __future__ import annotations

import dataclasses
import html
import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from cxrscale.cluster import doctor
from cxrscale.cluster.doctor import Row
from cxrscale.io import terminal
from cxrscale.reporting import audit_page, tables, tuning_page
from cxrscale.shards import audit, manifest
from cxrscale.tuning import results, search_space
from tests.cli.test_app import run
from tests.reporting.pages import read_page
from tests.small_datasets import write_shards
from tests.tiny import TINY_CLASSIFIER
from tests.tuning.test_results import SEEDS, SPACE, TRIALS, recipe, row

ODD = "a [b] [red] {c} $d$ $\\x$ <i>&amp;\"' :x: `e` |f| \u200f\u202ezw #1"
"""What Rich, Markdown, HTML, formulas of figures, YAML or a terminal that writes from right to left might read."""
STEERING = re.compile("[\x1b\u200e\u200f\u202a-\u202e]")
"""What no line of a terminal may hold as it is."""


def shown(lines: list[str], name: str = ODD) -> None:
    """The name is in the lines, whole, and steers no terminal."""
    text = "\n".join(lines)
    assert not STEERING.search(text)
    assert terminal.printable(name) in " ".join(text.split())


def on_page(path: Path, name: str = ODD) -> None:
    page = read_page(path)
    assert "<i>" not in page.source
    assert name in html.unescape(page.source)


@pytest.fixture(scope="module")
def odd_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset in a folder of the odd name, with a finding and a split of that name."""
    root = tmp_path_factory.mktemp("odd") / ODD
    write_shards(root, count=24, masks=False)
    path = root / manifest.NAME
    table = pq.ParquetFile(path).read(use_threads=False)
    names = [name.replace("label.Mass", f"label.{ODD}") for name in table.column_names]
    about = json.loads(table.schema.metadata[b"cxrscale"])
    manifest.write(str(path), table.rename_columns(names), about)
    return root


def odd_recipe(folder: Path, odd_set: Path, *more: str) -> list[str]:
    """A recipe of that name, and overrides that name the dataset."""
    path = folder / f"{ODD}.yaml"
    path.write_text("train: {epochs: 1}\n")
    findings = json.dumps(["Effusion", ODD])
    mine = ["data.findings=" + findings, f"data.shards={odd_set}", f"tracking.runs_dir={folder}"]
    kept = [item for item in TINY_CLASSIFIER if not item.startswith("data.findings")]
    return [str(path), *kept, *mine, "loader.backend=opencv", *more]


def test_pages_of_a_dataset(odd_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "audit", str(odd_set), "--out", str(tmp_path / "audit.html"))
    assert (code, err) == (0, "")
    shown(out)
    on_page(tmp_path / "audit.html")
    assert audit_page.write(audit.audit(str(odd_set)), str(tmp_path / f"{ODD}.html"))
    words = odd_recipe(tmp_path, odd_set)
    code, out, err = run(capsys, "preview", *words, "--out", str(tmp_path / "preview.html"))
    assert (code, err) == (0, "")
    on_page(tmp_path / "preview.html")
    assert not STEERING.search("\n".join(out))


def test_a_recipe_is_read_back_and_overfits(odd_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = odd_recipe(tmp_path, odd_set)
    code, out, _ = run(capsys, "config", *words)
    (tmp_path / "again.yaml").write_text("\n".join(out))
    assert code == 0
    assert run(capsys, "config", str(tmp_path / "again.yaml"))[1] == out
    code, out, err = run(capsys, "overfit", *words, "tracking.name=small", "--images", "8", "--epochs", "1")
    assert code in (0, 1), err
    assert not STEERING.search(err)
    assert json.loads((tmp_path / "small" / "overfit.json").read_text())["findings"].keys() == {"Effusion", ODD}
    assert (tmp_path / "small" / "overfit.png").read_bytes()[:4] == b"\x89PNG"
    assert out[-1] == str(tmp_path / "small" / "overfit.json")  # a path is for scripts too, and stays as it is
    assert not STEERING.search("\n".join(out[:-1]))


def test_faults_of_a_dataset_and_mistakes_are_shown(
    odd_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / ODD
    broken.mkdir()
    for path in odd_set.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    next(broken.glob("*.tar")).unlink()
    code, out, err = run(capsys, "verify", str(broken))
    assert code == 2
    shown(err.splitlines())
    words_of_a_recipe = odd_recipe(tmp_path, odd_set)
    for words in (
        ["config", f"model.{ODD}=1"],
        ["train", str(tmp_path / f"not {ODD}.yaml")],
        ["threshold", str(broken)],
        ["compare", str(broken), str(broken)],
        ["predict", "x.png", "--run", str(broken)],
        ["predict", "x.png", "--run", str(broken), "--gate", str(broken)],
        ["threshold", str(broken), "--gate", str(broken)],
        ["evaluate", str(broken), "--gate", str(broken)],
        ["ensemble", str(broken), str(tmp_path), "--name", "both"],
        ["ensemble", str(tmp_path), str(broken), "--name", ODD],
        ["explain", "x.png", "--run", str(broken)],
        ["explain", "--split", "test", "--run", str(broken)],
        ["tune", *words_of_a_recipe[:1], "--resume", ODD],
        ["submit", ODD],
        ["overfit", *words_of_a_recipe, f"tracking.name={ODD}"],
    ):
        code, out, err = run(capsys, *words)
        assert (code, err.count("\n"), words[0]) == (2, 1, words[0])
        assert not STEERING.search("\n".join([*out, err])), words
        assert "[red]" in err, words


def test_tables_and_pages_of_a_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trials = [dataclasses.replace(row(ODD, [0.5, 0.6], results.BROKEN, reason=ODD), run=ODD), *TRIALS]
    space = search_space.parse_space({**SPACE, "sampler.sampling": ["all", ODD]})
    (tmp_path / ODD).mkdir()
    tuning_page.write([*SEEDS, *trials], recipe(), space, str(tmp_path / ODD))
    on_page(tmp_path / ODD / tuning_page.PAGE)
    rows: list[dict[str, Any]] = results.results_table([*SEEDS, *trials], recipe(), space).to_pylist()
    tables.print_trials(rows, recipe(), list(space), ODD)
    shown(capsys.readouterr().out.splitlines())
    text = results.best_recipe(results.judge([*SEEDS, *TRIALS], recipe()), recipe(), space, f"runs/{ODD}")
    assert "cxrscale train runs/" in text


def test_doctor_shows_names_of_machines(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.show([Row(check="disk", node=ODD, result="full", verdict=doctor.WRONG, remedy=ODD)])
    shown(capsys.readouterr().out.splitlines())
