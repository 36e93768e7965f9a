"""What few open files cost: reads from 50 shards with room for 32 of them, and with room for all.

    python -m tests.benchmarks.open_shards [--shards 50] [--rounds 9] [--reads 4000]

32 is what a loader keeps open at `ulimit -n 256`. The contenders take turns over the same reads, in the loader's random
order, of files in the page cache. Prints medians over rounds, the median of the ratios within rounds, and the
difference as a share of decoding one such image (a 512-pixel JPEG, OpenCV, gray).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from cxrscale.loader.cache import RemoteShard
from cxrscale.loader.reader import OpenShards

IMAGES = 100
"""In one shard."""
LIMITS = {"room for all": 1024, "room for 32": 32}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--reads", type=int, default=4000)
    given = parser.parse_args(arguments)
    cv2.setNumThreads(1)
    rng = np.random.default_rng(0)
    smooth_HW = cv2.resize(rng.integers(0, 256, (64, 64), np.uint8), (512, 512), interpolation=cv2.INTER_CUBIC)
    jpeg = cv2.imencode(".jpg", smooth_HW)[1]
    with tempfile.TemporaryDirectory() as folder:
        shards = []
        for number in range(given.shards):
            path = Path(folder, f"{number}.tar")
            path.write_bytes(jpeg.tobytes() * IMAGES)
            shards.append(RemoteShard(str(path), None, path.stat().st_size))
        readers = {name: OpenShards(shards, limit) for name, limit in LIMITS.items()}
        seconds: dict[str, list[float]] = {name: [] for name in readers}
        for round_number in range(given.rounds + 1):
            order = rng.integers(0, (given.shards, IMAGES), (given.reads, 2)).tolist()
            for name, reader in readers.items():
                began = time.perf_counter()
                for shard, image in order:
                    reader.read(shard, image * len(jpeg), len(jpeg))
                if round_number:  # the first round warms up
                    seconds[name].append((time.perf_counter() - began) / given.reads)
    began = time.perf_counter()
    for _ in range(200):
        cv2.imdecode(jpeg, cv2.IMREAD_GRAYSCALE)
    decode = (time.perf_counter() - began) / 200
    base = seconds["room for all"]
    for name, values in seconds.items():
        ratio = statistics.median(value / other for value, other in zip(values, base, strict=True))
        print(f"{name:14}{1e6 * statistics.median(values):8.1f} us per read of {len(jpeg):,} bytes  {ratio:5.2f}")
    more = statistics.median(seconds["room for 32"]) - statistics.median(base)
    print(f"decoding it    {1e6 * decode:8.1f} us; the difference is {100 * more / decode:.2f}% of that")


if __name__ == "__main__":
    main()
