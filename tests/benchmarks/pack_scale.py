"""What packing would take at scale, from measured costs, and the planner and manifest run at that size.

    python -m tests.benchmarks.pack_scale [--cost-ms 10.5] [--rows 10000000] [--out results/pack_scale.json]

The table is arithmetic, not measurement: images x cost / cores against the bytes that disks and object stores can
move. The planner and the manifest below it are run for real with `--rows` records.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cxrscale.config import Pack
from cxrscale.config.findings import NIH14
from cxrscale.shards import layout, manifest
from cxrscale.types import ImageRecord

CORES = 32
"""Of a node."""
SOURCE_KB, STORED_KB = 400, 54
"""Of an NIH PNG and of its 512-pixel JPEG."""
LIMITS_MB = {"network disk": 250.0, "local NVMe": 2000.0, "object store": 1250.0}
"""MB/s a node can read and write at once: a cloud volume, a local disk, S3 through 10 Gbit/s."""


def projection(cost_ms: float) -> list[dict[str, Any]]:
    """Hours for each number of images, nodes and kind of storage, and which of CPU and storage sets them."""
    rows = []
    for images in (112_120, 1_000_000, 10_000_000):
        for nodes in (1, 8, 64):
            cpu = images * cost_ms / 1000 / (nodes * CORES) / 3600
            for storage, rate in LIMITS_MB.items():
                moved = images * (SOURCE_KB + STORED_KB) / 1000 / (nodes * rate) / 3600
                rows.append(
                    {
                        "images": images,
                        "nodes": nodes,
                        "storage": storage,
                        "hours": max(cpu, moved),
                        "bound": "CPU" if cpu >= moved else storage,
                        "written_GB": images * STORED_KB / 1e6,
                    }
                )
    return rows


def records(count: int) -> list[ImageRecord]:
    """As many records as asked, 3.64 images per patient as in ChestX-ray14."""
    states = dict.fromkeys(NIH14, 0)
    return [
        ImageRecord(
            image_id=f"{int(number / 3.64):08d}_{number % 100_000_000:08d}.png",
            source="nih",
            path="",
            patient=f"{int(number / 3.64):08d}",
            findings=states,
        )
        for number in range(count)
    ]


def planned(count: int) -> dict[str, float]:
    """Seconds of the planner over `count` records, and the peak memory of this process."""
    made = records(count)
    split = ["test" if number % 5 == 0 else "train" for number in range(count)]
    began = time.perf_counter()
    plans = layout.plan_shards(made, split, Pack())
    seconds = time.perf_counter() - began
    assert sum(len(plan.records) for plan in plans) == count
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"rows": count, "plan_s": seconds, "shards": len(plans), "peak_GB": peak}


def listed(count: int) -> dict[str, float]:
    """Size of a manifest of `count` rows, seconds to write and to load it."""
    rng = np.random.default_rng(0)
    number = np.arange(count)
    columns: dict[str, Any] = {
        "image_id": pa.array(np.char.add(np.char.zfill(number.astype(str), 12), ".png")),
        "key": rng.integers(-(2**63), 2**63 - 1, count),
        "patient": pa.array(np.char.zfill((number / 3.64).astype(np.int64).astype(str), 8)),
        "split": pa.array(np.where(number % 5 == 0, "test", "train")),
        "source": pa.array(np.full(count, "nih")),
        "shard": pa.array(np.char.add("train-", np.char.zfill((number // 2000).astype(str), 5))),
        "image_offset": number % 2000 * 55_000,
        "image_length": rng.integers(40_000, 70_000, count),
        "image_crc": rng.integers(0, 2**32, count).astype(np.uint32),
    }
    empty = {name: pa.nulls(count, kind) for name, kind in manifest.FIELDS if name not in columns}
    labels = {manifest.LABEL + name: (rng.random(count) < 0.05).astype(np.int8) for name in NIH14}
    rows = pa.table(columns | empty | labels).select(manifest.schema(NIH14).names).cast(manifest.schema(NIH14))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / manifest.NAME
        began = time.perf_counter()
        manifest.write(str(path), rows, {"format": manifest.FORMAT})
        written = time.perf_counter() - began
        began = time.perf_counter()
        loaded = manifest.load(folder)
        assert len(loaded.rows("train")) > 0
        return {
            "rows": count,
            "MB": path.stat().st_size / 1e6,
            "write_s": written,
            "load_s": time.perf_counter() - began,
        }


def main() -> None:
    """Print the projection, then run planner and manifest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cost-ms", type=float, default=10.5, help="CPU ms an image, from benchmarks.pack")
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows = projection(given.cost_ms)
    print(f"{'images':>12}{'nodes':>7}  {'storage':14}{'hours':>9}  bound by{'':10}{'GB written':>12}")
    for row in rows:
        print(
            f"{row['images']:12,}{row['nodes']:7}  {row['storage']:14}{row['hours']:9.2f}  {row['bound']:18}"
            f"{row['written_GB']:12.1f}"
        )
    run = [{**planned(count), **listed(count)} for count in (112_120, given.rows)]
    for found in run:
        print(
            f"{found['rows']:12,} rows: planned in {found['plan_s']:.1f} s into {found['shards']:,} shards, peak "
            f"{found['peak_GB']:.1f} GB; manifest {found['MB']:.0f} MB, written in {found['write_s']:.1f} s, "
            f"loaded in {found['load_s']:.1f} s"
        )
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps({"projection": rows, "run": run}, indent=2) + "\n")


if __name__ == "__main__":
    main()
