"""Rewritten ONNX graphs: the same outputs from fewer products."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

from cxrscale.inference.export import to_onnx
from cxrscale.inference.export.rewriting import FEWEST


class Doubled(nn.Module):
    """Convolutions of doubled images: in front of others, alone, of few channels, and with a stride."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, FEWEST, 3, padding=1)
        self.joined = nn.Conv2d(FEWEST + 1 + 1, FEWEST, 3, padding=1)
        self.alone = nn.Conv2d(FEWEST, 8, 3, padding=1, bias=False)
        self.few = nn.Conv2d(8, 4, 3, padding=1)
        self.strided = nn.Conv2d(4, 1, 3, padding=1, stride=2)

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        def double(x: torch.Tensor) -> torch.Tensor:
            return nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")

        wide = double(image_BCHW)
        x = self.joined(torch.cat([double(self.first(image_BCHW)), wide, wide * wide], dim=1)).relu()
        x = self.few(double(self.alone(double(x))))
        return torch.as_tensor(self.strided(double(x)))


def test_convolutions_of_doubled_images_give_the_same_from_fewer_products() -> None:
    torch.manual_seed(0)
    model = Doubled().eval()
    content = to_onnx.to_onnx(model, 10)
    graph = onnx.load_from_string(content).graph
    count = Counter(node.op_type for node in graph.node)
    # The first two become four each, of which the first also keeps one for its other channels.
    assert count["Conv"] == 3 + 4 + 1 + 4
    assert count["DepthToSpace"] == 2
    # What is doubled still, by factors that are known beforehand.
    assert all(len(node.input) == 3 for node in graph.node if node.op_type == "Resize")
    assert count["Resize"] == 3
    assert not {one.name for one in graph.initializer} - {name for node in graph.node for name in node.input}
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        image = np.random.default_rng(batch).normal(size=(batch, 1, 10, 10)).astype(np.float32)
        with torch.no_grad():
            own = model(torch.from_numpy(image)).numpy()
        np.testing.assert_allclose(session.run(None, {"image": image})[0], own, atol=2e-6)
