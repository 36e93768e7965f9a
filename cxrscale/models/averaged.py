"""Several models, and mirrored images, as one model whose output is the mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn
from torch.nn.functional import logsigmoid

Mean = Literal["probabilities", "logits"]
MEANS: tuple[Mean, ...] = ("probabilities", "logits")


class Averaged(nn.Module):
    """An ensemble: (B, 1, H, W) -> logits (B, F), or (B, 1, H, W), of the mean of its members' outputs."""

    def __init__(self, members: Sequence[nn.Module], mean: Mean = "probabilities", *, hflip: bool = False) -> None:
        """Args:
        members: at least one; all take the same input and give outputs of the same shape.
        mean: of the members' probabilities, or of their logits (which is the geometric mean of their odds).
        hflip: each member also sees the image mirrored left to right; its map is mirrored back.
        """
        super().__init__()
        self.members = nn.ModuleList(members)
        self.mean, self.hflip = mean, hflip

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """The logits of the mean, in fp32."""
        outputs = [member(image_BCHW).float() for member in self.members]
        if self.hflip:
            mirrored_BCHW = image_BCHW.flip(-1)
            outputs += [_mirrored_back(member(mirrored_BCHW).float()) for member in self.members]
        logits_M = torch.stack(outputs)
        if self.mean == "logits":
            return logits_M.mean(dim=0)
        # log(mean p / mean(1 - p)): exact also where a probability is 1 in fp32.
        return logsigmoid(logits_M).logsumexp(dim=0) - logsigmoid(-logits_M).logsumexp(dim=0)


def _mirrored_back(logits: torch.Tensor) -> torch.Tensor:
    return logits.flip(-1) if logits.ndim == 4 else logits
