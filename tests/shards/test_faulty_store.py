"""Whatever a store does while a dataset is made: input = packed + quarantined by decoding, or one line and a resume."""

import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import fsspec
import pytest

from cxrscale.io import access, storage, walk
from cxrscale.shards import build, manifest
from cxrscale.shards.contents import NAME as CONTENTS
from cxrscale.sources.synthetic.archive import SyntheticPaths
from cxrscale.types import AccessError, UserError
from tests.faulty_s3 import FAULTS, Schedule, faulty_s3
from tests.shards.test_pack import SETTINGS, contents
from tests.shards.test_remote import remote_contents


@pytest.fixture(scope="module")
def few(drawn: SyntheticPaths, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The synthetic NIH source with its first twelve images."""
    folder = tmp_path_factory.mktemp("few") / "nih"
    kept = sorted(path.name for path in drawn.nih.rglob("*.png"))[:12]
    shutil.copytree(
        drawn.nih, folder, ignore=lambda _, names: [n for n in names if n.endswith(".png") and n not in kept]
    )
    return folder


@pytest.fixture(scope="module")
def expected(few: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of its dataset."""
    out = tmp_path_factory.mktemp("expected") / "out"
    build.build_shards("nih", str(few), SETTINGS, str(out), local=True)
    return contents(out)


@pytest.fixture
def remote(few: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The source in a bucket; pauses between attempts are short."""
    root = f"{s3}/faulty/nih"
    if not storage.exists(root):
        fsspec.filesystem("s3").put(str(few), root.removeprefix("s3://"), recursive=True)
    monkeypatch.setattr(access, "RETRY_SECONDS", (0.01, 0.02, 0.05))
    with storage.waiting_for_stores(0.5):
        yield root
    _forget_connections()


def _forget_connections() -> None:
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()


@contextmanager
def through(schedule: Schedule, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, every request goes through the faulty proxy."""
    with faulty_s3(os.environ["AWS_ENDPOINT_URL"], schedule) as proxy, monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy)
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        _forget_connections()
        try:
            yield
        finally:
            _forget_connections()


def pack_through(schedule: Schedule, root: str, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with through(schedule, monkeypatch):
        build.build_shards("nih", root, SETTINGS, out, local=True)


@pytest.mark.parametrize(
    "fault", ["short", *(pytest.param(name, marks=pytest.mark.slow) for name in FAULTS if name != "short")]
)
def test_the_start_of_a_file_is_complete_or_an_error(fault: str, remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From it a source tells the format of a file without a suffix: too short, it would be passed over."""
    address = next(file.path for file in walk(remote) if file.path.endswith(".png"))
    with through(lambda method, _path, before: fault if method == "GET" and before < 2 else "", monkeypatch):
        assert storage.read_start(address, 132) == storage.read(address)[:132]
    with (
        through(lambda method, *_: fault if method == "GET" else "", monkeypatch),
        nullcontext() if fault == "slow" else pytest.raises(AccessError),
    ):
        storage.read_start(address, 132)


def test_faults_that_pass_cost_no_image(
    remote: str, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each image fails at its first request, in one of eight ways."""
    fault_of: dict[str, str] = {}

    def schedule(method: str, path: str, before: int) -> str:
        if method != "GET" or not path.endswith(".png"):
            return ""
        return fault_of.setdefault(path, FAULTS[len(fault_of) % len(FAULTS)]) if before == 0 else ""

    pack_through(schedule, remote, str(tmp_path / "out"), monkeypatch)
    assert set(fault_of.values()) == set(FAULTS)
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize(
    "fault", ["403", *(pytest.param(name, marks=pytest.mark.slow) for name in ("404", "expired", "short"))]
)
def test_a_fault_that_stays_stops_before_the_manifest_and_the_next_run_completes(
    fault: str, remote: str, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def schedule(method: str, path: str, before: int) -> str:
        del before
        return fault if method == "GET" and path.endswith("3_000.png") else ""

    out = tmp_path / "out"
    with pytest.raises(AccessError, match=r"3_000\.png cannot be reached \(") as caught:
        pack_through(schedule, remote, str(out), monkeypatch)
    assert "\n" not in str(caught.value)
    assert not (out / manifest.NAME).exists()
    assert not list(out.rglob(".tmp-*"))
    build.build_shards("nih", remote, SETTINGS, str(out), local=True)
    assert contents(out) == expected


def random_schedule(seed: int, share: float) -> Schedule:
    rng = random.Random(seed)

    def schedule(method: str, path: str, before: int) -> str:
        del before
        fault = rng.choice(FAULTS) if rng.random() < share else ""
        # Stores are consistent since 2020: only a file that is read can be missing for a moment, by its name's cache.
        return "" if fault == "404" and (method != "GET" or not path.endswith(".png")) else fault

    return schedule


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30))
def test_any_schedule_of_faults_ends_in_the_same_bytes(
    seed: int, remote: str, s3: str, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs the same command until it succeeds; source, table, tars and manifest all go through the proxy."""
    out, attempts = f"{s3}/faulty/out-{seed}", 0
    while True:
        attempts += 1
        assert attempts < 20
        # Fewer faults each time, so that it ends.
        schedule = random_schedule(1000 * seed + attempts, 0.2 / attempts)
        with suppress(UserError):
            pack_through(schedule, remote, out, monkeypatch)
            break
        # Published last; a manifest alone may stand there, complete.
        assert not storage.exists(storage.join(out, CONTENTS))
    assert remote_contents(out) == expected
