"""Problems that would stop a run on a cluster are one line before it starts."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxrscale.cluster import groups, nodes
from cxrscale.cluster.nodes import Node
from cxrscale.config import Scaling
from cxrscale.io import storage
from cxrscale.types import UserError

COUNTS = st.integers(0, 64)


@given(st.lists(st.tuples(COUNTS, COUNTS), max_size=6), st.integers(1, 16), st.booleans(), st.integers(1, 40))
def test_workers_are_placed_on_one_node_each_or_refused(
    sizes: list[tuple[int, int]], cpus: int, gpu: bool, workers: int
) -> None:
    available = [Node(f"{index}", f"n{index}", c, g) for index, (c, g) in enumerate(sizes)]
    # One by one, onto the first node that still has room for a worker.
    free, placed = [list(size) for size in sizes], 0
    for node in free:
        while node[0] >= cpus and (not gpu or node[1] >= 1):
            node[0], node[1], placed = node[0] - cpus, node[1] - int(gpu), placed + 1
    scaling = Scaling(num_workers=workers, cpus_per_worker=cpus)
    if placed >= workers:
        nodes.require_slots(available, scaling, gpu)
    else:
        with pytest.raises(UserError, match=rf"^scaling.num_workers={workers} does not fit") as caught:
            nodes.require_slots(available, scaling, gpu)
        assert "\n" not in str(caught.value)
        nodes.require_slots(available, scaling, gpu, autoscaled=workers - placed)


def test_the_total_does_not_matter_if_no_node_has_room_for_a_worker() -> None:
    available = [Node("a", "a", 4, 0), Node("b", "b", 4, 0)]
    with pytest.raises(UserError, match=r"8 CPUs: workers of 6 CPUs, none on any node; lower scaling.cpus_per_worker"):
        nodes.require_slots(available, Scaling(num_workers=1, cpus_per_worker=6), use_gpu=False)
    with pytest.raises(UserError, match=r"workers of 3 CPUs, 1 on a, 1 on b; lower it to 2"):
        nodes.require_slots(available, Scaling(num_workers=3, cpus_per_worker=3), use_gpu=False)
    nodes.require_slots(available, Scaling(num_workers=(2, 16), cpus_per_worker=3), use_gpu=False)
    assert nodes.worker_slots(Node("a", "a", 0.3, 0), 0.1, 0) == 3


VERSIONS = st.dictionaries(st.sampled_from(["torch", "ray", "cxrscale"]), st.sampled_from(["1", "2"]), min_size=1)


@given(VERSIONS, st.dictionaries(st.sampled_from(["a", "b"]), VERSIONS))
def test_every_version_difference_is_named(driver: dict[str, str], by_node: dict[str, dict[str, str]]) -> None:
    lines = nodes.version_differences(driver, by_node)
    pairs = {(package, versions.get(package, "absent")) for versions in by_node.values() for package in driver}
    assert len(lines) == len([pair for pair in pairs if driver[pair[0]] != pair[1]])
    for package, other in pairs:
        named = [line for line in lines if line.startswith(f"{package} is {driver[package]} here and {other} on ")]
        assert len(named) == (driver[package] != other)


@pytest.mark.usefixtures("ray_cluster")
def test_a_valid_run_passes_and_leaves_no_files(nih_shards: str, s3: str, tmp_path: Path) -> None:
    nodes.preflight(Scaling(num_workers=1), reads=[nih_shards], writes=[str(tmp_path), f"{s3}/checked"])
    assert list(tmp_path.iterdir()) == []
    assert storage.listing(f"{s3}/checked") == []


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("reads", "writes", "message"),
    [
        (["/nowhere"], [], r"data.shards=/nowhere cannot be used from node .*does not exist; give s3://"),
        ([], ["s3://no-such-bucket/runs"], r"tracking.runs_dir=s3://no-such-bucket/runs cannot be used from "),
        ([], ["/tmp/ray/x/working_dir_files/y/runs"], r"is in the job's folder"),
    ],
)
def test_an_address_that_workers_cannot_use_is_one_line(
    reads: list[str], writes: list[str], message: str, s3: str
) -> None:
    assert s3  # the server exists, the bucket does not
    with pytest.raises(UserError, match=message) as caught:
        nodes.preflight(Scaling(num_workers=1), reads=reads, writes=writes)
    assert "\n" not in str(caught.value)


WAITING_DRIVER = """
import sys, time
import ray
from ray.util import placement_group

ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
group = placement_group([{"CPU": 500}] * 2, name=sys.argv[2], lifetime="detached")
print("waiting", flush=True)
time.sleep(600)
"""
"""The driver of a search that waits for resources."""


@pytest.mark.usefixtures("ray_cluster")
def test_a_placement_group_of_a_killed_driver_is_found_and_removed() -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-c", WAITING_DRIVER, address, "sweep"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "waiting\n"
        assert groups.find_orphans() == []  # its job is running
        os.kill(driver.pid, signal.SIGKILL)
    end = time.monotonic() + 60
    while not (orphans := groups.find_orphans()):
        assert time.monotonic() < end
        time.sleep(0.2)
    assert [(orphan.name, orphan.state, orphan.bundles) for orphan in orphans] == [("sweep", "PENDING", "2 x CPU 500")]
    groups.remove(orphans[0])
    while groups.find_orphans():
        assert time.monotonic() < end
        time.sleep(0.2)
