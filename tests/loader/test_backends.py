"""DALI against OpenCV, which defines what is right, operation by operation and preset by preset.

Tolerances are gray levels of 255. Both backends decode to the same bytes (libjpeg-turbo twice; asserted). They
differ in the warp: DALI's CPU kernel adds the step of x up in float32 along a row, which after some 200 additions is
off by a few thousandths of a pixel. At the test images' steepest edges (50 levels a pixel plus noise) that is some
tenths of a level; on average it is below 0.01. CLAHE is bit-equal on equal input but is handed rounded levels: where
that rounding tips, the equalized level moves by what its tile's histogram makes of one level.
"""

from __future__ import annotations

import traceback
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from cxrscale.config import PRESETS, Augment, Sampler
from cxrscale.loader import dali, opencv
from cxrscale.loader.reader import EncodedBatch, ShardReader
from cxrscale.loader.sampler import BatchIndices, training_indices, training_stream
from cxrscale.loader.spec import LoaderSpec
from cxrscale.shards.manifest import Manifest
from cxrscale.types import Batch

pytestmark = pytest.mark.smoke

SIZE = 48
OPERATIONS: dict[str, dict[str, Any]] = {
    "resize": {},
    "flip": {"hflip": 0.5},
    "rotation": {"rotation": 30.0},
    "translation": {"translation": 0.3},
    "scale": {"scale": (0.7, 1.4)},
    "crop": {"crop_area": (0.3, 1.0)},
    "brightness": {"brightness": 0.5},
    "contrast": {"contrast": 0.9},
    "blur": {"blur": 0.5, "blur_sigma": 1.3},
    "noise": {"noise": 0.2},
    "minmax": {"normalize": "minmax"},
    "coin": {"probability": 0.5, "rotation": 20.0, "noise": 0.1, "blur": 1.0},
}
EQUALIZED: dict[str, dict[str, Any]] = {
    "clahe always": {"clahe": "always", "clahe_tiles": 4},
    "clahe random": {"clahe": "random", "clahe_tiles": 4, "rotation": 10.0},
    "clahe, uneven tiles": {"clahe": "always", "clahe_tiles": 5, "clahe_clip": 3.0},
}


def spec_of(manifest: Manifest, augment: Augment, training: bool = True, masks: bool = False) -> LoaderSpec:
    return LoaderSpec(
        reader=ShardReader(manifest),
        label_NF=manifest.labels(["Effusion"]),
        key_N=manifest.key,
        augment=augment,
        seed=5,
        training=training,
        masks=masks,
        num_threads=2,
        prefetch=2,
    )


def both(
    manifest: Manifest,
    indices: list[BatchIndices],
    training: bool,
    masks: bool = True,
    device: str = "cpu",
    **fields: Any,
) -> tuple[list[Batch], list[Batch], Augment]:
    """The same indices through both backends."""
    augment = Augment.model_validate({"size": SIZE, **fields})
    ours = list(dali.batches(indices, spec_of(manifest, augment, training, masks), device))
    right = list(opencv.batches(indices, spec_of(manifest, augment, training, masks), "cpu"))
    return ours, right, augment


def some_steps(manifest: Manifest, count: int = 4, batch: int = 8) -> list[BatchIndices]:
    rows = np.arange(len(manifest), dtype=np.int64)
    stream = training_stream(rows, manifest.labels(["Effusion"]), manifest.key, Sampler(batch_size=batch))
    return list(islice(training_indices(stream), count))


def difference(ours: list[Batch], right: list[Batch], augment: Augment) -> npt.NDArray[np.float32]:
    """Absolute differences in gray levels of 255."""
    scale = 255 if augment.normalize == "minmax" else 255 * augment.std
    assert all(a.image_BCHW.shape == b.image_BCHW.shape for a, b in zip(ours, right, strict=True))
    parts = [(a.image_BCHW - b.image_BCHW).abs() * scale for a, b in zip(ours, right, strict=True)]
    return np.asarray(torch.cat(parts).numpy(), np.float32)


def check_the_rest(ours: list[Batch], right: list[Batch]) -> None:
    """Everything but the images: equal, masks up to 1e-4 of the pixels."""
    for a, b in zip(ours, right, strict=True):
        assert torch.equal(a.row_B, b.row_B)
        assert torch.equal(a.valid_B, b.valid_B)
        assert torch.equal(a.label_BF, b.label_BF)
        assert a.image_BCHW.dtype == b.image_BCHW.dtype == torch.float32
    masks = [(a.mask_B1HW, b.mask_B1HW) for a, b in zip(ours, right, strict=True)]
    drawn = [(a, b) for a, b in masks if a is not None and b is not None]
    assert len(drawn) == len(masks)
    assert all(a.dtype == torch.float32 and bool(((a == 0) | (a == 1)).all()) for a, _ in drawn)
    assert max(float(a.mean()) for a, _ in drawn) > 0.01
    assert np.mean([float((a != b).float().mean()) for a, b in drawn]) <= 1e-4


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_agrees(shards: Manifest, name: str) -> None:
    ours, right, augment = both(shards, some_steps(shards), training=True, **OPERATIONS[name])
    found = difference(ours, right, augment)
    # minmax stretches an image's range to 0..1, hence its differences too; contrast up to 1.9 likewise.
    assert found.mean() < 0.01
    assert found.max() < 0.5
    check_the_rest(ours, right)


@pytest.mark.parametrize("name", EQUALIZED)
def test_equalization_agrees(shards: Manifest, name: str) -> None:
    ours, right, augment = both(shards, some_steps(shards), training=True, **EQUALIZED[name])
    found = difference(ours, right, augment)
    # A pixel whose rounding tips is one of some 100 in its tile; one level there is up to 255 / 100 * clip levels here.
    assert found.mean() < 0.05
    assert (found > 1).mean() < 0.01
    check_the_rest(ours, right)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_preset_agrees(shards: Manifest, preset: str, training: bool) -> None:
    ours, right, augment = both(shards, some_steps(shards), training, preset=preset)
    found = difference(ours, right, augment)
    assert found.mean() < (0.05 if augment.clahe != "never" else 0.01)
    assert (found > 0.5).mean() < (0.01 if augment.clahe != "never" else 1e-5)
    check_the_rest(ours, right)


@pytest.mark.parametrize("size", [64, 48, 32, 40, 37])
def test_plain_resizing_agrees_to_a_thousandth(shards: Manifest, size: int) -> None:
    """Without rotation DALI's coordinates are exact enough; ratios of 1, 4/3 and 2 meet halves exactly."""
    ours, right, augment = both(shards, some_steps(shards), training=False, size=size)
    assert difference(ours, right, augment).max() < 5e-3
    check_the_rest(ours, right)


def test_decoders_are_bit_equal_and_the_identity_is_the_identity(shards: Manifest) -> None:
    """At the stored size, with mean 0 and deviation 1, both backends deliver the decoded levels / 255."""
    ours, right, _ = both(shards, some_steps(shards), training=False, size=64, mean=0.0, std=1.0)
    files = ShardReader(shards)
    for a, b in zip(ours, right, strict=True):
        decoded = np.stack([opencv.decoded(file) for file in files.read(a.row_B.numpy(), False).images])
        for batch in (a, b):
            levels = batch.image_BCHW[:, 0].numpy() * 255
            assert np.abs(levels - decoded).max() < 1e-4


def test_a_flat_image_normalizes_to_zero() -> None:
    flat = np.full((8, 8), 90, np.float32)
    assert (opencv.normalized(flat, Augment(normalize="minmax")) == 0).all()


def test_classification_carries_no_mask(shards: Manifest) -> None:
    ours, right, _ = both(shards, some_steps(shards, 1), training=True, masks=False)
    assert ours[0].mask_B1HW is None
    assert right[0].mask_B1HW is None


def test_no_indices_no_batches(shards: Manifest) -> None:
    ours, right, _ = both(shards, [], training=False)
    assert ours == right == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_the_gpu_agrees(shards: Manifest, preset: str, training: bool) -> None:
    """nvJPEG's inverse transform differs from libjpeg-turbo's by up to a level; the rest is the same graph."""
    found, right, augment = both(shards, some_steps(shards), training, device="cuda", preset=preset)
    again, _, _ = both(shards, some_steps(shards), training, device="cuda", preset=preset)
    assert all(batch.image_BCHW.is_cuda and batch.valid_B.is_cuda for batch in found)
    assert all(torch.equal(a.image_BCHW, b.image_BCHW) for a, b in zip(found, again, strict=True))
    ours = [_on_cpu(batch) for batch in found]
    assert difference(ours, right, augment).mean() < (2.0 if augment.clahe != "never" else 0.3)
    check_the_rest(ours, right)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_no_batch_waits_for_the_gpu(shards: Manifest) -> None:
    """Labels, rows and noise offsets are copied from pinned memory; torch's own check for synchronization passes."""
    batches = dali.batches(some_steps(shards), spec_of(shards, Augment(preset="effusion", size=SIZE)), "cuda")
    found = [next(batches)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        found += list(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    right = [step.row_B.tolist() for step in some_steps(shards)]
    assert [batch.row_B.tolist() for batch in found] == right


def test_dali_does_not_rewrite_the_reader(shards: Manifest) -> None:
    """DALI rewrites a graph with conditions; if our reader were part of it, each of its calls would be interpreted."""
    seen: list[str] = []

    class Watched(ShardReader):
        def read(self, row_B: npt.NDArray[np.int64], masks: bool) -> EncodedBatch:
            seen.extend(frame.filename for frame in traceback.extract_stack())
            return super().read(row_B, masks)

    spec = replace(spec_of(shards, Augment(preset="siim", size=SIZE)), reader=Watched(shards))
    list(dali.batches(some_steps(shards, 2), spec, "cpu"))
    assert seen
    assert not [name for name in seen if "autograph" in name]


def _on_cpu(batch: Batch) -> Batch:
    mask = None if batch.mask_B1HW is None else batch.mask_B1HW.cpu()
    return Batch(batch.image_BCHW.cpu(), batch.label_BF.cpu(), mask, batch.row_B.cpu(), batch.valid_B.cpu())
