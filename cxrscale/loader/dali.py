"""Steps -> batches through one DALI graph; the device is the only difference between the CPU's and the GPU's.

The graph holds no random state: matrices, flags and offsets are handed to it as data, so that prefetching, threads,
restarts and devices cannot change what comes out. `reference.py` says what must come out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.utils.dlpack
from nvidia.dali import fn, math, pipeline_def, types

from cxrscale.config import Augment, Data, Loader
from cxrscale.loader.augment import HALF, AugmentParams, fits_inside, noise_bank, sample_params
from cxrscale.loader.hashing import Rows
from cxrscale.loader.reader import UNDECODABLE, EncodedBytes, Reader, find_undecodable
from cxrscale.loader.sampler import BatchIndices
from cxrscale.types import Batch

ONE_RIGHT_ONE_DOWN = np.array([[0, 0, 1], [0, 0, 1]], np.float32)
"""What a frame of one pixel adds to a map onto an image."""

KINDS: dict[str, tuple[types.DALIDataType, int, str]] = {
    "image": (types.UINT8, 1, ""),
    "mask": (types.UINT8, 1, ""),
    "matrix": (types.FLOAT, 2, ""),
    "inside": (types.BOOL, 0, ""),
    "framed": (types.INT32, 1, ""),
    "clahe": (types.BOOL, 0, ""),
    "blur": (types.BOOL, 0, ""),
    "shift": (types.FLOAT, 0, ""),
    "gain": (types.FLOAT, 0, ""),
    "amplitude": (types.FLOAT, 0, ""),
    "noise": (types.FLOAT, 3, "HWC"),
}
"""What the graph can be handed: element type, dimensions an image, layout."""


def batches(
    steps: Iterable[BatchIndices],
    source: Reader,
    label_NF: npt.NDArray[np.float32],
    augment: Augment,
    data: Data,
    key_N: Rows,
    seed: int,
    training: bool,
    device: torch.device | str,
) -> Generator[Batch, None, None]:
    """The steps' batches, one by one; a batch stays valid for as long as it is held.

    Building the graph costs some 10 ms (0.3 s the first time in a process): an iterator an epoch is cheap.

    Args:
        steps: which rows; all steps of the same length.
        source: the rows' bytes.
        label_NF: 1, 0 or NaN for every row of the manifest.
        augment: what happens to an image.
        data: the task, threads and prefetch depth.
        key_N: the manifest's numbers of the images.
        seed: sampler.seed.
        training: whether to augment.
        device: where decoding and all that follows run, and where the batches lie.
    """
    device = torch.device(device)
    remaining: Iterable[BatchIndices] | None = steps
    while remaining is not None:
        feeder = _Feeder(remaining, source, augment, key_N, seed, training, data.task == "segment", device)
        try:
            remaining = yield from _run(feeder, label_NF, augment, data, device)
        finally:
            feeder.close()


def _run(
    feeder: _Feeder, label_NF: npt.NDArray[np.float32], augment: Augment, data: Data, device: torch.device
) -> Generator[Batch, None, Iterable[BatchIndices] | None]:
    """Batches until the steps end or one cannot be decoded; returns the steps to go on with then, or None."""
    pipe = _pipeline(feeder, augment, data, device)
    while True:
        try:
            outputs = pipe.run(torch.cuda.current_stream(device)) if device.type == "cuda" else pipe.run()
        except StopIteration:
            return None
        except RuntimeError:
            # One image that cannot be decoded has cost the graph; without it another graph does the same batch.
            if not feeder.running or not _reject_undecodable(feeder, device):
                raise
            return feeder.unfinished()
        # With DALI's dynamic executor these tensors own their memory: nothing is copied, nothing is overwritten.
        tensors = [torch.utils.dlpack.from_dlpack(output.as_tensor()).permute(0, 3, 1, 2) for output in outputs]
        step, ok_B = feeder.running.popleft()
        yield Batch(
            image_BCHW=tensors[0],
            label_BF=to_device(label_NF[step.row_B], device),
            mask_B1HW=tensors[1] if len(tensors) > 1 else None,
            row_B=to_device(step.row_B, device),
            valid_B=to_device(step.valid_B & ok_B, device),
        )


def to_device(values: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """The values on the device, without waiting for what the device is doing."""
    tensor = torch.from_numpy(values)
    if device.type != "cuda":
        return tensor
    # From pageable memory the copy would wait for the stream. Torch keeps pinned memory until the copy is through.
    return tensor.pin_memory().to(device, non_blocking=True)


def _reject_undecodable(feeder: _Feeder, device: torch.device) -> bool:
    """Reject the rows of the oldest step under way that cannot be decoded; False where all of them can."""
    row_B = feeder.running[0][0].row_B
    encoded = feeder.source.read(row_B, feeder.masks)
    bad = find_undecodable(encoded)
    if not len(bad):
        # OpenCV may swallow what DALI does not: ask DALI itself, one file at a time.
        files = zip(encoded.images, encoded.masks or encoded.images, strict=True)
        ok = [all(_decodes(file, device) for file in pair) for pair in files]
        bad = np.flatnonzero(~np.array(ok, np.bool_))
    for place in bad.tolist():
        feeder.source.reject(int(row_B[place]), UNDECODABLE)
    return len(bad) > 0


def _decodes(file: EncodedBytes, device: torch.device) -> bool:
    """Whether DALI decodes the file."""

    def graph() -> Any:
        encoded = fn.external_source(lambda: [file], dtype=types.UINT8, ndim=1)
        return _decode(encoded, "mixed" if device.type == "cuda" else "cpu")

    try:
        pipeline_def(graph)(batch_size=1, num_threads=1, device_id=_index(device), exec_dynamic=True).run()
    except RuntimeError:
        return False
    return True


class _Feeder:
    """Turns steps into the graph's inputs, as the graph asks for them; remembers the steps that are under way."""

    def __init__(
        self,
        steps: Iterable[BatchIndices],
        source: Reader,
        augment: Augment,
        key_N: Rows,
        seed: int,
        training: bool,
        masks: bool,
        device: torch.device,
    ) -> None:
        self.steps = iter(steps)
        first = next(self.steps, None)
        self.first = first
        self.source, self.augment, self.masks = source, augment, masks
        self.batch_size = 1 if first is None else len(first.row_B)
        self.numbers: Callable[..., AugmentParams] = partial(sample_params, augment, seed, training=training)
        self.key_N = key_N
        self.names = _inputs(augment, training, masks)
        self.waiting: dict[str, deque[Any]] = {name: deque() for name in self.names}
        self.running: deque[tuple[BatchIndices, npt.NDArray[np.bool_]]] = deque()
        """Steps whose batch is under way, oldest first, and which of their rows were readable."""
        self.bank: Any = None
        if "noise" in self.names:
            bank = noise_bank(augment.size)
            self.bank = to_device(bank.copy(), device) if device.type == "cuda" else bank

    def take(self, name: str) -> Any:
        """The next batch of one input; raises StopIteration after the last step, as DALI expects."""
        if not self.waiting[name]:
            step = self.first or next(self.steps)
            self.first = None
            inputs, ok_B = self._prepare(step)
            self.running.append((step, ok_B))
            for each, values in inputs.items():
                self.waiting[each].append(values)
        return self.waiting[name].popleft()

    def taker(self, name: str) -> Callable[[], Any]:
        """`take` of one input."""
        return lambda: self.take(name)

    def unfinished(self) -> Iterable[BatchIndices]:
        """The steps under way, and those after them."""
        begun = [step for step, _ in self.running]
        return chain(begun, [] if self.first is None else [self.first], self.steps)

    def close(self) -> None:
        """Let go of the source: a graph is freed by the garbage collector, some time, but files should close now."""
        self.steps, self.first = iter(()), None
        self.waiting = {name: deque() for name in self.names}
        del self.source

    def _prepare(self, step: BatchIndices) -> tuple[dict[str, Any], npt.NDArray[np.bool_]]:
        encoded = self.source.read(step.row_B, self.masks)
        height_B, width_B = self.source.sizes(step.row_B)
        numbers = self.numbers(self.key_N[step.row_B], step.draw_B, height_B, width_B)
        inside_B = fits_inside(numbers.matrix_B23, self.augment.size, height_B, width_B)
        framed_B2 = np.stack([height_B, width_B], 1).astype(np.int32) + 2
        makers: dict[str, Callable[[], Any]] = {
            "image": lambda: encoded.images,
            "mask": lambda: encoded.masks,
            "matrix": lambda: numbers.matrix_B23 + (~inside_B[:, None, None] * ONE_RIGHT_ONE_DOWN),
            "inside": lambda: inside_B,
            "framed": lambda: framed_B2,
            "clahe": lambda: numbers.clahe_B,
            "blur": lambda: numbers.blur_B,
            "shift": lambda: 255 * numbers.brightness_B,
            "gain": lambda: numbers.contrast_B,
            "amplitude": lambda: (numbers.noise_on_B * np.float32(255 * self.augment.noise)).astype(np.float32),
            "noise": lambda: self._noise(numbers),
        }
        return {name: makers[name]() for name in self.names}, encoded.ok_B

    def _noise(self, numbers: AugmentParams) -> Any:
        size = self.augment.size
        if isinstance(self.bank, torch.Tensor):
            # One tensor, gathered on the device: a list of device tensors would be copied one by one.
            start_B1 = to_device(numbers.noise_offset_B, self.bank.device)[:, None]
            place_BP = start_B1 + torch.arange(size * size, device=self.bank.device)
            return self.bank[place_BP].reshape(-1, size, size, 1)
        return [self.bank[start : start + size * size].reshape(size, size, 1) for start in numbers.noise_offset_B]


def _inputs(augment: Augment, training: bool, masks: bool) -> tuple[str, ...]:
    """The inputs that this graph needs: an operation that can never happen is not in it."""
    wanted = {
        "mask": masks,
        "clahe": augment.clahe == "random" and training,
        "blur": augment.blur > 0 and training,
        "shift": _changes_levels(augment) and training,
        "gain": _changes_levels(augment) and training,
        "amplitude": augment.noise > 0 and training,
        "noise": augment.noise > 0 and training,
    }
    return tuple(name for name in KINDS if wanted.get(name, True))


def _changes_levels(augment: Augment) -> bool:
    return augment.brightness > 0 or augment.contrast > 0


def _pipeline(feeder: _Feeder, augment: Augment, data: Data, device: torch.device) -> Any:
    gpu = device.type == "cuda"
    place = "gpu" if gpu else "cpu"

    # Made here and not in the graph: DALI rewrites every function that the graph defines or calls, and calls within it
    # at every batch, which took 6 ms a batch. DALI also counts the arguments of a callable and knows no partial.
    takers = {name: feeder.taker(name) for name in feeder.names}

    def external(name: str) -> Any:
        dtype, ndim, layout = KINDS[name]
        # Only what meets the images in plain arithmetic has to lie beside them; arguments of operators stay here.
        where = place if name in ("noise", "amplitude") else "cpu"
        return fn.external_source(
            takers[name],
            device=where,
            dtype=dtype,
            ndim=ndim,
            layout=layout or None,
            name=name,
        )

    def graph() -> Any:
        given = {name: external(name) for name in feeder.names}
        return _graph(given, augment, "mixed" if gpu else "cpu")

    make = pipeline_def(graph, enable_conditionals=True)
    pipe = make(
        batch_size=feeder.batch_size,
        num_threads=Loader().num_threads,
        device_id=_index(device),
        prefetch_queue_depth=Loader().prefetch,
        exec_dynamic=True,
    )
    pipe.build()
    return pipe


def _index(device: torch.device) -> int | None:
    """The GPU's number; None for the CPU."""
    if device.type != "cuda":
        return None
    return device.index if device.index is not None else torch.cuda.current_device()


def _decode(encoded: Any, decoder: str) -> Any:
    return fn.decoders.image(encoded, device=decoder, output_type=types.GRAY, adjust_orientation=False)


def _graph(given: dict[str, Any], augment: Augment, decoder: str) -> tuple[Any, ...]:
    """The graph: encoded bytes and numbers in, (H, W, 1) float32 images and masks out."""
    image = _warped(_decode(given["image"], decoder), given, augment.size)
    image = _equalized(image, given, augment)
    if "blur" in given:
        image = _blurred(image, given["blur"], augment)
    image = _adjust_levels(image, given)
    image = _normalized(image, augment)
    if "mask" not in given:
        return (image,)
    mask = _warped(_decode(given["mask"], decoder), given, augment.size)
    # Thresholding the interpolated mask at one half puts its edge where it is to a fraction of a pixel; nearest
    # neighbor would move it by up to half a source pixel.
    return image, fn.cast(mask > 255 * HALF, dtype=types.FLOAT)


def _warped(source: Any, given: dict[str, Any], size: int) -> Any:
    """(size, size, 1) float32 samples of the source under its matrix, black outside of it."""
    # In float32: rounding after each operation would add up, and CPU and GPU round halves differently.
    # No fill_value: asking at each sample whether it lies outside doubles the CPU's time (1.07 ms instead of 0.54 from
    # 512 to 224 pixels). A frame of black, which the samples outside are clamped to, takes 0.75 and does the same.
    warp = partial(
        fn.warp_affine,
        matrix=given["matrix"],
        size=(size, size),
        interp_type=types.INTERP_LINEAR,
        inverse_map=True,
        dtype=types.FLOAT,
    )
    if given["inside"]:  # noqa: SIM108 - DALI rewrites statements, not expressions
        result = warp(source)
    else:
        result = warp(_framed(source, given["framed"]))
    return result


def _framed(source: Any, shape: Any) -> Any:
    """The source in a frame of one black pixel; without its channel axis, along which DALI copies pixel by pixel."""
    flat = fn.squeeze(source, axes=[2])
    framed = fn.slice(flat, start=[-1, -1], shape=shape, axes=[0, 1], out_of_bounds_policy="pad", fill_values=0)
    return fn.expand_dims(framed, axes=[2], new_axis_names="C")


def _equalized(image: Any, given: dict[str, Any], augment: Augment) -> Any:
    def clahe(level: Any) -> Any:
        whole = fn.cast(math.floor(level + HALF), dtype=types.UINT8)
        tiles, clip = augment.clahe_tiles, augment.clahe_clip
        return fn.cast(fn.clahe(whole, tiles_x=tiles, tiles_y=tiles, clip_limit=clip), dtype=types.FLOAT)

    if augment.clahe == "always":
        return clahe(image)
    if "clahe" in given:
        return _where(given["clahe"], clahe, image)
    return image


def _blurred(image: Any, flag: Any, augment: Augment) -> Any:
    return _where(flag, partial(fn.gaussian_blur, sigma=augment.blur_sigma), image)


def _where(flag: Any, operation: Callable[[Any], Any], image: Any) -> Any:
    """The operation on the images whose flag is set; DALI splits the batch here, and the others cost nothing."""
    if flag:  # noqa: SIM108 - DALI rewrites statements, not expressions
        result = operation(image)
    else:
        result = image
    return result


def _adjust_levels(image: Any, given: dict[str, Any]) -> Any:
    """Brightness and contrast about mid-gray, then noise, then the limits of the gray scale."""
    if "shift" in given:
        image = fn.brightness_contrast(
            image, brightness_shift=given["shift"], contrast=given["gain"], contrast_center=127.5
        )
    if "noise" in given:
        image = image + given["noise"] * given["amplitude"]
    if "shift" in given or "noise" in given:
        image = math.clamp(image, 0.0, 255.0)
    return image


def _normalized(image: Any, augment: Augment) -> Any:
    if augment.normalize == "minmax":
        low = fn.reductions.min(image, keep_dims=True)
        return (image - low) / math.max(fn.reductions.max(image, keep_dims=True) - low, 1e-6)
    return image * (1 / (255 * augment.std)) - augment.mean / augment.std
