"""Commands leave nothing in the temporary folder; those that start Ray are watched in tests/cluster/test_sockets.py."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cxrscale.sources.synthetic.archive import SyntheticPaths

RUN_ALL = """
import json, sys
from cxrscale.cli import app
for words in json.loads(sys.argv[1]):
    sys.argv = ["cxrscale", *words]
    try:
        app.main()
    except SystemExit as end:
        # One epoch need not learn anything.
        assert end.code in (0, None) or words[0] == "overfit", (words, end.code)
"""


@pytest.mark.slow
def test_commands_leave_nothing_in_the_temporary_folder(
    drawn: SyntheticPaths, nih_shards: str, classifier_run: str, tmp_path: Path
) -> None:
    run, temporary = str(tmp_path / "run"), tmp_path / "temporary"
    shutil.copytree(classifier_run, run)
    temporary.mkdir()
    recipe, out = str(Path(run) / "recipe.yaml"), str(tmp_path / "out")
    image = str(next(drawn.nih.rglob("*.png")))
    commands = [
        ["config", recipe],
        ["verify", nih_shards],
        ["audit", nih_shards, "--out", f"{out}/audit.html"],
        ["preview", recipe, "--out", f"{out}/preview.html"],
        ["threshold", run, "--resamples", "4"],
        ["evaluate", run, "--resamples", "4"],
        ["compare", run, run, "--resamples", "4", "--out", f"{out}/compare.json"],
        ["predict", image, "--run", run, "--out", f"{out}/predictions"],
        ["predict", "--split", "val", "--run", run],
        ["explain", image, "--run", run, "--out", f"{out}/explanations"],
        ["explain", "--split", "test", "--run", run, "--resamples", "4"],
        ["overfit", recipe, f"tracking.runs_dir={out}", "--images", "8", "--epochs", "1"],
        ["doctor"],
    ]
    environment = os.environ | {"TMPDIR": str(temporary), "HOME": str(temporary)}
    command = [sys.executable, "-c", RUN_ALL, json.dumps(commands)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    left = [path for path in temporary.rglob("*") if path.is_file() and ".cache" not in path.parts]
    assert left == []
