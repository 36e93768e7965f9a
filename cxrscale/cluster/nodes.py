"""The nodes of the connected cluster: their resources, functions that run on each of them, and checks before a run."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from cxrscale.cluster import probe, ray_session
from cxrscale.config import Scaling
from cxrscale.io import storage
from cxrscale.types import UserError, last_line

LOG = logging.getLogger("cxrscale")
SAY_S = 10.0
"""A wait of so long is said."""
ANSWER_S = 60.0
"""Seconds within which a node must start a Python process and answer."""
SETTLE_S = 5
"""Seconds after which different versions count as different."""
JOB_FOLDER = "working_dir_files"
"""A part of the path of every job's folder, which Ray deletes after the job."""


@dataclass(frozen=True, slots=True)
class Node:
    """A node that is alive."""

    id: str
    name: str
    """Its address, with a part of its id if several nodes have the same address."""
    cpus: float
    gpus: float
    """The total for Ray on this node, in use or not."""


def alive() -> list[Node]:
    """The cluster's nodes that are alive, sorted by name."""
    rows = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    addresses = [node["NodeManagerAddress"] for node in rows]
    result = []
    for node, address in zip(rows, addresses, strict=True):
        name = address if addresses.count(address) == 1 else f"{address}/{node['NodeID'][:6]}"
        resources = node["Resources"]
        result.append(Node(node["NodeID"], name, resources.get("CPU", 0.0), resources.get("GPU", 0.0)))
    return sorted(result, key=lambda node: node.name)


def worker_slots(node: Node, cpus: float, gpus: float) -> int:
    """How many workers with this many CPUs and GPUs fit on a node; a worker is never split over two nodes."""
    # Ray counts in units of 0.0001, so three workers of 0.1 CPU fit into 0.3.
    counts = [int((total + 1e-6) / need) for total, need in ((node.cpus, cpus), (node.gpus, gpus)) if need > 0]
    return min(counts, default=0)


def require_slots(nodes: Sequence[Node], scaling: Scaling, use_gpu: bool, autoscaled: int = 0) -> None:
    """Check that the smallest number of workers of a run fits, each worker on one node.

    Args:
        autoscaled: how many workers fit on nodes that an autoscaler may add.

    Raises:
        UserError: they do not fit; the message has the number of workers that fit on each node.
    """
    fewest, gpus = scaling.workers[0], 1.0 if use_gpu else 0.0
    slots = {node.name: worker_slots(node, scaling.cpus_per_worker, gpus) for node in nodes}
    fits = sum(slots.values()) + autoscaled
    if fits >= fewest:
        return
    total = f"{sum(node.cpus for node in nodes):g} CPUs"
    total += f" and {sum(node.gpus for node in nodes):g} GPUs" if use_gpu else ""
    worker = f"{scaling.cpus_per_worker:g} CPUs{' and a GPU' if use_gpu else ''}"
    where = ", ".join(f"{count} on {name}" for name, count in slots.items() if count) or "none on any node"
    remedy = f"lower it to {fits}" if fits else "lower scaling.cpus_per_worker" + (" or use_gpu" if use_gpu else "")
    raise UserError(
        f"scaling.num_workers={fewest} does not fit the cluster's {total}: workers of {worker}, {where}; "
        f"{remedy}, or add nodes"
    )


def autoscaler_slots(cpus: float, gpus: float) -> int:
    """How many workers fit on all nodes that the cluster's autoscaler may start; 0 without an autoscaler."""
    from ray._private.state import state  # Ray has no public access to the autoscaler's configuration

    settings = state.get_cluster_config()
    total = 0
    for group in settings.node_group_configs if settings is not None else ():
        node = Node("", group.name, group.resources.get("CPU", 0), group.resources.get("GPU", 0))
        # -1 means unlimited; a million is more than any run requests.
        total += worker_slots(node, cpus, gpus) * (group.max_count if group.max_count >= 0 else 10**6)
    return total


def ask_all(function: Callable[..., Any], nodes: Sequence[Node], *arguments: Any) -> dict[str, Any]:
    """Call a function of `probe` once on every node, in parallel; returns {node's name: answer}.

    Raises:
        UserError: a node does not answer.
    """
    answers = ask_each(function, nodes, *arguments)
    for name, answer in answers.items():
        if isinstance(answer, UserError):
            raise UserError(f"node {name} {answer}; see `cxrscale doctor`")
    return answers


def ask_each(
    function: Callable[..., Any], nodes: Sequence[Node], *arguments: Any, timeout: float = ANSWER_S
) -> dict[str, Any]:
    """As `ask_all`, but a node that does not answer has a UserError with the reason as its answer.

    The function's code is sent to the nodes, so nodes with another version of cxrscale, or without it, answer too.
    """
    ray.cloudpickle.register_pickle_by_value(probe)  # type: ignore[no-untyped-call]
    task = ray.remote(function)
    try:
        references = {node.name: task.options(**task_options(node)).remote(*arguments) for node in nodes}
    finally:
        ray.cloudpickle.unregister_pickle_by_value(probe)  # type: ignore[no-untyped-call]
    first = min(SAY_S, timeout)
    _, silent = ray.wait(list(references.values()), num_returns=len(references), timeout=first)
    if silent and timeout > first:
        names = ", ".join(name for name, reference in references.items() if reference in silent)
        LOG.warning("waiting %.0f s for an answer of %s; goes on without after %.0f s", first, names, timeout)
        ray.wait(silent, num_returns=len(silent), timeout=timeout - first)
    answers: dict[str, Any] = {}
    for name, reference in references.items():
        try:
            answers[name] = ray.get(reference, timeout=0.1)
        except ray.exceptions.GetTimeoutError:
            ray.cancel(reference, force=True)
            answers[name] = UserError(f"did not answer within {timeout:.0f} s")
        except ray.exceptions.RayError as error:
            answers[name] = UserError(f"cannot run a task: {last_line(error)}")
    return answers


def task_options(node: Node) -> dict[str, Any]:
    """The options of a Ray task that runs on this node only, even if the node is busy."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    strategy = NodeAffinitySchedulingStrategy(node.id, soft=False)
    return {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": strategy}


def measure_transfer(source: Node, target: Node, size: int = 64 * 2**20) -> float:
    """Bytes per second of one object that is sent from one node's object store to another's."""

    def make(count: int) -> Any:
        import numpy

        return numpy.ones(count, numpy.uint8)

    def fetch(references: list[Any]) -> float:
        import time

        import ray

        start = time.perf_counter()
        ray.get(references[0])
        return time.perf_counter() - start

    make_task = ray.remote(make).options(**task_options(source))
    fetch_task = ray.remote(fetch).options(**task_options(target))
    # A small object first, which opens the connection.
    for count in (2**20, size):
        reference = make_task.remote(count)
        ray.wait([reference], fetch_local=False, timeout=ANSWER_S)
        seconds = ray.get(fetch_task.remote([reference]), timeout=ANSWER_S)
    return size / float(seconds)


def version_differences(driver: dict[str, str], by_node: dict[str, dict[str, str]]) -> list[str]:
    """One line per version of a package that differs from the driver's, with its nodes."""
    lines = []
    for package, version in driver.items():
        others: dict[str, list[str]] = {}
        for name, versions in by_node.items():
            if versions.get(package, "absent") != version:
                others.setdefault(versions.get(package, "absent"), []).append(name)
        lines += [f"{package} is {version} here and {other} on {', '.join(names)}" for other, names in others.items()]
    return lines


def gpus_per_worker(scaling: Scaling) -> float:
    """GPUs per worker: as in the recipe, or one if the cluster has any."""
    use_gpu = scaling.use_gpu if scaling.use_gpu is not None else ray_session.gpus() > 0
    return 1.0 if use_gpu else 0.0


def preflight(scaling: Scaling, *, reads: Sequence[str] = (), writes: Sequence[str] = ()) -> None:
    """Check, in about two seconds, that a run can start on the connected cluster.

    Args:
        scaling: how many workers, and what each of them needs.
        reads: datasets that every worker reads.
        writes: where the run goes: all nodes must see the same folder or bucket.

    Raises:
        UserError: the workers do not fit, versions differ, or an address cannot be reached from a node.
    """
    gpus = gpus_per_worker(scaling)
    nodes = alive()
    require_slots(nodes, scaling, gpus > 0, autoscaler_slots(scaling.cpus_per_worker, gpus))
    wrong = _lasting_differences(nodes)
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise UserError(f"{wrong[0]}{more}; run the same image on all nodes, and ship the code with `cxrscale submit`")
    working = [node for node in nodes if worker_slots(node, scaling.cpus_per_worker, gpus)]
    for address in reads:
        answers = ask_all(probe.reach_address, working, storage.join(address, "manifest.parquet"), False)
        _refuse(address, answers, "data.shards")
    for address in writes:
        if JOB_FOLDER in Path(address).parts:
            raise UserError(
                f"tracking.runs_dir={address} is in the job's folder, which is deleted with the job; give s3://... "
                "or an absolute path that all nodes share"
            )
        _refuse(address, {"of the driver": probe.reach_address(address)}, "tracking.runs_dir")
        _refuse_unshared(address, working)


def _lasting_differences(nodes: Sequence[Node]) -> list[str]:
    # Nodes on the same machine share a job's folder, and each of them deletes and unpacks it at its first task. In the
    # meantime the package is incomplete, so only a difference that lasts is reported.
    for _ in range(SETTLE_S):
        wrong = version_differences(probe.versions(), ask_all(probe.versions, nodes))
        if not wrong:
            break
        time.sleep(1)
    return wrong


def _refuse(address: str, answers: dict[str, dict[str, Any]], field: str) -> None:
    for name, answer in answers.items():
        if "error" in answer:
            remedy = (
                "give every node its credentials and a route to it"
                if storage.is_remote(address)
                else "give s3://... or a path that all nodes share"
            )
            raise UserError(f"{field}={address} cannot be used from node {name}: {answer['error']}; {remedy}")


def _refuse_unshared(address: str, working: Sequence[Node]) -> None:
    marker = storage.join(address, f"{storage.TEMPORARY_PREFIX}seen-{uuid.uuid4().hex}")
    storage.write(marker, b"x")
    try:
        for name, answer in ask_all(probe.reach_address, working, marker, False).items():
            if answer.get("error") == probe.ABSENT:
                raise UserError(
                    f"tracking.runs_dir={address}: node {name} does not see a file written from here; give s3://... "
                    "or a path that all nodes share"
                )
        _refuse(address, ask_all(probe.reach_address, working, address), "tracking.runs_dir")
    finally:
        storage.remove(marker)
