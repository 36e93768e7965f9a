"""Our loader alone on a GPU: images per second, the decoder's part of it, and the memory it takes."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import torch

from cxrscale.config import PRESETS, Augment, Data, Recipe, Sampler
from cxrscale.loader.loader import training_batches
from cxrscale.loader.reader import ShardReader
from cxrscale.shards.manifest import Manifest
from cxrscale.types import DistContext
from tests.benchmarks.batches_peers import Contender

BATCHES = 20
"""Batches a round: with prefetching, one alone says little."""


def measured(shards: Manifest, batch: int, size: int, rounds: int) -> dict[str, Any]:
    """Every preset with DALI's prefetching as in training, and decoding alone; interleaved."""
    if not torch.cuda.is_available():
        raise SystemExit("--device mixed wants a CUDA device and torch sees none; run it on a machine with a GPU")
    before = torch.cuda.mem_get_info()[0]
    work: dict[str, Contender] = {"decode alone": _decoding(shards, batch)}
    for preset in sorted(PRESETS):
        augment = Augment.model_validate({"preset": preset, "size": size})
        recipe = Recipe(data=Data(findings=("Effusion", "Mass")), sampler=Sampler(batch_size=batch), augment=augment)
        work[preset] = training_batches(shards, recipe, DistContext(device=torch.device("cuda"))).__next__
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, contender in work.items():
            elapsed = _seconds(contender)
            if number:
                seconds[name].append(elapsed)
    median = {name: statistics.median(times) / (BATCHES * batch) for name, times in seconds.items()}
    found: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "presets": {}}
    for name, each in median.items():
        share = median["decode alone"] / each
        found["presets"][name] = {"images_per_second": 1 / each, "decode_share": share}
        print(f"{name:14}{1 / each:10.0f} images per second, decoding is {100 * share:5.1f}% of it")
    found["memory_gb"] = (before - torch.cuda.mem_get_info()[0]) / 1e9
    print(f"{found['memory_gb']:.2f} GB of GPU memory for all {len(work)} graphs together")
    return found


def _seconds(contender: Contender) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(BATCHES):
        contender()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def _decoding(shards: Manifest, batch: int) -> Contender:
    """nvJPEG on the same files, nothing else."""
    from nvidia.dali import fn, pipeline_def, types

    files = ShardReader(shards).read(np.arange(batch, dtype=np.int64) % len(shards), False).images

    def graph() -> Any:
        encoded = fn.external_source(lambda: files, dtype=types.UINT8, ndim=1)
        return fn.decoders.image(encoded, device="mixed", output_type=types.GRAY, adjust_orientation=False)

    pipe = pipeline_def(graph)(
        batch_size=batch, num_threads=2, device_id=torch.cuda.current_device(), exec_dynamic=True
    )
    pipe.build()
    return lambda: pipe.run(torch.cuda.current_stream())
