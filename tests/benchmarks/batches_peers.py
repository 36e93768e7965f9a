"""The loaders that others use, each as a function that returns the next batch: (B, 1, H, W) float32, normalized.

Those that only bring bytes (webdataset, litdata, mosaicml-streaming) are given our own OpenCV augmentation: it is the
fastest that we know, so what differs is the loader.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, count, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cxrscale.config import Augment
from cxrscale.loader import opencv
from cxrscale.loader.augment import sample_params, to_pixel_centers
from cxrscale.loader.reader import ShardReader
from cxrscale.shards.manifest import Manifest

Contender = Callable[[], object]


@dataclass(frozen=True)
class Material:
    """What every loader loads, and how."""

    paths: list[Path]
    """The archive's own PNGs."""
    shards: Manifest
    augment: Augment
    batch: int
    folder: Path
    """Where peers may put their copies."""

    @property
    def tars(self) -> list[str]:
        """The shards' files."""
        root = Path(self.shards.table["root"][0].as_py())
        return sorted(str(path) for path in root.glob("*.tar"))

    def files(self) -> list[bytes]:
        """The JPEGs of the shards, for copies in other formats."""
        rows = np.arange(len(self.shards), dtype=np.int64)
        return [image.tobytes() for image in ShardReader(self.shards).read(rows, False).images]


def torchvision_on_png(material: Material) -> Contender:
    """The usual way: PIL opens the archive's own file, torchvision augments it."""
    from PIL import Image
    from torchvision import transforms

    augment, size = material.augment, (material.augment.size, material.augment.size)
    operations: list[Any] = [transforms.Resize(size)]
    if augment.crop_area != (1.0, 1.0):
        operations = [transforms.RandomResizedCrop(size, augment.crop_area, (1.0, 1.0))]
    if augment.hflip:
        operations.append(transforms.RandomHorizontalFlip(augment.hflip))
    if _moved(augment):
        shift = (augment.translation, augment.translation)
        operations.append(transforms.RandomAffine(augment.rotation, shift, augment.scale))
    if augment.brightness or augment.contrast:
        operations.append(transforms.ColorJitter(augment.brightness, augment.contrast))
    operations.append(transforms.ToTensor())
    if augment.noise:
        operations.append(lambda image: image + augment.noise * torch.randn_like(image))
    if augment.normalize == "minmax":
        operations.append(lambda image: (image - image.min()) / (image.max() - image.min()).clamp_min(1e-6))
    else:
        operations.append(transforms.Normalize([augment.mean], [augment.std]))
    composed = transforms.Compose(operations)
    order = _shuffled(material.paths)

    def batch() -> object:
        chosen = [next(order) for _ in range(material.batch)]
        return torch.stack([composed(Image.open(path).convert("L")) for path in chosen])

    return batch


def installed(material: Material) -> dict[str, Contender]:
    """The peers that are here; says which are not, and how to get them."""
    peers: dict[str, tuple[str, str, Callable[[Material], Iterator[bytes]]]] = {
        "webdataset + OpenCV": ("webdataset", "webdataset", _webdataset),
        "litdata + OpenCV": ("litdata", "litdata lightning-utilities obstore tifffile", _litdata),
        "mosaicml-streaming + OpenCV": ("streaming", "mosaicml-streaming; the rest is in batches.py", _streaming),
    }
    found: dict[str, Contender] = {}
    for name, (module, package, make) in peers.items():
        if importlib.util.find_spec(module) is None:
            print(f"{name} is left out: pip install --no-deps {package}")
        else:
            found[name] = _augmented(make(material), material)
    return found


def _augmented(files: Iterator[bytes], material: Material) -> Contender:
    """OpenCV on the next files: decode, one warp, and what else the preset wants."""
    augment, size_B = material.augment, np.full(material.batch, _stored(material.shards))
    params_of_batches = (
        sample_params(augment, 0, np.arange(material.batch), np.arange(material.batch) + start, (size_B, size_B), True)
        for start in count(0, material.batch)
    )

    def batch() -> object:
        params = next(params_of_batches)
        matrix_B23 = to_pixel_centers(params.matrix_B23)
        encoded = (np.frombuffer(next(files), np.uint8) for _ in range(material.batch))
        images = [opencv.augmented_image(file, i, matrix_B23[i], params, augment) for i, file in enumerate(encoded)]
        return torch.from_numpy(np.stack(images)[:, None])

    return batch


def _webdataset(material: Material) -> Iterator[bytes]:
    import webdataset

    data = webdataset.WebDataset(material.tars, shardshuffle=len(material.tars)).shuffle(100)
    return (sample["jpg"] for sample in _endless(data.to_tuple("jpg", "json").map(_named)))


def _named(pair: tuple[bytes, bytes]) -> dict[str, bytes]:
    return dict(zip(("jpg", "json"), pair, strict=True))


def _litdata(material: Material) -> Iterator[bytes]:
    from litdata import StreamingDataset, optimize  # type: ignore[import-not-found,unused-ignore]

    out = material.folder / "litdata"
    if not out.exists():
        samples = list(enumerate(material.files()))
        optimize(_litdata_sample, samples, str(out), num_workers=1, chunk_bytes="4MB", verbose=False)
    return (sample["jpg"] for sample in _endless(StreamingDataset(str(out), shuffle=True)))


def _litdata_sample(sample: tuple[int, bytes]) -> dict[str, Any]:
    return {"id": sample[0], "jpg": sample[1]}


def _streaming(material: Material) -> Iterator[bytes]:
    from streaming import MDSWriter, StreamingDataset  # type: ignore[import-not-found,unused-ignore]
    from streaming.base.util import clean_stale_shared_memory  # type: ignore[import-not-found,unused-ignore]

    out = material.folder / "mds"
    if not out.exists():
        with MDSWriter(out=str(out), columns={"id": "int", "jpg": "bytes"}, size_limit=1 << 22) as writer:
            for number, file in enumerate(material.files()):
                writer.write({"id": number, "jpg": file})
    clean_stale_shared_memory()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = StreamingDataset(local=str(out), shuffle=True, batch_size=material.batch)
    return (sample["jpg"] for sample in _endless(data))


def dali_reader(material: Material, threads: int) -> Contender:
    """DALI's own reader of our shards, with DALI's own random operators: what its documentation shows."""
    from nvidia.dali import fn, pipeline_def, types

    augment, size = material.augment, material.augment.size

    def graph() -> Any:
        indices = [tar.replace(".tar", ".idx") for tar in material.tars]
        read: Any = fn.readers.webdataset
        jpeg, about = read(
            paths=material.tars, index_paths=indices, ext=["jpg", "json"], random_shuffle=True, initial_fill=100
        )
        image = fn.decoders.image(jpeg, output_type=types.GRAY)
        if augment.crop_area == (1.0, 1.0):
            image = fn.resize(image, size=(size, size))
        else:
            image = fn.random_resized_crop(
                image, size=(size, size), random_area=augment.crop_area, random_aspect_ratio=(1.0, 1.0)
            )
        if _moved(augment):
            image = fn.warp_affine(image, matrix=_random_matrix(augment), fill_value=0.0, inverse_map=False)
        if augment.brightness or augment.contrast:
            image = fn.brightness_contrast(
                image, brightness_shift=_uniform(augment.brightness), contrast=_uniform(augment.contrast, 1.0)
            )
        if augment.noise:
            image = fn.noise.gaussian(image, stddev=255 * augment.noise)
        flip = fn.random.coin_flip(probability=augment.hflip)
        if augment.normalize == "minmax":
            image = fn.cast(fn.flip(image, horizontal=flip), dtype=types.FLOAT)
            low, high = fn.reductions.min(image, keep_dims=True), fn.reductions.max(image, keep_dims=True)
            return (image - low) / (high - low + 1e-6), about
        mean, std = [255 * augment.mean], [255 * augment.std]
        return fn.crop_mirror_normalize(image, mirror=flip, mean=mean, std=std, dtype=types.FLOAT), about

    make = pipeline_def(graph)
    pipe = make(
        batch_size=material.batch,
        num_threads=threads,
        device_id=None,
        prefetch_queue_depth=1,
        exec_dynamic=True,
        seed=0,
    )
    pipe.build()
    return lambda: torch.utils.dlpack.from_dlpack(pipe.run()[0].as_tensor())


def _random_matrix(augment: Augment) -> Any:
    from nvidia.dali import fn

    center = (augment.size / 2, augment.size / 2)
    shift = augment.translation * augment.size
    matrix = fn.transforms.rotation(angle=_uniform(augment.rotation), center=center)
    matrix = fn.transforms.scale(
        matrix, scale=fn.random.uniform(range=augment.scale, shape=(1,)) * np.ones(2, np.float32), center=center
    )
    return fn.transforms.translation(matrix, offset=fn.random.uniform(range=(-shift, shift), shape=(2,)))


def _uniform(bound: float, center: float = 0.0) -> Any:
    from nvidia.dali import fn

    return fn.random.uniform(range=(center - bound, center + bound))


def _moved(augment: Augment) -> bool:
    return bool(augment.rotation or augment.translation or augment.scale != (1.0, 1.0))


def _stored(shards: Manifest) -> int:
    return int(shards.metadata[0]["pack"]["size"])


def _endless(data: Iterable[Any]) -> Iterator[Any]:
    return chain.from_iterable(repeat(data))


def _shuffled(paths: list[Path]) -> Iterator[Path]:
    rng = np.random.default_rng(0)
    return (paths[i] for _ in repeat(None) for i in rng.permutation(len(paths)))
