"""Remote shards are cached completely, once, and never beyond the cache's limit."""

from __future__ import annotations

import fcntl
import functools
import http.server
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from cxrscale.io import access, storage
from cxrscale.loader.cache import RemoteShard, staged_copy
from cxrscale.loader.reader import OpenShards, ShardReader
from cxrscale.shards import manifest as manifests
from cxrscale.types import AccessError, UserError
from tests.small_datasets import MakeShards


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("CXRSCALE_CACHE", str(folder))
    monkeypatch.delenv("CXRSCALE_CACHE_GB", raising=False)
    return folder


@pytest.fixture
def bucket() -> Iterator[fsspec.AbstractFileSystem]:
    """An empty remote file system in this process's memory."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()


def remote(files: fsspec.AbstractFileSystem, name: str, data: bytes) -> RemoteShard:
    """Put a shard into the bucket."""
    files.pipe_file(f"/{name}", data)
    return RemoteShard(f"memory://{name}", storage.digest(data), len(data))


def content(shard: RemoteShard) -> bytes:
    """Stage it, read it and close it."""
    with staged_copy(shard) as file:
        return file.read()


def copies(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir() if path.suffix != ".lock"}


def test_a_remote_dataset_reads_like_a_local_one(
    make_shards: MakeShards, bucket: fsspec.AbstractFileSystem, cache: Path
) -> None:
    local = make_shards()
    for path in Path(local.table["root"][0].as_py()).iterdir():
        bucket.pipe_file(f"/set/{path.name}", path.read_bytes())
    staged = manifests.load("memory://set")
    rows = np.array([23, 0, 12])
    ours, theirs = (ShardReader(dataset).read(rows, masks=True) for dataset in (staged, local))
    assert all(np.array_equal(a, b) for a, b in zip(ours.images, theirs.images, strict=True))
    assert ours.valid_B.all()
    assert len(copies(cache)) == 3
    bucket.store.clear()
    assert ShardReader(staged).read(rows, masks=True).valid_B.all()


def test_a_copy_is_named_by_its_digest_and_replaced_when_truncated(
    bucket: fsspec.AbstractFileSystem, cache: Path
) -> None:
    shard = remote(bucket, "a.tar", b"x" * 1000)
    path = cache / f"{shard.blake3}.tar"
    assert content(shard) == b"x" * 1000
    assert path.exists()
    path.write_bytes(b"x")
    assert content(shard) == b"x" * 1000


def test_a_reservation_of_a_killed_process_goes_with_the_next_use(
    cache: Path, bucket: fsspec.AbstractFileSystem
) -> None:
    shard = remote(bucket, "train-000.tar", b"content")
    assert content(shard) == b"content"
    (copy,) = cache.glob("*.tar")
    copy.with_suffix(".room").write_text("7")
    assert content(shard) == b"content"
    assert not list(cache.glob("*.room"))


def test_what_differs_from_the_manifest_is_refused_and_leaves_nothing(
    bucket: fsspec.AbstractFileSystem, cache: Path
) -> None:
    shard = remote(bucket, "a.tar", b"x" * 1000)
    bucket.pipe_file("/a.tar", b"y" * 1000)
    with pytest.raises(UserError, match=r"a.tar differs from its manifest's digest; run `cxrscale verify`"):
        staged_copy(shard)
    bucket.pipe_file("/a.tar", b"x" * 999)
    with pytest.raises(UserError, match="has 999 bytes, its manifest says 1000"):
        staged_copy(shard)
    bucket.rm("/a.tar")
    with pytest.raises(UserError, match=r"a.tar is missing"):
        staged_copy(shard)
    assert copies(cache) == set()


def test_the_limit_removes_the_least_recently_used_copy(
    bucket: fsspec.AbstractFileSystem, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXRSCALE_CACHE_GB", "2e-6")
    shards = [remote(bucket, f"{name}.tar", name.encode() * 1000) for name in "abc"]
    paths = [cache / f"{shard.blake3}.tar" for shard in shards]
    content(shards[0])
    content(shards[1])
    os.utime(paths[0], (2e9, 2e9))
    content(shards[2])
    assert copies(cache) == {paths[0].name, paths[2].name}


def test_a_copy_in_use_is_never_removed(
    bucket: fsspec.AbstractFileSystem, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A removed copy that is still mapped would fill the disk beyond the limit without being visible."""
    monkeypatch.setenv("CXRSCALE_CACHE_GB", "2e-6")
    shards = [remote(bucket, f"{name}.tar", name.encode() * 1000) for name in "abc"]
    with staged_copy(shards[0]) as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    content(shards[1])
    content(shards[2])
    assert copies(cache) == {f"{shards[0].blake3}.tar", f"{shards[2].blake3}.tar"}
    with (
        staged_copy(shards[2]),
        pytest.raises(UserError, match=r"3e-06 GB, more than CXRSCALE_CACHE_GB=2e-06") as error,
    ):
        staged_copy(shards[1])
    assert "in use at once; raise CXRSCALE_CACHE_GB" in str(error.value)
    assert "\n" not in str(error.value)
    mapped.close()
    content(shards[1])
    assert copies(cache) == {f"{shards[1].blake3}.tar", f"{shards[2].blake3}.tar"}


def test_a_reader_keeps_its_copies_while_their_files_are_closed(
    bucket: fsspec.AbstractFileSystem, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader of thousands of shards has few open at once; all others would be downloaded for each batch again."""
    monkeypatch.setenv("CXRSCALE_CACHE_GB", "2e-6")
    shards = [remote(bucket, f"{name}.tar", name.encode() * 1000) for name in "abc"]
    first, second = (OpenShards(shards, limit=1) for _ in range(2))
    for number in (0, 1, 0):
        assert first.read(number, 10, 1) == b"ab"[number : number + 1]
    assert second.read(0, 0, 1) == b"a"
    with pytest.raises(UserError, match="in use at once; raise CXRSCALE_CACHE_GB"):
        first.read(2, 0, 1)
    del first
    assert second.read(2, 0, 1) == b"c"
    assert copies(cache) == {f"{shards[0].blake3}.tar", f"{shards[2].blake3}.tar"}


@pytest.mark.parametrize("fault", ["error", "short"])
def test_a_download_that_fails_for_a_moment_is_tried_again(
    fault: str, bucket: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = remote(bucket, "a.tar", b"x" * 1000)
    get_file, faults = bucket.get_file, [fault, fault]

    def failing(source: str, target: str) -> None:
        if not faults:
            get_file(source, target)
        elif faults.pop() == "error":
            raise PermissionError("Forbidden")
        else:
            Path(target).write_bytes(b"x" * 10)

    monkeypatch.setattr(bucket, "get_file", failing)
    monkeypatch.setattr(access, "RETRY_SECONDS", (0.01, 0.01))
    assert content(shard) == b"x" * 1000
    Path(os.environ["CXRSCALE_CACHE"], f"{shard.blake3}.tar").unlink()
    faults += [fault] * 3
    with pytest.raises(AccessError, match=r"a.tar cannot be reached \("):
        staged_copy(shard)


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ("0.9e-6", r"a.tar alone has 1e-06 GB, more than CXRSCALE_CACHE_GB=9e-07; raise CXRSCALE_CACHE_GB"),
        ("much", r"CXRSCALE_CACHE_GB='much' is not a number of gigabytes; give one above 0"),
        ("nan", r"is not a number of gigabytes"),
        ("0", r"is not a number of gigabytes"),
    ],
)
def test_a_limit_that_cannot_be_kept_is_refused(
    bucket: fsspec.AbstractFileSystem, cache: Path, monkeypatch: pytest.MonkeyPatch, limit: str, message: str
) -> None:
    monkeypatch.setenv("CXRSCALE_CACHE_GB", limit)
    with pytest.raises(UserError, match=message) as error:
        staged_copy(remote(bucket, "a.tar", b"x" * 1000))
    assert "\n" not in str(error.value)
    assert copies(cache) == set()


def test_a_running_download_counts_with_its_full_size(
    bucket: fsspec.AbstractFileSystem, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another process has only begun to copy is counted at its full size; a dead process's reservation is not."""
    monkeypatch.setenv("CXRSCALE_CACHE_GB", "2e-6")
    shard = remote(bucket, "a.tar", b"a" * 1000)
    cache.mkdir()
    (cache / "other.room").write_text("1500")
    with (cache / "other.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"2.5e-06 GB, more than"):
            staged_copy(shard)
    content(shard)
    assert copies(cache) == {f"{shard.blake3}.tar"}


def test_a_mapped_copy_survives_its_removal(
    make_shards: MakeShards, bucket: fsspec.AbstractFileSystem, cache: Path
) -> None:
    for path in Path(make_shards().table["root"][0].as_py()).iterdir():
        bucket.pipe_file(f"/set/{path.name}", path.read_bytes())
    source = ShardReader(manifests.load("memory://set"))
    before = source.read(np.arange(5), masks=False).images
    for path in cache.glob("*.tar"):
        path.unlink()
    after = source.read(np.arange(5), masks=False).images
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_files_of_killed_processes_are_removed(bucket: fsspec.AbstractFileSystem, cache: Path) -> None:
    shard = remote(bucket, "a.tar", b"x")
    cache.mkdir()
    for name in ("dead", str(shard.blake3)):
        (cache / f"{name}.part").write_bytes(b"half")
        (cache / f"{name}.room").write_text("200000000000")
    content(shard)
    assert copies(cache) == {f"{shard.blake3}.tar"}


def test_two_processes_download_once(make_shards: MakeShards, cache: Path) -> None:
    folder = Path(make_shards(count=4).table["root"][0].as_py())
    requests: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            super().do_GET()

        def log_message(self, *_: object) -> None:
            pass

    data = (folder / "part-00000.tar").read_bytes()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/part-00000.tar"
        code = (
            "import sys; from cxrscale.loader.cache import RemoteShard, staged_copy;"
            "print(staged_copy(RemoteShard(sys.argv[1], sys.argv[2], int(sys.argv[3]))).name)"
        )
        command = [sys.executable, "-c", code, address, storage.digest(data), str(len(data))]
        running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        printed = {process.communicate(timeout=60)[0].strip() for process in running}
        server.shutdown()
    assert all(process.returncode == 0 for process in running)
    assert len(printed) == 1
    assert Path(printed.pop()).read_bytes() == data
    assert len(requests) == 1
    assert copies(cache) == {f"{storage.digest(data)}.tar"}


WORKER = """
import fcntl, os, random, sys
from pathlib import Path
from cxrscale.io import storage
from cxrscale.loader.cache import RemoteShard, staged_copy
cache, limit = Path(os.environ["CXRSCALE_CACHE"]), 1e9 * float(os.environ["CXRSCALE_CACHE_GB"])
seed, *shards = sys.argv[1:]
turns = random.Random(seed)
for _ in range(40):
    address, digest, size = turns.choice(shards).split()
    with staged_copy(RemoteShard(address, digest, int(size))) as file:
        assert storage.digest(file.read()) == digest
        sizes = {}
        with (cache / "cache.lock").open("w") as still:
            fcntl.flock(still, fcntl.LOCK_EX)
            for entry in os.scandir(cache):
                name, _, kind = entry.name.partition(".")
                if kind in ("tar", "part"):
                    try:
                        sizes[name] = entry.stat().st_size
                    except FileNotFoundError:
                        sizes[name] = 100_000
        assert sum(sizes.values()) <= limit, sizes
"""


def test_two_processes_keep_the_limit_together(s3: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six shards in a bucket, room for two: each process may have one, and neither is ever refused or over."""
    monkeypatch.setenv("CXRSCALE_CACHE_GB", "2.1e-4")
    files = fsspec.filesystem("s3")
    shards = []
    for number in range(6):
        data = np.random.default_rng(number).bytes(100_000)
        address = f"{s3}/staging/{number}.tar"
        files.pipe_file(address, data)
        shards.append(f"{address} {storage.digest(data)} {len(data)}")
    running = [
        subprocess.Popen([sys.executable, "-c", WORKER, seed, *shards], stderr=subprocess.PIPE, text=True)
        for seed in "ab"
    ]
    errors = [process.communicate(timeout=120)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], errors
    assert len(copies(cache)) == 2
    assert all(name.endswith(".tar") for name in copies(cache))
