"""What maps cost beside the prediction: exact maps of all findings, and Grad-CAM of one.

    python -m tests.benchmarks.explain [--arch densenet121] [--size 224] [--batch 8] [--rounds 7] [--out FILE.json]

The contenders take turns over the same batch of noise, in one thread; ratios to a forward pass are medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from cxrscale import config
from cxrscale.config import NIH14, Recipe
from cxrscale.inference import MapMaker
from cxrscale.io import storage
from cxrscale.models import GradientMaps, build_model, forward
from cxrscale.types import Batch

CPU = torch.device("cpu")


def contenders(recipe: Recipe, count: int) -> dict[str, Callable[[], object]]:
    """Name -> what is timed."""
    torch.manual_seed(0)
    model = build_model(recipe.model, recipe.data).eval()
    size = recipe.augment.size
    image_BCHW = torch.rand(count, 1, size, size)
    batch = Batch(image_BCHW, torch.zeros(count, 1), None, torch.arange(count), torch.ones(count, dtype=torch.bool))
    maker, gradients, everything = MapMaker(model, recipe, CPU), GradientMaps(model), range(len(NIH14))

    def plain() -> object:
        with torch.no_grad():
            return forward(model, batch, recipe.train, CPU)

    return {
        "forward": plain,
        f"forward and {maker.method} maps of 14 findings": lambda: maker(batch, everything),
        "Grad-CAM of 1 finding": lambda: gradients.maps(image_BCHW, [0]),
    }


def main() -> None:
    """Print milliseconds per image and the ratio to a forward pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="densenet121")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="also write JSON")
    given = parser.parse_args()
    torch.set_num_threads(1)
    fields = [f"model.arch={given.arch}", "model.weights=none", f"augment.size={given.size}"]
    recipe = config.parse(
        Recipe, config.override({}, [*fields, f"data.findings=[{', '.join(NIH14)}]"]), where="benchmark"
    )
    timed = contenders(recipe, given.batch)
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for turn in range(given.rounds + 1):
        for name, run in timed.items():
            # CPU time: another process on the machine costs wall time alone.
            began = time.process_time()
            run()
            if turn:  # the first is a warm-up
                seconds[name].append(time.process_time() - began)
    work = {}
    for name, values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(values, seconds["forward"], strict=True))
        milliseconds = 1000 * statistics.median(values) / given.batch
        print(f"{name:<46} {milliseconds:8.1f} CPU ms per image  {ratio:6.3f} x")
        work[name] = {"cpu_ms_per_image": round(milliseconds, 1), "forward_passes": round(ratio, 3)}
    if given.out:
        arguments = {key: value for key, value in vars(given).items() if key != "out"}
        about = {"machine": platform.machine(), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
        result = {**about, "torch": torch.__version__, "arguments": arguments, "work": work}
        storage.write(str(given.out), json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
