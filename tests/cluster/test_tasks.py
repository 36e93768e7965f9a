"""One function over many jobs, in this process and as Ray tasks."""

import os
from pathlib import Path

import pytest

from cxrscale.cluster import run_tasks
from cxrscale.types import UserError


def square(number: int) -> tuple[int, int, int]:
    """The number, its square, and the process."""
    return number, number**2, os.getpid()


def refuse_two(number: int) -> int:
    """A function whose input may be wrong."""
    if number == 2:
        raise UserError("2 is wrong; give another number")
    return number


def die_once(folder: str) -> str:
    """A function whose first process dies."""
    marker = Path(folder) / "died"
    if not marker.exists():
        marker.touch()
        os._exit(1)
    return "done"


def fail(number: int) -> int:
    """A function with a bug."""
    raise ZeroDivisionError(number)


JOBS = [(number,) for number in range(5)]


def test_local_jobs_run_here_in_their_order() -> None:
    results = list(run_tasks(square, JOBS, local=True, workers=None))
    assert results == [(number, number**2, os.getpid()) for number in range(5)]


def test_local_jobs_start_one_by_one() -> None:
    results = run_tasks(refuse_two, JOBS, local=True, workers=1)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(UserError, match="2 is wrong; give another number"):
        next(results)


def test_a_local_bug_is_its_own_exception() -> None:
    with pytest.raises(ZeroDivisionError):
        list(run_tasks(fail, JOBS, local=True, workers=None))


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("workers", [None, 1, 3])
def test_tasks_give_every_result_once_from_other_processes(workers: int | None) -> None:
    results = sorted(run_tasks(square, JOBS, local=False, workers=workers))
    assert [result[:2] for result in results] == [(number, number**2) for number in range(5)]
    assert os.getpid() not in {process for _, _, process in results}


@pytest.mark.usefixtures("ray_cluster")
def test_a_user_error_of_a_task_comes_back_as_itself() -> None:
    with pytest.raises(UserError, match="2 is wrong; give another number"):
        list(run_tasks(refuse_two, JOBS, local=False, workers=2))


@pytest.mark.usefixtures("ray_cluster")
def test_a_task_whose_worker_dies_is_repeated(tmp_path: Path) -> None:
    assert list(run_tasks(die_once, [(str(tmp_path),)], local=False, workers=1)) == ["done"]


def test_no_jobs_give_no_results() -> None:
    assert list(run_tasks(square, [], local=True, workers=None)) == []
