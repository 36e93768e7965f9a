"""A search of which no trial runs says what it waits for, and ends at its limit."""

import pytest

from cxrscale.config import Scaling
from cxrscale.training.waiting import SAY_SECONDS
from cxrscale.tuning import room
from cxrscale.types import WaitLimitError


def test_only_a_search_of_which_nothing_runs_waits(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_what", lambda: "room for 1 x CPU 4")
    watch = room.RoomWatch("/runs/search", Scaling(start_seconds=100))
    for now in range(200):
        watch.see(["RUNNING", "PENDING"], now)
    assert not caplog.messages
    for now in range(200, 299):
        watch.see(["TERMINATED", "PENDING"], now)
    assert caplog.messages == [
        f"waiting {seconds:.0f} s for room for 1 x CPU 4; ends at scaling.start_seconds=100"
        for seconds in (SAY_SECONDS, 6 * SAY_SECONDS)
    ]
    watch.see(["TERMINATED", "RUNNING"], 299)
    assert caplog.messages[2:] == ["a trial runs after 99 s"]
    for now in range(299, 500):
        watch.see(["TERMINATED", "TERMINATED"], now)
    watch.see(["PENDING"], 500)
    watch.see(["PENDING"], 599)
    with pytest.raises(
        WaitLimitError,
        match=r"^scaling\.start_seconds=100: no trial of /runs/search has run for 100 s",
    ):
        watch.see(["PENDING"], 600)
