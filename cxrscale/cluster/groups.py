"""Placement groups: what actors and drivers have asked a cluster for, and what is left of it when they are gone.

Ray gives a group back when the job that made it ends. When only the actor ends that made it, the group stays with the
job, also one that still waits for room: it gets its room one day, and nobody works there.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

CONTROLLER = "TrainController"
"""The class of Ray Train's actor that makes the placement groups of a training; nobody else works in them."""
NOBODY = b"\xff"
"""The bytes of an id that Ray has not set."""
END_SECONDS = 15.0
"""How long the end of an actor may take."""
QUIET_SECONDS = 1.0
"""For so long nothing may come from an actor that has ended: what it asked for last may still be under way."""
LOOK_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class PlacementGroup:
    """What a job waits for or holds."""

    id: str
    """Hexadecimal."""
    name: str
    state: str
    bundles: str
    """Its resources, e.g. `2 x CPU 4`."""
    job: str
    """The job that created it, hexadecimal."""
    actor: str
    """The actor that created it, hexadecimal; empty where it was none."""
    detached: bool
    """Whether it outlives its job on purpose."""


def find_all() -> list[PlacementGroup]:
    """All that are not removed, of all jobs."""
    from ray._private.state import state  # Ray's public table lacks the owner of a group
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]

    states = PlacementGroupTableData.PlacementGroupState
    result = []
    for row in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(row)
        bundles = [" ".join(f"{kind} {n:g}" for kind, n in item.unit_resources.items()) for item in group.bundles]
        found = PlacementGroup(
            id=group.placement_group_id.hex(),
            name=group.name,
            state=states.Name(group.state),
            bundles=", ".join(f"{bundles.count(bundle)} x {bundle}" for bundle in dict.fromkeys(bundles)),
            job=group.creator_job_id.hex(),
            actor=group.creator_actor_id.hex() if group.creator_actor_id.strip(NOBODY) else "",
            detached=group.is_detached,
        )
        if found.state != "REMOVED":
            result.append(found)
    return result


def find_orphans() -> list[PlacementGroup]:
    """The placement groups that no running job owns. A killed Tune driver leaves them; the next search waits forever.

    A detached group that has its resources outlives its job on purpose and is not an orphan.
    """
    from ray._private.state import state

    jobs = state.job_table()  # type: ignore[no-untyped-call]
    ended = {job["JobID"] for job in jobs if job["IsDead"]}
    return [group for group in find_all() if group.job in ended and not (group.detached and group.state == "CREATED")]


def waits_for(actor: str = "") -> str | None:
    """What an actor has asked for and no node has room for, e.g. `2 x CPU 4`; None where there is nothing.

    Without an actor: what this process has asked for.
    """
    own = ray.get_runtime_context().get_job_id()
    pending = [
        group.bundles
        for group in find_all()
        if group.actor == actor and group.state != "CREATED" and (actor or group.job == own)
    ]
    return ", ".join(dict.fromkeys(pending)) or None


def remove(group: PlacementGroup) -> None:
    """Remove the placement group and release its resources."""
    from ray.util.placement_group import PlacementGroup as Handle
    from ray.util.placement_group import remove_placement_group

    remove_placement_group(Handle(ray.PlacementGroupID(bytes.fromhex(group.id))))


def remove_abandoned() -> list[PlacementGroup]:
    """Remove the groups of trainings whose controller is dead; returns them.

    A controller that is killed, or whose trial is, leaves its group behind, for which every later training of the
    cluster would wait.
    """
    dead: dict[str, bool] = {}
    removed = []
    for group in find_all():
        if group.actor and group.actor not in dead:
            made_by = _actor(group.actor)
            kind = str(made_by.get("ActorClassName")).rpartition(".")[2]
            dead[group.actor] = kind == CONTROLLER and made_by.get("State") == "DEAD"
        if dead.get(group.actor):
            remove(group)
            removed.append(group)
    return removed


def end_actor(actor: Any) -> None:
    """End an actor of this node at once, with all that it has asked for.

    A kill is a message. Until it has arrived, and as long as requests from before are under way, the actor makes new
    groups: of 12 controllers that asked every 20 ms, 6 left one behind after a single look.
    """
    ray.kill(actor)
    name, end = actor._actor_id.hex(), time.monotonic() + END_SECONDS
    quiet_since = time.monotonic()
    while (now := time.monotonic()) < end:
        left = [group for group in find_all() if group.actor == name]
        for group in left:
            remove(group)
        if left or not _has_ended(_actor(name)):
            quiet_since = now
        elif now - quiet_since >= QUIET_SECONDS:
            return
        time.sleep(LOOK_SECONDS)


def _has_ended(actor: Mapping[str, Any]) -> bool:
    """Whether it is dead, and its process on this node gone; the control service says dead when it sends the kill."""
    return actor.get("State", "DEAD") == "DEAD" and not (actor.get("Pid") and Path(f"/proc/{actor['Pid']}").exists())


def _actor(name: str) -> dict[str, Any]:
    from ray._private.state import actors

    return dict(actors(name))
