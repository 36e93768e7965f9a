"""What an ensemble is made of."""

from __future__ import annotations

from cxrscale.io import ArtifactPart
from cxrscale.types import Mean


class Member(ArtifactPart):
    """One of the models of an ensemble."""

    run: str
    """The run's absolute path or address."""
    checkpoint: str
    """Digest of its file of weights."""


class Averaging(ArtifactPart):
    """How the outputs of several models, or of one model for an image and its mirror image, become one."""

    mean: Mean = "probabilities"
    """Of the members' probabilities, or of their logits."""
    hflip: bool = False
    """Whether each member also sees the image mirrored left to right."""
