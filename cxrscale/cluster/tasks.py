"""One function over many jobs: as Ray tasks with a bounded number in flight, or in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from cxrscale.types import UserError

Result = TypeVar("Result")


def run_tasks(
    function: Callable[..., Result], jobs: Sequence[tuple[Any, ...]], *, local: bool, workers: int | None
) -> Iterator[Result]:
    """The results of function(*job) for each job, in the order in which they finish.

    Args:
        function: runs in a Ray worker, which imports its module.
        jobs: the arguments of each call.
        local: run the jobs in this process, in their order, without Ray.
        workers: Ray tasks in flight; None: one per CPU of the cluster. A task whose worker dies is repeated up to three
            times.

    Raises:
        UserError: the function raised it; with the same message, without Ray's traceback.
    """
    if local:
        for job in jobs:
            yield function(*job)
        return
    import ray  # only here: a command that finds everything finished must not wait for it

    from cxrscale.cluster import ray_session

    ray_session.connect()
    remote: Any = ray.remote(max_retries=3)(_call)
    waiting = list(reversed(jobs))
    running: list[Any] = []
    limit = workers or max(1, ray_session.cpus())
    try:
        while waiting or running:
            while waiting and len(running) < limit:
                running.append(remote.remote(function, waiting.pop()))
            ready, running = ray.wait(running, num_returns=1)
            result = ray.get(ready[0])
            if isinstance(result, UserErrorMessage):
                raise UserError(result.message)
            yield result
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


@dataclass(frozen=True, slots=True)
class UserErrorMessage:
    """The message of a UserError as a task's result; Ray would wrap the exception in a page of traceback."""

    message: str


def _call(function: Callable[..., Result], job: tuple[Any, ...]) -> Result | UserErrorMessage:
    try:
        return function(*job)
    except UserError as error:
        return UserErrorMessage(str(error))
