"""Several models, and mirrored images, as one model whose output is the mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import interpolate, logsigmoid

from cxrscale.types import Mean

MEANS: tuple[Mean, ...] = ("probabilities", "logits")


class Averaged(nn.Module):
    """An ensemble: (B, 1, H, W) -> logits (B, F), or (B, 1, H, W), of the mean of its members' outputs."""

    def __init__(
        self,
        members: Sequence[nn.Module],
        mean: Mean = "probabilities",
        *,
        hflip: bool = False,
        sees: Sequence[int] | None = None,
    ) -> None:
        """Args:
        members: at least one; all give outputs of the same shape, but for the size of maps.
        mean: of the members' probabilities, or of their logits (which is the geometric mean of their odds).
        hflip: each member also sees the image mirrored left to right; its map is mirrored back.
        sees: for each member, which of the inputs of `forward` it takes; None: all the first.
        """
        super().__init__()
        self.members = nn.ModuleList(members)
        self.mean, self.hflip = mean, hflip
        self.sees = tuple(sees) if sees is not None else (0,) * len(members)

    def forward(self, *images: torch.Tensor) -> torch.Tensor:
        """The logits of the mean, in fp32; a map has the size of the first input.

        Args:
            images: (B, 1, H, W) inputs of the same images.
        """
        seen = [images[which] for which in self.sees]
        outputs = [member(image_BCHW).float() for member, image_BCHW in zip(self.members, seen, strict=True)]
        if self.hflip:
            mirrored = [image_BCHW.flip(-1) for image_BCHW in seen]
            outputs += [
                _mirrored_back(member(image_BCHW).float())
                for member, image_BCHW in zip(self.members, mirrored, strict=True)
            ]
        if outputs[0].ndim == 4:
            outputs = [_at_size(output, images[0].shape[-2:], self.mean) for output in outputs]
        logits_M = torch.stack(outputs)
        if self.mean == "logits":
            return logits_M.mean(dim=0)
        # log(mean p / mean(1 - p)): exact also where a probability is 1 in fp32.
        return logsigmoid(logits_M).logsumexp(dim=0) - logsigmoid(-logits_M).logsumexp(dim=0)


def _at_size(logit_B1HW: torch.Tensor, size: torch.Size, mean: Mean) -> torch.Tensor:
    """A map at another size, bilinear in what is averaged."""
    if logit_B1HW.shape[-2:] == size:
        return logit_B1HW

    def resized(value_B1HW: torch.Tensor) -> torch.Tensor:
        return interpolate(value_B1HW, size=tuple(size), mode="bilinear", align_corners=False)

    if mean == "logits":
        return resized(logit_B1HW)
    # Both shares, since 1 - p of a certain pixel is 0 in fp32; the smallest normal number keeps logarithms finite.
    tiny = torch.finfo(torch.float32).tiny
    present, absent = (resized(value.sigmoid()).clamp_min(tiny) for value in (logit_B1HW, -logit_B1HW))
    return present.log() - absent.log()


def _mirrored_back(logits: torch.Tensor) -> torch.Tensor:
    return logits.flip(-1) if logits.ndim == 4 else logits
