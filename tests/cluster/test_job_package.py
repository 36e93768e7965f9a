"""What is sent with a job, and what is refused."""

import shlex
import subprocess
import zipfile
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from cxrscale.cli import app
from cxrscale.cli.machines import NO_JOBS, command_parameters
from cxrscale.cluster import job_package
from cxrscale.types import UserError

ROOT = Path(__file__).resolve().parents[2]
SHARDS, RUNS = "data.shards=[s3://cxr/nih]", "tracking.runs_dir=s3://cxr/runs"
INCLUDED = [
    "cxrscale/__init__.py",
    "cxrscale/py.typed",
    "cxrscale/reporting/templates/base.html.jinja",
    "cxrscale/shards/pack.py",
    "jobs/mine.yaml",
]
EXCLUDED = [
    "report.html",
    "predictions.json",
    "cxrscale/predictions-test.parquet",
    "cxrscale/samples.png",
    "jobs/report.html",
    "jobs/.hidden/a.yaml",
    "notes.yaml",
    "tests/test_flow.py",
    "pyproject.toml",
    ".idea/config",
    ".venv/lib/x.py",
    "runs/a/best.pt",
    "shards/train.tar",
    "data/b.tar",
    "cxrscale/__pycache__/a.pyc",
    ".env",
]


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"))))
def test_a_shell_reads_the_arguments_unchanged(arguments: list[str]) -> None:
    assert shlex.split(job_package.entrypoint(arguments)) == ["python", "-m", "cxrscale", *arguments]


def checkout(folder: Path) -> Path:
    for name in [*INCLUDED, *EXCLUDED]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("train: {epochs: 1}\n" if name.endswith("yaml") else name)
    return folder


def test_only_the_package_and_the_recipes_are_shipped(tmp_path: Path) -> None:
    assert job_package.package_files(checkout(tmp_path)) == INCLUDED
    subprocess.run(["git", "-C", str(tmp_path), "init", "-q"], check=True)
    assert job_package.package_files(tmp_path) == INCLUDED
    subprocess.run(["git", "-C", str(tmp_path), "add", "--force", "."], check=True)
    assert job_package.package_files(tmp_path) == INCLUDED, "a committed report is not needed either"
    subprocess.run(["git", "-C", str(tmp_path), "reset", "-q"], check=True)
    (tmp_path / ".gitignore").write_text("/jobs/\n")
    assert job_package.package_files(tmp_path) == [name for name in INCLUDED if not name.startswith("jobs")]
    assert job_package.package_files(tmp_path, ["jobs/mine.yaml"]) == INCLUDED
    assert "notes.yaml" in job_package.package_files(tmp_path, ["notes.yaml"])


def test_a_folder_without_the_package_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not hold the package cxrscale; give the checkout, or --installed"):
        job_package.package_files(tmp_path)


def test_a_private_file_is_not_shipped_but_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lists").mkdir()
    for name in ("patient.key", "lists/train.txt", "a.png"):
        (tmp_path / name).write_text("private")
    for argument in ("pack.key_file=patient.key", "pack.split_lists={train: lists/train.txt}", "a.png"):
        with pytest.raises(UserError, match=r"is not shipped; give s3://\.\.\. or an absolute path on all nodes"):
            prepare(["shard", "nih", "/raw", argument, "--out", "/shards"], tmp_path)


def test_the_package_of_this_checkout_is_small_and_complete() -> None:
    names = job_package.package_files(ROOT)
    assert {"cxrscale/shards/pack.py", "cxrscale/io/__init__.pyi", "jobs/chexnet14.yaml", "jobs/demo.yaml"} <= set(
        names
    )
    assert {name for name in names if name.startswith("cxrscale")} >= {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "cxrscale").rglob("*") if path.suffix in (".py", ".jinja")
    }
    assert sum((ROOT / name).stat().st_size for name in names) < 2 * 2**20


def test_the_same_files_give_the_same_package(tmp_path: Path) -> None:
    root = checkout(tmp_path / "a")
    sizes = [job_package.pack(root, INCLUDED, tmp_path / name) for name in ("1.zip", "2.zip")]
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "2.zip").read_bytes()
    assert sizes[0] == (tmp_path / "1.zip").stat().st_size
    assert zipfile.ZipFile(tmp_path / "1.zip").read("cxrscale/shards/pack.py") == b"cxrscale/shards/pack.py"


def test_a_package_that_is_too_large_names_its_largest_part(tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    for name, size in (("scans/a.npy", job_package.MAX_BYTES), ("notes.txt", 10)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
    with pytest.raises(UserError, match=r"the largest part is scans \(100 MiB\)") as caught:
        job_package.pack(tmp_path, ["notes.txt", "scans/a.npy"], tmp_path / "out.zip")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.zip").exists()


@pytest.mark.parametrize(
    "argument",
    [
        "AKIA" + "ABCDEFGHIJKLMNOP",
        "tracking.project=" + "0123456789abcdef" * 2 + "01234567",
        "s3://" + "someone:something@bucket/x",
        "ghp_" + "a1" * 18,
        "hf_" + "aB3" * 11,
    ],
)
def test_a_secret_argument_is_refused_and_not_repeated(argument: str) -> None:
    with pytest.raises(UserError, match="looks like a secret") as caught:
        job_package.refuse_secrets(["train", "jobs/demo.yaml", argument])
    assert argument.rpartition("=")[2] not in str(caught.value)
    with pytest.raises(UserError, match="--env COLOR: its value looks like a secret") as caught:
        job_package.environment_variables(["COLOR"], {"COLOR": argument.rpartition("=")[2]})
    assert argument.rpartition("=")[2] not in str(caught.value)


@pytest.mark.parametrize(
    "argument",
    [SHARDS, "optim.lr=3e-4", "tracking.name=chexnet14-20260101-120000", "jobs/siim-unet-balanced.yaml", "a" * 40],
)
def test_ordinary_arguments_are_not_secrets(argument: str) -> None:
    if argument != "a" * 40:
        job_package.refuse_secrets([argument])
    else:  # a wandb key has forty hexadecimal digits
        with pytest.raises(UserError):
            job_package.refuse_secrets([argument])


@pytest.mark.parametrize(
    "name", ["WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "db_password", "RAY_AUTH_TOKEN"]
)
def test_variables_named_like_secrets_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"--env {name} is named like a secret; .*put it on the nodes"):
        job_package.environment_variables([f"{name}=x"], {})


def test_variables_are_given_by_name_or_value() -> None:
    variables = job_package.environment_variables(
        ["WANDB_MODE", "OMP_NUM_THREADS=4"], {"WANDB_MODE": "offline", "OTHER": "no"}
    )
    assert variables == {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "4"}
    with pytest.raises(UserError, match="--env NOWHERE: not set here"):
        job_package.environment_variables(["NOWHERE"], {})


def prepare(words: list[str], root: Path, installed: bool = False) -> job_package.JobCommand:
    return job_package.prepare(words, command_parameters(words), root, installed)


def test_recipes_become_relative_to_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = checkout(tmp_path / "here")
    monkeypatch.chdir(root / "jobs")
    command = prepare(["train", "mine.yaml", SHARDS, RUNS, "--local"], root)
    assert command.words == ["train", "jobs/mine.yaml", SHARDS, RUNS, "--local"]
    assert command.recipes == ["jobs/mine.yaml"]
    image = ["train", "jobs/chexnet14.yaml", SHARDS]
    assert prepare(image, root, installed=True).words == image


def test_a_recipe_that_git_ignores_is_shipped_when_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = checkout(tmp_path)
    (root / "runs" / "a" / "best.yaml").write_text("train: {epochs: 1}\n")
    monkeypatch.chdir(root)
    assert prepare(["train", "runs/a/best.yaml", SHARDS, RUNS], root).recipes == ["runs/a/best.yaml"]
    assert "runs/a/best.yaml" not in job_package.package_files(root)
    assert "runs/a/best.yaml" in job_package.package_files(root, ["runs/a/best.yaml"])


@pytest.mark.parametrize(
    ("command_line", "message"),
    [
        (["train", "{tmp}/else.yaml", SHARDS, RUNS], "else.yaml is outside --working-dir"),
        (["train", "jobs/none.yaml", SHARDS, RUNS], "none.yaml does not exist"),
        (["train", "jobs/mine.yaml", SHARDS, RUNS, "optim.lrr=1"], "unknown field optim.lrr"),
        (["train", "jobs/mine.yaml", SHARDS], "tracking.runs_dir=runs is relative"),
        (["train", "jobs/mine.yaml", "data.shards=[shards/nih]", RUNS], "data.shards=shards/nih is not shipped"),
        (
            ["train", "jobs/mine.yaml", SHARDS, RUNS, "model.weights=runs/a/best.pt"],
            "model.weights=runs/a/best.pt is not",
        ),
        (["overfit", "jobs/mine.yaml", SHARDS], "tracking.runs_dir=runs is relative"),
        (["preview", "jobs/mine.yaml", "data.shards=[shards/nih]"], "data.shards=shards/nih is not shipped"),
        (["preview", "jobs/mine.yaml", SHARDS], "--out is missing"),
        (["predict", "s3://raw/a.dcm", "--run", "s3://runs/a"], "--out is missing"),
        (["predict", "a.dcm", "--run", "s3://runs/a", "--out", "/o"], "INPUT a.dcm is not shipped"),
        (["explain", "s3://raw/a.dcm", "--run", "s3://runs/a"], "--out is missing"),
        (["explain", "--split", "test", "--run", "runs/a"], "--run runs/a is not shipped"),
        (["predict", "--split", "val", "--run", "runs/a"], "--run runs/a is not shipped"),
        (["shard", "nih", "s3://raw/nih"], "--out is missing"),
        (["shard", "nih", "s3://raw/nih", "--out", "shards"], "--out shards is relative"),
        (["shard", "nih", "/raw", "--out", "/shards", "--keep-map", "map.csv"], "--keep-map map.csv is relative"),
        (["shard", "nih", "data", "--out", "/shared/nih"], "ROOT data is not shipped"),
        (["audit", "s3://a", "--out=audit.html"], "--out audit.html is relative"),
        (["audit", "a", "--out=/o/audit.html"], "SHARDS a is not shipped"),
        (["evaluate", "runs/a"], "RUN runs/a is not shipped"),
        (["compare", "s3://runs/a", "s3://runs/b"], "--out is missing"),
        (["doctor", "--json", "doctor.json"], "--json doctor.json is relative"),
        (["demo"], "--out is missing"),
        (["submit", "config"], "there is no command 'submit' to submit"),
        (["trian", "jobs/mine.yaml"], "there is no command 'trian' to submit"),
    ],
)
def test_a_path_that_the_job_cannot_use_is_one_line(
    command_line: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = checkout(tmp_path / "here")
    (tmp_path / "else.yaml").write_text("{}")
    monkeypatch.chdir(root)
    with pytest.raises(UserError) as caught:
        prepare([argument.format(tmp=tmp_path) for argument in command_line], root)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("command_line", "results"),
    [
        (["shard", "nih", "/raw", "--out", "s3://cxr/nih"], ["s3://cxr/nih"]),
        (["demo", "--out=/shared/demo"], ["/shared/demo"]),
        (["verify", "/s"], []),
        (["predict", "--split", "train", "--run", "s3://cxr/runs/a"], ["s3://cxr/runs/a"]),
        (["explain", "--split", "test", "--run", "s3://cxr/runs/a"], ["s3://cxr/runs/a"]),
        (["explain", "s3://raw/a.dcm", "--run", "s3://runs/a", "--out", "s3://o/a"], ["s3://o/a"]),
        (["predict", "s3://raw/a.dcm", "--run", "s3://runs/a", "--out", "s3://o/a"], ["s3://o/a"]),
        (["evaluate", "/shared/runs/a"], ["/shared/runs/a"]),
        (["compare", "/r/a", "/r/b", "--out", "/o/compare.json"], ["/o/compare.json"]),
        (["ensemble", "s3://cxr/runs/a", "s3://cxr/runs/b", "--name", "both"], ["s3://cxr/runs/both"]),
        (["evaluate", "/shared/runs/a", "--gate", "/shared/runs/b"], ["/shared/runs/a"]),
        (["export", "/shared/runs/a", "--out", "s3://cxr/exports/a"], ["s3://cxr/exports/a"]),
        (["doctor"], []),
        (["doctor", "--json", "/shared/doctor.json"], ["/shared/doctor.json"]),
        (["config", "jobs/mine.yaml"], []),
        (["train", "jobs/mine.yaml", SHARDS, RUNS], ["s3://cxr/runs/mine-TIME"]),
        (["train", "jobs/mine.yaml", SHARDS, RUNS, "tracking.name=a"], ["s3://cxr/runs/a"]),
        (["tune", "jobs/mine.yaml", SHARDS, RUNS, "--resume", "b"], ["s3://cxr/runs/b"]),
    ],
)
def test_results_that_outlive_the_job_are_named(
    command_line: list[str], results: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = checkout(tmp_path)
    monkeypatch.chdir(root)
    command = prepare(command_line, root)
    assert command.words == command_line
    assert command.results == results


def test_every_path_of_every_command_is_an_input_or_a_result() -> None:
    """A parameter that is added to a command has to be listed, or a job may lose what it writes."""
    neither = {"recipe", "overrides", "source", "split", "kind", "resume", "address", "name", "mean", "tta"}
    neither |= {"finding", "quantize"}
    commands: Any = typer.main.get_command(app.app)
    for name, command in commands.commands.items():
        for parameter, hint in get_type_hints(command.callback).items() if name not in NO_JOBS else ():
            if "str" in str(hint) or "Path" in str(hint):
                known = neither | set(job_package.INPUTS) | set(job_package.OUTPUTS)
                assert parameter in known, f"{name} {parameter}: add it to job_package"
