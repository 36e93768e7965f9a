"""run.json: time and cost over all sessions of a run, also of those that were killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxrscale.io import storage, write_artifact
from cxrscale.training import run_info
from cxrscale.training.run_info import Outcome, RunInputs, Session, Usage, sum_usage
from cxrscale.types import UserError

INPUTS = RunInputs(manifest="m")


def session(seconds: float | None, workers: int = 1, device: str | None = "CPU") -> Session:
    ended = None if seconds is None else 1000.0 + seconds
    return Session(began=1000.0, ended=ended, workers=workers, device=device)


def test_hours_and_cost_of_gpus() -> None:
    sessions = [session(3600, 4, "NVIDIA H100"), session(1800, 2, "NVIDIA H100")]
    assert sum_usage(sessions, price=2.0) == Usage(seconds=5400.0, worker_hours=5.0, gpu_hours=5.0, cost=10.0)
    assert sum_usage(sessions, None).cost is None


def test_without_a_gpu_the_cost_is_that_of_the_workers() -> None:
    usage = sum_usage([session(7200, 3)], price=0.5)
    assert usage == Usage(seconds=7200.0, worker_hours=6.0, gpu_hours=0.0, cost=3.0)


def test_a_killed_session_is_assumed_to_have_run_on_the_device_of_the_others() -> None:
    sessions = [session(3600, 2, None), session(3600, 2, "NVIDIA H100")]
    assert sum_usage(sessions, 1.0).gpu_hours == 4.0
    assert sum_usage(sessions, 1.0).cost == 4.0


@given(st.lists(st.tuples(st.floats(0, 1e5), st.integers(1, 64), st.sampled_from(["CPU", "NVIDIA H100"])), max_size=6))
def test_the_usage_of_sessions_adds_up(spans: list[tuple[float, int, str]]) -> None:
    sessions = [session(*span) for span in spans]
    usage = sum_usage([*sessions, session(None)], price=3.0)
    parts = [sum_usage([part], price=3.0) for part in sessions]
    for name in ("seconds", "worker_hours", "gpu_hours"):
        total = sum(getattr(part, name) for part in parts)
        assert getattr(usage, name) == pytest.approx(total, abs=0.06 * (len(parts) + 1))
    assert usage.worker_hours == pytest.approx(sum(s * w for s, w, _ in spans) / 3600, abs=1e-3)


def test_each_launch_is_a_session_and_the_outcome_is_that_of_the_last(tmp_path: Path) -> None:
    run = str(tmp_path)
    with run_info.record_session(run, INPUTS, workers=3, price=1.0):
        begun = run_info.read_run_info(run)
        assert (begun.finished, begun.sessions[0].ended) == (False, None)
        time.sleep(0.2)
    with pytest.raises(KeyboardInterrupt), run_info.record_session(run, INPUTS, workers=3, price=1.0):
        raise KeyboardInterrupt
    outcome = Outcome(finished=True, epochs=2, best=0.9, device="CPU", workers=2)
    with run_info.record_session(run, INPUTS, workers=3, price=1.0):
        write_artifact(storage.join(run, run_info.OUTCOME), outcome)
    info = run_info.read_run_info(run)
    assert (info.finished, info.epochs, info.best, info.manifest) == (True, 2, 0.9, "m")
    assert [item.workers for item in info.sessions] == [3, 3, 2]
    assert [item.device for item in info.sessions] == [None, None, "CPU"]
    assert info.seconds == pytest.approx(sum((item.ended or 0) - item.began for item in info.sessions), abs=0.1)
    assert info.seconds >= 0.2
    assert info.gpu_hours == 0
    assert {"torch", "ray", "python", "cxrscale"} <= info.versions.keys()
    assert (info.hardware.cpus or 0) >= 1
    assert not (tmp_path / run_info.OUTCOME).exists()


def test_the_outcome_of_a_run_whose_driver_was_lost_counts_and_is_kept_at_a_resume(tmp_path: Path) -> None:
    """The machine of the driver is lost after the last worker wrote how it ended, before run.json says so."""
    run = str(tmp_path)
    run_info.write_new(run, INPUTS)
    with run_info.record_session(run, INPUTS, workers=3, price=None):
        while_it_runs = (tmp_path / run_info.RUN_INFO).read_bytes()
    (tmp_path / run_info.RUN_INFO).write_bytes(while_it_runs)
    assert not run_info.read_run_info(run).finished
    write_artifact(
        storage.join(run, run_info.OUTCOME), Outcome(finished=True, epochs=2, best=0.9, device="CPU", workers=2)
    )
    info = run_info.read_run_info(run)
    assert (info.finished, info.epochs, info.best, info.sessions[0].workers) == (True, 2, 0.9, 2)
    with run_info.record_session(run, INPUTS, workers=3, price=None):
        assert not run_info.read_run_info(run).finished
        assert [item.workers for item in run_info.read_run_info(run).sessions] == [2, 3]
    assert not run_info.read_run_info(run).finished


KILLED = """
import sys, time
from cxrscale.config import Tracking
from cxrscale.training import RunInputs, run_info
from cxrscale.training.tracking import Tracker
with run_info.record_session(sys.argv[1], RunInputs(manifest="m"), workers=2, price=None):
    tracker = Tracker(sys.argv[1], Tracking(), {})
    time.sleep(0.5)
    tracker.log("train", 1, {"loss": 1.0})
    print("logged", flush=True)
    time.sleep(60)
"""


def test_a_killed_session_lasted_until_its_last_log_line(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "logged\n"
        process.send_signal(signal.SIGKILL)
    assert run_info.read_run_info(str(tmp_path)).sessions[0].ended is None
    with run_info.record_session(str(tmp_path), INPUTS, workers=2, price=None):
        pass
    info = run_info.read_run_info(str(tmp_path))
    first, second = info.sessions
    assert first.ended is not None
    assert 0.4 <= first.ended - first.began < 30
    assert first.ended <= second.began + 0.1
    assert info.seconds >= 0.4


def test_a_folder_without_a_run_is_a_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run\.json does not exist; give the folder that `cxrscale train` printed"):
        run_info.read_run_info(str(tmp_path))
