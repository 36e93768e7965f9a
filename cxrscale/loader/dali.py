"""Batch indices -> batches through one DALI graph; the device is the only difference between the CPU's and the GPU's.

The graph holds no random state: matrices, flags and offsets are handed to it as data, so that prefetching, threads,
restarts and devices cannot change what comes out. `opencv` defines what must come out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.utils.dlpack
from nvidia.dali import fn, math, pipeline_def, types

from cxrscale.config import Augment
from cxrscale.loader.augment import HALF, AugmentParams, blur_window, fits_inside, noise_bank, sample_params
from cxrscale.loader.reader import UNDECODABLE, EncodedBytes, find_undecodable
from cxrscale.loader.sampler import BatchIndices
from cxrscale.loader.spec import LoaderSpec
from cxrscale.types import Batch

ONE_RIGHT_ONE_DOWN = np.array([[0, 0, 1], [0, 0, 1]], np.float32)
"""What a frame of one pixel adds to a matrix that maps onto an image."""

KINDS: dict[str, tuple[types.DALIDataType, int, str]] = {
    "image": (types.UINT8, 1, ""),
    "mask": (types.UINT8, 1, ""),
    "matrix": (types.FLOAT, 2, ""),
    "frame_start": (types.INT32, 1, ""),
    "frame_shape": (types.INT32, 1, ""),
    "clahe": (types.FLOAT, 0, ""),
    "window": (types.INT32, 0, ""),
    "shift": (types.FLOAT, 0, ""),
    "gain": (types.FLOAT, 0, ""),
    "amplitude": (types.FLOAT, 0, ""),
    "noise": (types.FLOAT, 3, "HWC"),
}
"""The graph's possible inputs: element type, dimensions per image, layout."""


def batches(
    indices: Iterable[BatchIndices], spec: LoaderSpec, device: torch.device | str
) -> Generator[Batch, None, None]:
    """The batches of the indices, one by one; a batch stays valid for as long as it is held.

    Building the graph costs some 10 ms (0.3 s the first time in a process): an iterator per epoch is cheap.

    Args:
        indices: the rows of each batch; all batches of the same length.
        spec: where bytes, labels and augmentation come from.
        device: where decoding and all that follows run, and where the batches are.
    """
    device = torch.device(device)
    remaining: Iterable[BatchIndices] | None = indices
    while remaining is not None:
        feeder = _Feeder(remaining, spec, device)
        try:
            remaining = yield from _run(feeder, spec, device)
        finally:
            feeder.close()


def _run(
    feeder: _Feeder, spec: LoaderSpec, device: torch.device
) -> Generator[Batch, None, Iterable[BatchIndices] | None]:
    """Batches until the indices end or one cannot be decoded; returns the indices to continue with then, or None."""
    pipe = _pipeline(feeder, spec, device)
    while True:
        try:
            outputs = pipe.run(torch.cuda.current_stream(device)) if device.type == "cuda" else pipe.run()
        except StopIteration:
            return None
        except RuntimeError:
            # One image that cannot be decoded has ended the graph; without it another graph makes the same batch.
            if not feeder.running or not _reject_undecodable(feeder, device):
                raise
            return feeder.unfinished()
        # With DALI's dynamic executor these tensors own their memory: nothing is copied, nothing is overwritten.
        tensors = [torch.utils.dlpack.from_dlpack(output.as_tensor()).permute(0, 3, 1, 2) for output in outputs]
        step, valid_B = feeder.running.popleft()
        yield Batch(
            image_BCHW=tensors[0],
            label_BF=to_device(spec.label_NF[step.row_B], device),
            mask_B1HW=tensors[1] if len(tensors) > 1 else None,
            row_B=to_device(step.row_B, device),
            valid_B=to_device(step.valid_B & valid_B, device),
        )


def to_device(values: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """The values on the device, without waiting for its running work."""
    tensor = torch.from_numpy(values)
    if device.type != "cuda":
        return tensor
    # From pageable memory the copy would wait for the stream. Torch keeps pinned memory until the copy is through.
    return tensor.pin_memory().to(device, non_blocking=True)


def _reject_undecodable(feeder: _Feeder, device: torch.device) -> bool:
    """Reject the rows of the oldest unfinished step that cannot be decoded; False where all of them can."""
    row_B = feeder.running[0][0].row_B
    encoded = feeder.reader.read(row_B, feeder.spec.masks)
    bad = find_undecodable(encoded)
    if not len(bad):
        # OpenCV may accept what DALI does not: ask DALI itself, one file at a time.
        files = zip(encoded.images, encoded.masks or encoded.images, strict=True)
        ok = [all(_decodes(file, device) for file in pair) for pair in files]
        bad = np.flatnonzero(~np.array(ok, np.bool_))
    for index in bad.tolist():
        feeder.reader.reject(int(row_B[index]), UNDECODABLE)
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
    """Turns steps into the graph's inputs, as the graph asks for them; remembers the steps that are not finished."""

    def __init__(self, indices: Iterable[BatchIndices], spec: LoaderSpec, device: torch.device) -> None:
        self.steps = iter(indices)
        self.first = next(self.steps, None)
        self.spec, self.reader = spec, spec.reader
        self.batch_size = 1 if self.first is None else len(self.first.row_B)
        self.names = _inputs(spec)
        self.waiting: dict[str, deque[Any]] = {name: deque() for name in self.names}
        self.running: deque[tuple[BatchIndices, npt.NDArray[np.bool_]]] = deque()
        """Steps whose batch is not finished, oldest first, and which of their rows were readable."""
        self.bank: Any = None
        if "noise" in self.names:
            bank = noise_bank(spec.augment.size)
            self.bank = to_device(bank.copy(), device) if device.type == "cuda" else bank

    def take(self, name: str) -> Any:
        """The next batch of one input; raises StopIteration after the last step, as DALI expects."""
        if not self.waiting[name]:
            step = self.first or next(self.steps)
            self.first = None
            inputs, valid_B = self._prepare(step)
            self.running.append((step, valid_B))
            for input_name, values in inputs.items():
                self.waiting[input_name].append(values)
        return self.waiting[name].popleft()

    def taker(self, name: str) -> Callable[[], Any]:
        """`take` of one input."""
        return lambda: self.take(name)

    def unfinished(self) -> Iterable[BatchIndices]:
        """The unfinished steps, and those after them."""
        unfinished = [step for step, _ in self.running]
        return chain(unfinished, [] if self.first is None else [self.first], self.steps)

    def close(self) -> None:
        """Drop the reader: the garbage collector frees a graph at some later time, but files should close now."""
        self.steps, self.first = iter(()), None
        self.waiting = {name: deque() for name in self.names}
        del self.reader, self.spec

    def _prepare(self, step: BatchIndices) -> tuple[dict[str, Any], npt.NDArray[np.bool_]]:
        spec, augment = self.spec, self.spec.augment
        encoded = self.reader.read(step.row_B, spec.masks)
        height_B, width_B = self.reader.sizes(step.row_B)
        key_B, size_B = spec.key_N[step.row_B], (height_B, width_B)
        params = sample_params(augment, spec.seed, key_B, step.stream_pos_B, size_B, spec.training)
        inside_B = fits_inside(params.matrix_B23, augment.size, height_B, width_B)
        frame_B1 = (~inside_B[:, None]).astype(np.int32)
        frame_shape_B2 = np.stack([height_B, width_B], 1).astype(np.int32) + 2 * frame_B1
        makers: dict[str, Callable[[], Any]] = {
            "image": lambda: encoded.images,
            "mask": lambda: encoded.masks,
            "matrix": lambda: params.matrix_B23 + (~inside_B[:, None, None] * ONE_RIGHT_ONE_DOWN),
            "frame_start": lambda: np.repeat(-frame_B1, 2, axis=1),
            "frame_shape": lambda: frame_shape_B2,
            "clahe": lambda: params.clahe_B.astype(np.float32),
            "window": lambda: np.where(params.blur_B, blur_window(augment.blur_sigma), 1).astype(np.int32),
            "shift": lambda: 255 * params.brightness_B,
            "gain": lambda: params.contrast_B,
            "amplitude": lambda: (params.noise_on_B * np.float32(255 * augment.noise)).astype(np.float32),
            "noise": lambda: self._noise(params),
        }
        return {name: makers[name]() for name in self.names}, encoded.valid_B

    def _noise(self, params: AugmentParams) -> Any:
        size = self.spec.augment.size
        if isinstance(self.bank, torch.Tensor):
            # One tensor, gathered on the device: a list of device tensors would be copied one by one.
            start_B1 = to_device(params.noise_offset_B, self.bank.device)[:, None]
            index_BP = start_B1 + torch.arange(size * size, device=self.bank.device)
            return self.bank[index_BP].reshape(-1, size, size, 1)
        return [self.bank[start : start + size * size].reshape(size, size, 1) for start in params.noise_offset_B]


def _inputs(spec: LoaderSpec) -> tuple[str, ...]:
    """The inputs that this graph needs: an operation that can never happen is not in it."""
    augment, training = spec.augment, spec.training
    wanted = {
        "mask": spec.masks,
        "clahe": augment.clahe == "random" and training,
        "window": augment.blur > 0 and training,
        "shift": _changes_levels(augment) and training,
        "gain": _changes_levels(augment) and training,
        "amplitude": augment.noise > 0 and training,
        "noise": augment.noise > 0 and training,
    }
    return tuple(name for name in KINDS if wanted.get(name, True))


def _changes_levels(augment: Augment) -> bool:
    return augment.brightness > 0 or augment.contrast > 0


def _pipeline(feeder: _Feeder, spec: LoaderSpec, device: torch.device) -> Any:
    # The graph must hold no spec: it would keep the shards mapped until it is freed.
    augment, gpu = spec.augment, device.type == "cuda"
    where = "gpu" if gpu else "cpu"

    # DALI counts the arguments of a callable and knows no partial.
    takers = {name: feeder.taker(name) for name in feeder.names}

    def external(name: str) -> Any:
        dtype, ndim, layout = KINDS[name]
        # Only what enters plain arithmetic with the images has to be on their device; operator arguments stay here.
        input_device = where if name in ("noise", "amplitude", "clahe") else "cpu"
        return fn.external_source(
            takers[name],
            device=input_device,
            dtype=dtype,
            ndim=ndim,
            layout=layout or None,
            name=name,
        )

    def graph() -> Any:
        given = {name: external(name) for name in feeder.names}
        return _graph(given, augment, "mixed" if gpu else "cpu")

    # No conditionals: DALI would rewrite the graph's functions by a converter that newer Pythons warn of.
    make = pipeline_def(graph)
    pipe = make(
        batch_size=feeder.batch_size,
        num_threads=spec.num_threads,
        device_id=_index(device),
        prefetch_queue_depth=spec.prefetch,
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
    if "window" in given:
        # A window of one pixel leaves an image as it is.
        image = fn.gaussian_blur(image, sigma=augment.blur_sigma, window_size=given["window"])
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
    return fn.warp_affine(
        _framed(source, given["frame_start"], given["frame_shape"]),
        matrix=given["matrix"],
        size=(size, size),
        interp_type=types.INTERP_LINEAR,
        inverse_map=True,
        dtype=types.FLOAT,
    )


def _framed(source: Any, start: Any, shape: Any) -> Any:
    """The source in a frame of one black pixel where samples lie outside (start -1), else as it is (start 0).

    Without its channel axis, along which DALI copies pixel by pixel.
    """
    flat = fn.squeeze(source, axes=[2])
    framed = fn.slice(flat, start=start, shape=shape, axes=[0, 1], out_of_bounds_policy="pad", fill_values=0)
    return fn.expand_dims(framed, axes=[2], new_axis_names="C")


def _equalized(image: Any, given: dict[str, Any], augment: Augment) -> Any:
    if augment.clahe != "always" and "clahe" not in given:
        return image
    rounded = fn.cast(math.floor(image + HALF), dtype=types.UINT8)
    tiles, clip = augment.clahe_tiles, augment.clahe_clip
    equalized = fn.cast(fn.clahe(rounded, tiles_x=tiles, tiles_y=tiles, clip_limit=clip), dtype=types.FLOAT)
    if augment.clahe == "always":
        return equalized
    # Exact, since each factor is 0 or 1: no image takes anything from the other.
    return given["clahe"] * equalized + (1.0 - given["clahe"]) * image


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
