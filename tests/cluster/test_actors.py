"""Jobs shared by actors of a real Ray cluster, some of which are killed."""

import logging
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray

from cxrscale.cluster import run_actors
from cxrscale.types import UserError


def squarer(folder: str) -> Callable[[int], tuple[int, int]]:
    """Squares; notes each actor that was made in a folder, and waits for the second: the first could do all alone."""
    (Path(folder) / str(os.getpid())).touch()

    def call(number: int) -> tuple[int, int]:
        ends = time.monotonic() + 60
        while len(list(Path(folder).iterdir())) < 2 and time.monotonic() < ends:
            time.sleep(0.02)
        return number * number, os.getpid()

    return call


def killed_at_seven(folder: str, always: bool) -> Callable[[int], int]:
    def call(number: int) -> int:
        marker = Path(folder) / "killed"
        if number == 7 and (always or not marker.exists()):
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    return call


def refusing(what: str) -> Callable[[int], int]:
    def call(number: int) -> int:
        if number == 3:
            raise UserError("three is refused")
        return number

    if what == "made":
        raise UserError("it cannot be loaded")
    return call


def test_each_job_is_done_once_by_actors_that_are_made_once(tmp_path: Path, ray_cluster: Any) -> None:
    del ray_cluster
    results = list(run_actors(partial(squarer, str(tmp_path)), range(12), workers=2))
    assert sorted(value for value, _ in results) == [number * number for number in range(12)]
    made = {int(path.name) for path in tmp_path.iterdir()}
    assert {pid for _, pid in results} <= made
    assert len(made) == 2
    assert os.getpid() not in made


def test_a_job_whose_actor_is_killed_goes_to_another(tmp_path: Path, ray_cluster: Any) -> None:
    del ray_cluster
    results = list(run_actors(partial(killed_at_seven, str(tmp_path), always=False), range(10), workers=1))
    assert (tmp_path / "killed").exists()
    assert sorted(results) == list(range(10))


def test_a_job_that_kills_every_actor_ends_in_one_line(tmp_path: Path, ray_cluster: Any) -> None:
    del ray_cluster
    with pytest.raises(UserError, match="workers died 4 times over the same images"):
        list(run_actors(partial(killed_at_seven, str(tmp_path), always=True), range(10), workers=1))


@pytest.mark.parametrize(("what", "message"), [("made", "it cannot be loaded"), ("called", "three is refused")])
def test_an_actors_user_error_arrives_as_it_is(what: str, message: str, ray_cluster: Any) -> None:
    del ray_cluster
    with pytest.raises(UserError, match=f"^{message}$"):
        list(run_actors(partial(refusing, what), range(6), workers=1))


def test_no_more_actors_than_processors(ray_cluster: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    del ray_cluster
    with caplog.at_level(logging.WARNING):
        results = run_actors(partial(squarer, str(tmp_path)), range(2), workers=999)
        assert sorted(value for value, _ in results) == [0, 1]
    assert "999 workers where the cluster has" in caplog.text
    with pytest.raises(UserError, match="the cluster has no GPUs"):
        list(run_actors(partial(squarer, str(tmp_path)), range(2), workers=1, gpus=1))


def dying(folder: str) -> Callable[[int], int]:
    (Path(folder) / str(os.getpid())).touch()
    os.kill(os.getpid(), signal.SIGKILL)
    return abs


def test_actors_that_never_get_ready_end_in_one_line(tmp_path: Path, ray_cluster: Any) -> None:
    del ray_cluster
    with pytest.raises(UserError, match="workers died 4 times before they were ready"):
        list(run_actors(partial(dying, str(tmp_path)), range(4), workers=1))
    assert len(list(tmp_path.iterdir())) == 4


def on_a_node(folder: str) -> Callable[[int], int]:
    def call(number: int) -> int:
        (Path(folder) / f"{ray.get_runtime_context().get_node_id()}-{number}").touch()
        time.sleep(0.2)
        return number

    return call


@pytest.mark.slow
def test_the_jobs_of_a_lost_machine_go_to_those_that_are_left(tmp_path: Path, ray_cluster: Any) -> None:
    """Four actors on two machines; the second does not come back, and no room is left for its two."""
    second = ray_cluster.add_node(num_cpus=2)
    ray_cluster.wait_for_nodes()
    results, lost = [], False
    for number in run_actors(partial(on_a_node, str(tmp_path)), range(60), workers=4):
        results.append(number)
        here = sum(path.name.startswith(second.node_id) for path in tmp_path.iterdir())
        if here >= 6 and not lost:
            ray_cluster.remove_node(second, allow_graceful=False)
            lost = True
    assert lost
    assert sorted(results) == list(range(60))
