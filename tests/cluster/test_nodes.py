"""What would stop a run on a cluster is one line before it starts."""

import http.server
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxrscale.cluster import nodes, probe, ray_session
from cxrscale.cluster.nodes import Node
from cxrscale.config import Scaling
from cxrscale.io import storage
from cxrscale.types import UserError

COUNTS = st.integers(0, 64)


@given(st.lists(st.tuples(COUNTS, COUNTS), max_size=6), st.integers(1, 16), st.booleans(), st.integers(1, 40))
def test_workers_are_placed_whole_or_refused(rooms: list[tuple[int, int]], cpus: int, gpu: bool, workers: int) -> None:
    there = [Node(f"{index}", f"n{index}", c, g) for index, (c, g) in enumerate(rooms)]
    # One by one, onto the first node that still has room for a whole worker.
    left, placed = [list(each) for each in rooms], 0
    for node in left:
        while node[0] >= cpus and (not gpu or node[1] >= 1):
            node[0], node[1], placed = node[0] - cpus, node[1] - int(gpu), placed + 1
    scaling = Scaling(num_workers=workers, cpus_per_worker=cpus)
    if placed >= workers:
        nodes.require_room(there, scaling, gpu)
    else:
        with pytest.raises(UserError, match=rf"^scaling.num_workers={workers} does not fit") as caught:
            nodes.require_room(there, scaling, gpu)
        assert "\n" not in str(caught.value)
        nodes.require_room(there, scaling, gpu, growing=workers - placed)


def test_totals_do_not_count_where_no_node_holds_a_worker() -> None:
    there = [Node("a", "a", 4, 0), Node("b", "b", 4, 0)]
    with pytest.raises(UserError, match=r"8 CPUs: workers of 6 CPUs, none on any node; lower scaling.cpus_per_worker"):
        nodes.require_room(there, Scaling(num_workers=1, cpus_per_worker=6), use_gpu=False)
    with pytest.raises(UserError, match=r"workers of 3 CPUs, 1 on a, 1 on b; lower it to 2"):
        nodes.require_room(there, Scaling(num_workers=3, cpus_per_worker=3), use_gpu=False)
    nodes.require_room(there, Scaling(num_workers=(2, 16), cpus_per_worker=3), use_gpu=False)
    assert nodes.worker_slots(Node("a", "a", 0.3, 0), 0.1, 0) == 3


VERSIONS = st.dictionaries(st.sampled_from(["torch", "ray", "cxrscale"]), st.sampled_from(["1", "2"]), min_size=1)


@given(VERSIONS, st.dictionaries(st.sampled_from(["a", "b"]), VERSIONS))
def test_every_difference_is_named_and_nothing_else(here: dict[str, str], there: dict[str, dict[str, str]]) -> None:
    lines = nodes.version_differences(here, there)
    pairs = {(package, each.get(package, "absent")) for each in there.values() for package in here}
    assert len(lines) == len([pair for pair in pairs if here[pair[0]] != pair[1]])
    for package, other in pairs:
        said = [line for line in lines if line.startswith(f"{package} is {here[package]} here and {other} on ")]
        assert len(said) == (here[package] != other)


@pytest.mark.usefixtures("ray_cluster")
def test_a_sound_run_passes_and_leaves_nothing(nih_shards: str, s3: str, tmp_path: Path) -> None:
    nodes.preflight(Scaling(num_workers=1), reads=[nih_shards], writes=[str(tmp_path), f"{s3}/checked"])
    assert list(tmp_path.iterdir()) == []
    assert storage.listing(f"{s3}/checked") == []


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("reads", "writes", "message"),
    [
        (["/nowhere"], [], r"data.shards=/nowhere cannot be used from node .*does not exist; give s3://"),
        ([], ["s3://no-such-bucket/runs"], r"tracking.runs_dir=s3://no-such-bucket/runs cannot be used from "),
        ([], ["/tmp/ray/x/working_dir_files/y/runs"], r"lies in the job's own folder"),
    ],
)
def test_an_address_that_workers_cannot_use(reads: list[str], writes: list[str], message: str, s3: str) -> None:
    assert s3  # the server is there, the bucket is not
    with pytest.raises(UserError, match=message) as caught:
        nodes.preflight(Scaling(num_workers=1), reads=reads, writes=writes)
    assert "\n" not in str(caught.value)


def test_an_endpoint_that_never_answers_costs_its_patience_only(monkeypatch: pytest.MonkeyPatch) -> None:
    # TEST-NET-1 (RFC 5737): nobody is there.
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://192.0.2.1:9")
    began = time.monotonic()
    found = probe.reach_address("s3://lonely/runs", patience=1.0)
    assert "fault" in found
    assert time.monotonic() - began < 20


@pytest.fixture
def web() -> "http.server.ThreadingHTTPServer":
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def test_an_address_without_a_cluster_is_one_line_within_seconds(web: http.server.ThreadingHTTPServer) -> None:
    began = time.monotonic()
    for address, message in (
        ("127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1: Connection refused"),
        ("nowhere.invalid:6379", "no Ray cluster answers at nowhere.invalid:6379"),
        (f"127.0.0.1:{web.server_port}", "is not Ray's control service; give its port"),
        ("http://127.0.0.1:8265", "is no address of a Ray cluster; give host:port"),
        ("head", "is no address of a Ray cluster"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            ray_session.reach(address)
        assert "\n" not in str(caught.value)
    web.shutdown()
    web.server_close()
    assert time.monotonic() - began < 30


LEAVES = """
import sys, time
import ray
from ray.util import placement_group

ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
group = placement_group([{"CPU": 500}] * 2, name=sys.argv[2], lifetime="detached")
print("waiting", flush=True)
time.sleep(600)
"""
"""A sweep's driver that waits for room."""


@pytest.mark.usefixtures("ray_cluster")
def test_what_a_killed_driver_left_waiting_is_found_and_freed() -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-c", LEAVES, address, "sweep"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "waiting\n"
        assert nodes.orphans() == []  # its job lives
        os.kill(driver.pid, signal.SIGKILL)
    end = time.monotonic() + 60
    while not (found := nodes.orphans()):
        assert time.monotonic() < end
        time.sleep(0.2)
    assert [(each.name, each.state, each.bundles) for each in found] == [("sweep", "PENDING", "2 x CPU 500")]
    nodes.free(found[0])
    while nodes.orphans():
        assert time.monotonic() < end
        time.sleep(0.2)
