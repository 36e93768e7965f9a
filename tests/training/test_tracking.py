"""train_log.jsonl survives kills and restarts."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from cxrscale.config import Tracking
from cxrscale.io import scratch, storage
from cxrscale.training import tracking
from cxrscale.training.tracking import Start, Tracker, Wait, require_wandb_key
from cxrscale.types import UserError


def test_a_resumed_run_drops_the_lines_that_it_will_repeat(tmp_path: Path) -> None:
    first = Tracker(str(tmp_path), Tracking(), {})
    for step in range(1, 6):
        first.log("train", step, {"loss": step / 10})
    first.close()
    second = Tracker(str(tmp_path), Tracking(), {}, Start(3))
    second.log("train", 4, {"loss": 9.0})
    second.close()
    assert [(line["step"], line["loss"]) for line in tracking.read_log(str(tmp_path))] == [
        (1, 0.1),
        (2, 0.2),
        (3, 0.3),
        (4, 9.0),
    ]


def test_a_validation_that_will_be_repeated_is_dropped_too(tmp_path: Path) -> None:
    first = Tracker(str(tmp_path), Tracking(), {})
    first.log("train", 4, {"epoch": 0, "loss": 0.1})
    first.log("val", 4, {"epoch": 1, "loss": 0.2})
    first.close()
    # The checkpoint of step 4 is from before the first epoch's validation, then from after it.
    for start, kinds in ((Start(4, 1), ["train", "val"]), (Start(4, 0), ["train"])):
        Tracker(str(tmp_path), Tracking(), {}, start).close()
        assert [line["kind"] for line in tracking.read_log(str(tmp_path))] == kinds


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path: Path) -> None:
    whole = json.dumps({"kind": "train", "step": 1, "time": 2.5})
    (tmp_path / "train_log.jsonl").write_text(whole + '\n{"kind": "tra')
    assert [line["step"] for line in tracking.read_log(str(tmp_path))] == [1]


def test_an_undefined_metric_is_null(tmp_path: Path) -> None:
    tracker = Tracker(str(tmp_path), Tracking(), {})
    tracker.log("val", 1, {"auroc": math.nan})
    tracker.close()
    assert tracking.read_log(str(tmp_path))[0]["auroc"] is None


def test_wandb_offline_keeps_one_run_over_restarts(tmp_path: Path) -> None:
    for start in (0, 2):
        tracker = Tracker(str(tmp_path), Tracking(wandb="offline"), {"optim": {"lr": 0.1}}, Start(start))
        tracker.log("train", start + 1, {"loss": 1.0})
        tracker.close()
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert runs
    assert len({folder.name.split("-")[3] for folder in runs}) == 1, "a restart keeps the run's id"


def test_wandb_gets_no_image_unless_asked(tmp_path: Path) -> None:
    tracker = Tracker(str(tmp_path), Tracking(wandb="offline"), {})
    tracker.samples(np.zeros((5, 1, 8, 8), np.float32))
    tracker.close()
    assert (tmp_path / "samples.png").is_file()
    assert list((tmp_path / "wandb").rglob("*.png")) == []
    (log,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    for word in (b"samples", os.fsencode(sys.argv[0]), b"github"):
        assert word not in log.read_bytes(), "neither the command line nor the checkout may be there"


def test_wandb_gets_the_sample_images_when_asked_and_the_log_stays(tmp_path: Path) -> None:
    image_BCHW = np.random.default_rng(0).normal(size=(5, 1, 8, 8)).astype(np.float32)
    tracker = Tracker(str(tmp_path), Tracking(wandb="offline", wandb_images=True), {})
    tracker.samples(image_BCHW)
    tracker.log("train", 1, {"loss": 1.0})
    tracker.close()
    logged = list((tmp_path / "wandb").glob("offline-run-*/files/media/images/samples*.png"))
    assert len(logged) == 1
    # Five images of 8 x 8 in three columns and two rows, the last position black.
    ours, theirs = (cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) for path in (tmp_path / "samples.png", logged[0]))
    assert ours is not None
    assert theirs is not None
    assert ours.shape == (16, 24)
    assert np.array_equal(ours, theirs)
    assert not ours[8:, 16:].any()
    assert [line["step"] for line in tracking.read_log(str(tmp_path))] == [1]


DYING = """
import sys, psutil
from cxrscale.config import Tracking
from cxrscale.training.tracking import Start, Tracker

tracker = Tracker(sys.argv[1], Tracking(wandb="offline"), {})
tracker.log("train", 1, {"loss": 1.0})
(service,) = [child for child in psutil.Process().children(recursive=True) if "wandb-core" in child.name()]
service.kill()
service.wait(10)
for step in (2, 3):
    tracker.log("train", step, {"loss": 0.5})
tracker.close()
"""


def test_the_run_goes_on_when_wandb_dies(tmp_path: Path) -> None:
    # Through this variable a child would find the service of earlier tests.
    alone = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    command = [sys.executable, "-c", DYING, str(tmp_path)]
    done = subprocess.run(command, env=alone, capture_output=True, text=True, timeout=120, check=True)
    assert [line["step"] for line in tracking.read_log(str(tmp_path))] == [1, 2, 3]
    assert done.stderr.count("wandb has stopped") == 1


def test_wandb_disabled_writes_nothing(tmp_path: Path) -> None:
    tracker = Tracker(str(tmp_path), Tracking(wandb="disabled"), {})
    tracker.samples(np.zeros((2, 1, 8, 8), np.float32))
    tracker.log("train", 1, {"loss": 1.0})
    tracker.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples.png", "train_log.jsonl"]


def test_wandb_online_without_a_key_is_one_line_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.hospital.example:8443/api")
    online = Tracking(wandb="online")
    for home in ("/proc/nowhere", str(tmp_path)):
        monkeypatch.setenv("HOME", home)
        with pytest.raises(
            UserError, match=r"needs a key for wandb\.hospital\.example: run `wandb login`, set WANDB_API"
        ):
            require_wandb_key(online)
    require_wandb_key(Tracking(wandb="offline"))
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine wandb.hospital.example login user password 0123\n")
    netrc.chmod(0o600)
    require_wandb_key(online)
    netrc.unlink()
    monkeypatch.setenv("WANDB_API_KEY", "0123")
    require_wandb_key(online)


def test_wandb_files_of_a_run_in_a_bucket_go_there_and_leave_nothing_here(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run = f"{s3}/runs/wandb-files"
    tracker = Tracker(run, Tracking(wandb="offline"), {})
    tracker.log("train", 1, {"loss": 0.5})
    tracker.close()
    (folder,) = [name for name in storage.listing(f"{run}/wandb") if name.startswith("offline-run-")]
    assert [name for name in storage.listing(f"{run}/wandb/{folder}") if name.endswith(".wandb")]
    left = {path for path in tmp_path.iterdir() if path.name.startswith(scratch.PREFIX)}
    assert left <= {scratch.shared()}
    assert list(scratch.shared().iterdir()) == [scratch.shared() / scratch.OWNER]


def wait(began: float) -> Wait:
    return Wait("room for 2 x CPU 4", "scaling.start_seconds=1800", 73.5, began)


def test_waits_stand_in_the_log_and_not_among_the_lines_of_training(tmp_path: Path) -> None:
    first = Tracker(str(tmp_path), Tracking(), {})
    for step in range(1, 6):
        first.log("train", step, {"loss": step / 10})
        if step == 5:
            first.log_wait(5, wait(1.5))
    first.close()
    # It has been waited, though step 5 will be done again.
    Tracker(str(tmp_path), Tracking(), {}, Start(3)).close()
    tracking.add_waits(str(tmp_path), [wait(1.5), wait(2.5)])
    assert [line["step"] for line in tracking.read_log(str(tmp_path))] == [1, 2, 3]
    waits = tracking.read_waits(str(tmp_path))
    assert [(line["step"], line["began"], line["seconds"]) for line in waits] == [(5, 1.5, 73.5), (5, 2.5, 73.5)]
    assert {line["what"] for line in waits} == {"room for 2 x CPU 4"}


def test_a_wait_without_its_cause_is_no_line_of_a_log(tmp_path: Path) -> None:
    for values in ({"seconds": 3.0, "began": 1.0, "limit": "x"}, {"seconds": 3.0, "what": "x", "limit": "x"}):
        line = {"kind": "wait", "step": 1, "time": 2.5, **values}
        (tmp_path / "train_log.jsonl").write_text(json.dumps(line) + "\n")
        with pytest.raises(UserError, match="line 1 is not one of a training's log"):
            tracking.read_log(str(tmp_path))
