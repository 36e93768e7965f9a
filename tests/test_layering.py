"""The rooms stand in one order, imports run leftwards through a room's face; heavy libraries have few doors."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "cxrscale"

ROOMS = (
    *("types", "config", "io", "cluster", "sources", "shards", "loader", "models"),
    *("evaluation", "training", "inference", "tuning", "reporting", "run", "cli"),
)
"""In the order of the data's way: a room imports from those before it."""

DOORS = {
    "ray": {
        "cluster",
        "training/distributed",
        "training/process_group",
        "training/launch",
        "training/waiting",
        "run/serving",
        "tuning/sweep",
        "tuning/tuner",
        "tuning/trial",
        "tuning/follower",
        "tuning/schedulers",
    },
    "nvidia": {"loader/dali", "cluster/probe"},
    "wandb": {"training/tracking"},
    "highdicom": {"inference/dicom_objects"},
    "onnx": {"inference/export"},
    "onnxruntime": {"inference/export"},
    "torch": {"types", "cluster/probe", "loader", "models", "training", "inference"},
}
"""Library -> the rooms or modules that may import it."""


def modules() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT or path.name == "types.py")


def place(path: Path) -> str:
    """shards/pack.py -> shards/pack, shards/__init__.py -> shards."""
    return path.relative_to(ROOT).with_suffix("").as_posix().removesuffix("/__init__")


def imports(path: Path) -> list[tuple[str, list[str]]]:
    """(module, names) of every import, wherever it stands in the file; `import a.b` has no names."""
    result: list[tuple[str, list[str]]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            result += [(alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            result.append((node.module, [alias.name for alias in node.names]))
    return result


def face(room: str) -> set[str] | None:
    """What a room exports; None where the room is a single module, whose public names are its face."""
    stub, init = ROOT / room / "__init__.pyi", ROOT / room / "__init__.py"
    if not init.exists():
        return None
    tree = ast.parse((stub if stub.exists() else init).read_text())
    exported = {a.asname or a.name for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names}
    return exported | {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}


def broken_rules(path: Path, own: str) -> list[str]:
    """What the imports of a file of the room `own` break."""
    faults = []
    for module, names in imports(path):
        parts = module.split(".")
        if parts[0] != "cxrscale":
            continue
        targets = [(parts[1], names)] if len(parts) > 1 else [(name, []) for name in names if name in ROOMS]
        for room, taken in targets:
            if room == own or room not in ROOMS:
                continue
            if ROOMS.index(room) > ROOMS.index(own):
                faults.append(f"imports {room}, which stands to the right of {own}")
            exported = face(room)
            inside = len(parts) > 2 and parts[1:] != ["evaluation", "metrics"]
            if inside or (len(parts) == 3 and parts[2].startswith("_")):
                faults.append(f"imports from {module} instead of cxrscale.{room}")
            elif exported is not None and len(parts) == 2:
                faults += [f"imports {name}, which {room} does not export" for name in taken if name not in exported]
            faults += [f"imports the private {room}.{name}" for name in taken if name.startswith("_")]
    return faults


def test_there_are_no_rooms_but_these() -> None:
    entries = {p.stem for p in ROOT.iterdir() if p.suffix == ".py" or (p.is_dir() and p.name != "__pycache__")}
    assert entries - {"__init__", "__main__"} == set(ROOMS)


@pytest.mark.parametrize("path", modules(), ids=place)
def test_imports_run_leftwards_through_the_faces(path: Path) -> None:
    assert broken_rules(path, place(path).split("/")[0]) == []


@pytest.mark.parametrize("room", [room for room in ROOMS if (ROOT / room).is_dir()])
def test_a_room_says_what_it_is_for(room: str) -> None:
    text = ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text())) or ""
    assert len(text) > 60


@pytest.mark.parametrize("path", modules(), ids=place)
def test_heavy_libraries_come_in_by_their_doors(path: Path) -> None:
    here = place(path)
    for library, doors in DOORS.items():
        used = any(module.split(".")[0] == library for module, _ in imports(path))
        allowed = any(here == door or here.startswith(door + "/") for door in doors)
        assert not used or allowed, f"{here} imports {library}; its doors are {sorted(doors)}"


def test_no_module_is_called_by_what_it_is_not() -> None:
    vague = {"utils", "common", "helpers", "manager", "factory", "misc", "base"}
    assert [place(path) for path in modules() if set(place(path).split("/")) & vague] == []


def positional(path: Path) -> list[str]:
    """Functions of a file with seven or more parameters that can be given by position."""
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [f"{place(path)}.{f.name}" for f in functions if len(f.args.posonlyargs + f.args.args) > 6]


def test_no_function_has_seven_positional_parameters() -> None:
    # Typer makes options of a command's parameters; nobody calls these functions.
    assert [name for path in modules() for name in positional(path) if not name.endswith("_command")] == []


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import cxrscale", ("torch", "ray", "cv2", "pydantic", "numpy")),
        ("import cxrscale.config", ("torch", "ray", "cv2", "pandas")),
        ("import cxrscale.io", ("torch", "ray", "cv2", "pydicom")),
        ("import cxrscale.cli.app", ("torch", "ray", "nvidia", "matplotlib", "cv2")),
        ("from cxrscale.shards import manifest", ("torch", "ray", "nvidia")),
        ("from cxrscale.inference import Predictor", ("highdicom", "matplotlib", "nvidia", "ray", "sklearn")),
    ],
)
def test_light_imports_stay_light(statement: str, absent: tuple[str, ...]) -> None:
    code = f"import sys; {statement}; print([name for name in {absent!r} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_the_rules_see_what_breaks_them(tmp_path: Path) -> None:
    sample = tmp_path / "sample.py"
    sample.write_text(
        "def f():\n    from cxrscale.training import launch\n    from cxrscale.io.storage import join\n"
        "    from cxrscale.io import nothing, _hidden\n    from cxrscale import run\n"
    )
    faults = " ".join(broken_rules(sample, "shards"))
    for part in (
        "imports training",
        "from cxrscale.io.storage",
        "imports nothing",
        "private io._hidden",
        "imports run",
    ):
        assert part in faults
