"""What a training picture costs on one CPU core: our readers on shards against PIL and torchvision on raw PNGs.

    python -m tests.benchmarks.batches --images FOLDER [--preset rsna] [--size 224] [--repeat 9]

The contenders take turns, a batch each, so that a machine whose speed wanders treats them alike. Prints the median
milliseconds a picture of each and its ratio to the first.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from itertools import count, repeat
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from cxrscale.batches import dali, reference
from cxrscale.batches.plan import Step
from cxrscale.batches.source import MemorySource
from cxrscale.config import PRESETS, Augment, Data
from cxrscale.schema import InputError

Contender = Callable[[], object]


def encoded(path: Path, side: int, quality: int = 95) -> bytes:
    """The picture as the shards hold it: grey JPEG of `side` pixels."""
    grey = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    if grey is None:
        raise InputError(f"{path} is no picture")
    small = cv2.resize(grey, (side, side), interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def torchvision_on_png(paths: list[Path], augment: Augment) -> Contender:
    """The usual way: PIL opens the archive's own file, torchvision augments it."""
    from PIL import Image
    from torchvision import transforms

    operations: list[Any] = [transforms.Resize((augment.size, augment.size))]
    if augment.hflip:
        operations.append(transforms.RandomHorizontalFlip(augment.hflip))
    if augment.rotation or augment.translation or augment.scale != (1.0, 1.0):
        shift = (augment.translation, augment.translation)
        operations.append(transforms.RandomAffine(augment.rotation, shift, augment.scale))
    if augment.brightness or augment.contrast:
        operations.append(transforms.ColorJitter(augment.brightness, augment.contrast))
    operations += [transforms.ToTensor(), transforms.Normalize([augment.mean], [augment.std])]
    chain = transforms.Compose(operations)
    return lambda: torch.stack([chain(Image.open(path).convert("L")) for path in paths])


def opencv_on_png(paths: list[Path], augment: Augment) -> Contender:
    """A leaner way: OpenCV opens the archive's own file and only resizes it."""
    size = (augment.size, augment.size)

    def batch() -> object:
        grey = [cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) for path in paths]
        small = [cv2.resize(each, size, interpolation=cv2.INTER_AREA) for each in grey if each is not None]
        return torch.from_numpy((np.stack(small)[:, None] / 255 - augment.mean) / augment.std).float()

    return batch


def ours(module: Any, files: list[bytes], augment: Augment, data: Data) -> Contender:
    """One of our readers, as training uses it."""
    rows = np.arange(len(files), dtype=np.int64)
    steps = (Step(rows, rows + len(files) * number, np.ones(len(files), np.bool_)) for number in count())
    label_NF = np.zeros((len(files), 1), np.float32)
    source = MemorySource(files)
    batches = module.batches(steps, source, label_NF, augment, data, rows, 0, True, torch.device("cpu"))
    return lambda: next(batches)


def interleaved(contenders: dict[str, Contender], rounds: int) -> Iterator[tuple[str, float]]:
    """(name, seconds) of each contender's batch, round by round; the first round only warms up."""
    for number in range(rounds + 1):
        for name, contender in contenders.items():
            began = time.perf_counter()
            contender()
            if number:
                yield name, time.perf_counter() - began


def main() -> None:
    """Run what the arguments say and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of PNGs, e.g. NIH's images_001/images")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="chexnet", help="augmentation")
    parser.add_argument("--batch", type=int, default=64, help="pictures a batch")
    parser.add_argument("--size", type=int, default=224, help="input side in pixels")
    parser.add_argument("--stored", type=int, default=512, help="side of the pictures in the shards")
    parser.add_argument("--threads", type=int, default=1, help="DALI's threads; the others use one")
    parser.add_argument("--repeat", type=int, default=9, help="rounds")
    given = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    found = sorted(given.images.glob("*.png"))
    if not found:
        raise SystemExit(f"{given.images} holds no PNGs; give --images FOLDER")
    paths = [
        path for _, path in zip(range(given.batch), (path for all_ in repeat(found) for path in all_), strict=False)
    ]
    files = [encoded(path, given.stored) for path in paths]
    augment = Augment.model_validate({"preset": given.preset, "size": given.size})
    # Prefetching would move work out of the time that is measured.
    data = Data(findings=("Effusion",), threads=given.threads, prefetch=1)
    contenders = {
        "PIL + torchvision, raw PNG": torchvision_on_png(paths, augment),
        "OpenCV, raw PNG, resize only": opencv_on_png(paths, augment),
        f"reference, {given.stored} JPEG": ours(reference, files, augment, data),
        f"DALI, {given.stored} JPEG": ours(dali, files, augment, data),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for name, elapsed in interleaved(contenders, given.repeat):
        seconds[name].append(elapsed)
    medians = {name: 1000 * float(np.median(times)) / len(paths) for name, times in seconds.items()}
    first = next(iter(medians.values()))
    print(f"{len(paths)} pictures a batch, {given.repeat} rounds, preset {given.preset}, load {os.getloadavg()[0]:.1f}")
    for name, median in medians.items():
        lowest = 1000 * min(seconds[name]) / len(paths)
        print(f"{name:32} {median:7.2f} ms a picture (best {lowest:.2f})  {first / median:5.1f}x")


if __name__ == "__main__":
    main()
