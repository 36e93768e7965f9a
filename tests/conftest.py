"""What many tests share: one small synthetic archive, its shards, one Ray cluster."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from cxrscale import config
from cxrscale.config import Pack, Recipe
from cxrscale.shards import build, ids
from cxrscale.sources.synthetic import archive
from cxrscale.sources.synthetic.archive import SyntheticPaths
from tests.servers import free_port, s3_environment
from tests.small_datasets import make_shards, shards  # noqa: F401
from tests.tiny import TINY_CLASSIFIER, TINY_SEGMENTER

# A shell ignores SIGINT for what it starts in the background, and nohup SIGHUP; every process started from there too.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
# Ray's workers must import torch from bytecode, and Train's defaults poll every two seconds.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ |= {
    # Ray's 15 would leave its workers a thirtieth of a core beside the other processes of tests.
    "RAY_worker_niceness": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # For so long Ray waits for a lost node's place in the new group before it makes a smaller one; 60 by default.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    "WANDB_MODE": "offline",
    # Else the first dataset would make a key in the home of whoever runs the tests.
    "CXRSCALE_PATIENT_KEY": "the key of the tests",
}

# How long one example takes says how busy the machine is; speed is measured in tests/benchmarks.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


S3_PORT = free_port()
# Set before Ray starts, so that its workers speak to the same S3.
os.environ |= s3_environment(S3_PORT)

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"


FIRST = {"ray_cluster"}
"""The fixture of tests on the session's cluster: the longest way, so one process begins with it."""
LATER = {"cluster", "local", "site"}
"""Fixtures that start clusters of their own: apart from the start of the session's, and not alone at the end."""
END = ("tests/shards/", "tests/sources/", "tests/training/", "tests/tuning/", "tests/test_")
"""What many small groups after them fill the end with, so that no process is idle there."""


def pytest_itemcollected(item: pytest.Item) -> None:
    """Two processes share the tests by module, and by what clusters they need."""
    module = item.nodeid.partition("::")[0]
    group = {0: "ray_cluster", 2: "own clusters"}.get(_turn(item), module)
    item.add_marker(pytest.mark.xdist_group(group))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on the session's cluster first, those that start their own after most of the others."""
    items.sort(key=_turn)


def _turn(item: pytest.Item) -> int:
    needs = set(getattr(item, "fixturenames", ()))
    return 0 if needs & FIRST else 2 if needs & LATER else 3 if item.nodeid.startswith(END) else 1


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder of real images and tables beside the checkout."""
    if not REAL.is_dir():
        pytest.skip("no real images beside the checkout (../shared/data)")
    return REAL


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> SyntheticPaths:
    """A synthetic archive of 80 images of 96 pixels."""
    return archive.write(str(tmp_path_factory.mktemp("synthetic") / "archive"), images=80, size=96, seed=3)


@pytest.fixture(scope="session")
def nih_shards(drawn: SyntheticPaths, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The synthetic archive's NIH side as shards of 64-pixel JPEGs."""
    out = str(tmp_path_factory.mktemp("shards") / "nih")
    build.build_shards("nih", str(drawn.nih), Pack(size=64, samples_per_shard=20), out, local=True)
    return out


@pytest.fixture(scope="session")
def siim_shards(drawn: SyntheticPaths, nih_shards: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The synthetic archive's SIIM side with masks, under the patients and splits of its NIH duplicates."""
    out = str(tmp_path_factory.mktemp("shards") / "siim")
    settings = Pack(size=64, samples_per_shard=20, masks=True)
    build.build_shards("siim", str(drawn.siim), settings, out, patients_from_dataset=nih_shards, local=True)
    return out


@pytest.fixture(scope="session")
def classifier_run(nih_shards: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A classifier after two epochs; of its findings Hernia is never present. Copy it before you change it."""
    from cxrscale.cli.progress import watch_run
    from cxrscale.training import launch

    findings = "data.findings=[Cardiomegaly, Effusion, Mass, Hernia]"
    root = tmp_path_factory.mktemp("classifier")
    recipe = tiny(nih_shards, root, findings, "train.epochs=2", "optim.lr=3e-3", "threshold.report_at=[0.25]")
    return launch.launch(recipe, "tiny", watch_run, local=True)


@pytest.fixture(scope="session")
def segmenter_run(siim_shards: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A segmenter after two epochs. Copy it before you change it."""
    from cxrscale.cli.progress import watch_run
    from cxrscale.training import launch

    recipe = tiny(siim_shards, tmp_path_factory.mktemp("segmenter"), "train.epochs=2", base=TINY_SEGMENTER)
    return launch.launch(recipe, "tiny", watch_run, local=True)


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The address of a bucket on a real S3 server on this machine."""
    import fsspec
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=S3_PORT, verbose=False)
    server.start()
    fsspec.filesystem("s3").mkdir("cxr")
    yield "s3://cxr"
    server.stop()


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """The one Ray cluster of the test session: a head with two CPUs on this machine; tests may add nodes to it."""
    import ray
    from ray.cluster_utils import Cluster

    from cxrscale.cluster import ray_session

    os.environ["RAY_AUTH_MODE"] = "disabled"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    ray_session.connect(cluster.address)
    yield cluster
    ray.shutdown()
    cluster.shutdown()  # type: ignore[no-untyped-call]


@pytest.fixture
def full_cluster(ray_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:  # noqa: ARG001
    """A cluster of which somebody holds every CPU, until the function is called; words come early."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    from cxrscale.cluster import groups
    from cxrscale.training import waiting

    monkeypatch.setattr(waiting, "SAY_SECONDS", 2.0)
    taken = placement_group([{"CPU": 1}] * int(ray.cluster_resources()["CPU"]))  # type: ignore[no-untyped-call]
    ray.get(taken.ready(), timeout=60)
    before = {group.id for group in groups.find_all()}
    yield lambda: remove_placement_group(taken)
    remove_placement_group(taken)
    # What the run has asked for went with it, also what was under way when it ended.
    time.sleep(1)
    assert [group for group in groups.find_all() if group.id not in before] == []


TWO_WORKERS = (
    "train.epochs=2",
    "sampler.steps_per_epoch=30",
    "train.checkpoint_steps=4",
    "augment.hflip=0.5",
    "scaling.num_workers=2",
)
"""Sixty steps of a few hundredths of a second, so that there is a middle to be killed in."""


@pytest.fixture(scope="session")
def two_worker_run(
    ray_cluster: Any,  # noqa: ARG001 - on the test session's cluster
    nih_shards: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> str:
    """A run of `TWO_WORKERS` on Ray that nothing disturbed. Copy it before you change it."""
    from cxrscale.cli.progress import watch_run
    from cxrscale.training import launch

    recipe = tiny(nih_shards, tmp_path_factory.mktemp("two"), *TWO_WORKERS, "tracking.wandb=offline")
    return launch.launch(recipe, "tiny", watch_run)


def keyed(source: str, name: str) -> str:
    """The id that stands for a source's patient or image id in the datasets of these tests."""
    key = ids.read_key(Pack())
    assert key is not None
    return key.hash(source, name)


def tiny(dataset: str, root: Path, *overrides: str, base: tuple[str, ...] = TINY_CLASSIFIER) -> Recipe:
    """A small recipe over a dataset, whose runs go under `root`."""
    given = [*base, f"data.shards=[{dataset}]", f"tracking.runs_dir={root}", "tracking.name=tiny", *overrides]
    return config.parse(Recipe, config.override({}, given), where="test")


@pytest.fixture(autouse=True)
def one_torch_thread() -> None:
    """Sums of one thread come out the same bit for bit on every machine."""
    torch.set_num_threads(1)
