"""Small datasets, written here so that the tests that use them depend on nothing but the manifest's schema."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import webdataset

from cxrscale.shards import contents, manifest
from cxrscale.shards.manifest import Manifest

FINDINGS = ("Effusion", "Mass")

MakeShards = Callable[..., Manifest]


def chest(index: int, size: int) -> npt.NDArray[np.uint8]:
    """A smooth gray image with an edge and a blob, different for each index, so that wrong interpolation shows."""
    rng = np.random.default_rng(index)
    y, x = np.mgrid[0:size, 0:size] / size
    waves = sum(
        rng.normal() * np.sin(2 * np.pi * (rng.uniform(1, 6) * x + rng.uniform(1, 6) * y + rng.uniform()))
        for _ in range(5)
    )
    gray = 128 + 30 * waves + 50 * (x > rng.uniform(0.3, 0.7)) + 3 * rng.normal(size=(size, size))
    return np.asarray(np.clip(gray, 0, 255), np.uint8)


def blob(index: int, size: int) -> npt.NDArray[np.uint8]:
    """A mask of 0 and 255 with one ellipse; every third is empty."""
    rng = np.random.default_rng(index + 1000)
    mask = np.zeros((size, size), np.uint8)
    if index % 3:
        center = rng.integers(size // 4, 3 * size // 4, 2).tolist()
        axes = rng.integers(size // 10, size // 4, 2).tolist()
        cv2.ellipse(mask, center, axes, float(rng.uniform(0, 180)), 0, 360, 255, -1)
    return mask


def _member(suffix: str, image: npt.NDArray[np.uint8]) -> bytes:
    options = {"jpg": [cv2.IMWRITE_JPEG_QUALITY, 95], "png": [], "mask.png": [cv2.IMWRITE_PNG_BILEVEL, 1]}[suffix]
    return cv2.imencode("." + suffix.rsplit(".", 1)[-1], image, options)[1].tobytes()


def write_shards(
    root: Path, count: int = 24, size: int = 64, masks: bool = True, codec: str = "jpeg", per_shard: int = 10
) -> Manifest:
    """`count` images in tars of `per_shard`: two thirds train, one third val; a third has Effusion; some NaN."""
    root.mkdir(parents=True, exist_ok=True)
    suffix = "jpg" if codec == "jpeg" else "png"
    rows: list[dict[str, Any]] = []
    for number, start in enumerate(range(0, count, per_shard)):
        name, buffer = f"part-{number:05d}.tar", io.BytesIO()
        writer = webdataset.TarWriter(buffer, mtime=0, format=tarfile.USTAR_FORMAT, encoder=False)
        for i in range(start, min(start + per_shard, count)):
            sample = {"__key__": f"k{i:05d}", suffix: _member(suffix, chest(i, size))}
            if masks:
                sample["mask.png"] = _member("mask.png", blob(i, size))
            writer.write({**sample, "json": json.dumps({"id": f"{i}.png"}).encode()})
            rows.append(_row(i, name, size))
        writer.close()
        (root / name).write_bytes(buffer.getvalue())
        _add_offsets(rows[start:], root / name)
    about = {"format": manifest.FORMAT, "pack": {"codec": codec, "size": size, "masks": masks}, "shards": {}}
    table = pa.Table.from_pylist(rows, schema=manifest.schema(FINDINGS))
    manifest.write(str(root / manifest.NAME), table, about)
    return manifest.load(str(root))


def rewrite_manifest(root: Path | str, rows: pa.Table, metadata: Mapping[str, Any]) -> None:
    """Give a dataset another manifest, and a dataset.json that knows it."""
    manifest.write(str(Path(root, manifest.NAME)), rows, metadata)
    files = [path for path in Path(root).iterdir() if path.name != contents.NAME and not path.name.startswith(".")]
    contents.write(str(root), {path.name: contents.FileDigest.of(path.read_bytes()) for path in files})


def _row(index: int, shard: str, size: int) -> dict[str, Any]:
    return {
        "image_id": f"{index}.png",
        "key": manifest.image_key(f"{index}.png"),
        "source": "nih",
        "patient": f"p{index // 2}",
        "split": "val" if index % 3 == 2 else "train",
        "width": size,
        "height": size,
        "shard": shard,
        "label.Effusion": int(index % 3 == 1),
        "label.Mass": None if index % 5 == 0 else 0,
    }


def _add_offsets(rows: list[dict[str, Any]], path: Path) -> None:
    kinds = {"jpg": "image", "png": "image", "mask.png": "mask", "json": "json"}
    by_key = {f"k{row['image_id'].removesuffix('.png').zfill(5)}": row for row in rows}
    with tarfile.open(path) as tar:
        for member in tar:
            key, suffix = member.name.split(".", 1)
            file = tar.extractfile(member)
            assert file is not None
            location = {"offset": member.offset_data, "length": member.size, "crc": zlib.crc32(file.read())}
            by_key[key] |= {f"{kinds[suffix]}_{name}": value for name, value in location.items()}


@pytest.fixture
def make_shards(tmp_path: Path) -> MakeShards:
    """Writes a dataset into a folder of its own; keywords as in `write_shards`."""

    def make(name: str = "set", **options: Any) -> Manifest:
        return write_shards(tmp_path / name, **options)

    return make


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """24 images of 64 pixels with masks, in three tars; do not change it."""
    return write_shards(tmp_path_factory.mktemp("shards"))
