"""`verify RUN`: every file of a run carries a digest, and a changed bit in any of them is seen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cxrscale.cli import app
from cxrscale.run import open_run
from cxrscale.training import run_files, tracking
from cxrscale.types import UserError


@pytest.fixture(scope="module")
def whole_run(classifier_run: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run after every command."""
    run = tmp_path_factory.mktemp("verified") / "run"
    shutil.copytree(classifier_run, run)
    opened = open_run(str(run))
    opened.choose_thresholds(["threshold.calibration=platt"], 4)
    opened.evaluate(4)
    opened.report()
    return run


def test_every_file_carries_a_digest(whole_run: Path) -> None:
    files = run_files.verify(str(whole_run))
    assert (files.faults, files.without) == ((), ())
    assert files.checked == sum(path.is_file() for path in whole_run.rglob("*")) - files.others
    names = {path.name for path in whole_run.iterdir()}
    assert {"recipe.yaml", "run.json", "train_log.jsonl", "best.pt", "samples.png", "report.html"} <= names


def test_a_changed_bit_anywhere_is_seen(whole_run: Path) -> None:
    seen = {}
    for path in sorted(path for path in whole_run.rglob("*") if path.is_file()):
        content, name = path.read_bytes(), path.relative_to(whole_run).as_posix()
        places = {0, len(content) // 3, len(content) // 2, len(content) - 90, len(content) - 3, len(content) - 1}
        for place in sorted(places):
            changed = bytearray(content)
            changed[place] ^= 1 << place % 8
            path.write_bytes(changed)
            faults = run_files.verify(str(whole_run)).faults
            seen[name, place] = bool(faults) and all(line.startswith(f"{name}: ") for line in faults)
        path.write_bytes(content)
    assert len(seen) > 60
    assert [place for place, fault in seen.items() if not fault] == []


def test_what_is_missing_or_of_an_earlier_version_is_named(whole_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    (run / "best.pt").unlink()
    recipe = (run / "recipe.yaml").read_text().splitlines()
    (run / "recipe.yaml").write_text("\n".join(recipe[:-1]) + "\n")
    log = [json.loads(line) for line in (run / "train_log.jsonl").read_text().splitlines()]
    plain = [{name: value for name, value in line.items() if name != tracking.CRC} for line in log]
    (run / "train_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in plain))
    files = run_files.verify(str(run))
    assert files.faults == ("best.pt: missing",)
    assert sorted(files.without) == ["recipe.yaml", "train_log.jsonl"]
    assert tracking.read_log(str(run)) == plain
    assert open_run(str(run)).recipe == open_run(str(whole_run)).recipe


def test_a_damaged_line_of_a_log_is_one_line(whole_run: Path, tmp_path: Path) -> None:
    lines = (whole_run / "train_log.jsonl").read_text().splitlines()
    other = lines[1].replace('"loss": ', '"loss": 1')
    (tmp_path / "train_log.jsonl").write_text("\n".join([lines[0], other, *lines[2:]]) + "\n")
    with pytest.raises(UserError, match=r"train_log\.jsonl: line 2 is damaged \(its CRC-32 differs\); remove"):
        tracking.read_log(str(tmp_path))


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has neither run\.json nor sweep\.json"):
        run_files.verify(str(tmp_path))


def test_a_run_is_not_repaired(whole_run: Path) -> None:
    done = CliRunner().invoke(app.app, ["verify", str(whole_run), "--repair"])
    assert done.exit_code == 2
    assert "--repair rewrites what of a dataset can be rebuilt" in str(done.output)
