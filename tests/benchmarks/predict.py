"""Images per second of `predict` over real files, beside the model alone, decoding alone, and a plain script.

    python -m tests.benchmarks.predict --images DIR [--arch densenet121] [--size 224] [--rounds 5] [--memory 10000]

DIR holds PNG or DICOM files at any depth. One thread decodes and one runs the model, as with 2 CPU cores. The
contenders take turns over the same files; ratios are medians over rounds. The plain script is what one writes first:
pydicom or PIL, a resize by PIL, torch, file by file. --memory N also predicts N files (the same ones again and again)
and 100, each in a process of its own, and prints the memory that each has taken.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import pydicom
import torch
from PIL import Image

from cxrscale import config
from cxrscale.config import NIH14, Recipe
from cxrscale.inference import Predictor, find_inputs
from cxrscale.inference.stored_images import encode_as_stored
from cxrscale.io import Strictness, load_image, storage
from cxrscale.models import build_model, forward
from cxrscale.training import checkpoint
from cxrscale.types import Batch

BATCH = 16


def make_run(folder: Path, arch: str, size: int) -> str:
    """A run with random weights, whose training images are said to be 512-pixel JPEGs."""
    given = [f"model.arch={arch}", "model.weights=none", f"augment.size={size}", f"data.findings=[{', '.join(NIH14)}]"]
    recipe = config.parse(Recipe, config.override({}, [*given, f"sampler.eval_batch_size={BATCH}"]), where="benchmark")
    model = build_model(recipe.model, recipe.data)
    state = {
        "model": model.state_dict(),
        "recipe": recipe.model_dump(mode="json"),
        "manifest": "none",
        "pixels": {"codec": "jpeg", "size": 512, "quality": 95},
    }
    (folder / checkpoint.BEST).write_bytes(checkpoint.dump(state))
    return str(folder)


def plain_script(predictor: Predictor, paths: Sequence[str], size: int) -> int:
    """What one writes first; how many images it took."""
    model = predictor._trained.model
    done = 0
    for path in paths:
        if path.endswith(".png"):
            image = Image.open(path).convert("L")
        else:
            pixels = pydicom.dcmread(path).pixel_array.astype(np.float32)
            image = Image.fromarray((255 * (pixels - pixels.min()) / max(1.0, np.ptp(pixels))).astype(np.uint8))
        small_HW = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR), dtype=np.float32) / 255
        with torch.no_grad():
            torch.sigmoid(model(torch.from_numpy(small_HW)[None, None]))
        done += 1
    return done


def contenders(predictor: Predictor, paths: Sequence[str], size: int) -> dict[str, Callable[[], int]]:
    """Name -> what predicts, or does a part of it; each returns the number of images."""
    model, pixels = predictor._trained.model, predictor._trained.pixels
    none_B = torch.zeros(BATCH, dtype=torch.int64)
    batch = Batch(torch.rand(BATCH, 1, size, size), torch.zeros(BATCH, 1), None, none_B, none_B.bool())

    def model_alone() -> int:
        # In the memory layout that training and prediction use.
        with torch.no_grad():
            for _ in range(len(paths) // BATCH):
                forward(model, batch, predictor.recipe.train, torch.device("cpu"))
        return len(paths) // BATCH * BATCH

    def decoding_alone() -> int:
        for path in paths:
            image = load_image(storage.read(path), name=path, strictness=Strictness.LENIENT)
            encode_as_stored(image.image_HW, pixels)
        return len(paths)

    def ours() -> int:
        return sum(not one.error for one in predictor.stream(paths, threads=1))

    return {
        "cxrscale predict": ours,
        "model alone": model_alone,
        "decoding alone": decoding_alone,
        "plain script": lambda: plain_script(predictor, paths, size),
    }


def memory(run: str, paths: Sequence[str], number: int) -> None:
    """Print the peak memory of this process in MB after that many predictions."""
    many: Iterator[str] = islice(cycle(paths), number)
    done = sum(1 for _ in Predictor(run, "cpu").stream(many))
    print(done, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", required=True)
    parser.add_argument("--arch", default="densenet121")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", type=int, default=0)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    paths = find_inputs([given.images]).paths
    if given.run:
        memory(given.run, paths, given.memory)
        return
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder), given.arch, given.size)
        _speed(contenders(Predictor(run, "cpu"), paths, given.size), given.rounds)
        if given.memory:
            peaks = [_peak(run, given.images, number) for number in (100, given.memory)]
            print(f"memory: {peaks[0]} MB after 100 files, {peaks[1]} MB after {given.memory}")


def _speed(all_of_them: dict[str, Callable[[], int]], rounds: int) -> None:
    speeds: dict[str, list[float]] = {name: [] for name in all_of_them}
    for number in range(rounds + 1):
        for name, contender in all_of_them.items():
            began = time.perf_counter()
            images = contender()
            if number:  # the first round warms up
                speeds[name].append(images / (time.perf_counter() - began))
    for name, values in speeds.items():
        print(f"{name:18}{statistics.median(values):8.1f} images/s")
    slower = [min(pair) for pair in zip(speeds["model alone"], speeds["decoding alone"], strict=True)]
    for name, base in (("the slower of model and decoding", slower), ("the plain script", speeds["plain script"])):
        ratios = [mine / other for mine, other in zip(speeds["cxrscale predict"], base, strict=True)]
        print(f"cxrscale predict to {name}: {statistics.median(ratios):.2f}")


def _peak(run: str, images: str, number: int) -> int:
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.predict", "--images", images, "--run", run]
    ran = subprocess.run([*command, "--memory", str(number)], capture_output=True, text=True, check=True)
    done, peak = map(int, ran.stdout.split())
    assert done == number
    return peak


if __name__ == "__main__":
    main()
