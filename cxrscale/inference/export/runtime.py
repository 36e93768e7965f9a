"""An exported file as a module that any forward pass can call."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cxrscale.inference.export import contract
from cxrscale.io import seal
from cxrscale.types import UserError, one_line

GPU_PROVIDERS = ("TensorrtExecutionProvider", "CUDAExecutionProvider")
"""Of ONNX Runtime, the faster first; of these, the ones that are installed run a model on a GPU."""
INPUT, OUTPUT = "image", "logits"
"""Names in an ONNX file."""


class OnnxModule(nn.Module):
    """An ONNX Runtime session as a model: (B, 1, H, W) -> logits (B, F), or (B, 1, H, W), in fp32.

    On the CPU it has as many threads as torch. Autocast and the memory layout of its input change nothing.
    """

    def __init__(self, content: bytes, device: torch.device, *, half: bool = False) -> None:
        """Args:
        content: of the ONNX file.
        device: a GPU is used where onnxruntime-gpu is installed.
        half: whether TensorRT may compute in fp16.
        """
        super().__init__()
        self._session = _session(content, device, half=half)

    @property
    def providers(self) -> tuple[str, ...]:
        """What runs it, the first wherever it can."""
        return tuple(self._session.get_providers())

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """The logits, on the device of the input."""
        image = np.ascontiguousarray(image_BCHW.detach().float().cpu().numpy())
        (logits,) = self._session.run([OUTPUT], {INPUT: image})
        return torch.from_numpy(logits).float().to(image_BCHW.device)


class ProgramModule(nn.Module):
    """A program of torch.export as a model; it runs in fp32 whatever autocast says."""

    def __init__(self, content: bytes, device: torch.device) -> None:
        """Args:
        content: of the file.
        device: that it runs on.
        """
        super().__init__()
        program = torch.export.load(io.BytesIO(content))
        if device.type != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, device)
        # Not a child: its module has no modes to switch between and refuses train() and eval().
        self._call = program.module().forward

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """The logits."""
        with torch.autocast(image_BCHW.device.type, enabled=False):
            logits: torch.Tensor = self._call(image_BCHW.float())
        return logits


def exported_module(content: bytes, path: str, device: torch.device, *, half: bool = False) -> nn.Module:
    """The model in the bytes of an exported file, in evaluation mode.

    Args:
        path: of the file, which says of which kind it is.
        half: whether an engine on a GPU may compute in fp16.

    Raises:
        UserError: the file is damaged, or what runs it is not installed.
    """
    seal.check(content, path, contract.REMEDY)
    try:
        if path.endswith(contract.FILES["onnx"]):
            return OnnxModule(content, device, half=half).eval()
        return ProgramModule(content, device).eval()
    except UserError:
        raise
    except Exception as error:  # the runtimes raise whatever their parsers do
        raise UserError(f"{path} cannot be loaded ({one_line(error, limit=160)}); {contract.REMEDY}") from None


def sealed_onnx(content: bytes) -> bytes:
    """The bytes of an ONNX file with a digest of themselves as its only metadata: the exporter's names files here."""
    import onnx

    model = onnx.load_from_string(content)
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    model.metadata_props.add(key=seal.FIELD, value=seal.BLANK)
    return seal.close(model.SerializeToString())


def sealed_program(content: bytes) -> bytes:
    """The bytes of a file of torch.export with a digest of themselves as the comment of the zip archive."""
    buffer = io.BytesIO(content)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.comment = seal.BLANK.encode()
    return seal.close(buffer.getvalue())


def _session(content: bytes, device: torch.device, *, half: bool) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise UserError("an ONNX model needs onnxruntime; install cxrscale[export]") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    # Only errors: it warns of each constant that its optimizer folds.
    options.log_severity_level = 3
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda":
        installed = onnxruntime.get_available_providers()
        providers = [
            (name, _options(name, device, half=half)) for name in GPU_PROVIDERS if name in installed
        ] + providers
    return onnxruntime.InferenceSession(content, options, providers=providers)


def _options(provider: str, device: torch.device, *, half: bool) -> dict[str, str]:
    """Of a GPU's provider."""
    index = {"device_id": str(device.index or 0)}
    if provider != GPU_PROVIDERS[0]:
        return index
    # An engine takes minutes to build; TensorRT names the files by model, version and GPU.
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cxrscale" / "tensorrt"
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    return {
        **index,
        "trt_fp16_enable": str(half),
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(cache),
    }
