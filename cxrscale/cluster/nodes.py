"""The nodes of the connected cluster: their room, and what each of them says."""

from __future__ import annotations

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
from cxrscale.types import UserError

ANSWER_S = 60.0
"""Seconds that a node has to start a Python process and answer."""
SETTLE_S = 5
"""Seconds that differing versions get to agree."""
JOB_FOLDER = "working_dir_files"
"""A part of the path of every job's folder, which Ray removes after the job."""


@dataclass(frozen=True, slots=True)
class Node:
    """A living node."""

    id: str
    name: str
    """Its address, and a piece of its id where several nodes share that."""
    cpus: float
    gpus: float
    """What Ray may hand out there, in use or not."""


def alive() -> list[Node]:
    """The cluster's living nodes, by name."""
    listed = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    places = [node["NodeManagerAddress"] for node in listed]
    found = []
    for node, place in zip(listed, places, strict=True):
        name = place if places.count(place) == 1 else f"{place}/{node['NodeID'][:6]}"
        room = node["Resources"]
        found.append(Node(node["NodeID"], name, room.get("CPU", 0.0), room.get("GPU", 0.0)))
    return sorted(found, key=lambda node: node.name)


def worker_slots(node: Node, cpus: float, gpus: float) -> int:
    """How many workers of so many CPUs and GPUs fit on a node: none is split over two."""
    # Ray counts in ten-thousandths: 0.3 holds three times 0.1.
    counts = [int((have + 1e-6) / want) for have, want in ((node.cpus, cpus), (node.gpus, gpus)) if want > 0]
    return min(counts, default=0)


def require_room(nodes: Sequence[Node], scaling: Scaling, use_gpu: bool, growing: int = 0) -> None:
    """Make sure that the fewest workers of a run fit, each whole on one node.

    Args:
        growing: how many more workers fit on nodes that an autoscaler may add.

    Raises:
        UserError: they do not; says what fits where.
    """
    fewest, gpus = scaling.workers[0], 1.0 if use_gpu else 0.0
    rooms = {node.name: worker_slots(node, scaling.cpus_per_worker, gpus) for node in nodes}
    fits = sum(rooms.values()) + growing
    if fits >= fewest:
        return
    total = f"{sum(node.cpus for node in nodes):g} CPUs"
    total += f" and {sum(node.gpus for node in nodes):g} GPUs" if use_gpu else ""
    worker = f"{scaling.cpus_per_worker:g} CPUs{' and a GPU' if use_gpu else ''}"
    where = ", ".join(f"{count} on {name}" for name, count in rooms.items() if count) or "none on any node"
    remedy = f"lower it to {fits}" if fits else "lower scaling.cpus_per_worker" + (" or use_gpu" if use_gpu else "")
    raise UserError(
        f"scaling.num_workers={fewest} does not fit the cluster's {total}: workers of {worker}, {where}; "
        f"{remedy}, or add nodes"
    )


def growth(cpus: float, gpus: float) -> int:
    """How many workers fit on the nodes that the cluster's autoscaler may start in all; 0 without one."""
    from ray._private.state import state  # the only door to what `ray up` and KubeRay told the autoscaler

    settings = state.get_cluster_config()
    total = 0
    for group in settings.node_group_configs if settings is not None else ():
        one = Node("", group.name, group.resources.get("CPU", 0), group.resources.get("GPU", 0))
        # -1: without bound; nobody asks for more workers than this.
        total += worker_slots(one, cpus, gpus) * (group.max_count if group.max_count >= 0 else 10**6)
    return total


def ask_all(ask: Callable[..., Any], nodes: Sequence[Node], *arguments: Any) -> dict[str, Any]:
    """Call a function of cxrscale.machine once on every node, all at once; returns {node's name: answer}.

    Raises:
        UserError: a node does not answer.
    """
    found = ask_each(ask, nodes, *arguments)
    for name, answer in found.items():
        if isinstance(answer, UserError):
            raise UserError(f"node {name} {answer}; see `cxrscale doctor`")
    return found


def ask_each(
    ask: Callable[..., Any], nodes: Sequence[Node], *arguments: Any, timeout: float = ANSWER_S
) -> dict[str, Any]:
    """As `each`, with the reason, an UserError, in place of an answer that a node does not give.

    The function travels as it stands here, so a node with another cxrscale, or none, answers too.
    """
    ray.cloudpickle.register_pickle_by_value(probe)  # type: ignore[no-untyped-call]
    task = ray.remote(ask)
    try:
        asked = {node.name: task.options(**on(node)).remote(*arguments) for node in nodes}
    finally:
        ray.cloudpickle.unregister_pickle_by_value(probe)  # type: ignore[no-untyped-call]
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=timeout)
    found: dict[str, Any] = {}
    for name, answer in asked.items():
        try:
            found[name] = ray.get(answer, timeout=0.1)
        except ray.exceptions.GetTimeoutError:
            ray.cancel(answer, force=True)
            found[name] = UserError(f"did not answer within {timeout:.0f} s")
        except ray.exceptions.RayError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            found[name] = UserError(f"cannot run a task: {lines[-1]}")
    return found


def on(node: Node) -> dict[str, Any]:
    """The options of a task that runs on this node and nowhere else, however busy it is."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node.id, soft=False)
    return {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": there}


def transfer(source: Node, target: Node, size: int = 64 * 2**20) -> float:
    """Bytes a second of one object on its way from one node's object store to the other's."""

    def give(count: int) -> Any:
        import numpy

        return numpy.ones(count, numpy.uint8)

    def take(held: list[Any]) -> float:
        import time

        import ray

        began = time.perf_counter()
        ray.get(held[0])
        return time.perf_counter() - began

    making, taking = ray.remote(give).options(**on(source)), ray.remote(take).options(**on(target))
    # A small one first, so that the connection stands.
    for count in (2**20, size):
        held = making.remote(count)
        ray.wait([held], fetch_local=False, timeout=ANSWER_S)
        seconds = ray.get(taking.remote([held]), timeout=ANSWER_S)
    return size / float(seconds)


@dataclass(frozen=True, slots=True)
class Orphan:
    """A placement group that waits for, or holds, resources for a job that has ended."""

    id: str
    """Hexadecimal."""
    name: str
    state: str
    bundles: str
    """What it asks for, e.g. `2 x CPU 4`."""
    job: str
    """The job that made it, hexadecimal."""


def orphans() -> list[Orphan]:
    """The placement groups that no living job owns: a killed Tune driver leaves them, and the next sweep waits.

    Detached groups that have got their resources outlive their job on purpose and are none.
    """
    from ray._private.state import state  # the public table does not say whose a group is
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]

    jobs = state.job_table()  # type: ignore[no-untyped-call]
    dead = {job["JobID"] for job in jobs if job["IsDead"]}
    names = PlacementGroupTableData.PlacementGroupState
    found = []
    for row in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(row)
        now, job = names.Name(group.state), group.creator_job_id.hex()
        if job not in dead or now == "REMOVED" or (group.is_detached and now == "CREATED"):
            continue
        asked = [" ".join(f"{kind} {many:g}" for kind, many in b.unit_resources.items()) for b in group.bundles]
        listed = ", ".join(f"{asked.count(each)} x {each}" for each in dict.fromkeys(asked))
        found.append(Orphan(group.placement_group_id.hex(), group.name, now, listed, job))
    return found


def free(orphan: Orphan) -> None:
    """Remove the placement group and give back what it holds."""
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(orphan.id))))


def version_differences(here: dict[str, str], there: dict[str, dict[str, str]]) -> list[str]:
    """One line for every package whose version on a node is not the driver's."""
    lines = []
    for package, version in here.items():
        others: dict[str, list[str]] = {}
        for name, versions in there.items():
            if versions.get(package, "absent") != version:
                others.setdefault(versions.get(package, "absent"), []).append(name)
        lines += [f"{package} is {version} here and {other} on {', '.join(on)}" for other, on in others.items()]
    return lines


def gpus_wanted(scaling: Scaling) -> float:
    """GPUs a worker: as the recipe says, or one where the cluster has any."""
    use_gpu = scaling.use_gpu if scaling.use_gpu is not None else ray_session.gpus() > 0
    return 1.0 if use_gpu else 0.0


def preflight(scaling: Scaling, *, reads: Sequence[str] = (), writes: Sequence[str] = ()) -> None:
    """Find what would stop a run on the connected cluster before anything starts: some two seconds.

    Args:
        scaling: how many workers, and what each needs.
        reads: datasets that every worker reads.
        writes: where the run goes: all nodes must see the same folder or bucket.

    Raises:
        UserError: one line: the workers do not fit, versions differ, or an address cannot be reached from a node.
    """
    gpus = gpus_wanted(scaling)
    nodes = alive()
    require_room(nodes, scaling, gpus > 0, growth(scaling.cpus_per_worker, gpus))
    wrong = _disagreements(nodes)
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise UserError(f"{wrong[0]}{more}; run one image on all nodes, and ship the code by `cxrscale submit`")
    working = [node for node in nodes if worker_slots(node, scaling.cpus_per_worker, gpus)]
    for address in reads:
        _refuse(
            address,
            ask_all(probe.reach_address, working, storage.join(address, "manifest.parquet"), False),
            "data.shards",
        )
    for address in writes:
        if JOB_FOLDER in Path(address).parts:
            raise UserError(
                f"tracking.runs_dir={address} lies in the job's own folder, which goes with the job; give s3://... or an "
                "absolute path that all nodes share"
            )
        _refuse(address, {"of the driver": probe.reach_address(address)}, "tracking.runs_dir")
        _refuse_unshared(address, working)


def _disagreements(nodes: Sequence[Node]) -> list[str]:
    # Nodes that share a machine share a job's folder too, and each removes and unpacks it anew at its first task. What
    # is read meanwhile is half a package, so only a difference that stays is one.
    for _ in range(SETTLE_S):
        wrong = version_differences(probe.versions(), ask_all(probe.versions, nodes))
        if not wrong:
            break
        time.sleep(1)
    return wrong


def _refuse(address: str, answers: dict[str, dict[str, Any]], field: str) -> None:
    for name, answer in answers.items():
        if "fault" in answer:
            remedy = (
                "give every node its credentials and a route to it"
                if storage.is_remote(address)
                else "give s3://... or a path that all nodes share"
            )
            raise UserError(f"{field}={address} cannot be used from node {name}: {answer['fault']}; {remedy}")


def _refuse_unshared(address: str, working: Sequence[Node]) -> None:
    mark = storage.join(address, f"{storage.STRAY}seen-{uuid.uuid4().hex}")
    storage.write(mark, b"x")
    try:
        for name, answer in ask_all(probe.reach_address, working, mark, False).items():
            if answer.get("fault") == probe.ABSENT:
                raise UserError(
                    f"tracking.runs_dir={address}: node {name} does not see what is written there from here; give s3://... "
                    "or a path that all nodes share"
                )
        _refuse(address, ask_all(probe.reach_address, working, address), "tracking.runs_dir")
    finally:
        storage.remove(mark)
