"""What more GPUs would bring, as pure functions of measured costs and named assumptions; nothing here is measured.

A step takes what its GPU work takes, plus what of the gradients' all-reduce the backward pass does not hide, plus the
short messages that the loop waits for; or longer, where loader or disk deliver its images later than that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise

MIB = 2**20
FIRST_BUCKET, BUCKET = MIB, 25 * MIB
"""Bytes of DistributedDataParallel's first bucket and of the others (Li et al. 2020, VLDB 13(12), and its defaults)."""
COUNT_BYTES = 64
"""Of the sum over the workers that each step's loss is divided by."""
WORTH = 0.5
"""Scaling stops where less than this share of an added GPU arrives as speed."""
GOOD = 0.9
"""At this efficiency or above, the GPU work counts as the bound."""

COMPUTE, FIXED, PADDING = "GPU work", "fixed cost of a step", "padding"
NETWORK, LINK, MESSAGES = "network: gradients", "node link: gradients", "short messages"
LOADER, DISK, START = "loader", "disk", "start and staging"
BATCH = "sampler.batch_size: a GPU needs an image"


def assumed(default: float, meaning: str) -> float:
    """A field with a default that is an assumption until somebody measures it."""
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True, slots=True)
class Cost:
    """What a step of one GPU costs."""

    fixed_ms: float
    """However few images: launches, the optimizer."""
    image_ms: float
    """For each of its images."""
    gradient_bytes: int
    buffer_bytes: int
    """Batch-norm statistics, which DistributedDataParallel sends from rank 0 before each forward pass."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """What the GPUs stand in; every default is an assumption."""

    node_gpus: int = field(default=8, metadata={"help": "GPUs per node"})
    node_gbs: float = assumed(200.0, "GB/s that a GPU sends to others of its node (NVLink 4: 450 on paper)")
    node_us: float = assumed(5.0, "microseconds of a message inside a node")
    network_gbs: float = assumed(12.5, "GB/s that a node sends to others (12.5 = 100 Gbit/s)")
    network_us: float = assumed(25.0, "microseconds of a message between nodes")
    backward: float = assumed(0.6, "share of the GPU work that is the backward pass")
    overlap: float = assumed(0.8, "share of the backward pass in which gradients already travel")
    decode_ms: float = assumed(1.38, "core-milliseconds per image of loader and decoder, from benchmarks.batches")
    decode_cores: float = assumed(8.0, "cores for each GPU's loader")
    disk_gbs: float = assumed(2.0, "GB/s that a node reads from its shard cache")
    store_gbs: float = assumed(10.0, "GB/s that the shared store gives to all nodes together")
    image_kb: float = assumed(54.0, "kB of a stored image")


@dataclass(frozen=True, slots=True)
class Job:
    """The size of a run."""

    train: int = field(default=75_312, metadata={"help": "training images"})
    val: int = field(default=11_212, metadata={"help": "validation images"})
    epochs: int = field(default=20, metadata={"help": "epochs"})
    start_s: float = assumed(60.0, "seconds from the command to the first step")


@dataclass(frozen=True, slots=True)
class Point:
    """A number of GPUs and what becomes of a step on them. Times are milliseconds per step."""

    gpus: int
    batch: int
    """Images per step over all GPUs."""
    work_ms: float
    gradients_ms: float
    """All-reduce of the gradients, were nothing hidden."""
    exposed_ms: float
    """What of it the backward pass does not hide."""
    messages_ms: float
    loader_ms: float
    disk_ms: float
    step_ms: float
    per_second: float
    """Images per second over all GPUs."""
    efficiency: float
    """`per_second` over that of one GPU times `gpus`."""
    bound: str
    """What costs the most of the efficiency that is lost."""
    start_h: float
    """Hours of the job before its first step at full speed: its start, and the staging of the shards."""
    run_h: float
    """Hours of the job."""


def ring_ms(ranks: int, size: float, gbs: float, us: float, messages: int = 1) -> float:
    """Milliseconds of a ring all-reduce of `size` bytes: 2 (n - 1) / n * size / bandwidth + 2 (n - 1) * latency.

    Source: Patarasuk and Yuan 2009, Bandwidth optimal all-reduce algorithms for clusters of workstations, J. Parallel
    Distrib. Comput. 69(2): a reduce-scatter and an all-gather of n - 1 steps each, in each of which every rank sends an
    n-th of the data; no all-reduce moves less.

    Args:
        gbs: GB/s of each rank, in each direction at once.
        us: latency of a message.
        messages: in how many parts the data is sent, each of which pays the latency.
    """
    return 2 * (ranks - 1) / ranks * size / (gbs * 1e6) + 2 * (ranks - 1) * us * messages / 1000


def tree_ms(ranks: int, size: float, gbs: float, us: float, messages: int = 1) -> float:
    """Milliseconds of an all-reduce over two complementary binary trees: 2 size / bandwidth + 2 ceil(log2 n) * latency.

    Source: Sanders, Speck and Traff 2009, Two-tree algorithms for full bandwidth broadcast, reduction and scan,
    Parallel Computing 35(12); NCCL uses it since 2.4. The term for filling the pipeline is left out.
    """
    if ranks == 1:
        return 0.0
    return 2 * size / (gbs * 1e6) + 2 * math.ceil(math.log2(ranks)) * us * messages / 1000


def all_reduce_ms(gpus: int, size: float, cluster: Cluster, messages: int = 1) -> tuple[float, str]:
    """(milliseconds, algorithm) of the quickest of three all-reduces, among which NCCL chooses as well.

    One ring over all GPUs, each step as slow as the network; or a ring inside each node, which leaves every GPU a share
    of the sums, then a ring or a tree between the nodes over all of the shares at once, and back.
    """
    if gpus <= cluster.node_gpus:
        return ring_ms(gpus, size, cluster.node_gbs, cluster.node_us, messages), "ring in the node"
    nodes = math.ceil(gpus / cluster.node_gpus)
    inside = ring_ms(cluster.node_gpus, size, cluster.node_gbs, cluster.node_us, messages)
    algorithms = {
        "one ring": ring_ms(gpus, size, cluster.network_gbs, cluster.network_us, messages),
        "rings in and between nodes": inside + ring_ms(nodes, size, cluster.network_gbs, cluster.network_us, messages),
        "rings in nodes, trees between": inside
        + tree_ms(nodes, size, cluster.network_gbs, cluster.network_us, messages),
    }
    name = min(algorithms, key=lambda name: algorithms[name])
    return algorithms[name], name


def buckets(gradient_bytes: int) -> int:
    """In how many messages DistributedDataParallel sends so many bytes of gradients."""
    return 1 + max(0, math.ceil((gradient_bytes - FIRST_BUCKET) / BUCKET))


def hidden_ms(work_ms: float, cluster: Cluster) -> float:
    """How long gradients can travel while the backward pass still computes: work * backward share * overlap."""
    return work_ms * cluster.backward * cluster.overlap


def messages_ms(gpus: int, cost: Cost, cluster: Cluster) -> float:
    """Milliseconds of what every step waits for: the sum its loss is divided by, and batch-norm's buffers.

    The buffers' broadcast counts as half an all-reduce, its second half.
    """
    sums, _ = all_reduce_ms(gpus, COUNT_BYTES, cluster)
    statistics, _ = all_reduce_ms(gpus, cost.buffer_bytes, cluster)
    return sums + statistics / 2


def staging_s(nodes: int, cluster: Cluster, job: Job) -> float:
    """Seconds until every node has its own copy of all shards: each may be asked for any image."""
    total_gb = (job.train + job.val) * cluster.image_kb / 1e6
    return total_gb / min(cluster.network_gbs, cluster.store_gbs / nodes)


def epoch_s(gpus: int, batch: int, step_ms: float, cost: Cost, cluster: Cluster, job: Job) -> float:
    """Seconds of an epoch: its steps, and validation, which is forward passes alone."""
    forward_ms = max(cost.image_ms * (1 - cluster.backward), cluster.decode_ms / cluster.decode_cores)
    return (math.ceil(job.train / batch) * step_ms + math.ceil(job.val / gpus) * forward_ms) / 1000


def point(gpus: int, batch: int, alone: Point | None, cost: Cost, cluster: Cluster, job: Job) -> Point:
    """A step of `batch` images on so many GPUs, held against `alone`, the point of one GPU (None: this is it)."""
    share = math.ceil(batch / gpus)  # the sampler pads the last ranks
    work = cost.fixed_ms + share * cost.image_ms
    gradients, _ = all_reduce_ms(gpus, cost.gradient_bytes, cluster, buckets(cost.gradient_bytes))
    exposed = max(0.0, gradients - hidden_ms(work, cluster))
    short = messages_ms(gpus, cost, cluster)
    nodes = math.ceil(gpus / cluster.node_gpus)
    loader = share * cluster.decode_ms / cluster.decode_cores
    disk = batch * cluster.image_kb / (nodes * cluster.disk_gbs * 1000)
    busy = work + exposed + short
    step = max(busy, loader, disk)
    speed = 1000 * batch / step
    efficiency = speed / (gpus * alone.per_second) if alone else 1.0
    scale = batch / (alone.batch if alone else batch) / gpus
    lost = {
        FIXED: cost.fixed_ms * (1 - scale),
        PADDING: cost.image_ms * (share - batch / gpus),
        NETWORK if nodes > 1 else LINK: exposed,
        MESSAGES: short,
    }
    if step > busy:
        bound = LOADER if loader >= disk else DISK
    else:
        bound = COMPUTE if efficiency >= GOOD else max(lost, key=lambda name: lost[name])
    start_h = (job.start_s + staging_s(nodes, cluster, job)) / 3600
    return Point(
        gpus=gpus,
        batch=batch,
        work_ms=work,
        gradients_ms=gradients,
        exposed_ms=exposed,
        messages_ms=short,
        loader_ms=loader,
        disk_ms=disk,
        step_ms=step,
        per_second=speed,
        efficiency=efficiency,
        bound=bound,
        start_h=start_h,
        run_h=start_h + job.epochs * epoch_s(gpus, batch, step, cost, cluster, job) / 3600,
    )


def fixed_batch(batch: int, counts: Sequence[int], cost: Cost, cluster: Cluster, job: Job) -> list[Point]:
    """Strong scaling, the sampler's: as many images per step on 1 and each of `counts` GPUs, at least one each."""
    alone = point(1, batch, None, cost, cluster, job)
    return [alone, *(point(n, batch, alone, cost, cluster, job) for n in counts if 1 < n <= batch)]


def fixed_share(share: int, counts: Sequence[int], cost: Cost, cluster: Cluster, job: Job) -> list[Point]:
    """Weak scaling: the same images per GPU, so that the batch, and with it what is learned, grows with the GPUs."""
    alone = point(1, share, None, cost, cluster, job)
    return [alone, *(point(n, n * share, alone, cost, cluster, job) for n in counts if n > 1)]


def stop(points: Sequence[Point], counts: Sequence[int]) -> tuple[int, str] | None:
    """(GPUs up to which more are worth it, why not beyond); None where all of `counts` are.

    More GPUs are worth it where `WORTH` of each added one arrives as images per second.
    """
    for before, after in pairwise(points):
        if not _worth(before, after, after.per_second / before.per_second):
            return before.gpus, after.bound
    last = points[-1].gpus
    return (last, BATCH) if max(counts) > last else None


def stop_of_run(points: Sequence[Point], counts: Sequence[int]) -> tuple[int, str] | None:
    """As `stop`, of the whole job's wall time, which start and staging do not let shrink forever."""
    for before, after in pairwise(points):
        if not _worth(before, after, before.run_h / after.run_h):
            epochs = (before.run_h - before.start_h) / (after.run_h - after.start_h)
            return before.gpus, START if _worth(before, after, epochs) else after.bound
    last = points[-1].gpus
    return (last, BATCH) if max(counts) > last else None


def _worth(before: Point, after: Point, faster: float) -> bool:
    return faster >= 1 + WORTH * (after.gpus / before.gpus - 1)


def meanings(section: type[Cluster] | type[Job]) -> dict[str, tuple[float, str]]:
    """Field -> (default, meaning), for the command line and for what is written beside the figures."""
    return {item.name: (item.default, item.metadata["help"]) for item in fields(section)}  # type: ignore[misc]
