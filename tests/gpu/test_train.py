"""The fast path on a GPU: nothing waits between two log lines, and each setting learns what the plain loop learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cxrscale.config import Recipe
from cxrscale.loader.loader import training_batches
from cxrscale.shards import manifest
from cxrscale.training import loop, tracking
from cxrscale.training.distributed import LocalWorker
from tests.conftest import tiny
from tests.tiny import TINY_CLASSIFIER, TINY_SEGMENTER

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # Torch warns once per process that the mode is a prototype.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
]

LOG = 6
"""Steps between two log lines."""
PLAIN = ("train.compile=never", "train.precision=fp32", "train.channels_last=false")
AUGMENTED = ("augment.hflip=0.5", "augment.rotation=10", "augment.brightness=0.2", "augment.noise=0.05")


def run(recipe: Recipe, strict: bool) -> int:
    """Train an epoch; where strict, an operation that waits for the GPU between two log lines raises.

    Returns how many steps were checked.
    """
    worker = LocalWorker("cuda")
    data, state = manifest.load(*recipe.data.shards), loop.build_state(recipe, worker.dist.device)
    batches = training_batches(data, recipe, worker.dist)
    steps = recipe.sampler.steps_per_epoch
    assert steps is not None
    context = loop.make_context(recipe, worker, data, state, steps, None)
    checked = 0
    try:
        for done in loop.train_epoch(context, state, batches):
            # The first two stretches choose algorithms, compile, record CUDA graphs and fill the memory pools.
            quiet = done >= 2 * LOG and (done + 1) % LOG != 0 and done + 1 < steps
            checked += quiet
            torch.cuda.set_sync_debug_mode("error" if quiet and strict else "default")
    finally:
        torch.cuda.set_sync_debug_mode("default")
        batches.close()
    return checked


@pytest.mark.parametrize(
    "settings",
    [
        PLAIN,
        (),
        ("optim.grad_accum_steps=2", "optim.max_grad_norm=1", "optim.ema_decay=0.99", "train.compile=never"),
        ("train.compile=reduce-overhead",),
        ("optim.name=sgd", "optim.schedule=cosine", "optim.warmup_steps=3", "train.compile=never"),
    ],
    ids=["plain", "defaults", "accumulate", "graphs", "sgd"],
)
def test_no_step_between_two_log_lines_waits_for_the_gpu(
    settings: tuple[str, ...], nih_shards: str, tmp_path: Path
) -> None:
    more = (f"tracking.log_steps={LOG}", f"sampler.steps_per_epoch={5 * LOG}", *AUGMENTED, *settings)
    assert run(tiny(nih_shards, tmp_path, *more), strict=True) >= 3 * (LOG - 1) - 1


@pytest.mark.parametrize("terms", [("loss.dice=1",), ("loss.focal=1", "loss.lovasz=1")], ids=["dice", "lovasz"])
def test_no_step_of_segmentation_waits_either(terms: tuple[str, ...], siim_shards: str, tmp_path: Path) -> None:
    more = (f"tracking.log_steps={LOG}", f"sampler.steps_per_epoch={4 * LOG}", *terms)
    assert run(tiny(siim_shards, tmp_path, *more, base=TINY_SEGMENTER), strict=True) > LOG


def test_a_step_that_logs_waits(nih_shards: str, tmp_path: Path) -> None:
    # Else the tests above could not fail.
    recipe = tiny(nih_shards, tmp_path, *PLAIN, "tracking.log_steps=1", f"sampler.steps_per_epoch={4 * LOG}")
    with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
        run(recipe, strict=True)


def losses_of(shards: str, root: Path, *settings: str, base: tuple[str, ...]) -> list[float]:
    """The training losses of a few steps of a run."""
    more = ("train.epochs=1", "sampler.steps_per_epoch=5", "optim.name=sgd", "optim.lr=0.01", *PLAIN, *settings)
    loop.train(tiny(shards, root, *more, base=base), str(root), LocalWorker("cuda"))
    return [line["loss"] for line in tracking.read_log(str(root)) if line["kind"] == "train"]


@pytest.mark.parametrize("segment", [False, True], ids=["classify", "segment"])
@pytest.mark.parametrize(
    ("setting", "tolerance"),
    [
        ("train.channels_last=true", 0.01),
        ("train.precision=bf16", 0.03),
        ("train.compile=default", 0.01),
        ("train.compile=reduce-overhead", 0.01),
    ],
)
def test_a_setting_changes_the_speed_but_not_the_losses(
    setting: str, tolerance: float, segment: bool, nih_shards: str, siim_shards: str, tmp_path: Path
) -> None:
    shards, base = (siim_shards, TINY_SEGMENTER) if segment else (nih_shards, TINY_CLASSIFIER)
    plain = losses_of(shards, tmp_path / "plain", base=base)
    assert losses_of(shards, tmp_path / "fast", setting, base=base) == pytest.approx(plain, rel=tolerance)


def test_microbatches_add_up_with_cuda_graphs(nih_shards: str, tmp_path: Path) -> None:
    plain = losses_of(nih_shards, tmp_path / "plain", "optim.grad_accum_steps=2", base=TINY_CLASSIFIER)
    graphs = ("optim.grad_accum_steps=2", "train.compile=reduce-overhead")
    assert losses_of(nih_shards, tmp_path / "graphs", *graphs, base=TINY_CLASSIFIER) == pytest.approx(plain, rel=0.01)


def test_the_gpu_is_named_and_its_memory_logged(nih_shards: str, tmp_path: Path) -> None:
    losses_of(nih_shards, tmp_path / "run", base=TINY_CLASSIFIER)
    lines = [line for line in tracking.read_log(str(tmp_path / "run")) if line["kind"] == "train"]
    assert all(0 < line["gpu_memory_gb"] < torch.cuda.get_device_properties(0).total_memory / 1e9 for line in lines)
