"""The one forward pass: memory layout, autocast, and logits in fp32."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cxrscale.config import Train
from cxrscale.models import forward, probabilities
from cxrscale.types import Batch

CPU = torch.device("cpu")


class Spy(nn.Module):
    """A convolution that remembers its input and whether autocast was on."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 2, 3)
        self.image_BCHW = torch.zeros(0)
        self.autocast = False

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        self.image_BCHW, self.autocast = image_BCHW, torch.is_autocast_enabled("cpu")
        out: torch.Tensor = self.convolution(image_BCHW)
        return out


def batch() -> Batch:
    image_BCHW = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)).half()
    return Batch(image_BCHW, torch.zeros(3, 2), None, torch.arange(3), torch.ones(3, dtype=torch.bool))


@pytest.mark.parametrize(("precision", "autocast"), [("auto", False), ("fp32", False), ("bf16", True)])
@pytest.mark.parametrize("channels_last", [True, False])
def test_images_and_logits_are_fp32_whatever_the_precision(precision: str, autocast: bool, channels_last: bool) -> None:
    model = Spy()
    settings = Train.model_validate({"precision": precision, "channels_last": channels_last})
    logits = forward(model, batch(), settings, CPU)
    assert model.autocast == autocast
    assert model.image_BCHW.dtype == logits.dtype == torch.float32
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert model.image_BCHW.is_contiguous(memory_format=layout)
    exact = model.convolution(batch().image_BCHW.float())
    torch.testing.assert_close(logits, exact, rtol=0, atol=0.05 if autocast else 1e-6)
    assert torch.equal(logits, exact) != autocast
    torch.autograd.backward(logits.sum())
    assert model.convolution.weight.grad is not None


def test_probabilities_are_independent_of_each_other() -> None:
    logits = torch.tensor([[0.0, 2.0], [-1000.0, 1000.0]])
    assert probabilities(logits).tolist() == [[0.5, pytest.approx(0.8807971)], [0.0, 1.0]]
