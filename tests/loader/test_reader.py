"""Bytes out of shards: the right ones, or a row that is marked bad and logged once; never a crash of the batch."""

from __future__ import annotations

import errno
import gc
import io
import logging
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest
import webdataset
from nvidia.dali import fn, pipeline_def, types

from cxrscale.io import access
from cxrscale.loader import reader
from cxrscale.loader.opencv import decoded
from cxrscale.loader.reader import MemoryReader, ShardReader
from cxrscale.shards import manifest as manifests
from cxrscale.shards.manifest import Manifest
from cxrscale.types import AccessError, UserError
from tests.small_datasets import MakeShards, chest, rewrite_manifest


def root(manifest: Manifest) -> Path:
    """The folder of a dataset."""
    return Path(manifest.table["root"][0].as_py())


def flip(manifest: Manifest, row: int, member: str = "image", by: int = 40) -> None:
    """Change one byte of a member of a shard on disk."""
    path = root(manifest) / manifest.table["shard"][row].as_py()
    data = bytearray(path.read_bytes())
    data[manifest.table[f"{member}_offset"][row].as_py() + by] ^= 0xFF
    path.write_bytes(data)


def test_the_reader_gives_the_members_of_the_tar(shards: Manifest) -> None:
    rows = np.array([17, 3, 3, 0])
    batch = ShardReader(shards).read(rows, masks=True)
    assert batch.valid_B.all()
    for row, image, mask in zip(rows.tolist(), batch.images, batch.masks or [], strict=True):
        with tarfile.open(root(shards) / shards.table["shard"][row].as_py()) as tar:
            for suffix, ours in (("jpg", image), ("mask.png", mask)):
                member = tar.extractfile(f"k{row:05d}.{suffix}")
                assert member is not None
                assert ours.tobytes() == member.read()
    assert ShardReader(shards).read(rows, masks=False).masks is None


@pytest.mark.parametrize("member", ["image", "mask"])
def test_a_flipped_byte_makes_that_row_alone_invalid(
    make_shards: MakeShards, caplog: pytest.LogCaptureFixture, member: str
) -> None:
    manifest = make_shards()
    rows = np.arange(12)
    clean = ShardReader(manifest).read(rows, masks=True)
    flip(manifest, 5, member)
    reader = ShardReader(manifest)
    with caplog.at_level(logging.WARNING, "cxrscale"):
        batch = reader.read(rows, masks=True)
        reader.read(rows, masks=True)
    assert batch.valid_B.tolist() == [row != 5 for row in range(12)]
    for row in set(range(12)) - {5}:
        assert np.array_equal(batch.images[row], clean.images[row])
    assert [sample.row for sample in reader.bad] == [5]
    assert sum("left out" in record.message for record in caplog.records) == 1
    assert "5.png" in caplog.text
    assert "part-00000.tar" in caplog.text
    assert decoded(batch.images[5]).shape == (8, 8)


def test_a_missing_mask_is_a_bad_row(make_shards: MakeShards) -> None:
    reader = ShardReader(make_shards(masks=False))
    assert not reader.read(np.arange(3), masks=True).valid_B.any()
    assert [sample.reason for sample in reader.bad] == ["has no mask"] * 3
    assert reader.read(np.arange(3), masks=False).valid_B.all()


def test_a_missing_or_short_shard_ends_the_run_with_a_remedy(make_shards: MakeShards) -> None:
    manifest = make_shards()
    path = root(manifest) / "part-00001.tar"
    complete = path.read_bytes()
    for content in (complete[:4000], b"", None):
        path.write_bytes(content) if content is not None else path.unlink()
        with pytest.raises(UserError, match=r"part-00001.tar .*cxrscale verify") as error:
            ShardReader(manifest).read(np.arange(10, 20), masks=False)
        assert "\n" not in str(error.value)
        assert ShardReader(manifest).read(np.arange(10), masks=False).valid_B.all()


def test_a_shard_that_is_cut_short_while_it_is_read_is_one_line(make_shards: MakeShards) -> None:
    """Under a memory map the process would end by SIGBUS, without a word."""
    manifest = make_shards()
    source = ShardReader(manifest)
    source.read(np.arange(10), masks=False)
    with (root(manifest) / "part-00000.tar").open("r+b") as shard:
        shard.truncate(4096)
    with pytest.raises(UserError, match=r"part-00000.tar is shorter than its manifest says; run `cxrscale verify`"):
        source.read(np.arange(10), masks=False)


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE])
def test_a_network_disk_that_fails_for_a_moment_costs_nothing(
    error: int, shards: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ShardReader(shards).read(np.arange(10), masks=False).images
    source, pread, failures = ShardReader(shards), os.pread, [OSError(error, os.strerror(error))] * 2

    def failing(*arguments: int) -> bytes:
        if failures:
            raise failures.pop()
        return pread(*arguments)

    monkeypatch.setattr(access, "RETRY_SECONDS", (0.01, 0.01))
    monkeypatch.setattr(os, "pread", failing)
    images = source.read(np.arange(10), masks=False).images
    assert [image.tobytes() for image in images] == [image.tobytes() for image in expected]
    failures += [OSError(error, os.strerror(error))] * 4
    with pytest.raises(AccessError, match=r"part-00000.tar cannot be reached \(.*\); check the disk"):
        source.read(np.arange(10), masks=False)
    assert not failures


MANY = """
import resource, sys
import numpy as np
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from cxrscale.loader.reader import ShardReader
from cxrscale.shards import manifest
data = manifest.load(*sys.argv[1:])
readers = ShardReader(data), ShardReader(data)  # as in training and in the validation between
rows = np.random.default_rng(0).permutation(len(data))
for _ in range(2):
    for reader in readers:
        assert reader.read(rows, masks=False).valid_B.all()
print(len(data))
"""


def test_5000_shards_need_256_open_files_at_most(make_shards: MakeShards) -> None:
    data = make_shards(count=1, masks=False)
    folder = root(data)
    names = [f"{number:04d}.tar" for number in range(5000)]
    for name in names:
        os.link(folder / "part-00000.tar", folder / name)
    columns = data.table.drop_columns(["root", "shard", "image_id"]).take(np.zeros(5000, np.int64))
    table = columns.append_column("shard", pa.array(names)).append_column("image_id", pa.array(names))
    rewrite_manifest(folder, table, data.metadata[0])
    ran = subprocess.run([sys.executable, "-c", MANY, str(folder)], capture_output=True, text=True)
    assert ran.stdout == "5000\n", ran.stderr


def test_sizes_are_those_of_the_stored_images(make_shards: MakeShards) -> None:
    packed, untouched = make_shards("a", size=40), make_shards("b", size=48, codec="source")
    for manifest, side in ((packed, 40), (untouched, 48)):
        height_B, width_B = ShardReader(manifest).sizes(np.array([2, 0]))
        assert (height_B.tolist(), width_B.tolist()) == ([side] * 2, [side] * 2)


def test_sizes_of_joined_datasets(make_shards: MakeShards, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = make_shards("a", size=40, count=4), make_shards("b", size=64, count=5)
    monkeypatch.setattr("cxrscale.shards.manifest._check_unique", lambda _: None)
    joined = manifests.load(str(root(first)), str(root(second)))
    assert ShardReader(joined).sizes(np.arange(9))[0].tolist() == [40] * 4 + [64] * 5
    batch = ShardReader(joined).read(np.arange(9), masks=False)
    assert [decoded(image).shape[0] for image in batch.images] == [40] * 4 + [64] * 5


def test_files_in_memory(caplog: pytest.LogCaptureFixture) -> None:
    files = [cv2.imencode(".png", chest(i, side))[1].tobytes() for i, side in enumerate((30, 50))]
    reader = MemoryReader([*files, b"no image", b""])
    with caplog.at_level(logging.WARNING, "cxrscale"):
        batch = reader.read(np.array([1, 0, 2, 3]), masks=False)
    assert batch.valid_B.tolist() == [True, True, False, False]
    assert reader.sizes(np.array([1, 0]))[0].tolist() == [50, 30]
    assert [sample.row for sample in reader.bad] == [2, 3]
    assert np.array_equal(decoded(batch.images[0]), chest(1, 50))
    with pytest.raises(UserError, match="masks"):
        reader.read(np.array([0]), masks=True)


def test_the_placeholder_is_an_image() -> None:
    assert decoded(reader.placeholder()).shape == (8, 8)


# webdataset leaves the tar that it has read for the garbage collector to close.
@pytest.mark.filterwarnings("ignore:.*part-00000.tar:ResourceWarning")
@pytest.mark.filterwarnings("ignore:.*part-00000.tar:pytest.PytestUnraisableExceptionWarning")
def test_other_readers_see_the_same_images(shards: Manifest, tmp_path: Path) -> None:
    """The shards are plain webdataset tars: `webdataset` and DALI's own reader find the same bytes in them."""
    path = root(shards) / "part-00000.tar"
    ours = [image.tobytes() for image in ShardReader(shards).read(np.arange(10), masks=False).images]
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
    gc.collect()
    assert [sample["jpg"] for sample in samples] == ours
    assert [sample["__key__"] for sample in samples] == [f"k{i:05d}" for i in range(10)]
    assert all({"mask.png", "json"} <= set(sample) for sample in samples)

    def graph() -> object:
        image = fn.readers.webdataset(
            paths=[str(path)],
            index_paths=[str(_index(path, tmp_path))],
            ext=["jpg"],
            missing_component_behavior="error",
        )
        return fn.decoders.image(image, output_type=types.GRAY)

    (image_list,) = pipeline_def(graph)(batch_size=10, num_threads=1, device_id=None).run()
    for i in range(10):
        assert np.array_equal(np.asarray(image_list.at(i))[..., 0], decoded(np.frombuffer(ours[i], np.uint8)))


def _index(path: Path, folder: Path) -> Path:
    """DALI's index of a tar (wds2idx v1.2)."""
    by_key: dict[str, list[str]] = {}
    with tarfile.open(fileobj=io.BytesIO(path.read_bytes())) as tar:
        for member in tar:
            key, suffix = member.name.split(".", 1)
            by_key.setdefault(key, []).append(f"{suffix} {member.offset_data} {member.size} {member.name}")
    index = folder / "shard.idx"
    index.write_text(f"v1.2 {len(by_key)}\n" + "".join(" ".join(members) + "\n" for members in by_key.values()))
    return index
