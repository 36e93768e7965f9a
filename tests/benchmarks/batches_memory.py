"""Resident memory of our pipeline over many batches: it must not grow."""

from __future__ import annotations

import gc
import time
from typing import Any

import numpy as np
import psutil

from cxrscale.config import Augment, Data, Recipe, Sampler
from cxrscale.loader.loader import training_batches
from cxrscale.shards.manifest import Manifest

STORED, SIZE, BATCH = 64, 48, 4
"""Images of 64 pixels to inputs of 48, four a batch: a leak is a leak an iteration, whatever the size."""
WARM, SAMPLES = 0.1, 100
MEGABYTES = 5.0
SHARE = 0.01


def measured(shards: Manifest, steps: int) -> dict[str, Any]:
    """Go through `steps` batches; flat is growth below 1% or 5 MB from the first to the last tenth after warm-up."""
    augment = Augment.model_validate({"preset": "effusion", "size": SIZE, "blur": 0.1, "clahe": "random"})
    process, began = psutil.Process(), time.perf_counter()
    every, step_S, megabytes_S = max(1, steps // SAMPLES), [], []
    recipe = Recipe(data=Data(findings=("Effusion", "Mass")), sampler=Sampler(batch_size=BATCH), augment=augment)
    batches = training_batches(shards, recipe)
    for step in range(1, steps + 1):
        next(batches)
        if step % every == 0:
            gc.collect()
            step_S.append(step)
            megabytes_S.append(process.memory_info().rss / 1e6)
            if len(step_S) % 10 == 0:
                print(f"{step:>8,} batches  {megabytes_S[-1]:8.1f} MB")
    batches.close()
    warm = int(WARM * len(step_S))
    kept, tenth = np.array(megabytes_S[warm:]), max(1, (len(step_S) - warm) // 10)
    slope = float(np.polyfit(step_S[warm:], kept, 1)[0]) * 1000 if len(kept) > 1 else float("nan")
    first, last = float(np.median(kept[:tenth])), float(np.median(kept[-tenth:]))
    flat = last - first < max(MEGABYTES, SHARE * first)
    print(f"{steps:,} batches of {BATCH} x {SIZE} x {SIZE} in {time.perf_counter() - began:.0f} s")
    print(f"{first:.1f} -> {last:.1f} MB, {slope:+.3f} MB a thousand batches: {'flat' if flat else 'GROWING'}")
    return {
        "batches": steps,
        "batch": BATCH,
        "size": SIZE,
        "first_mb": first,
        "last_mb": last,
        "slope_mb_per_1000": slope,
        "flat": flat,
    }
