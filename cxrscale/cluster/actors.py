"""A pool of Ray actors that share a stream of jobs: what is costly to load, a model, is loaded once per actor."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from cxrscale.cluster.tasks import UserErrorMessage
from cxrscale.types import UserError

LOG = logging.getLogger("cxrscale")
RESTARTS = 3
"""How often a job is given to another actor when the one that had it dies: a process killed, a machine lost."""
Job = TypeVar("Job")
Result = TypeVar("Result")


def run_actors(
    make: Callable[[], Callable[[Job], Result]], jobs: Iterable[Job], workers: int, gpus: float = 0
) -> Iterator[Result]:
    """The results of the jobs, in the order in which they finish; two jobs per actor are on their way.

    Args:
        make: called once in each actor; returns what a job is given to.
        workers: actors; no more than the cluster has CPUs (or GPUs) are started.
        gpus: of each actor; without one it has a CPU.

    Raises:
        UserError: an actor raised it, there is no CPU (or GPU), or a job has killed all actors that it was given to.
    """
    import ray

    from cxrscale.cluster import ray_session

    ray_session.connect()
    count = _count(workers, gpus)
    resources = {"num_gpus": gpus, "num_cpus": 0} if gpus else {"num_cpus": 1}
    actor_class: Any = ray.remote(max_restarts=-1, max_task_retries=RESTARTS, **resources)(_Actor)
    actors = [actor_class.remote(make) for _ in range(count)]
    running: dict[Any, Any] = {}
    left = iter(jobs)
    try:
        for actor in actors * 2:
            _give(actor, left, running)
        while running:
            (ready,), _ = ray.wait(list(running), num_returns=1)
            actor = running.pop(ready)
            result = _result(ready)
            _give(actor, left, running)
            yield result
    finally:
        for actor in actors:
            ray.kill(actor)


def _count(workers: int, gpus: float) -> int:
    from cxrscale.cluster import ray_session

    available, kind = (ray_session.gpus() / gpus, "GPUs") if gpus else (ray_session.cpus(), "CPUs")
    if available < 1:
        raise UserError(f"the cluster has no {kind}; start nodes, or leave --workers out to predict here")
    if workers > available:
        LOG.warning("%d workers where the cluster has %d %s: %d are started", workers, available, kind, available)
    return min(workers, int(available))


def _give(actor: Any, jobs: Iterator[Any], running: dict[Any, Any]) -> None:
    for job in jobs:
        running[actor.run.remote(job)] = actor
        return


def _result(reference: Any) -> Any:
    import ray

    try:
        result = ray.get(reference)
    except ray.exceptions.RayActorError as error:
        raise UserError(
            f"workers died {RESTARTS + 1} times over the same images ({type(error).__name__}); their memory may be too "
            "small. Run the same command again to resume"
        ) from None
    if isinstance(result, UserErrorMessage):
        raise UserError(result.message)
    return result


class _Actor:
    """One worker; an error of its user comes back as a message, as a result of its jobs."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]]) -> None:
        self._call: Callable[[Any], Any] | None = None
        self._message = ""
        try:
            self._call = make()
        except UserError as error:
            self._message = str(error)

    def run(self, job: Any) -> Any:
        """The job's result."""
        if self._call is None:
            return UserErrorMessage(self._message)
        try:
            return self._call(job)
        except UserError as error:
            return UserErrorMessage(str(error))
