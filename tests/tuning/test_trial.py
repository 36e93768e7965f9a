"""A trial reports an epoch to Tune once its files are on disk."""

import threading
from pathlib import Path

from cxrscale.config import Tracking
from cxrscale.training.tracking import Tracker
from cxrscale.tuning import trial


def test_an_epoch_is_reported_once_its_checkpoint_or_a_later_one_is_written(tmp_path: Path) -> None:
    tracker = Tracker(str(tmp_path), Tracking(), {}, 0)
    tracker.log("val", 12, {"auroc": 0.5})
    tracker.close()
    (tmp_path / "checkpoints").mkdir()
    steps: list[int] = []
    waiting = threading.Thread(target=lambda: steps.append(trial.wait_for_checkpoint(str(tmp_path))))
    waiting.start()
    (tmp_path / "checkpoints" / "step-000000008-0123456789abcdef.pt").touch()
    waiting.join(0.3)
    assert waiting.is_alive()
    # The one of step 12 has been written and removed meanwhile, as only the newest are kept.
    (tmp_path / "checkpoints" / "step-000000016-0123456789abcdef.pt").touch()
    waiting.join(10)
    assert steps == [12]
