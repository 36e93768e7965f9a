"""Exported forms of a model beside torch: milliseconds per image, size, and how far their probabilities are apart.

    python -m tests.benchmarks.export --out tests/benchmarks/results/export.json
    python -m tests.benchmarks.export --cpu --threads 1    # CPU time, on a machine that other work keeps busy
    python -m tests.benchmarks.export --run runs/NAME    # also: what each form costs in calls and AUROC

The nets are DenseNet-121 at 224 pixels and a UNet with a ResNet-34 encoder at 256. Their weights are random and their
batch statistics those of the images, so speed, size and the float form's difference are what a trained net has, but
not what quantization costs: that is measured on --run. Forms take turns within a round, with torch eager in
channels_last first; ratios are medians over rounds of the ratio within a round. OpenVINO, where it is installed, runs
the float form and the statically quantized one too.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cxrscale import config
from cxrscale.config import NIH14, Recipe
from cxrscale.inference import Form, Gate
from cxrscale.inference.export import latency, quantize, to_onnx
from cxrscale.inference.export.runtime import OnnxModule
from cxrscale.models import build_model
from cxrscale.run import export
from cxrscale.types import UserError

NETS = {
    "DenseNet-121, 224": ("model.arch=densenet121", "augment.size=224", f"data.findings=[{', '.join(NIH14)}]"),
    "ResNet-34 UNet, 256": (
        *("data.task=segment", "data.findings=[Pneumothorax]", "model.arch=Unet", "model.encoder=resnet34"),
        *("augment.size=256", "train.monitor=dice"),
    ),
}
IMAGES = 8
"""That ranges are calibrated on, and differences measured on others."""


def images(size: int, seed: int) -> torch.Tensor:
    """(IMAGES, 1, size, size) smooth random images, normalized."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(IMAGES, 1, 14, 14, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")
    return smooth + 0.1 * torch.randn(smooth.shape, generator=generator)


def net(overrides: Sequence[str]) -> tuple[nn.Module, int]:
    """The net in evaluation mode, and its input's side."""
    given = [*overrides, "model.weights=none"]
    recipe = config.parse(Recipe, config.override({}, given), where="benchmark")
    torch.manual_seed(0)
    model, size = build_model(recipe.model, recipe.data), recipe.augment.size
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain mean over what it sees
    with torch.no_grad():
        model.train()(images(size, 1)[:8])
    return model.eval(), size


def forms(model: nn.Module, size: int, folder: Path) -> tuple[dict[str, nn.Module], dict[str, int]]:
    """Form -> the module that runs it; form -> bytes."""
    content = to_onnx.to_onnx(model, size)
    quantizer = quantize.StaticQuantizer(content, [one[None].numpy() for one in images(size, 2)], folder)
    static = quantizer.quantized("minmax")
    files = {
        "onnx": content,
        "int8-static": static,
        "int8-static, full range": quantizer.quantized("minmax", reduce_range=False),
        "int8-dynamic": quantize.dynamic(content),
        "fp16": quantize.half(content),
    }
    modules: dict[str, nn.Module] = {"torch": model.to(memory_format=torch.channels_last)}
    modules |= {name: OnnxModule(one, torch.device("cpu")) for name, one in files.items()}
    modules |= openvino({"onnx": content, "int8-static": static}, folder)
    sizes = {name: len(one) for name, one in files.items()}
    return modules, sizes | {"torch": sum(value.numel() * 4 for value in model.state_dict().values())}


def openvino(files: dict[str, bytes], folder: Path) -> dict[str, nn.Module]:
    """OpenVINO running the files, where it is installed."""
    try:
        import openvino as ov
    except ImportError:
        return {}

    class OpenVino(nn.Module):
        def __init__(self, path: Path) -> None:
            super().__init__()
            settings = {
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_PRECISION_HINT": "f32",
            }
            self._compiled = ov.Core().compile_model(str(path), "CPU", settings)

        def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(self._compiled(np.ascontiguousarray(image_BCHW.numpy()))[0])

    result: dict[str, nn.Module] = {}
    for name, content in files.items():
        path = folder / f"openvino-{name}.onnx"
        path.write_bytes(content)
        try:
            result[f"OpenVINO, {name}"] = OpenVino(path)
        except RuntimeError:  # 2026.4 fails in a pass of its own over the UNet's quantized file
            print(f"OpenVINO does not take {name}")
    return result


def measure_net(overrides: Sequence[str], rounds: int, wanted: str, *, cpu: bool) -> dict[str, dict[str, Any]]:
    """Form -> its row.

    Args:
        wanted: names of forms, between commas; empty: all.
        cpu: CPU time of all threads instead of wall time.
    """
    model, size = net(overrides)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        modules, sizes = forms(model, size, Path(folder))
        names = ["torch", *wanted.split(",")] if wanted else list(modules)
        modules = {name: module for name, module in modules.items() if name in names}
        clock = time.process_time if cpu else time.perf_counter
        times = latency.measure(modules, size, rounds=rounds, clock=clock)
        seen = images(size, 3)[:8]
        own = model(seen).sigmoid().numpy()
        rows = {}
        for name, module in modules.items():
            gap = np.abs(module(seen).sigmoid().numpy() - own)
            rows[name] = {
                "bytes": sizes.get(name),
                "milliseconds": {batch: round(one.milliseconds, 2) for batch, one in times[name].items()},
                "times_torch": {batch: round(one.times_first, 3) for batch, one in times[name].items()},
                "max_difference": float(gap.max()),
                "mean_difference": float(gap.mean()),
            }
    return rows


def measure_run(run: str) -> dict[str, Any]:
    """What each form of a trained run costs, by its export.json; the gate lets all through."""
    rows: dict[str, Any] = {}
    wide = Gate(maximum=1, mean=1, flipped=1)
    with tempfile.TemporaryDirectory() as folder:
        for form in (Form(), *(Form(quantization=one) for one in ("int8-dynamic", "int8-static", "fp16"))):
            try:
                info = export(run, str(Path(folder, form.name)), form, wide)
            except UserError as error:
                rows[form.name] = str(error)
                continue
            kept = {"table", "tried", "notes", "parity"}
            rows[form.name] = info.model_dump(mode="json", include=kept)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--run", help="a trained run")
    parser.add_argument("--net", default="", help="a part of a net's name: that one alone")
    parser.add_argument("--forms", default="", help="names of forms between commas: those alone, beside torch")
    parser.add_argument("--cpu", action="store_true", help="CPU time of all threads instead of wall time")
    parser.add_argument("--no-nets", action="store_true", help="of --run alone")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    vnni = "vnni" in Path("/proc/cpuinfo").read_text()
    result: dict[str, Any] = {"machine": platform.machine(), "vnni": vnni, "versions": {}}
    for name in ("torch", "onnxruntime", "onnx", "openvino"):
        try:
            result["versions"][name] = version(name)
        except PackageNotFoundError:
            print(f"{name} is not installed")
    earlier = json.loads(given.out.read_text()) if given.out and given.out.exists() else {}
    for name, overrides in NETS.items() if not given.no_nets else ():
        if given.net not in name:
            continue
        clock = "CPU" if given.cpu else "wall"
        key = f"{name}, {clock} time, {given.threads} threads"
        result[key] = measure_net(overrides, given.rounds, given.forms, cpu=given.cpu)
        print(key)
        for form, row in result[key].items():
            times = "  ".join(f"{row['milliseconds'][b]:7.1f} ms ({row['times_torch'][b]:.2f} x)" for b in (1, 8))
            size = f"{row['bytes'] / 1e6:6.1f} MB" if row["bytes"] else " " * 9
            print(f"  {form:24}{size}  {times}  max {row['max_difference']:.2g}", flush=True)
    if given.run:
        result["run"] = measure_run(given.run)
        print(json.dumps(result["run"], indent=1)[:4000])
    if given.out:
        given.out.write_text(json.dumps({**earlier, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
