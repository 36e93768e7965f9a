"""Milliseconds per image of several forms of a model, measured in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

BATCHES = (1, 8)
ROUNDS = 7
SECONDS = 60.0
"""After so long no further round begins, but three are done."""


@dataclass(frozen=True, slots=True)
class Latency:
    """Of one form and batch size."""

    milliseconds: float
    """Median per image."""
    times_first: float
    """Median over rounds of the first form's time over this one's: above 1 it is faster."""


def measure(
    forms: Mapping[str, nn.Module],
    size: int,
    batches: tuple[int, ...] = BATCHES,
    rounds: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[int, Latency]]:
    """Form -> batch size -> its latency on the CPU, with torch's number of threads.

    The forms take turns in each round, so that a machine whose speed wanders treats them alike.

    Args:
        forms: the first is what the others are compared with; each takes (B, 1, size, size) in channels_last.
        rounds: after one that warms up; None: `ROUNDS`.
        clock: seconds; `time.process_time` counts those of all threads, whatever else the machine does.
    """
    rounds = ROUNDS if rounds is None else rounds
    result: dict[str, dict[int, Latency]] = {name: {} for name in forms}
    for batch in batches:
        image_BCHW = torch.rand(batch, 1, size, size).contiguous(memory_format=torch.channels_last)
        times: dict[str, list[float]] = {name: [] for name in forms}
        began = time.perf_counter()
        for number in range(rounds + 1):
            if number > 3 and time.perf_counter() - began > SECONDS:
                break
            for name, model in forms.items():
                start = clock()
                with torch.no_grad():
                    model(image_BCHW)
                if number:  # the first round warms up
                    times[name].append((clock() - start) * 1000 / batch)
        first = times[next(iter(forms))]
        for name, values in times.items():
            ratios = [base / own for base, own in zip(first, values, strict=True)]
            result[name][batch] = Latency(statistics.median(values), statistics.median(ratios))
    return result
