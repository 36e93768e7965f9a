"""An exported file as a module that any forward pass can call."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import torch
from torch import nn

from cxrscale.inference.export import contract
from cxrscale.inference.export.session import OnnxModel
from cxrscale.io import seal


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
        gpu = (device.index or 0) if device.type == "cuda" else None
        self._model = OnnxModel(content, torch.get_num_threads(), gpu, half=half)

    @property
    def providers(self) -> tuple[str, ...]:
        """What runs it, the first wherever it can."""
        return self._model.providers

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """The logits, on the device of the input."""
        image = np.ascontiguousarray(image_BCHW.detach().float().cpu().numpy())
        return torch.from_numpy(self._model(image)).to(image_BCHW.device)


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
    with contract.loading(content, path):
        if path.endswith(contract.FILES["onnx"]):
            return OnnxModule(content, device, half=half).eval()
        return ProgramModule(content, device).eval()


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
