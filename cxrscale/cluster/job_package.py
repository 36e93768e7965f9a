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
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

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
RECIPE_COMMANDS = ("train", "tune", "overfit", "preview", "config")
"""Commands with a recipe, which is checked before the job is sent."""
OUTPUT_COMMANDS = ("demo", "shard", "audit", "preview", "predict")
"""Commands that write to --out."""


def entrypoint(command_line: Sequence[str]) -> str:
    """The shell command of the job, which passes each argument unchanged."""
    return shlex.join(["python", "-m", "cxrscale", *command_line])


def is_recipe(argument: str) -> bool:
    """Whether an argument is the path of a recipe."""
    return argument.endswith((".yaml", ".yml")) and "=" not in argument and not argument.startswith("-")


def relative_to_package(command_line: Sequence[str], root: Path, installed: bool = False) -> list[str]:
    """The command line with the paths of recipes relative to `root`, which becomes the job's folder on the cluster.

    Args:
        command_line: the command and its arguments.
        root: the folder that is shipped.
        installed: the nodes' image has cxrscale; a recipe that does not exist here may be in the image.

    Raises:
        UserError: a recipe is missing, wrong or outside `root`, another file is named by a relative path, or an output
            would be deleted with the job's folder.
    """
    command = command_line[0] if command_line else ""
    result = []
    for argument in command_line:
        if is_recipe(argument) and not (installed and not Path(argument).exists()):
            path = Path(argument).resolve()
            if not path.is_relative_to(root.resolve()):
                raise UserError(f"recipe {argument} is outside --working-dir {root}, which is shipped; copy it there")
            if command in RECIPE_COMMANDS:
                _check_recipe(command_line, path)
            result.append(path.relative_to(root.resolve()).as_posix())
        else:
            _refuse_local_files(argument)
            result.append(argument)
    if (private := _option(command_line, "--keep-map")) and not _is_permanent(private):
        raise UserError(
            f"--keep-map {private} is relative, and a job's folder is deleted with the job; give /shared/..."
        )
    writes_to_run = command == "predict" and _option(command_line, "--split") is not None
    if command in OUTPUT_COMMANDS and not writes_to_run and not _is_permanent(out := _option(command_line, "--out")):
        reason = f"--out {out} is relative" if out else "--out is missing"
        raise UserError(
            f"{command}: {reason}, and a job's folder is deleted with the job; give --out s3://... or /shared/..."
        )
    return result


def _refuse_local_files(argument: str) -> None:
    """Refuse a file of this machine by a relative path: nothing but code and recipes is shipped."""
    for word in re.split(r"[\s=,:{}\[\]'\"]+", argument):
        is_path = ("/" in word or "." in word) and not _is_permanent(word)
        with suppress(OSError):  # no file has a name of this length
            if is_path and Path(word).is_file():
                raise UserError(f"{word} is not shipped; give s3://... or an absolute path on all nodes")


def _check_recipe(command_line: Sequence[str], path: Path) -> None:
    """Refuse a wrong recipe before the job starts, and datasets or runs in the job's own folder."""
    overrides = [argument for argument in command_line[1:] if "=" in argument and not argument.startswith("-")]
    recipe = config.load_recipe(path, overrides)
    if command_line[0] == "config":
        return
    for shards in recipe.data.shards:
        if not _is_permanent(shards):
            raise UserError(f"data.shards={shards} is not shipped; give s3://... or an absolute path on all nodes")
    root = recipe.tracking.runs_dir
    if command_line[0] != "preview" and not _is_permanent(root):
        raise UserError(
            f"tracking.runs_dir={root} is relative, and a job's folder is deleted with the job; give s3://... or an "
            "absolute path that all nodes share"
        )


def _is_permanent(address: str | None) -> bool:
    """Whether an address is outside the job's folder."""
    return bool(address) and (storage.is_remote(str(address)) or storage.local_path(str(address)).is_absolute())


def _option(command_line: Sequence[str], name: str) -> str | None:
    for index, argument in enumerate(command_line):
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2]
        if argument == name and index + 1 < len(command_line):
            return command_line[index + 1]
    return None


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
