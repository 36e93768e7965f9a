"""The Python API: light to import, typed, and the README's block runs as it stands there."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import cxrscale as cx
from cxrscale.config import Pack
from cxrscale.sources.synthetic.archive import SyntheticPaths

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("Predictor", "Run", "UserError", "build_shards", "load_recipe", "make_loader", "open_dataset", "open_run")


def test_every_name_is_there_and_explains_itself() -> None:
    assert set(dir(cx)) >= {*NAMES, "train", "tune"}
    for name in (*NAMES, "train", "tune"):
        text = getattr(cx, name).__doc__ or ""
        assert len(text) > 60, name
    for name in (
        "Predictor",
        "build_shards",
        "load_recipe",
        "make_loader",
        "open_dataset",
        "open_run",
        "train",
        "tune",
    ):
        assert "cx." in (getattr(cx, name).__doc__ or ""), f"{name} has no example"
    assert (ROOT / "cxrscale" / "py.typed").exists()


def test_importing_it_takes_no_time_and_no_torch() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import cxrscale; "
        "print(time.perf_counter() - start, 'torch' in sys.modules)"
    )
    seconds, torch_loaded = min(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        for _ in range(3)
    )
    assert float(seconds) < 0.1
    assert torch_loaded == "False"


def test_the_block_of_the_readme_runs(
    drawn: SyntheticPaths,
    classifier_run: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    demo = tmp_path / "runs" / "demo"
    for link, target in (
        (tmp_path / "jobs", ROOT / "jobs"),
        (demo / "synthetic", drawn.nih.parent),
        (demo / "runs" / "demo-0a1b2c3d", Path(classifier_run)),
    ):
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target)
    cx.build_shards("nih", str(drawn.nih), Pack(size=160), str(demo / "shards" / "nih"), local=True)
    monkeypatch.chdir(tmp_path)
    began = time.perf_counter()
    exec(compile(block, "README.md", "exec"), {})
    assert time.perf_counter() - began < 60
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("densenet121 (")
    assert "'Effusion': 0." in lines[1]
    assert all(line.startswith("torch.Size([") for line in lines[2:])
    assert len(lines) > 2
