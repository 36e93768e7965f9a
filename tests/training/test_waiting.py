"""What a run's signs of life say: waits are found, named by what they wait for, and end at the right limit."""

import pytest

from cxrscale.config import Scaling
from cxrscale.training.waiting import SAY_SECONDS, Sign, Standstill

SCALING = Scaling(start_seconds=100, hang_seconds=30)


def sign(steps: int, time: float, group: str = "a", doing: str = "the next batch of images") -> Sign:
    return Sign(group, steps, doing, time)


def test_a_run_that_starts_slowly_has_waited_until_its_first_step() -> None:
    still = Standstill(SCALING, None, 0)
    assert still.activity(1) is None
    assert still.limit(1) == "scaling.start_seconds=100"
    assert not still.is_time_to_speak(SAY_SECONDS - 1)
    assert still.is_time_to_speak(SAY_SECONDS)
    assert not still.is_time_to_speak(SAY_SECONDS + 1)
    # Its workers are there and load the model: that is no step yet.
    assert still.see(sign(0, 20, doing="the workers to load model and data"), 20) == 0
    assert still.activity(21) == "the workers to load model and data"
    assert still.see(sign(1, 25), 25) == 25
    assert still.see(sign(2, 26), 26) == 0


def test_the_same_sign_is_none() -> None:
    old = sign(7, 1)
    still = Standstill(SCALING, old, 0)
    for now in range(1, 99):
        assert still.see(old, now) == 0
        assert not still.exceeded(now)
    assert still.exceeded(100) == "scaling.start_seconds=100"
    assert still.see(sign(1, 101, group="b"), 101) == 101


def test_a_hung_step_and_the_restart_after_it_are_one_wait() -> None:
    still = Standstill(SCALING, None, -30)
    for now in range(5):
        still.see(sign(10 * now, now), now)
    for now in range(5, 36):
        assert still.see(sign(40, now, doing="all workers to do a step"), now) == 0
    assert still.is_time_to_speak(14)
    assert still.activity(35) == "all workers to do a step"
    assert still.limit(35) == "scaling.hang_seconds=30"
    # The group is gone; then a new one loads, and does its first step.
    assert (still.activity(45), still.limit(45)) == (None, "scaling.start_seconds=100")
    assert still.see(sign(0, 50, group="b"), 50) == 0
    assert still.see(sign(2, 54, group="b"), 54) == 50


def test_workers_that_come_and_never_do_a_step_end_the_run() -> None:
    still = Standstill(SCALING, None, 0)
    for now in range(1, 130):
        still.see(sign(0, now, group=str(now // 10)), now)
        assert not still.exceeded(now)
    assert still.exceeded(130) == "scaling.hang_seconds=30"


@pytest.mark.parametrize("seconds", [12, 40])
def test_slow_steps_are_no_waits_once_they_are_known(seconds: int) -> None:
    still = Standstill(Scaling(hang_seconds=600), None, 0)
    still.see(sign(1, 1), 1)
    assert still.see(sign(2, 2), 1 + seconds) == seconds
    for step in range(2, 5):
        assert not still.is_time_to_speak(step * seconds)
        assert still.see(sign(step + 1, step * 100), 1 + step * seconds) == 0
    end = 1 + 4 * seconds
    assert still.see(sign(9, 9), end + 4 * seconds) == 4 * seconds


def test_one_long_wait_does_not_make_the_next_one_usual() -> None:
    still = Standstill(Scaling(hang_seconds=600), None, 0)
    for now in range(1, 9):
        still.see(sign(10 * now, now), now)
    assert still.see(sign(81, 70), 70) == 62
    for now in range(71, 75):
        still.see(sign(81 + now, now), now)
    assert still.is_time_to_speak(85)
