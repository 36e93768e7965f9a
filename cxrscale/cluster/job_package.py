"""What is sent with a job: the package and the recipes as a zip, the command line, variables; never secrets or data.

Everyone who reaches the cluster can read it, and a checkout also holds reports with images, predictions and tables.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cxrscale import config
from cxrscale.io import storage
from cxrscale.types import UserError

MAX_BYTES = 100 * 2**20
"""Ray 2.60 documents 500 MiB, but its job server answers 413 above 100 MiB."""
PACKAGE, RECIPES = "cxrscale", "jobs"
"""The folders of a checkout that a job needs."""
NEEDED = {PACKAGE: frozenset({".py", ".pyi", ".jinja", ".typed"}), RECIPES: frozenset({".yaml", ".yml"})}
"""Folder -> suffixes of what is shipped from it, committed or not."""
SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
SECRET_VALUE = re.compile(
    r"\b(AKIA|ASIA)[A-Z0-9]{16}\b|\bgh[pousr]_\w{30}|\bgithub_pat_\w{20}|\bhf_\w{30}|\bwandb_v\d_\w{20}|\bsk-[\w-]{20}"
    r"|://[^/\s:@]+:[^/\s@]+@|BEGIN [A-Z ]*PRIVATE KEY|^[0-9a-f]{40}$|^(?=.*[a-z])(?=.*[A-Z])(?=.*\d)[\w+/]{40}$"
)
"""How access keys start (AWS, GitHub, Hugging Face, wandb, OpenAI), addresses with a password, PEM keys; then two forms
without a prefix: 40 hexadecimal digits (wandb) and 40 mixed characters (AWS)."""
REMEDY = "everyone can read a job's command line and variables: put it on the nodes (environment, ~/.netrc, secret)"
RUN_COMMANDS = ("train", "tune", "overfit")
"""Commands with a recipe that write to its tracking.runs_dir."""
OUTPUTS = ("out", "keep_map")
"""Parameters that say where a command writes."""
INPUTS = (
    "root",
    "shards",
    "patients_from",
    "run",
    "runs",
    "run_a",
    "run_b",
    "gate",
    "quantized",
    "inputs",
    "readers",
    "id_map",
)
"""Parameters that are files, datasets or runs; another counts where it names a file here."""
OF_FILES_OR_SPLIT = ("predict", "explain")
"""Commands that write a folder of files' results, or with --split into the run."""
WRITES_INTO_RUN = ("threshold", "evaluate")
"""Commands that write into the run that they are given."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """What a command makes of one option or argument."""

    name: str
    option: str
    """As the user writes it: --out, or RUN for an argument."""
    value: Any
    given: bool = True
    """The user has given it; it is not the default."""


@dataclass(frozen=True, slots=True)
class JobCommand:
    """A command line that a job can run."""

    words: list[str]
    """With the paths of recipes relative to the job's folder."""
    recipes: list[str]
    """Recipes to ship, whether git ignores them or not, relative to the job's folder."""
    results: list[str]
    """Where the command writes."""


def entrypoint(command_line: Sequence[str]) -> str:
    """The shell command of the job, which passes each argument unchanged."""
    return shlex.join(["python", "-m", "cxrscale", *command_line])


def prepare(
    command_line: Sequence[str], parameters: Sequence[Parameter], root: Path, installed: bool = False
) -> JobCommand:
    """Check that a job can read what the command needs and that its results outlive it.

    Args:
        command_line: the command and its arguments.
        parameters: what the command makes of them.
        root: the folder that is shipped and becomes the job's folder.
        installed: the nodes' image has cxrscale; a recipe that does not exist here may be in the image.

    Raises:
        UserError: a recipe is missing, wrong or outside `root`, an input stays here, or an output would be deleted
            with the job's folder.
    """
    command, given = command_line[0], {parameter.name: parameter for parameter in parameters}
    words, recipes, results = list(command_line), [], []
    recipe = str(given["recipe"].value) if "recipe" in given and given["recipe"].value else None
    if recipe is not None and not (installed and not Path(recipe).exists()) and "=" not in recipe:
        path = Path(recipe).resolve()
        if not path.is_relative_to(root.resolve()):
            raise UserError(f"recipe {recipe} is outside --working-dir {root}, which is shipped; copy it there")
        overrides = given["overrides"].value if "overrides" in given else None
        results += _check_recipe(command, path, overrides or [], given)
        recipes.append(path.relative_to(root.resolve()).as_posix())
        words = [recipes[-1] if word == recipe else word for word in words]
    of_split = command in OF_FILES_OR_SPLIT and "split" in given and given["split"].value
    into_run = command in WRITES_INTO_RUN or of_split
    for parameter in parameters:
        if parameter.name in OUTPUTS:
            if not (of_split and ("id_map" not in given or given["id_map"].value is None)):
                results += _check_output(command, parameter)
        elif parameter.name not in ("recipe", "overrides"):
            _check_input(command, parameter)
    for word in command_line[1:]:
        if word != recipe:
            _refuse_local_files(word)
    if into_run:
        run = given["run"].value
        results.append(str(run[0] if isinstance(run, list | tuple) else run))
    if command == "ensemble":
        first = str(given["runs"].value[0]).rstrip("/")
        results.append(storage.join(first.rpartition("/")[0], str(given["name"].value)))
    return JobCommand(words, recipes, results)


def _check_output(command: str, parameter: Parameter) -> list[str]:
    if parameter.value is None and command not in OF_FILES_OR_SPLIT:
        return []
    address = str(parameter.value)
    if parameter.value is None or not _is_permanent(parameter.value):
        reason = f"{parameter.option} {address} is relative" if parameter.given else f"{parameter.option} is missing"
        raise UserError(
            f"{command}: {reason}, and a job's folder is deleted with the job; give {parameter.option} s3://... or "
            "/shared/..."
        )
    return [address]


def _refuse_local_files(argument: str) -> None:
    """Refuse a file of this machine by a relative path: nothing but code and recipes is shipped."""
    for word in re.split(r"[\s=,:{}\[\]'\"]+", argument):
        is_path = ("/" in word or "." in word) and not _is_permanent(word)
        if is_path and _is_file(word):
            raise UserError(f"{word} is not shipped; give s3://... or an absolute path on all nodes")


def _is_file(path: str) -> bool:
    with suppress(OSError, ValueError):  # no file has a name of this length
        return Path(path).is_file()
    return False


def _check_input(command: str, parameter: Parameter) -> None:
    values = parameter.value if isinstance(parameter.value, list | tuple) else [parameter.value]
    for value in values:
        if not isinstance(value, str | Path) or _is_permanent(value):
            continue
        if parameter.name in INPUTS:
            raise UserError(
                f"{command}: {parameter.option} {value} is not shipped; give s3://... or an absolute path on all nodes"
            )


def _check_recipe(command: str, path: Path, overrides: Sequence[str], parameters: Mapping[str, Parameter]) -> list[str]:
    """Refuse a wrong recipe before the job starts, and inputs or runs in the job's own folder; returns the run."""
    recipe = config.load_recipe(path, list(overrides))
    if command == "config":
        return []
    for field, value in _texts(recipe.model_dump(mode="json", exclude={"tracking", "tune", "reference", "pack"})):
        if not _is_permanent(value) and (field == "data.shards" or _is_file(value)):
            raise UserError(f"{field}={value} is not shipped; give s3://... or an absolute path on all nodes")
    if command not in RUN_COMMANDS:
        return []
    root = recipe.tracking.runs_dir
    if not _is_permanent(root):
        raise UserError(
            f"tracking.runs_dir={root} is relative, and a job's folder is deleted with the job; give s3://... or an "
            "absolute path that all nodes share"
        )
    resumed = parameters["resume"].value if "resume" in parameters else None
    return [storage.join(root, resumed or recipe.tracking.name or f"{path.stem}-TIME")]


def _texts(tree: Any, field: str = "") -> Iterator[tuple[str, str]]:
    """(section.field, text) of every text in a recipe."""
    if isinstance(tree, str):
        yield field, tree
    elif isinstance(tree, Mapping):
        for name, child in tree.items():
            yield from _texts(child, f"{field}.{name}" if field else name)
    elif isinstance(tree, list):
        for child in tree:
            yield from _texts(child, field)


def _is_permanent(address: str | Path) -> bool:
    """Whether an address is outside the job's folder; a Path is never remote."""
    if isinstance(address, Path):
        return address.is_absolute()
    return bool(address) and (storage.is_remote(address) or storage.local_path(address).is_absolute())


def refuse_secrets(command_line: Iterable[str]) -> None:
    """Check that no argument looks like a secret.

    Raises:
        UserError: one does; the message does not contain it.
    """
    for argument in command_line:
        name, equals, value = argument.partition("=")
        if SECRET_VALUE.search(argument) or SECRET_VALUE.search(value):
            shown = name if equals and not SECRET_VALUE.search(name) else "an argument"
            raise UserError(f"{shown} looks like a secret; {REMEDY}")


def environment_variables(options: Iterable[str], environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment variables of a job, from options NAME (with this process's value) or NAME=VALUE.

    Raises:
        UserError: a name or value looks like a secret, or the variable is not set here.
    """
    result = {}
    for option in options:
        name, equals, value = option.partition("=")
        if SECRET_NAME.search(name):
            raise UserError(f"--env {name} is named like a secret; {REMEDY}")
        if not equals and name not in environment:
            raise UserError(f"--env {name}: not set here; set it, or give {name}=VALUE")
        result[name] = value if equals else environment[name]
        if SECRET_VALUE.search(result[name]):
            raise UserError(f"--env {name}: its value looks like a secret; {REMEDY}")
    return result


def package_files(root: Path, recipes: Iterable[str] = ()) -> list[str]:
    """The sorted paths, relative to `root`, to ship: the package's code, the recipes of `jobs`, and the recipes given.

    What git ignores is not shipped, unless it is a given recipe.

    Raises:
        UserError: `root` does not hold the package.
    """
    if not (root / PACKAGE / "__init__.py").is_file():
        raise UserError(f"--working-dir {root} does not hold the package {PACKAGE}; give the checkout, or --installed")
    paths = _not_ignored(root)
    if paths is None:
        paths = [path.relative_to(root).as_posix() for folder in NEEDED for path in (root / folder).rglob("*")]
    needed = {path for path in paths if _is_needed(Path(path))} | set(recipes)
    return sorted(path for path in needed if (root / path).is_file())


def _is_needed(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and len(path.parts) > 1 and path.suffix in NEEDED.get(path.parts[0], ())


def _not_ignored(root: Path) -> list[str] | None:
    """Files that git tracks and new files; None without git or outside a checkout."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *NEEDED]
    if shutil.which("git") is None:
        return None
    ran = subprocess.run(command, capture_output=True, text=True)
    return [name for name in ran.stdout.split("\0") if name] if ran.returncode == 0 else None


def pack(root: Path, names: Sequence[str], out: Path) -> int:
    """Write the files to a zip, whose bytes depend only on the files, so that Ray uploads them once.

    Returns:
        The size of the zip in bytes.

    Raises:
        UserError: the files are larger than Ray accepts.
    """
    sizes: Counter[str] = Counter()
    for name in names:
        sizes[name.partition("/")[0]] += (root / name).stat().st_size
    if sizes.total() > MAX_BYTES:
        largest, size = sizes.most_common(1)[0]
        raise UserError(
            f"{root.resolve()} holds {sizes.total() / 2**20:.0f} MiB, Ray accepts {MAX_BYTES / 2**20:.0f}; the largest "
            f"part is {largest} ({size / 2**20:.0f} MiB): move it elsewhere"
        )
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            entry = zipfile.ZipInfo(name)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, (root / name).read_bytes())
    return out.stat().st_size
