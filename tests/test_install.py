"""Which Python `make setup` takes, and what the install resolves to."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("sh", "bash", "dirname", "rm", "mktemp", "grep", "tail", "tr", "cat")


class Machine:
    """A PATH with Pythons of stated versions, and with nothing else that could be a Python."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.home = folder / "bin", folder / "home"
        self.bin.mkdir()
        self.home.mkdir()
        for name in TOOLS:
            (self.bin / name).symlink_to(shutil.which(name) or f"/bin/{name}")

    def script(self, name: str, text: str) -> Path:
        path = self.bin / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return path

    def python(self, name: str, version: str) -> Path:
        """This Python, which says that it is another."""
        parts = tuple(int(part) for part in version.split("."))
        code = (
            f"import platform, sys; sys.version_info = {parts}; platform.python_version = lambda: {version!r};"
            f"sys.executable = {str(self.bin / name)!r}; exec(sys.argv[2])"
        )
        return self.script(name, f'exec {sys.executable} -c "{code}" "$@"')

    def run(self, script: str, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [str(ROOT / ".ci" / script), *arguments],
            env={"PATH": str(self.bin), "HOME": str(self.home)} | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize(
    ("pythons", "chosen"),
    [
        ({"python3": "3.12.4"}, "python3"),
        ({"python3": "3.14.0", "python3.13": "3.13.1", "python3.11": "3.11.7"}, "python3.13"),
        ({"python3": "3.9.2", "python3.11": "3.11.7"}, "python3.11"),
        ({"python3.12": "3.12.0"}, "python3.12"),
    ],
)
def test_the_first_python_in_the_range_is_taken(machine: Machine, pythons: dict[str, str], chosen: str) -> None:
    paths = {name: machine.python(name, version) for name, version in pythons.items()}
    ran = machine.run("find-python")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"{paths[chosen]}\n", "")


@pytest.mark.parametrize(
    ("pythons", "fragment"),
    [({"python3": "3.14.0"}, "python3 is 3.14.0"), ({"python3": "3.9.2"}, "python3 is 3.9.2"), ({}, "is not there")],
)
def test_without_one_in_the_range_one_line_says_what_to_do(
    machine: Machine, pythons: dict[str, str], fragment: str
) -> None:
    for name, version in pythons.items():
        machine.python(name, version)
    ran = machine.run("find-python")
    assert ran.returncode == 2
    assert ran.stderr.count("\n") == 1
    for part in (fragment, "3.11 to 3.13", "uv python install 3.13", "PYTHON="):
        assert part in ran.stderr


def test_uv_fetches_a_python_where_there_is_none(machine: Machine) -> None:
    machine.python("python3", "3.14.0")
    fetched = machine.python("managed", "3.13.5")
    # The first question finds none; after the installation there is one.
    machine.script(
        "uv",
        f'case "$*" in *install*) touch=1; : > {machine.home}/got;; esac; [ -e {machine.home}/got ] && echo {fetched}',
    )
    ran = machine.run("find-python")
    assert (ran.returncode, ran.stdout.splitlines()[-1]) == (0, str(fetched))
    assert "uv fetched Python 3.13: python3 is 3.14.0" in ran.stderr


def test_the_variable_chooses_and_is_refused_out_of_the_range(machine: Machine) -> None:
    machine.python("python3", "3.12.4")
    own, newer = machine.python("mine", "3.11.7"), machine.python("newer", "3.14.0")
    assert machine.run("find-python", PYTHON=str(own)).stdout == f"{own}\n"
    ran = machine.run("find-python", PYTHON=str(newer))
    assert ran.returncode == 2
    assert f"{newer} is 3.14.0" in ran.stderr
    assert machine.run("find-python", PYTHON="/nowhere/python").returncode == 2


@pytest.mark.parametrize(
    ("have", "asked", "kept"),
    [("3.12.4", None, True), ("3.12.4", "3.13.1", False), ("3.12.4", "3.12.9", True), ("3.10.1", None, False)],
)
def test_a_venv_of_another_python_is_removed_with_a_word(
    machine: Machine, have: str, asked: str | None, kept: bool
) -> None:
    machine.python("python3", "3.13.0")
    venv = machine.home / "venv"
    machine.python(f"{venv}/bin/python", have)
    given = {"PYTHON": str(machine.python("asked", asked))} if asked else {}
    ran = machine.run("check-venv", str(venv), **given)
    assert ran.returncode == 0
    assert venv.exists() == kept
    assert ("making it anew" in ran.stderr) != kept
    assert ran.stderr.count("\n") == (0 if kept else 1)


def test_a_venv_whose_python_is_gone_is_removed_with_a_word(machine: Machine) -> None:
    venv = machine.home / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to("/nowhere/python3.12")
    ran = machine.run("check-venv", str(venv))
    assert not venv.exists()
    assert "does not run" in ran.stderr
    assert machine.run("check-venv", str(venv)).returncode == 0  # none yet


def test_each_python_is_one_line(machine: Machine) -> None:
    machine.python("python3.11", "3.11.7")
    machine.python(f"{machine.home}/.pyenv/versions/3.12.1/bin/python", "3.12.1")
    machine.script("make", 'echo "===== 3 passed in 1.00s ====="; case "$*" in *3.12*) exit 1;; esac')
    ran = machine.run("each-python", "test")
    lines = [line for line in ran.stdout.splitlines() if line.startswith("Python")]
    assert ran.returncode == 1
    assert lines[0].startswith("Python 3.11.7: passed in ")
    assert lines[0].endswith("3 passed in 1.00s ")
    assert lines[1].startswith("Python 3.12.1: FAILED in ")
    assert lines[2] == "Python 3.13: not on this machine"
    assert machine.run("each-python", "smoke", "3.12").returncode == 0


def test_the_base_install_resolves_for_the_next_python(tmp_path: Path) -> None:
    """All wheels are there for 3.14; it is declared once the tests have run on it."""
    uv = Path(sys.executable).with_name("uv")
    if not uv.exists():
        pytest.skip("uv is not in this environment")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (tmp_path / "base.in").write_text("\n".join(project["dependencies"]))
    command = [str(uv), "pip", "compile", "--no-header", "--no-annotate", "--python-version", "3.14"]
    command += ["--only-binary", ":all:", "-c", str(ROOT / "constraints.txt"), str(tmp_path / "base.in")]
    ran = subprocess.run(
        command, capture_output=True, text=True, timeout=200, env=os.environ | {"UV_HTTP_RETRIES": "1"}
    )
    if ran.returncode and any(word in ran.stderr.lower() for word in ("fetch", "connect", "dns", "network")):
        pytest.skip("no package index can be reached")
    assert ran.returncode == 0, ran.stderr
    for package in ("torch==", "ray==", "nvidia-dali-cuda130==", "imagecodecs=="):
        assert f"\n{package}" in ran.stdout
