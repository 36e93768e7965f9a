"""run.json: time and cost over all sessions of a run, also of those that were killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxrscale.io import storage
from cxrscale.training import run_info
from cxrscale.types import UserError


def session_of(seconds: float | None, workers: int = 1, device: str | None = "CPU") -> dict[str, Any]:
    return {"began": 1000.0, "ended": None if seconds is None else 1000.0 + seconds, "workers": workers} | {
        "device": device
    }


def test_hours_and_cost_of_gpus() -> None:
    sessions = [session_of(3600, 4, "NVIDIA H100"), session_of(1800, 2, "NVIDIA H100")]
    found = run_info.totals(sessions, price=2.0)
    assert found == {"seconds": 5400.0, "worker_hours": 5.0, "gpu_hours": 5.0, "cost": 10.0}
    assert run_info.totals(sessions, None)["cost"] is None


def test_without_a_gpu_workers_are_paid() -> None:
    found = run_info.totals([session_of(7200, 3)], price=0.5)
    assert found == {"seconds": 7200.0, "worker_hours": 6.0, "gpu_hours": 0.0, "cost": 3.0}


def test_a_killed_session_ran_on_what_the_others_ran_on() -> None:
    sessions = [session_of(3600, 2, None), session_of(3600, 2, "NVIDIA H100")]
    assert run_info.totals(sessions, 1.0)["gpu_hours"] == 4.0
    assert run_info.totals(sessions, 1.0)["cost"] == 4.0


@given(st.lists(st.tuples(st.floats(0, 1e5), st.integers(1, 64), st.sampled_from(["CPU", "NVIDIA H100"])), max_size=6))
def test_sessions_add_up(spans: list[tuple[float, int, str]]) -> None:
    sessions = [session_of(*span) for span in spans]
    found = run_info.totals([*sessions, session_of(None)], price=3.0)
    parts = [run_info.totals([each], price=3.0) for each in sessions]
    for name in ("seconds", "worker_hours", "gpu_hours"):
        assert found[name] == pytest.approx(sum(part[name] or 0 for part in parts), abs=0.06 * (len(parts) + 1))
    assert found["worker_hours"] == pytest.approx(sum(s * w for s, w, _ in spans) / 3600, abs=1e-3)


def test_each_launch_is_a_session_and_the_last_one_says_how_it_ended(tmp_path: Path) -> None:
    run = str(tmp_path)
    with run_info.record_session(run, {"manifest": "m"}, workers=3, price=1.0):
        begun = run_info.read_run_info(run)
        assert (begun["finished"], begun["sessions"][0]["ended"]) == (False, None)
        time.sleep(0.2)
    with pytest.raises(KeyboardInterrupt), run_info.record_session(run, {"manifest": "m"}, workers=3, price=1.0):
        raise KeyboardInterrupt
    said = {"finished": True, "epochs": 2, "best": 0.9, "device": "CPU", "workers": 2}
    with run_info.record_session(run, {"manifest": "m"}, workers=3, price=1.0):
        storage.write(storage.join(run, run_info.RESULT), json.dumps(said))
    found = run_info.read_run_info(run)
    assert (found["finished"], found["epochs"], found["best"], found["manifest"]) == (True, 2, 0.9, "m")
    assert [each["workers"] for each in found["sessions"]] == [3, 3, 2]
    assert [each["device"] for each in found["sessions"]] == [None, None, "CPU"]
    spans = [each["ended"] - each["began"] for each in found["sessions"]]
    assert found["seconds"] == pytest.approx(sum(spans), abs=0.1)
    assert found["seconds"] >= 0.2
    assert found["gpu_hours"] == 0
    assert {"torch", "ray", "python", "cxrscale"} <= found["versions"].keys()
    assert found["hardware"]["cpus"] >= 1
    assert not (tmp_path / run_info.RESULT).exists()


KILLED = """
import sys, time
from cxrscale import account
from cxrscale.config import Tracking
from cxrscale.tracking import Tracker
with account.session(sys.argv[1], {"manifest": "m"}, workers=2, price=None):
    tracker = Tracker(sys.argv[1], Tracking(), {}, 0)
    time.sleep(0.5)
    tracker.log("train", 1, {"loss": 1.0})
    print("logged", flush=True)
    time.sleep(60)
"""


def test_a_killed_session_lasted_until_its_last_line(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "logged\n"
        process.send_signal(signal.SIGKILL)
    assert run_info.read_run_info(str(tmp_path))["sessions"][0]["ended"] is None
    with run_info.record_session(str(tmp_path), {"manifest": "m"}, workers=2, price=None):
        pass
    found = run_info.read_run_info(str(tmp_path))
    first, second = found["sessions"]
    assert 0.4 <= first["ended"] - first["began"] < 30
    assert first["ended"] <= second["began"] + 0.1
    assert found["seconds"] >= 0.4


def test_no_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run\.json does not exist; give the folder that `cxrscale train` printed"):
        run_info.read_run_info(str(tmp_path))
