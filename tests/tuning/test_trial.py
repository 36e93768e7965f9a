"""What a trial tells Tune of is on disk."""

import threading
from pathlib import Path

from cxrscale.config import Tracking
from cxrscale.training.tracking import Tracker
from cxrscale.tuning import trial


def test_an_epoch_is_told_of_once_its_checkpoint_or_a_later_one_is_there(tmp_path: Path) -> None:
    tracker = Tracker(str(tmp_path), Tracking(), {}, 0)
    tracker.log("val", 12, {"auroc": 0.5})
    tracker.close()
    (tmp_path / "checkpoints").mkdir()
    told: list[int] = []
    waiting = threading.Thread(target=lambda: told.append(trial.written(str(tmp_path))))
    waiting.start()
    (tmp_path / "checkpoints" / "step-000000008-0123456789abcdef.pt").touch()
    waiting.join(0.3)
    assert waiting.is_alive()
    # By now the one of step 12 has come and been removed, as only the newest are kept.
    (tmp_path / "checkpoints" / "step-000000016-0123456789abcdef.pt").touch()
    waiting.join(10)
    assert told == [12]
