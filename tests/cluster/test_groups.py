"""What an actor has asked a cluster for goes with it, also what it asks for while it is being killed."""

import time
from typing import Any

import pytest

from cxrscale.cluster import groups


def asks_for_ever(patience: float = 0.02) -> Any:
    """An actor that asks for more than there is, gives up after some seconds, and asks again, as Ray Train's does."""
    import ray

    class TrainController:
        def run(self) -> None:
            from ray.util.placement_group import placement_group, remove_placement_group

            while True:
                group = placement_group([{"CPU": 500}])
                group.wait(patience)
                remove_placement_group(group)

    actor: Any = ray.remote(num_cpus=0)(TrainController).remote()
    actor.run.remote()
    end = time.monotonic() + 60
    while not groups.waits_for(actor._actor_id.hex()):
        assert time.monotonic() < end
    return actor


@pytest.mark.usefixtures("ray_cluster")
def test_nothing_stays_of_what_an_actor_asks_for_while_it_is_killed() -> None:
    for _ in range(3):
        actor = asks_for_ever()
        groups.end_actor(actor)
        time.sleep(0.5)
        assert groups.waits_for(actor._actor_id.hex()) is None


@pytest.mark.usefixtures("ray_cluster")
def test_what_a_killed_training_has_left_is_removed_and_nothing_else() -> None:
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    others, alive = placement_group([{"CPU": 600}]), asks_for_ever()
    killed = asks_for_ever(patience=600)
    ray.kill(killed)
    left: list[groups.PlacementGroup] = []
    end = time.monotonic() + 60
    while not left:
        assert time.monotonic() < end
        left = groups.remove_abandoned()
    assert {group.actor for group in left} == {killed._actor_id.hex()}
    assert groups.remove_abandoned() == []
    assert groups.waits_for() == "1 x CPU 600"  # this process's own
    assert others.id.hex() in {group.id for group in groups.find_all()}
    assert ray.util.placement_group_table(others)["state"] == "PENDING"
    groups.end_actor(alive)
    remove_placement_group(others)
