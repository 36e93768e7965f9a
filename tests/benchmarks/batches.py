"""The time of a training batch: our complete pipeline beside the usual loaders, interleaved in one run.

    python -m tests.benchmarks.batches --images DIR [--preset rsna] [--rounds 9] [--out results/batches.json]
    python -m tests.benchmarks.batches --images DIR --memory
    python -m tests.benchmarks.batches --images DIR --device mixed        (where there is a GPU)

DIR is a folder of PNGs, e.g. NIH's images_001/images; they are packed into real shards first. Every contender delivers
normalized batches of the same size under the same kind of augmentation; the contenders take turns, one batch each, in
one process with one thread each, so that changes of the machine's speed affect all alike. CPU is the time of all
threads.
Ratios are medians over rounds of the ratio within a round.

Peers that are not installed are left out and named. They are no dependencies of cxrscale; in an environment of their
own that sees this one's packages:

    pip install --no-deps litdata lightning-utilities obstore tifffile
    pip install --no-deps mosaicml-streaming catalog python-snappy cramjam zstd brotli xxhash transformers tokenizers
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import torch

from cxrscale.config import PRESETS, Augment, Data, Loader, Pack, Recipe, Sampler
from cxrscale.loader.augment import sample_params
from cxrscale.loader.loader import open_training_stream, training_batches
from cxrscale.loader.reader import ShardReader
from cxrscale.loader.sampler import training_indices
from cxrscale.shards import layout, manifest, pack
from cxrscale.shards.manifest import Manifest
from cxrscale.types import ImageRecord
from tests.benchmarks import batches_device, batches_memory, batches_peers
from tests.benchmarks.batches_peers import Contender, Material

USUAL, READER, OURS, OPENCV = "PIL + torchvision, raw PNG", "DALI readers.webdataset", "cxrscale", "cxrscale, OpenCV"
SAMPLER, PARAMS = "cxrscale: sampler + reader", "cxrscale: augmentation parameters"


def packed(paths: list[Path], out: str, size: int) -> Manifest:
    """The PNGs as a dataset whose every image is for training."""
    records = [
        ImageRecord(path.name, "nih", str(path), path.name.split("_")[0], {"Effusion": number % 2, "Mass": 0})
        for number, path in enumerate(paths)
    ]
    rows = layout.SplitRecords(records, ["train"] * len(records))
    pack.pack(rows, Pack(size=size, samples_per_shard=60), out, local=True)
    return manifest.load(out)


def recipe_of(augment: Augment, batch: int) -> Recipe:
    """The recipe of our loader for the PNGs."""
    return Recipe(data=Data(findings=("Effusion", "Mass")), sampler=Sampler(batch_size=batch), augment=augment)


def sampler_and_reader(shards: Manifest, recipe: Recipe) -> Iterator[object]:
    """The rows and their checked bytes: what our pipeline does before its graph."""
    reader, label_NF = ShardReader(shards), shards.labels(recipe.data.findings)
    for step in training_indices(open_training_stream(shards, recipe)):
        yield reader.read(step.row_B, False), label_NF[step.row_B]


def params(shards: Manifest, recipe: Recipe) -> Iterator[object]:
    """The parameters of every image's augmentation, alone."""
    reader = ShardReader(shards)
    for step in training_indices(open_training_stream(shards, recipe)):
        key_B, size_B = shards.key[step.row_B], reader.sizes(step.row_B)
        yield sample_params(recipe.augment, 0, key_B, step.stream_pos_B, size_B, True)


def contenders(material: Material, threads: int) -> dict[str, Contender]:
    """All that can run here."""
    shards, recipe = material.shards, recipe_of(material.augment, material.batch)
    result: dict[str, Contender] = {USUAL: batches_peers.torchvision_on_png(material)}
    result |= batches_peers.installed(material)
    result[READER] = batches_peers.dali_reader(material, threads)
    for name, backend in ((OURS, "dali"), (OPENCV, "opencv")):
        # Prefetching would move work out of the time that is measured.
        loader = Loader.model_validate({"backend": backend, "num_threads": threads, "prefetch": 1})
        result[name] = training_batches(shards, recipe.model_copy(update={"loader": loader})).__next__
    result[SAMPLER] = sampler_and_reader(shards, recipe).__next__
    result[PARAMS] = params(shards, recipe).__next__
    return result


def cpu() -> float:
    """CPU seconds of all threads of this process and its finished children."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def interleaved(contenders: dict[str, Contender], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Seconds of each contender's batch, round by round; the first two rounds only warm up."""
    times: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for number in range(rounds + 2):
        for name, contender in contenders.items():
            wall, spent = time.perf_counter(), cpu()
            contender()
            if number > 1:
                times[name].append({"wall": time.perf_counter() - wall, "cpu": cpu() - spent})
    return times


def table(times: dict[str, list[dict[str, float]]], batch: int) -> dict[str, dict[str, float]]:
    """Print and return medians in ms an image, and how many times as fast as the usual loader each is."""
    print(f"{'ms an image':34}{'cpu':>8}{'wall':>8}{'x usual, cpu':>14}{'wall':>8}")
    found: dict[str, dict[str, float]] = {}
    for name, rounds in times.items():
        row = {kind: 1000 * statistics.median(r[kind] for r in rounds) / batch for kind in ("cpu", "wall")}
        for kind in ("cpu", "wall"):
            row[f"{kind}_times_usual"] = ratio(times, USUAL, name, kind)
        found[name] = row
        print(
            f"{name:34}{row['cpu']:8.3f}{row['wall']:8.3f}{row['cpu_times_usual']:14.1f}{row['wall_times_usual']:8.1f}"
        )
    return found


def ratio(times: dict[str, list[dict[str, float]]], above: str, below: str, kind: str) -> float:
    """Median over rounds of one contender's seconds over another's."""
    pairs = zip(times[above], times[below], strict=True)
    return statistics.median(one[kind] / max(1e-9, other[kind]) for one, other in pairs)


def verdict(times: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """Print and return how we stand: against the usual loader, each peer, and the share of sampler and reader."""
    found = {f"{name}, cpu": ratio(times, name, OURS, "cpu") for name in times if name not in (OURS, SAMPLER, PARAMS)}
    for name, value in found.items():
        print(f"{name:40} takes {value:5.2f} of cxrscale's CPU time")
    for name in (SAMPLER, PARAMS):
        found[f"{name}, share"] = ratio(times, name, OURS, "cpu")
        print(f"{name:40} {100 * found[f'{name}, share']:5.1f}% of cxrscale's CPU time")
    return found


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of PNGs")
    parser.add_argument("--count", type=int, default=240, help="how many of them")
    parser.add_argument("--preset", choices=sorted(PRESETS), default=[], action="append", help="may be repeated")
    parser.add_argument("--batch", type=int, default=64, help="images per batch")
    parser.add_argument("--size", type=int, default=224, help="input side in pixels")
    parser.add_argument("--stored", type=int, default=512, help="side of the images in the shards")
    parser.add_argument("--threads", type=int, default=1, help="DALI's threads; the others use one")
    parser.add_argument("--rounds", type=int, default=9, help="timed batches of each contender")
    parser.add_argument("--device", choices=["cpu", "mixed"], default="cpu", help="mixed: our loader on a GPU, alone")
    parser.add_argument("--memory", action="store_true", help="resident memory over many small batches instead")
    parser.add_argument("--steps", type=int, default=20_000, help="for --memory: batches")
    parser.add_argument("--out", type=Path, help="JSON of the figures")
    return parser.parse_args()


def compared(given: argparse.Namespace, paths: list[Path], shards: Manifest, folder: Path) -> dict[str, Any]:
    """All presets, all contenders."""
    found: dict[str, Any] = {}
    for preset in given.preset or ["chexnet", "rsna", "effusion"]:
        augment = Augment.model_validate({"preset": preset, "size": given.size})
        material = Material(paths, shards, augment, given.batch, folder)
        print(f"\npreset {preset}, load {os.getloadavg()[0]:.1f}")
        times = interleaved(contenders(material, given.threads), given.rounds)
        found[preset] = {"contenders": table(times, given.batch), "of cxrscale": verdict(times)}
        found[preset]["load"] = os.getloadavg()[0]
    return found


def main() -> None:
    """Run what the arguments say, print it, and keep the figures where --out says."""
    given = arguments()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    paths = sorted(given.images.glob("*.png"))[: given.count]
    if not paths:
        raise SystemExit(f"{given.images} holds no PNGs; give --images FOLDER")
    found: dict[str, Any] = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "settings": {name: str(value) for name, value in vars(given).items() if name not in ("images", "out")},
    }
    work: dict[str, Callable[[Manifest, Path], dict[str, Any]]] = {
        "batches": lambda shards, folder: compared(given, paths, shards, folder),
        "memory": lambda shards, _: batches_memory.measured(shards, given.steps),
        "device": lambda shards, _: batches_device.measured(shards, given.batch, given.size, given.rounds),
    }
    kind = "memory" if given.memory else "device" if given.device == "mixed" else "batches"
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        shards = packed(paths, f"{name}/shards", batches_memory.STORED if given.memory else given.stored)
        found[kind] = work[kind](shards, Path(name))
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
