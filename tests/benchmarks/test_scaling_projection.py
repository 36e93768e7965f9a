"""The projection against cases computed by hand, and what must hold whatever the figures."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.benchmarks import scaling_projection as projection
from tests.benchmarks.scaling_projection import Cluster, Cost, Job, Point

COST = Cost(fixed_ms=10, image_ms=1, gradient_bytes=28_000_000, buffer_bytes=0)
PLAIN = Cluster(
    node_gbs=200, node_us=5, network_gbs=12.5, network_us=25, backward=0.5, overlap=0.8, decode_ms=0, disk_gbs=1e9
)
POWERS = (2, 4, 8, 16, 32, 64, 128, 256, 512)

sizes = st.floats(1, 1e10)
costs = st.builds(
    Cost,
    fixed_ms=st.floats(0, 100),
    image_ms=st.floats(0.01, 100),
    gradient_bytes=st.integers(4, 2_000_000_000),
    buffer_bytes=st.integers(0, 10_000_000),
)
clusters = st.builds(
    Cluster,
    node_gpus=st.sampled_from([1, 2, 4, 8]),
    node_gbs=st.floats(50, 1000),
    node_us=st.floats(0, 10),
    network_gbs=st.floats(0.1, 50),
    network_us=st.floats(10, 100),
    backward=st.floats(0, 1),
    overlap=st.floats(0, 1),
    decode_ms=st.floats(0, 50),
    decode_cores=st.floats(1, 64),
    disk_gbs=st.floats(0.01, 20),
    store_gbs=st.floats(0.01, 100),
    image_kb=st.floats(1, 2000),
)


def at(points: list[Point], gpus: int) -> Point:
    return next(item for item in points if item.gpus == gpus)


def test_a_ring_by_hand() -> None:
    # 4 ranks: 6 quarters of 100 MB at 10 GB/s are 15 ms, and 6 messages of 50 us.
    assert projection.ring_ms(4, 100e6, 10, 50) == pytest.approx(15.3)
    assert projection.ring_ms(4, 100e6, 10, 50, messages=3) == pytest.approx(15.9)
    assert projection.ring_ms(1, 100e6, 10, 50) == 0


def test_a_tree_by_hand() -> None:
    # Up and down: twice 100 MB at 10 GB/s, and log2(8) = 3 hops of 50 us each way; 9 ranks need a fourth.
    assert projection.tree_ms(8, 100e6, 10, 50) == pytest.approx(20.3)
    assert projection.tree_ms(9, 100e6, 10, 50) == pytest.approx(20.4)
    assert projection.tree_ms(1, 100e6, 10, 50) == 0


def test_the_quickest_all_reduce_by_hand() -> None:
    assert projection.all_reduce_ms(1, 1e9, PLAIN)[0] == 0
    inside = 2 * 7 / 8 * 25 / 200 + 14 * 5e-3  # 25 MB, of which 200 GB/s move 200 in a millisecond
    # Two nodes: half of 2 x 25 MB goes over 12.5 MB/ms, 2 messages of 25 us.
    # 64 nodes, a message of a byte: 126 hops of the ring are 3.15 ms, 12 of the tree 0.3.
    # A node link no quicker than the network, and no latency: the detour through the node does not pay.
    slow = replace(PLAIN, node_gbs=12.5, node_us=0, network_us=0)
    cases = [
        (8, 25e6, PLAIN, inside, "ring in the node"),
        (16, 25e6, PLAIN, inside + 2 + 0.05, "rings in and between nodes"),
        (512, 1, PLAIN, 14 * 5e-3 + 0.3, "rings in nodes, trees between"),
        (16, 25e6, slow, 2 * 15 / 16 * 2, "one ring"),
    ]
    for gpus, size, cluster, expected, algorithm in cases:
        result, name = projection.all_reduce_ms(gpus, size, cluster)
        assert result == pytest.approx(expected, rel=1e-6)
        assert name == algorithm


@pytest.mark.parametrize(
    ("size", "count"), [(4, 1), (2**20, 1), (2**20 + 1, 2), (26 * 2**20, 2), (26 * 2**20 + 1, 3), (28_000_000, 3)]
)
def test_buckets_by_hand(size: int, count: int) -> None:
    assert projection.buckets(size) == count


def test_a_step_by_hand() -> None:
    # 64 images on 16 GPUs: 4 each, 14 ms of work, 5.6 of which hide gradients.
    points = projection.fixed_batch(64, POWERS, COST, PLAIN, Job())
    result = at(points, 16)
    gradients = 2 * 7 / 8 * 28 / 200 + 14 * 5e-3 * 3 + 2 / 2 * 28 / 12.5 + 2 * 25e-3 * 3
    assert result.gradients_ms == pytest.approx(gradients)
    assert result.exposed_ms == 0
    assert result.work_ms == 14
    # The sum of the counts has 64 bytes, next to nothing; the buffers are empty but cost half a message's latency.
    assert result.messages_ms == pytest.approx(1.5 * (14 * 5e-3 + 2 * 25e-3), rel=1e-3)
    assert result.step_ms == pytest.approx(14.18, rel=1e-3)
    assert result.efficiency == pytest.approx(74 / 16 / result.step_ms)
    assert result.bound == projection.FIXED


def test_what_the_backward_pass_does_not_hide_is_waited_for() -> None:
    heavy = replace(COST, gradient_bytes=1_000_000_000)
    result = at(projection.fixed_batch(64, POWERS, heavy, PLAIN, Job()), 16)
    assert result.exposed_ms == pytest.approx(result.gradients_ms - 14 * 0.5 * 0.8)
    assert result.bound == projection.NETWORK
    # In one node 1 GB and its 40 buckets take 11.55 ms, of which 18 x 0.4 = 7.2 are hidden from 18 ms of work.
    light = replace(heavy, fixed_ms=0, image_ms=2.25)
    inside = at(projection.fixed_batch(64, POWERS, light, PLAIN, Job()), 8)
    assert inside.exposed_ms == pytest.approx(2 * 7 / 8 * 5 + 14 * 5e-3 * 40 - 7.2)
    assert inside.bound == projection.LINK


@pytest.mark.parametrize(
    ("change", "bound"),
    [
        # 8 images of 100 core-ms on 4 cores: 200 ms.
        ({"decode_ms": 100.0, "decode_cores": 4.0}, projection.LOADER),
        # 64 images of 54 kB per node at 10 MB/s: 345.6 ms.
        ({"disk_gbs": 0.01}, projection.DISK),
        ({"network_us": 20_000.0, "overlap": 1.0}, projection.MESSAGES),
    ],
)
def test_each_ceiling_is_named(change: dict[str, float], bound: str) -> None:
    small = replace(COST, gradient_bytes=4, fixed_ms=0.0)
    points = projection.fixed_share(8, POWERS, small, replace(PLAIN, **change), Job())  # type: ignore[arg-type]
    result = at(points, 16)
    assert result.bound == bound
    if bound != projection.MESSAGES:
        assert result.step_ms == pytest.approx(200 if bound == projection.LOADER else 345.6)


def test_padding_costs_what_it_pads() -> None:
    # 9 images on 8 GPUs: two each, of which 7 are padding.
    cost = replace(COST, fixed_ms=0.0, gradient_bytes=4)
    result = at(projection.fixed_batch(9, (8,), cost, replace(PLAIN, node_us=0), Job()), 8)
    assert result.work_ms == 2
    assert result.efficiency == pytest.approx(9 / 16, rel=1e-3)
    assert result.bound == projection.PADDING


def test_where_it_stops() -> None:
    points = projection.fixed_batch(64, POWERS, COST, PLAIN, Job())
    # Work alone: 74, 42, 26, 18 ms: doublings of 1.76, 1.62 and 1.44; the last is not worth it.
    assert projection.stop(points, POWERS) == (4, projection.FIXED)
    free = replace(COST, fixed_ms=0.0, gradient_bytes=4)
    prompt = replace(PLAIN, node_us=0, network_us=0)
    assert projection.stop(projection.fixed_batch(64, POWERS, free, prompt, Job()), POWERS) == (64, projection.BATCH)
    assert projection.stop(projection.fixed_share(64, POWERS, COST, PLAIN, Job()), POWERS) is None


def test_a_run_by_hand() -> None:
    job = Job(train=6400, val=100, epochs=2, start_s=36)
    cluster = replace(PLAIN, store_gbs=1e9)
    result = at(projection.fixed_batch(64, POWERS, COST, cluster, job), 8)
    # 100 steps of 18 ms and a bit, 13 images of 0.5 ms, twice; 6,500 images of 54 kB through 12.5 GB/s.
    assert result.start_h == pytest.approx((36 + 0.351 / 12.5) / 3600)
    assert result.run_h == pytest.approx(result.start_h + 2 * (100 * result.step_ms + 13 * 0.5) / 1000 / 3600)
    # 74 ms on one GPU make 15 s of training beside 36 of start: no second GPU is worth it.
    points = projection.fixed_batch(64, POWERS, COST, cluster, job)
    assert projection.stop_of_run(points, POWERS) == (1, projection.START)


@given(size=sizes, gbs=st.floats(0.1, 1000), us=st.floats(0, 1000), ranks=st.integers(1, 1000))
def test_a_ring_gets_no_quicker_with_ranks_bytes_or_a_worse_link(
    size: float, gbs: float, us: float, ranks: int
) -> None:
    expected = projection.ring_ms(ranks, size, gbs, us)
    assert expected <= projection.ring_ms(ranks + 1, size, gbs, us)
    assert expected <= projection.ring_ms(ranks, 2 * size, gbs, us)
    assert expected <= projection.ring_ms(ranks, size, gbs / 2, us + 1)
    # Twice the data over the link, whatever the number of ranks: the bound that Patarasuk and Yuan prove.
    assert projection.ring_ms(ranks, size, gbs, 0) <= 2 * size / (gbs * 1e6)


@given(costs, clusters, st.integers(1, 4096))
def test_efficiency_is_a_share_and_falls(cost: Cost, cluster: Cluster, batch: int) -> None:
    strong = projection.fixed_batch(batch, POWERS, cost, cluster, Job())
    weak = projection.fixed_share(batch, POWERS, cost, cluster, Job())
    for points in (strong, weak):
        assert all(0 < item.efficiency <= 1 + 1e-9 for item in points)
    assert [item.gpus for item in strong] == [1, *(n for n in POWERS if n <= batch)]
    # The work of a GPU never grows with the number of GPUs, what they tell each other never shrinks.
    for points in (strong, weak):
        for before, after in pairwise(points):
            assert after.work_ms <= before.work_ms
            assert after.gradients_ms >= before.gradients_ms * (1 - 1e-9)
            assert after.messages_ms >= before.messages_ms * (1 - 1e-9)


@given(costs, clusters, st.integers(1, 4096), st.sampled_from(POWERS))
def test_better_hardware_never_makes_a_step_slower(cost: Cost, cluster: Cluster, batch: int, gpus: int) -> None:
    def step(changed: Cluster) -> float:
        return projection.fixed_share(batch, [gpus], cost, changed, Job())[-1].step_ms

    now = step(cluster) * (1 + 1e-9)
    assert step(replace(cluster, network_gbs=2 * cluster.network_gbs)) <= now
    assert step(replace(cluster, network_us=cluster.network_us / 2)) <= now
    assert step(replace(cluster, node_gbs=2 * cluster.node_gbs)) <= now
    assert step(replace(cluster, overlap=min(1.0, cluster.overlap + 0.1))) <= now
    assert step(replace(cluster, decode_cores=2 * cluster.decode_cores)) <= now
    assert step(replace(cluster, disk_gbs=2 * cluster.disk_gbs)) <= now


@given(costs, clusters, st.integers(1, 4096))
def test_a_step_is_never_under_any_of_its_ceilings(cost: Cost, cluster: Cluster, batch: int) -> None:
    for item in projection.fixed_batch(batch, POWERS, cost, cluster, Job()):
        assert item.step_ms >= max(item.work_ms + item.exposed_ms + item.messages_ms, item.loader_ms, item.disk_ms)
        assert item.per_second == pytest.approx(1000 * batch / item.step_ms)
        assert item.exposed_ms <= item.gradients_ms


@given(costs, clusters, st.integers(1, 4096))
def test_scaling_stops_after_the_last_doubling_that_paid(cost: Cost, cluster: Cluster, batch: int) -> None:
    points = projection.fixed_batch(batch, POWERS, cost, cluster, Job())
    stopped = projection.stop(points, POWERS)
    paid = [after.per_second >= 1.5 * before.per_second for before, after in pairwise(points)]
    if False in paid:
        assert stopped is not None
        assert stopped[0] == points[paid.index(False)].gpus
    else:
        assert stopped == ((points[-1].gpus, projection.BATCH) if points[-1].gpus < POWERS[-1] else None)
