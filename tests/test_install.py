"""Which Python `make setup` takes, where interpreters claim to be of any version; and what the install resolves to."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLS = """bash cat cp dirname find grep head ls make mkdir mktemp pwd rm sed sh tail test touch tr uname"""
"""What the scripts and make may call; nothing else is on their PATH."""

INTERPRETER = f"""#!/bin/sh
case "$1 $2" in
-c*) exec {sys.executable} -I -S -c "import importlib.util as u, platform, sys
sys.version_info, sys.executable = (*map(int, '@'.split('.')), 'final', 0), '$0'
platform.python_version = lambda: '@'
find = u.find_spec
u.find_spec = lambda name: None if '~' and name == 'ensurepip' else find(name)
exec(sys.argv[1])" "$2" ;;
"-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && touch "$3/pyvenv.cfg" ;;
"-m pip") ;;
*) exit 1 ;;
esac
"""
"""Says that it is a Python @, without ensurepip where ~ is set. It makes venvs of itself, installs nothing."""

UV = """#!/bin/sh
case "$1 $2" in
"python find") for last; do :; done; ls "$UV_KEEPS/python$last" ;;
"python install") cp "$UV_FETCHES" "$UV_KEEPS/python3.13" ;;
esac
"""


class Machine:
    """A folder that is the whole PATH, a home, and a checkout with the Makefile and the scripts of ours."""

    def __init__(self, root: Path) -> None:
        self.bin, self.home, self.checkout = root / "bin", root / "home", root / "checkout"
        self.environment = {"PATH": str(self.bin), "HOME": str(self.home), "UV_KEEPS": str(root / "uv")}
        for folder in (self.bin, self.home, self.checkout, root / "uv"):
            folder.mkdir()
        for name in TOOLS.split():
            found = shutil.which(name)
            assert found, name
            (self.bin / name).symlink_to(found)
        shutil.copytree(ROOT / ".ci", self.checkout / ".ci")
        for name in ("Makefile", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.checkout)

    def add(self, name: str, version: str, without: str = "") -> Path:
        """An interpreter on the PATH, or wherever `name` leads from there."""
        path = self.bin / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(INTERPRETER.replace("@", version).replace("~", without))
        path.chmod(0o755)
        return path

    def run(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """A command in the checkout."""
        return subprocess.run(
            words,
            cwd=self.checkout,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def python_of(self, venv: str) -> str:
        """The version of a venv of the checkout."""
        show = "import platform; print(platform.python_version())"
        return self.run(str(self.checkout / venv / "bin" / "python"), "-c", show).stdout.strip()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        ({"python3": "3.11.2"}, "python3"),
        ({"python3": "3.12.9", "python3.13": "3.13.1"}, "python3"),
        ({"python3": "3.14.0", "python3.11": "3.11.9", "python3.13": "3.13.1"}, "python3.13"),
        ({"python3": "3.10.4", "python3.11": "3.11.9", "python3.12": "3.12.1"}, "python3.12"),
        ({"python3.11": "3.11.9"}, "python3.11"),
    ],
)
def test_the_first_python_in_the_range_is_taken_without_a_word(
    machine: Machine, there: dict[str, str], taken: str
) -> None:
    for name, version in there.items():
        machine.add(name, version)
    found = machine.run(".ci/find-python")
    assert (found.returncode, found.stdout, found.stderr) == (0, f"{machine.bin / taken}\n", "")


@pytest.mark.parametrize(
    ("there", "chosen", "what"),
    [
        ({"python3": "3.14.1"}, "", "python3 is 3.14.1;"),
        ({"python3": "3.9.2"}, "", "python3 is 3.9.2;"),
        ({"python3": "3.10.4", "python3.13": "3.14.0"}, "", "python3 is 3.10.4, python3.13 is 3.14.0;"),
        ({}, "", "there is no python3;"),
        ({"python3": "3.12.1", "old": "3.8.1"}, "old", "old is 3.8.1;"),
        ({"python3": "3.12.1"}, "/not/there", "/not/there does not run;"),
    ],
)
def test_no_python_in_the_range_is_one_line_with_what_there_is_and_what_to_do(
    machine: Machine, there: dict[str, str], chosen: str, what: str
) -> None:
    for name, version in there.items():
        machine.add(name, version)
    result = machine.run("make", "-s", "setup", **({"PYTHON": chosen} if chosen else {}))
    line, *others = result.stderr.splitlines()
    assert result.returncode != 0
    assert all(other.startswith("make") for other in others)
    assert line.startswith(
        "error: cxrscale takes Python 3.11 to 3.13 (3.14 resolves but has not been run yet), and " + what
    )
    assert line.endswith(
        "get one with your system's packages or `uv python install 3.13`, then make PYTHON=/path/to/python3.13"
    )
    assert not (machine.checkout / ".venv").exists()


def test_debians_python_without_ensurepip_is_passed_over_and_named(machine: Machine) -> None:
    machine.add("python3", "3.12.3", without="ensurepip")
    assert "python3 is 3.12.3 without its ensurepip (package python3.12-venv);" in machine.run(".ci/find-python").stderr
    other = machine.add("python3.11", "3.11.9")
    assert machine.run(".ci/find-python").stdout == f"{other}\n"


def test_the_python_that_is_asked_for_is_taken(machine: Machine) -> None:
    machine.add("python3", "3.11.2")
    asked = machine.add("elsewhere/python", "3.13.4")
    assert machine.run(".ci/find-python", PYTHON=str(asked)).stdout == f"{asked}\n"
    assert machine.run("make", "-s", "setup", f"PYTHON={asked}").returncode == 0
    assert machine.python_of(".venv") == "3.13.4"


def test_pythons_of_pyenv_and_uv_are_taken_with_a_word_and_uv_fetches_what_is_missing(machine: Machine) -> None:
    machine.add("python3", "3.14.0")
    (machine.bin / "uv").write_text(UV)
    (machine.bin / "uv").chmod(0o755)
    hidden = machine.add("../fetched", "3.13.7")
    fetched = machine.run(".ci/find-python", UV_FETCHES=str(hidden))
    assert fetched.stdout == f"{machine.environment['UV_KEEPS']}/python3.13\n"
    assert fetched.stderr.splitlines() == [
        "python3 is 3.14.0; asking uv for Python 3.13",
        "python3 is 3.14.0; taking uv's Python 3.13.7",
    ]
    assert machine.run(".ci/find-python").stdout == fetched.stdout
    Path(fetched.stdout.strip()).unlink()
    refused = machine.run(".ci/find-python", UV_FETCHES="/not/there")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.splitlines()[-1].startswith("error: cxrscale takes Python 3.11 to 3.13")
    kept = machine.add("../home/.pyenv/versions/3.12.1/bin/python", "3.12.1").resolve()
    found = machine.run(".ci/find-python")
    assert Path(found.stdout.strip()).resolve() == kept
    assert found.stderr == "python3 is 3.14.0; taking pyenv's Python 3.12.1\n"


def test_a_venv_is_kept_or_remade_with_a_word(machine: Machine) -> None:
    default = machine.add("python3", "3.11.2")
    machine.add("python3.12", "3.12.4")
    venv = machine.checkout / ".venv"

    def setup(*words: str) -> tuple[str, str]:
        """The version of the venv after `make setup`, and what it said."""
        result = machine.run("make", "-s", "setup", *words)
        assert result.returncode == 0, result.stderr
        said = [line for line in result.stderr.splitlines() if "uv cannot be installed" not in line]
        return machine.python_of(".venv"), "\n".join(said)

    assert setup() == ("3.11.2", "")
    (venv / "mark").touch()
    assert setup() == ("3.11.2", "")
    assert setup("PYTHON=python3") == ("3.11.2", "")
    assert (venv / "mark").exists()
    assert setup("PYTHON=python3.12") == ("3.12.4", ".venv is of Python 3.11, wanted is 3.12; making it anew")
    assert not (venv / "mark").exists()
    # What was asked for once stays.
    assert setup() == ("3.12.4", "")
    (venv / "bin" / "python").unlink()
    (venv / "bin" / "python").symlink_to("/gone/python3.12")
    assert setup() == ("3.11.2", ".venv does not run (its Python may have moved); making it anew")
    default.write_text(default.read_text().replace("3.11.2", "3.13.0"))
    (venv / "bin" / "python").write_text(INTERPRETER.replace("@", "3.14.0").replace("~", ""))
    assert setup() == ("3.13.0", ".venv is of Python 3.14, wanted is 3.13; making it anew")
    machine.checkout = machine.checkout.rename(machine.checkout.with_name("moved"))
    assert setup() == ("3.13.0", f".venv is that of {venv.parent}; making it anew")


def test_a_folder_that_is_no_venv_is_left_alone(machine: Machine) -> None:
    machine.add("python3", "3.11.2")
    precious = machine.checkout / "results" / "run.json"
    precious.parent.mkdir()
    precious.touch()
    result = machine.run("make", "-s", "setup", "VENV=results")
    assert result.returncode != 0
    assert result.stderr.startswith("error: VENV=results is not a virtual environment")
    assert precious.exists()


SUITE = """
test:
	mkdir -p .venv/bin && cp "$$(.ci/find-python)" .venv/bin/python
smoke:
	@echo "$(VENV) $(PYTHON)" >>asked
	@echo "==== 3 passed in 0.10s ===="
	@test $(VENV) != .venv-3.13 || { echo "E  it broke"; exit 1; }
"""


def test_every_other_python_that_is_there_has_its_line(machine: Machine) -> None:
    machine.add("python3", "3.11.2")
    (machine.checkout / "Makefile").write_text(SUITE)
    alone = machine.run(".ci/run")
    assert alone.returncode == 0, alone.stderr
    assert alone.stdout.splitlines()[-2:] == ["Python 3.12: not on this machine", "Python 3.13: not on this machine"]
    taken = machine.add("python3.12", "3.12.4")
    both = machine.run(".ci/run")
    assert both.returncode == 0
    assert re.search(r"^Python 3\.12\.4: passed in \d+ s; 3 passed in 0\.10s", both.stdout, re.MULTILINE)
    assert (machine.checkout / "asked").read_text() == f".venv-3.12 {taken}\n"
    machine.add("python3.13", "3.13.1")
    broken = machine.run(".ci/run")
    assert broken.returncode == 1
    assert "E  it broke" in broken.stdout
    assert re.search(r"^Python 3\.13\.1: FAILED in \d+ s; 3 passed in 0\.10s", broken.stdout, re.MULTILINE)


def test_the_scripts_have_no_known_fault() -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    if not shellcheck.exists():
        pytest.skip("shellcheck is not installed (it has no wheel for this platform)")
    checked = subprocess.run([shellcheck, *(ROOT / ".ci").iterdir()], capture_output=True, text=True, check=False)
    assert checked.stdout == ""


@pytest.mark.slow  # 14 s where nothing is in uv's cache yet, 2 s later
def test_the_base_install_resolves_to_wheels_for_python_3_14(tmp_path: Path) -> None:
    """3.14 is declared once the tests have run on it; until then this says that nothing else is in its way."""
    uv = Path(sys.executable).with_name("uv")
    if not uv.exists():
        pytest.skip("uv is not in this environment")
    # Not pyproject.toml itself, whose `requires-python` ends before 3.14.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (tmp_path / "base.in").write_text("\n".join(project["dependencies"]))
    command = [str(uv), "pip", "compile", "--no-annotate", "--only-binary", ":all:", "--python-version", "3.14"]
    command += ["--python-platform", "x86_64-manylinux_2_28", "-c", f"{ROOT}/constraints.txt", f"{tmp_path}/base.in"]
    environment = os.environ | {"UV_HTTP_RETRIES": "0"}
    resolved = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=200)
    if resolved.returncode and any(word in resolved.stderr.lower() for word in ("fetch", "connect", "dns", "network")):
        pytest.skip(f"the package index cannot be reached: {resolved.stderr.splitlines()[0]}")
    assert resolved.returncode == 0, resolved.stderr
    for package in ("torch", "ray", "nvidia-dali-cuda130", "imagecodecs"):
        assert f"\n{package}==" in resolved.stdout
    assert "pyjpegls" not in resolved.stdout
