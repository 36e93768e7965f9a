"""Imports run downstream only, and each heavy library has its own few doors."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "cxrscale"

LAYERS = (
    ("schema", "labels", "config", "storage", "session", "machine", "nodes"),
    ("archives", "dicom", "masks", "images", "splits", "duplicates"),
    ("shards",),
    ("batches",),
    ("models", "losses"),
    ("metrics",),
    ("thresholds", "calibration"),
    ("worker", "checkpoint", "tracking", "optimizer"),
    ("account",),
    ("scoring",),
    ("train",),
    ("published", "plots", "assessment"),
    ("ablation", "predict", "evaluate", "cases", "compare", "explain", "export"),
    ("launch", "tune", "report", "serve"),
    ("report_page",),
    ("parcel", "submit", "doctor"),
    ("progress",),
    ("demo",),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

DOORS = {
    "ray": {"session", "nodes", "shards/pack", "worker", "launch", "serve", "submit", "doctor"}
    | {"tune/sweep", "tune/trial", "tune/schedule"},
    "nvidia": {"batches/dali", "machine"},
    "wandb": {"tracking"},
}


def modules() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if path.name != "__init__.py" or path.parent != ROOT)


def imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever in the file, dotted."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


def place(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix()


@pytest.mark.parametrize("path", modules(), ids=place)
def test_imports_run_downstream(path: Path) -> None:
    own = place(path).split("/")[0]
    assert own in LEVEL, f"{own} has no layer: add it to LAYERS where it belongs"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "cxrscale" and len(parts) > 1 and parts[1] in LEVEL:
            assert LEVEL[parts[1]] <= LEVEL[own], f"{own} imports {parts[1]}, which lies downstream of it"


@pytest.mark.parametrize("path", modules(), ids=place)
def test_heavy_libraries_come_in_by_their_doors(path: Path) -> None:
    for library, doors in DOORS.items():
        used = any(name.split(".")[0] == library for name in imports(path))
        assert not used or place(path) in doors, f"{place(path)} imports {library}; its doors are {sorted(doors)}"


def test_no_module_is_called_by_what_it_is_not() -> None:
    vague = {"utils", "common", "helpers", "manager", "factory", "misc", "base"}
    assert [place(path) for path in modules() if set(place(path).split("/")) & vague] == []


def test_the_rule_sees_an_upstream_import(tmp_path: Path) -> None:
    sample = tmp_path / "sample.py"
    sample.write_text("def f():\n    from cxrscale.train import train\n    import ray.train\n")
    assert imports(sample) == {"cxrscale.train.train", "ray.train"}
