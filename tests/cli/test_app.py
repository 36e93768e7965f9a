"""The command line as a user meets it: artifacts last, mistakes in one line."""

import html
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from cxrscale.cli import app
from cxrscale.sources.synthetic.archive import SyntheticPaths
from tests.tiny import TINY_CLASSIFIER


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[str], str]:
    """Exit code, lines of stdout, stderr of `cxrscale words...` in this process."""
    before, sys.argv = sys.argv, ["cxrscale", *words]
    try:
        app.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.argv = before
    captured = capsys.readouterr()
    return code, captured.out.splitlines(), captured.err


ODD = "a [b] [red] {c} $d$ <i>&amp;\"' :x: \u202ee #1"
"""A folder's name with what markup, Markdown, HTML, formulas, YAML and text from right to left might read as theirs."""


@pytest.mark.smoke
def test_the_whole_way_by_commands_in_a_folder_with_an_odd_name(
    drawn: SyntheticPaths, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tmp_path = tmp_path / ODD
    tmp_path.mkdir()
    recipe = tmp_path / "small.yaml"
    recipe.write_text("train: {epochs: 1}\n")
    shards = str(tmp_path / "nih")
    code, out, _ = run(capsys, "shard", "nih", str(drawn.nih), "pack.size=64", "--out", shards, "--local")
    assert (code, out[-1]) == (0, shards)
    code, out, _ = run(capsys, "verify", shards)
    assert (code, out[-1]) == (0, shards)
    code, out, _ = run(capsys, "audit", shards, "--out", str(tmp_path / "audit.html"))
    assert (code, out[-1]) == (0, str(tmp_path / "audit.html"))
    assert "No leak found: no patient and no image is in two splits." in out
    assert json.loads((tmp_path / "audit.json").read_text())["leaks"]["patients_in_two_splits"] == []
    overrides = [*TINY_CLASSIFIER, f"data.shards={shards}", f"tracking.runs_dir={tmp_path}", "tracking.name=small"]
    code, out, _ = run(capsys, "train", str(recipe), *overrides, "--local")
    assert (code, out[-1]) == (0, str(tmp_path / "small"))
    code, out, _ = run(capsys, "evaluate", out[-1])
    assert code == 2
    code, out, _ = run(capsys, "threshold", str(tmp_path / "small"), "threshold.goal=youden", "--resamples", "20")
    assert (code, out[-1]) == (0, str(tmp_path / "small" / "thresholds.json"))
    code, out, _ = run(capsys, "evaluate", str(tmp_path / "small"), "--resamples", "20")
    assert out[-2:] == [str(tmp_path / "small" / name) for name in ("test_metrics.json", "report.html")]
    found = json.loads(Path(out[-2]).read_text())
    assert found["recipe"]["data"]["shards"] == [shards]
    for page in (tmp_path / "audit.html", Path(out[-1])):
        text = page.read_text()
        assert "<i>" not in text
        assert ODD in html.unescape(text)
    code, out, _ = run(
        capsys, "compare", str(tmp_path / "small"), str(tmp_path / "small"), "--out", str(tmp_path / "c")
    )
    assert (code, out[-1]) == (0, str(tmp_path / "c"))
    assert {"manifest", "checkpoint"} <= found.keys()
    image = str(next(drawn.nih.rglob("*.png")))
    dicom = str(next(drawn.siim.rglob("*.dcm")))
    made, bare = tmp_path / "predictions" / "predictions.json", tmp_path / "bare"
    bare.write_bytes(Path(dicom).read_bytes()[132:])
    files = (image, dicom, __file__, str(bare))
    code, out, err = run(capsys, "predict", *files, "--run", str(tmp_path / "small"), "--out", str(made.parent))
    lines = json.loads(made.read_text())["predictions"]
    assert (code, out[-1]) == (3, str(made))
    assert "error: 1 of 4 inputs could not be read; `error` in their rows says why" in err
    assert [len(line.get("probabilities", {})) for line in lines] == [3, 3, 0, 3]
    assert lines[2]["error"]
    (warning,) = lines[3]["warnings"]
    assert f"  warning: {warning}" in out


def test_config_resolves_and_explains(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "config", "optim.lr=3e-4")
    assert code == 0
    assert "  lr: 0.0003" in out
    code, out, _ = run(capsys, "config", "--help-fields")
    assert "optim.lr" in out


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (["shard", "nih", "/nowhere", "--out", "{tmp}/o"], ["/nowhere"]),
        (["shard", "mri", "{nih}", "--out", "{tmp}/o"], ["mri", "nih", "siim"]),
        (["shard", "nih", "{nih}", "pack.sise=3", "--out", "{tmp}/o"], ["unknown field pack.sise", "pack.size"]),
        (["shard", "nih", "{broken}", "--out", "{tmp}/o"], ["Data_Entry_2017", "Finding Labels"]),
        (["train", "jobs/nothing.yaml"], ["jobs/nothing.yaml does not exist"]),
        (["train", "{tmp}/[b]\x1b[31m\u202e.yaml"], ["[b]\\x1b[31m\\u202e.yaml does not exist"]),
        (["verify", "{tmp}/a\nb"], ["a\\nb"]),
        (["threshold", "{tmp}"], ["recipe.yaml does not exist", "cxrscale train"]),
        (["predict", "x.dcm", "--run", "{tmp}"], ["best.pt does not exist"]),
        (["verify", "{tmp}"], ["manifest.parquet does not exist"]),
    ],
)
def test_a_mistake_is_one_line_that_names_it(
    words: list[str],
    fragments: list[str],
    drawn: SyntheticPaths,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(drawn.nih, broken)
    table = next(broken.glob("Data_Entry*.csv"))
    table.write_text(table.read_text().replace("Finding Labels", "Labels", 1))
    places = {"tmp": str(tmp_path), "nih": str(drawn.nih), "broken": str(broken)}
    code, _, err = run(
        capsys, *(word.format(**places) for word in words), *(["--local"] if words[0] == "shard" else [])
    )
    assert code == 2
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    for fragment in fragments:
        assert fragment in err


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}, 'endpoint URL: "http://127.0.0.1:1/nowhere/x'),
        ({"AWS_EC2_METADATA_DISABLED": "true"}, "Unable to locate credentials"),
    ],
)
def test_a_bucket_that_cannot_be_reached_is_one_line(keys: dict[str, str], said: str, tmp_path: Path) -> None:
    alone = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    given = {"AWS_ENDPOINT_URL": "http://127.0.0.1:1", "AWS_MAX_ATTEMPTS": "1", "HOME": str(tmp_path)}
    command = [sys.executable, "-m", "cxrscale", "verify", "s3://nowhere/x"]
    ran = subprocess.run(command, env=alone | given | keys, capture_output=True, text=True, timeout=120)
    *waits, line = ran.stderr.splitlines()
    assert ran.returncode == 2
    assert said in line
    # It gives up after 5 s. Only where the machine is so busy that an attempt takes longer, there is a word before.
    assert all("s for s3://nowhere/x/" in wait and wait.endswith("ends at 5 s without an answer") for wait in waits)
    assert line.endswith("check the network, AWS_ENDPOINT_URL and the credentials")


def test_help_teaches() -> None:
    shown = subprocess.run([sys.executable, "-m", "cxrscale", "--help"], capture_output=True, text=True, check=True)
    for command in ("demo", "shard", "verify", "audit", "preview", "overfit", "train", "tune", "threshold", "evaluate"):
        assert command in shown.stdout
    for command in ("compare", "predict", "doctor", "submit", "config"):
        assert command in shown.stdout


@pytest.mark.smoke
def test_the_help_of_every_command_loses_no_character(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Brackets, such as those of data.shards=[shards/nih], are not markup."""
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("TERMINAL_WIDTH", "400")
    commands = typer.main.get_command(app.app).commands  # type: ignore[attr-defined]
    assert len(commands) >= 14
    for name, command in commands.items():
        code, out, _ = run(capsys, name, "--help")
        assert code == 0
        shown = " ".join(word for line in out for word in line.replace("│", " ").split())
        texts = [command.help or "", *(parameter.help or "" for parameter in command.params if not parameter.hidden)]
        assert "" not in texts[:1]
        for text in texts:
            assert " ".join(text.split()) in shown, (name, text)


@pytest.mark.parametrize(
    ("words", "old", "new"),
    [
        (["batches", "jobs/demo.yaml"], "batches", "preview"),
        (["ablation", "jobs/demo.yaml"], "ablation", "overfit"),
        (["shard", "siim", "x", "--twins", "y"], "--twins", "--patients-from"),
        (["doctor", "--free-orphans"], "--free-orphans", "--remove-orphans"),
        (["train", "jobs/demo.yaml", "plan.batch=4"], "plan.batch", "sampler.batch_size"),
    ],
)
def test_an_old_name_is_one_line_with_the_new_one(
    words: list[str], old: str, new: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    code, _, err = run(capsys, *words)
    assert code == 2
    assert err.count("\n") == 1
    assert old in err
    assert new in err
