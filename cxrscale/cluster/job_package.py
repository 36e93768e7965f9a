"""What a job takes along: the checkout's files in one zip, its words, and its variables; and what it must not take."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

from cxrscale import config
from cxrscale.io import storage
from cxrscale.types import UserError

LIMIT = 100 * 2**20
"""Bytes. Ray 2.60 names 500 MiB, but its job server answers 413 past 100."""
LEFT_OUT_ANYWHERE = (".*", "__pycache__", "*.egg-info", "node_modules", "venv", "wandb", "*.tar", "*.pyc")
LEFT_OUT_AT_THE_TOP = ("runs", "shards", "build", "dist", "synthetic")
"""Names at the top alone: cxrscale/shards is a part of the package."""
SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
SECRET_VALUE = re.compile(
    r"\b(AKIA|ASIA)[A-Z0-9]{16}\b|\bgh[pousr]_\w{30}|\bgithub_pat_\w{20}|\bhf_\w{30}|\bwandb_v\d_\w{20}|\bsk-[\w-]{20}"
    r"|://[^/\s:@]+:[^/\s@]+@|BEGIN [A-Z ]*PRIVATE KEY|^[0-9a-f]{40}$|^(?=.*[a-z])(?=.*[A-Z])(?=.*\d)[\w+/]{40}$"
)
"""How access keys begin (AWS, GitHub, Hugging Face, wandb, OpenAI), addresses with a password, PEM keys; then the two
forms without a mark: 40 hexadecimal digits (wandb) and 40 mixed characters (AWS)."""
REMEDY = "a job's words and variables can be read by everybody: put it on the nodes (environment, ~/.netrc, secret)"
RECIPE_VERBS = ("train", "tune", "batches", "config")
OUT_VERBS = ("demo", "shard", "audit", "batches", "predict")


def entrypoint(words: Sequence[str]) -> str:
    """The shell command of a command on the cluster, each word as it was given."""
    return shlex.join(["python", "-m", "cxrscale", *words])


def is_recipe(word: str) -> bool:
    """Whether a word of the command is the path of a recipe."""
    return word.endswith((".yaml", ".yml")) and "=" not in word and not word.startswith("-")


def relative_to_package(words: Sequence[str], root: Path, installed: bool = False) -> list[str]:
    """The words with each recipe's path relative to `root`, which is the job's folder on the cluster.

    Args:
        words: the command and its arguments.
        root: the folder that is shipped.
        installed: a recipe that is not here may be one of the image's.

    Raises:
        UserError: a recipe is missing or lies outside of `root`; or a result would be lost with the job's folder.
    """
    found = []
    for word in words:
        if is_recipe(word) and not (installed and not Path(word).exists()):
            path = Path(word).resolve()
            if not path.is_relative_to(root.resolve()):
                raise UserError(
                    f"recipe {word} lies outside of --working-dir {root}, all that is shipped; copy it there"
                )
            if words[0] in RECIPE_VERBS:
                _refuse_relative(words, path)
            found.append(path.relative_to(root.resolve()).as_posix())
        else:
            found.append(word)
    if words and words[0] in OUT_VERBS and not _lasts(out := _option(words, "--out")):
        said = f"--out {out} is relative" if out else "--out is missing"
        raise UserError(f"{words[0]}: {said}, and a job's folder goes with the job; give --out s3://... or /shared/...")
    return found


def _refuse_relative(words: Sequence[str], path: Path) -> None:
    """A mistake in the recipe is found here; and no run is written to, or read from, the job's own folder."""
    recipe = config.load_recipe(path, [word for word in words[1:] if "=" in word and not word.startswith("-")])
    if words[0] == "config":
        return
    for shards in recipe.data.shards:
        if not _lasts(shards):
            raise UserError(f"data.shards={shards} is not shipped; give s3://... or an absolute path on all nodes")
    root = recipe.tracking.runs_dir
    if words[0] != "batches" and not _lasts(root):
        raise UserError(
            f"tracking.runs_dir={root} is relative, and a job's folder goes with the job; give s3://... or an absolute "
            "path that all nodes share"
        )


def _lasts(address: str | None) -> bool:
    return bool(address) and (storage.is_remote(str(address)) or storage.local_path(str(address)).is_absolute())


def _option(words: Sequence[str], name: str) -> str | None:
    for place, word in enumerate(words):
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
        if word == name and place + 1 < len(words):
            return words[place + 1]
    return None


def refuse_secrets(words: Iterable[str]) -> None:
    """Raises UserError where a word of the command looks like a secret; the message does not repeat it."""
    for word in words:
        name, equals, value = word.partition("=")
        if SECRET_VALUE.search(word) or SECRET_VALUE.search(value):
            shown = name if equals and not SECRET_VALUE.search(name) else "an argument"
            raise UserError(f"{shown} looks like a secret; {REMEDY}")


def environment_variables(names: Iterable[str], here: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment variables that a job gets: NAME with this process's value, or NAME=VALUE.

    Raises:
        UserError: a name or value looks like a secret, or the variable is not set here.
    """
    found = {}
    for given in names:
        name, equals, value = given.partition("=")
        if SECRET_NAME.search(name):
            raise UserError(f"--env {name} is named like a secret; {REMEDY}")
        if not equals and name not in here:
            raise UserError(f"--env {name}: not set here; set it, or give {name}=VALUE")
        found[name] = value if equals else here[name]
        if SECRET_VALUE.search(found[name]):
            raise UserError(f"--env {name}: its value looks like a secret; {REMEDY}")
    return found


def package_files(root: Path) -> list[str]:
    """The sorted paths, relative to `root`, that are shipped: what git does not ignore, less data, runs and caches."""
    listed = _not_ignored(root)
    if listed is None:
        listed = []
        for folder, inner, names in os.walk(root):
            place = Path(folder).relative_to(root)
            inner[:] = [name for name in inner if not _left_out(place / name)]
            listed += [(place / name).as_posix() for name in names]
    return sorted(name for name in listed if not _left_out(Path(name)) and (root / name).is_file())


def _left_out(path: Path) -> bool:
    anywhere = any(fnmatch(part, pattern) for part in path.parts for pattern in LEFT_OUT_ANYWHERE)
    return anywhere or path.parts[0] in LEFT_OUT_AT_THE_TOP


def _not_ignored(root: Path) -> list[str] | None:
    """What git tracks and what is new; None where there is no git or no checkout."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if shutil.which("git") is None:
        return None
    asked = subprocess.run(command, capture_output=True, text=True)
    return [name for name in asked.stdout.split("\0") if name] if asked.returncode == 0 else None


def pack(root: Path, names: Sequence[str], out: Path) -> int:
    """Zip the files, the same bytes for the same files, so that Ray uploads them once; returns the zip's bytes.

    Raises:
        UserError: they are more than Ray takes.
    """
    sizes: Counter[str] = Counter()
    for name in names:
        sizes[name.partition("/")[0]] += (root / name).stat().st_size
    if sizes.total() > LIMIT:
        largest, size = sizes.most_common(1)[0]
        raise UserError(
            f"{root.resolve()} holds {sizes.total() / 2**20:.0f} MiB, Ray takes {LIMIT / 2**20:.0f}; the largest part "
            f"is {largest} ({size / 2**20:.0f} MiB): name it in .gitignore or move it out"
        )
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            entry = zipfile.ZipInfo(name)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, (root / name).read_bytes())
    return out.stat().st_size
