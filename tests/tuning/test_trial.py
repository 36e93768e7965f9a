"""A trial reports an epoch to Tune once its files are on disk."""

import math
import threading
from pathlib import Path

import pytest

from cxrscale import config
from cxrscale.config import Recipe, Tracking
from cxrscale.training import waiting
from cxrscale.training.tracking import Tracker
from cxrscale.tuning import trial
from cxrscale.types import WaitLimitError


def test_an_epoch_is_reported_once_its_checkpoint_or_a_later_one_is_written(tmp_path: Path) -> None:
    tracker = Tracker(str(tmp_path), Tracking(), {})
    tracker.log("val", 12, {"auroc": 0.5})
    tracker.close()
    (tmp_path / "checkpoints").mkdir()
    steps, said = list[int](), list[str]()
    thread = threading.Thread(target=lambda: steps.append(trial.wait_for_checkpoint(str(tmp_path), 60, said.append)))
    thread.start()
    (tmp_path / "checkpoints" / "step-000000008-0123456789abcdef.pt").touch()
    thread.join(0.3)
    assert thread.is_alive()
    # The one of step 12 has been written and removed meanwhile, as only the newest are kept.
    (tmp_path / "checkpoints" / "step-000000016-0123456789abcdef.pt").touch()
    thread.join(10)
    assert (steps, said) == ([12], [])


def test_a_checkpoint_that_never_comes_is_said_and_ends_at_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "SAY_SECONDS", 0.1)
    tracker = Tracker(str(tmp_path), Tracking(), {})
    tracker.log("val", 12, {"auroc": 0.5})
    tracker.close()
    said: list[str] = []
    with pytest.raises(WaitLimitError, match=r"^scaling\.hang_seconds=0\.3: .* has no checkpoint of step 12 after 0 s"):
        trial.wait_for_checkpoint(str(tmp_path), 0.3, said.append)
    assert said == ["waiting 0 s for the checkpoint of step 12; ends at scaling.hang_seconds=0.3"]


def test_an_epoch_without_a_metric_is_worse_than_any_other_and_a_failure_than_all() -> None:
    best = trial.BestMetric(Recipe())
    reported = [best.report({"epoch": 1, "auroc": value})["best"] for value in (None, 0.6, math.nan, 0.5, 0.7)]
    assert reported[1:] == [0.6, 0.6, 0.6, 0.7]
    assert math.isnan(reported[0])
    assert math.isnan(best.failed(9)["best"])


def test_what_another_point_has_trained_is_no_start(tmp_path: Path) -> None:
    recipe = Recipe()
    (tmp_path / "recipe.yaml").write_text(config.to_yaml(recipe))
    (tmp_path / "checkpoints").mkdir()
    files = [
        tmp_path / "checkpoints" / "step-000000008-0123456789abcdef.pt",
        tmp_path / "best.pt",
        tmp_path / "run.json",
    ]
    for path in files:
        path.touch()
    trial._check_same_point(str(tmp_path), recipe)
    assert all(path.exists() for path in files)
    other = recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"lr": 0.5})})
    trial._check_same_point(str(tmp_path), other)
    assert not any(path.exists() for path in files)
