"""A search that is interrupted, anywhere and however, ends as one that nothing disturbed."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cxrscale import config
from cxrscale.cli import progress
from cxrscale.config import Recipe
from cxrscale.tuning import results, sweep
from tests.conftest import tiny

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL]
STAGES = ["before the first trial", "while some wait", "while some run", "before the verdict"]
METHODS = ["random", "grid", "tpe", "asha"]
TRIALS = 3
SHORT = (
    f"tune.trials={TRIALS}",
    "tune.baseline_seeds=1",
    "train.epochs=2",
    "sampler.steps_per_epoch=3",
    "tune.reduction_factor=2",
    "tune.max_concurrent_trials=1",
)
DRIVER = """
import sys
from cxrscale import config
from cxrscale.cli import progress
from cxrscale.tuning import sweep
result = sweep.tune(config.load_recipe(sys.argv[1]), 'tiny', progress.bar)
sys.exit(0 if result.finished else 130)
"""


def recipe_of(method: str, shards: str, root: Path) -> Recipe:
    space = "{optim.lr: [1e-4, 1e-3, 1e-2]}" if method == "grid" else '{optim.lr: "loguniform(1e-4, 1e-2)"}'
    return tiny(shards, root, f"tune.space={space}", f"tune.method={method}", *SHORT)


def outcome(run: Path) -> list[Any]:
    """What may not depend on an interruption: trials, points, metrics, which were stopped, and the best recipe."""
    rows = results.read_results(str(run))
    best = config.load_recipe(run / results.BEST)
    names = ("trial", "status", "optim.lr", "auroc", "curve", "reason")
    return [[tuple(str(row[name]) for name in names) for row in rows], best.optim.lr]


def run_infos(run: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in (run / "trials").glob("*/run.json")]


def reached(stage: str, run: Path) -> bool:
    infos = run_infos(run) if (run / "sweep.json").exists() else []
    finished = sum(bool(info["finished"]) for info in infos)
    all_done = len(infos) == TRIALS + 1 and finished == len(infos)
    return {
        "before the first trial": (run / "sweep.json").exists(),
        "while some wait": len(infos) >= 1,
        "while some run": finished >= 2,
        "before the verdict": all_done or (run / "trials.parquet").exists(),
    }[stage]


def interrupt(recipe: Recipe, folder: Path, stage: str, number: signal.Signals) -> int:
    """Search in a process of its own, which gets the signal once the stage is reached; its exit code."""
    import ray

    (folder / "recipe.yaml").write_text(config.to_yaml(recipe))
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [sys.executable, "-W", "ignore", "-c", DRIVER, str(folder / "recipe.yaml")]
    with subprocess.Popen(command, env=environment) as driver:
        try:
            while driver.poll() is None and not reached(stage, folder / "tiny"):
                time.sleep(0.02)
            driver.send_signal(number)
            return driver.wait(120)
        finally:
            driver.kill()


_undisturbed: dict[str, list[Any]] = {}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_search_ends_as_an_undisturbed_one(
    method: str, number: signal.Signals, stage: str, nih_shards: str, tmp_path: Path
) -> None:
    if method == "tpe":
        pytest.importorskip("optuna")
    if method not in _undisturbed:
        undisturbed = recipe_of(method, nih_shards, tmp_path / "undisturbed")
        assert sweep.tune(undisturbed, "tiny", progress.bar).finished
        _undisturbed[method] = outcome(tmp_path / "undisturbed" / "tiny")
    broken = tmp_path / "broken"
    broken.mkdir()
    recipe = recipe_of(method, nih_shards, broken)
    code = interrupt(recipe, broken, stage, number)
    if not (broken / "tiny" / results.BEST).exists():
        assert code != 0
        assert sweep.tune(recipe, "tiny", progress.bar).finished
    assert outcome(broken / "tiny") == _undisturbed[method]


def test_a_trial_that_failed_is_run_once_more_when_asked(nih_shards: str, tmp_path: Path) -> None:
    given = "tune.space={optim.lr: [1e-3, 1e-4]}"
    more = ("tune.method=grid", "tune.baseline_seeds=0", "train.epochs=1", "sampler.steps_per_epoch=2")
    recipe = tiny(nih_shards, tmp_path, given, *more)
    # A folder in the way of a checkpoint file's name fails the trial; who removes it has mended the cause.
    (tmp_path / "tiny" / "trials" / "trial-001").mkdir(parents=True)
    obstacle = tmp_path / "tiny" / "trials" / "trial-001" / "checkpoints"
    obstacle.write_text("in the way")
    assert sweep.tune(recipe, "tiny", progress.bar).finished
    rows = results.read_results(str(tmp_path / "tiny"))
    assert [row["status"] for row in rows] == ["finished", "failed"]
    assert "part of this path is a file" in rows[1]["reason"]
    assert math.isnan(rows[1]["f1_at_own_thresholds"])
    with pytest.raises(Exception, match=r"tune\.retry_failed=true runs the trials that failed once more"):
        sweep.tune(recipe, "tiny", progress.bar)
    again = tiny(nih_shards, tmp_path, given, *more, "tune.retry_failed=true")
    assert sweep.tune(again, "tiny", progress.bar).finished
    rows = results.read_results(str(tmp_path / "tiny"))
    assert [(row["status"], "once more" in row["reason"]) for row in rows] == [("finished", False), ("failed", True)]
    obstacle.unlink()
    (obstacle.parent / "retried.txt").unlink()
    assert sweep.tune(again, "tiny", progress.bar).finished
    assert [row["status"] for row in results.read_results(str(tmp_path / "tiny"))] == ["finished"] * 2
