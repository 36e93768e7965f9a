"""Exports made by hand in milliseconds: of a model so small that no exporter is needed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch

from cxrscale.inference import Form, FormRow, export_info, write_draft
from cxrscale.inference.export.contract import Difference
from cxrscale.inference.export.making import Made
from cxrscale.inference.export.runtime import INPUT, OUTPUT, sealed_onnx
from cxrscale.inference.trained import load_model


def write_export(run: str, out: Path) -> str:
    """An export of the run's findings and input; its logits are multiples of the mean gray level, of a segmenter of the
    gray level itself. Returns its folder."""
    trained = load_model(run, torch.device("cpu"))
    maps = trained.recipe.data.task == "segment"
    content = _maps() if maps else _logits(len(trained.recipe.data.findings))
    made = Made(content, content, Difference(images=1, maximum=0, mean=0, flipped=0))
    row = FormRow(form="onnx", bytes=len(content), milliseconds={1: 1.0}, times_torch={1: 1.0})
    out.mkdir()
    write_draft(out, trained, content, export_info(run, trained, Form(), made, (row,)), str(out))
    return str(out)


def _logits(findings: int) -> bytes:
    weights = {"w": np.linspace(-3, 3, findings, dtype=np.float32)[None], "b": np.zeros(findings, np.float32)}
    nodes = [
        onnx.helper.make_node("GlobalAveragePool", [INPUT], ["pooled"]),
        onnx.helper.make_node("Flatten", ["pooled"], ["flat"]),
        onnx.helper.make_node("Gemm", ["flat", "w", "b"], [OUTPUT]),
    ]
    return _model(nodes, weights, ["batch", findings])


def _maps() -> bytes:
    weights = {"w": np.full((1, 1, 1, 1), 4, np.float32), "b": np.full(1, -3, np.float32)}
    return _model([onnx.helper.make_node("Conv", [INPUT, "w", "b"], [OUTPUT])], weights, ["batch", 1, "h", "w"])


def _model(nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], shape: list[str | int]) -> bytes:
    def tensor(name: str, axes: list[str | int]) -> onnx.ValueInfoProto:
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, axes)

    graph = onnx.helper.make_graph(
        nodes,
        "small",
        [tensor(INPUT, ["batch", 1, "h", "w"])],
        [tensor(OUTPUT, shape)],
        [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    return sealed_onnx(model.SerializeToString())
