"""Remote shards come into the cache whole, once, and never past its bound."""

from __future__ import annotations

import functools
import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from cxrscale import storage
from cxrscale.batches.source import ShardSource
from cxrscale.batches.staging import Shard, staged
from cxrscale.schema import InputError
from cxrscale.shards import manifest as manifests
from tests.batches.conftest import MakeShards


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


def remote(files: fsspec.AbstractFileSystem, name: str, data: bytes) -> Shard:
    """Put a shard there."""
    files.pipe_file(f"/{name}", data)
    return Shard(f"memory://{name}", storage.digest(data), len(data))


def copies(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir() if path.suffix != ".lock"}


def test_a_remote_set_reads_like_a_local_one(
    make_shards: MakeShards, bucket: fsspec.AbstractFileSystem, cache: Path
) -> None:
    local = make_shards()
    for path in Path(local.table["root"][0].as_py()).iterdir():
        bucket.pipe_file(f"/set/{path.name}", path.read_bytes())
    there = manifests.load("memory://set")
    rows = np.array([23, 0, 12])
    ours, theirs = (ShardSource(each).read(rows, masks=True) for each in (there, local))
    assert all(np.array_equal(a, b) for a, b in zip(ours.images, theirs.images, strict=True))
    assert ours.ok_B.all()
    assert len(copies(cache)) == 3
    bucket.store.clear()
    assert ShardSource(there).read(rows, masks=True).ok_B.all()


def test_a_copy_is_named_by_its_digest_and_made_again_when_cut(bucket: fsspec.AbstractFileSystem, cache: Path) -> None:
    shard = remote(bucket, "a.tar", b"x" * 1000)
    path = staged(shard)
    assert path == cache / f"{shard.blake3}.tar"
    path.write_bytes(b"x")
    assert staged(shard).read_bytes() == b"x" * 1000


def test_what_differs_from_the_manifest_is_refused_and_leaves_nothing(
    bucket: fsspec.AbstractFileSystem, cache: Path
) -> None:
    shard = remote(bucket, "a.tar", b"x" * 1000)
    bucket.pipe_file("/a.tar", b"y" * 1000)
    with pytest.raises(InputError, match=r"a.tar differs from its manifest's digest; run `cxrscale verify`"):
        staged(shard)
    bucket.pipe_file("/a.tar", b"x" * 999)
    with pytest.raises(InputError, match="has 999 bytes, its manifest says 1000"):
        staged(shard)
    bucket.rm("/a.tar")
    with pytest.raises(InputError, match=r"a.tar is missing"):
        staged(shard)
    assert copies(cache) == set()


def test_the_bound_removes_what_was_used_longest_ago(
    bucket: fsspec.AbstractFileSystem, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXRSCALE_CACHE_GB", "2.5e-6")
    shards = [remote(bucket, f"{name}.tar", name.encode() * 1000) for name in "abc"]
    first, second = staged(shards[0]), staged(shards[1])
    os.utime(first, (2e9, 2e9))
    third = staged(shards[2])
    assert copies(cache) == {first.name, third.name}
    assert not second.exists()
    with pytest.raises(InputError, match=r"CXRSCALE_CACHE_GB=2.5e-6: this run needs them all at once") as error:
        staged(shards[1], in_use={first, third})
    assert "\n" not in str(error.value)
    assert copies(cache) == {first.name, third.name}


def test_a_mapped_copy_survives_its_removal(
    make_shards: MakeShards, bucket: fsspec.AbstractFileSystem, cache: Path
) -> None:
    for path in Path(make_shards().table["root"][0].as_py()).iterdir():
        bucket.pipe_file(f"/set/{path.name}", path.read_bytes())
    source = ShardSource(manifests.load("memory://set"))
    before = source.read(np.arange(5), masks=False).images
    for path in cache.glob("*.tar"):
        path.unlink()
    after = source.read(np.arange(5), masks=False).images
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_strays_of_killed_processes_are_swept(bucket: fsspec.AbstractFileSystem, cache: Path) -> None:
    cache.mkdir()
    (cache / "dead.part").write_bytes(b"half")
    staged(remote(bucket, "a.tar", b"x"))
    assert not (cache / "dead.part").exists()


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
            "import sys; from cxrscale.batches.staging import Shard, staged;"
            "print(staged(Shard(sys.argv[1], sys.argv[2], int(sys.argv[3]))))"
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
