"""A pool of Ray actors that share a stream of jobs: what is costly to load, a model, is loaded once per actor."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from cxrscale.cluster.tasks import UserErrorMessage
from cxrscale.types import UserError, one_line

LOG = logging.getLogger("cxrscale")
RESTARTS = 3
"""How often a job is given to another actor when the one that had it dies: a process killed, a machine lost."""
Job = TypeVar("Job")
Result = TypeVar("Result")


def run_actors(
    make: Callable[[], Callable[[Job], Result]], jobs: Iterable[Job], workers: int, gpus: float = 0
) -> Iterator[Result]:
    """The results of the jobs, in the order in which they finish; two jobs per actor are on their way.

    The jobs of an actor that dies, with its process or its machine, go to the others, and another is started in its
    place as soon as a machine has room for it. An actor gets jobs only once it is ready: none waits for a machine that
    does not come back.

    Args:
        make: called once in each actor; returns what a job is given to.
        workers: actors; no more than the cluster has CPUs (or GPUs) are started.
        gpus: of each actor; without one it has a CPU.

    Raises:
        UserError: an actor raised it, there is no CPU (or GPU), a job has killed all actors that it was given to, or
            actors die before they are ready.
    """
    from cxrscale.cluster import ray_session

    ray_session.connect()
    pool = _Pool(make, iter(jobs), gpus)
    try:
        for _ in range(_count(workers, gpus)):
            pool.start()
        yield from pool.results()
    finally:
        pool.close()


def _count(workers: int, gpus: float) -> int:
    from cxrscale.cluster import ray_session

    available, kind = (ray_session.gpus() / gpus, "GPUs") if gpus else (ray_session.cpus(), "CPUs")
    if available < 1:
        raise UserError(f"the cluster has no {kind}; start nodes, or leave --workers out to predict here")
    if workers > available:
        LOG.warning("%d workers where the cluster has %d %s: %d are started", workers, available, kind, available)
    return min(workers, int(available))


@dataclass(slots=True)
class _Given:
    """A job, and how many actors died over it."""

    job: Any
    deaths: int = 0


@dataclass(eq=False, slots=True)
class _Worker:
    """An actor and what it has to do."""

    handle: Any
    starting: Any
    """A reference that resolves once it is ready; None from then on."""
    running: dict[Any, _Given] = field(default_factory=dict)
    """Reference -> job, in their order."""


class _Pool:
    """Actors, the jobs that they have, and those that came back from dead ones."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]], jobs: Iterator[Any], gpus: float) -> None:
        import ray

        resources: dict[str, Any] = {"num_gpus": gpus, "num_cpus": 0} if gpus else {"num_cpus": 1}
        # Restarts by Ray would keep an actor's jobs until a machine has room for it again, be it never.
        actor_class: Any = ray.remote(max_restarts=0, max_task_retries=0, **resources)(_Actor)
        self._make_actor = partial(actor_class.remote, make)
        self._jobs, self._back = jobs, deque[_Given]()
        self._workers: list[_Worker] = []
        self._failed_starts = 0

    def start(self) -> None:
        """Start an actor."""
        handle = self._make_actor()
        self._workers.append(_Worker(handle, handle.ready.remote()))

    def results(self) -> Iterator[Any]:
        """What the jobs return, until none is left."""
        import ray

        while any(worker.running for worker in self._workers) or self._any_left():
            owner = {reference: worker for worker in self._workers for reference in worker.running}
            owner |= {worker.starting: worker for worker in self._workers if worker.starting is not None}
            (reference,), _ = ray.wait(list(owner), num_returns=1)
            worker = owner[reference]
            try:
                result = ray.get(reference)
            except _lost() as error:
                self._replace(worker, error)
                continue
            if reference == worker.starting:
                worker.starting, self._failed_starts = None, 0
                self._fill()
                continue
            del worker.running[reference]
            if isinstance(result, UserErrorMessage):
                raise UserError(result.message)
            self._fill()
            yield result

    def close(self) -> None:
        """End all actors."""
        import ray

        for worker in self._workers:
            ray.kill(worker.handle)

    def _any_left(self) -> bool:
        if not self._back:
            self._back.extend(_Given(job) for job in islice(self._jobs, 1))
        return bool(self._back)

    def _fill(self) -> None:
        """Give each actor that is ready its two jobs."""
        for number in (1, 2):
            for worker in self._workers:
                if worker.starting is None and len(worker.running) < number and self._any_left():
                    given = self._back.popleft()
                    worker.running[worker.handle.run.remote(given.job)] = given

    def _replace(self, worker: _Worker, error: Exception) -> None:
        """Start another actor in the place of a dead one, whose jobs go to the others."""
        import ray

        ray.kill(worker.handle)
        self._workers.remove(worker)
        kind, given = type(error).__name__, list(worker.running.values())
        if worker.starting is not None:
            self._failed_starts += 1
            if self._failed_starts > RESTARTS:
                raise UserError(
                    f"workers died {self._failed_starts} times before they were ready ({kind}: "
                    f"{one_line(str(error), limit=300)}); their memory may be too small"
                )
        elif given:
            # It had begun the first alone.
            given[0].deaths += 1
            if given[0].deaths > RESTARTS:
                raise UserError(
                    f"workers died {given[0].deaths} times over the same images ({kind}); their memory may be too "
                    "small. Run the same command again to resume"
                )
        LOG.warning("a worker died (%s); another takes its place", kind)
        self._back.extendleft(reversed(given))
        self.start()
        self._fill()


def _lost() -> tuple[type[Exception], ...]:
    """What Ray raises where an actor, or the machine with its result, is gone."""
    from ray import exceptions

    return (
        exceptions.RayActorError,
        exceptions.ObjectLostError,
        exceptions.OutOfMemoryError,
        exceptions.NodeDiedError,
        exceptions.WorkerCrashedError,
    )


class _Actor:
    """One worker; an error of its user comes back as a message, as a result of its jobs."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]]) -> None:
        self._call: Callable[[Any], Any] | None = None
        self._message = ""
        try:
            self._call = make()
        except UserError as error:
            self._message = str(error)

    def ready(self) -> None:
        """Answers as soon as it can be given jobs."""

    def run(self, job: Any) -> Any:
        """The job's result."""
        if self._call is None:
            return UserErrorMessage(self._message)
        try:
            return self._call(job)
        except UserError as error:
            return UserErrorMessage(str(error))
