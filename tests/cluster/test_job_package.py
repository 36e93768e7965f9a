"""What a job takes along, and what it must not."""

import shlex
import subprocess
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxrscale.cluster import job_package
from cxrscale.types import UserError

ROOT = Path(__file__).resolve().parents[2]
SHARDS, RUNS = "data.shards=[s3://cxr/nih]", "tracking.runs_dir=s3://cxr/runs"
SEEN = ["cxrscale/__init__.py", "cxrscale/shards/pack.py", "jobs/mine.yaml", "pyproject.toml"]
UNSEEN = [
    ".idea/config",
    ".venv/lib/x.py",
    "runs/a/best.pt",
    "shards/train.tar",
    "data/b.tar",
    "cxrscale/__pycache__/a.pyc",
    ".env",
]


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"))))
def test_a_shell_reads_the_words_as_they_were(words: list[str]) -> None:
    assert shlex.split(job_package.entrypoint(words)) == ["python", "-m", "cxrscale", *words]


def checkout(folder: Path) -> Path:
    for name in [*SEEN, *UNSEEN]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("train: {epochs: 1}\n" if name.endswith("yaml") else name)
    return folder


def test_only_the_package_is_shipped(tmp_path: Path) -> None:
    assert job_package.package_files(checkout(tmp_path)) == SEEN
    subprocess.run(["git", "-C", str(tmp_path), "init", "-q"], check=True)
    assert job_package.package_files(tmp_path) == SEEN
    (tmp_path / ".gitignore").write_text("/jobs/\n")
    assert job_package.package_files(tmp_path) == [name for name in SEEN if not name.startswith("jobs")]


def test_this_checkout_is_small_and_whole() -> None:
    names = job_package.package_files(ROOT)
    assert {"cxrscale/shards/pack.py", "jobs/chexnet14.yaml", "pyproject.toml"} <= set(names)
    assert sum((ROOT / name).stat().st_size for name in names) < 5 * 2**20


def test_the_same_files_are_the_same_parcel(tmp_path: Path) -> None:
    root = checkout(tmp_path / "a")
    sizes = [job_package.pack(root, SEEN, tmp_path / name) for name in ("1.zip", "2.zip")]
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "2.zip").read_bytes()
    assert sizes[0] == (tmp_path / "1.zip").stat().st_size
    assert zipfile.ZipFile(tmp_path / "1.zip").read("cxrscale/shards/pack.py") == b"cxrscale/shards/pack.py"


def test_too_large_a_parcel_names_its_largest_part(tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    for name, size in (("scans/a.npy", job_package.LIMIT), ("notes.txt", 10)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
    with pytest.raises(UserError, match=r"the largest part is scans \(100 MiB\)") as caught:
        job_package.pack(tmp_path, ["notes.txt", "scans/a.npy"], tmp_path / "out.zip")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.zip").exists()


@pytest.mark.parametrize(
    "word",
    [
        "AKIA" + "ABCDEFGHIJKLMNOP",
        "tracking.project=" + "0123456789abcdef" * 2 + "01234567",
        "s3://" + "someone:something@bucket/x",
        "ghp_" + "a1" * 18,
        "hf_" + "aB3" * 11,
    ],
)
def test_a_secret_among_the_words_is_refused_and_not_repeated(word: str) -> None:
    with pytest.raises(UserError, match="looks like a secret") as caught:
        job_package.refuse_secrets(["train", "jobs/demo.yaml", word])
    assert word.rpartition("=")[2] not in str(caught.value)
    with pytest.raises(UserError, match="--env COLOR: its value looks like a secret") as caught:
        job_package.environment_variables(["COLOR"], {"COLOR": word.rpartition("=")[2]})
    assert word.rpartition("=")[2] not in str(caught.value)


@pytest.mark.parametrize(
    "word",
    [SHARDS, "optim.lr=3e-4", "tracking.name=chexnet14-20260101-120000", "jobs/siim-unet-balanced.yaml", "a" * 40],
)
def test_ordinary_words_are_no_secrets(word: str) -> None:
    if word != "a" * 40:
        job_package.refuse_secrets([word])
    else:  # forty hexadecimal digits are what a wandb key is
        with pytest.raises(UserError):
            job_package.refuse_secrets([word])


@pytest.mark.parametrize(
    "name", ["WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "db_password", "RAY_AUTH_TOKEN"]
)
def test_variables_named_like_secrets_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"--env {name} is named like a secret; .*put it on the nodes"):
        job_package.environment_variables([f"{name}=x"], {})


def test_variables_pass_by_name_or_value() -> None:
    found = job_package.environment_variables(
        ["WANDB_MODE", "OMP_NUM_THREADS=4"], {"WANDB_MODE": "offline", "OTHER": "no"}
    )
    assert found == {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "4"}
    with pytest.raises(UserError, match="--env NOWHERE: not set here"):
        job_package.environment_variables(["NOWHERE"], {})


def test_recipes_become_relative_to_what_is_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = checkout(tmp_path / "here")
    monkeypatch.chdir(root / "jobs")
    words = ["train", "mine.yaml", SHARDS, RUNS, "--flag"]
    assert job_package.relative_to_package(words, root) == ["train", "jobs/mine.yaml", SHARDS, RUNS, "--flag"]
    image = ["train", "jobs/chexnet14.yaml", SHARDS]
    assert job_package.relative_to_package(image, root, installed=True) == image


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "{tmp}/else.yaml", SHARDS, RUNS], "else.yaml lies outside of --working-dir"),
        (["train", "jobs/none.yaml", SHARDS, RUNS], "none.yaml does not exist"),
        (["train", "jobs/mine.yaml", SHARDS, RUNS, "optim.lrr=1"], "unknown field optim.lrr"),
        (["train", "jobs/mine.yaml", SHARDS], "tracking.runs_dir=runs is relative"),
        (["train", "jobs/mine.yaml", "data.shards=[shards/nih]", RUNS], "data.shards=shards/nih is not shipped"),
        (["shard", "nih", "s3://raw/nih"], "--out is missing"),
        (["shard", "nih", "s3://raw/nih", "--out", "shards"], "--out shards is relative"),
        (["audit", "s3://a", "--out=audit.html"], "--out audit.html is relative"),
    ],
)
def test_what_the_cluster_will_not_have_is_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = checkout(tmp_path / "here")
    (tmp_path / "else.yaml").write_text("{}")
    monkeypatch.chdir(root)
    with pytest.raises(UserError) as caught:
        job_package.relative_to_package([word.format(tmp=tmp_path) for word in words], root)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_results_that_last_are_let_through(tmp_path: Path) -> None:
    for words in (["shard", "nih", "/raw", "--out", "s3://cxr/nih"], ["demo", "--out=/shared/demo"], ["verify", "/s"]):
        assert job_package.relative_to_package(words, tmp_path) == words
