"""Sources are read from S3 and shards written to it, on a real S3 server."""

from pathlib import Path

import fsspec
import pytest

from cxrscale.shards import build, manifest
from cxrscale.shards.verify import verify
from cxrscale.sources.synthetic.archive import SyntheticPaths
from cxrscale.types import UserError
from tests.shards.test_pack import SETTINGS, contents


def remote_contents(address: str) -> dict[str, bytes]:
    files, root = fsspec.core.url_to_fs(address)
    files.invalidate_cache()
    return {path.rsplit("/", 1)[1]: files.cat_file(path) for path in files.ls(root, detail=False)}


@pytest.fixture(scope="module")
def remote_root(drawn: SyntheticPaths, s3: str) -> str:
    files, root = fsspec.core.url_to_fs(f"{s3}/source")
    files.put(f"{drawn.nih}/", f"{root}/", recursive=True)
    return f"{s3}/source"


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("local", [True, False], ids=["in-process", "ray"])
def test_packing_from_s3_to_s3_gives_the_same_bytes(remote_root: str, s3: str, nih_shards: str, local: bool) -> None:
    out = f"{s3}/shards-{local}"
    packed = build.build_shards("nih", remote_root, SETTINGS, out, local=local)
    assert (packed.images, packed.quarantined) == (80, 0)
    assert remote_contents(out) == contents(nih_shards)
    assert verify(out) == []
    assert manifest.load(out).digest == manifest.load(nih_shards).digest
    assert not build.build_shards("nih", remote_root, SETTINGS, out, local=local).fresh


def test_a_flipped_byte_in_s3_is_found(drawn: SyntheticPaths, s3: str) -> None:
    out = f"{s3}/damaged"
    build.build_shards("nih", str(drawn.nih), SETTINGS, out, local=True)
    files, root = fsspec.core.url_to_fs(f"{out}/test-00000.tar")
    content = bytearray(files.cat_file(root))
    content[1000] ^= 4
    files.pipe_file(root, bytes(content))
    assert [fault.split(":")[0] for fault in verify(out)] == ["test-00000.tar"]


def test_file_addresses_are_local(drawn: SyntheticPaths, nih_shards: str, tmp_path: Path) -> None:
    build.build_shards("nih", f"file://{drawn.nih}", SETTINGS, f"file://{tmp_path}/out", local=True)
    assert contents(tmp_path / "out") == contents(nih_shards)


def test_a_missing_bucket_is_one_line(drawn: SyntheticPaths, s3: str) -> None:
    with pytest.raises(UserError, match="s3://nobucket"):
        build.build_shards("nih", str(drawn.nih), SETTINGS, f"{s3.replace('cxr', 'nobucket')}/x", local=True)
