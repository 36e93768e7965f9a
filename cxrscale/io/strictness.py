"""How strictly an image file is read: what enters a dataset, and what a prediction accepts.

Both levels read the same gray values or none: where a file leaves them in doubt, it is refused. A file whose gray
values are certain can still break the rules of its format:

| fault of the file                                              | strict (datasets)  | lenient (predictions)     |
| -------------------------------------------------------------- | ------------------ | ------------------------- |
| DICOM without SOPInstanceUID: the image has no id              | refused            | read, with a warning      |
| DICOM without preamble, and its name lacks .dcm and .dicom     | refused            | read, with a warning      |
| bytes behind the image, fewer than a second one would take     | refused            | read, with a warning      |
| HighBit above BitsStored - 1: values are stored shifted        | refused            | shifted, with a warning   |
| JPEG scan header with a spectral selection other than 0 to 63  | refused            | read, with a warning      |
| one pad byte, 00 or FF behind the image, an empty fragment     | read               | read                      |
| NumberOfFrames 0, and one frame                                | read               | read                      |
| bits above BitsStored: overlays, garbage, lossy overshoot      | masked or clipped  | masked or clipped         |
| truncated, damaged, color, several frames, other contradictions | refused           | refused                   |

A dataset is made once and trained on for years, so a file that breaks a rule is set aside with the reason, to be mended
by whoever knows where it is from. A prediction is wanted now, and whoever asks for it reads the warning.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from cxrscale.types import UnreadableImageError


class Strictness(Enum):
    """What happens to a file that breaks a rule of its format although its gray values are certain."""

    STRICT = "strict"
    """It is refused: for datasets."""
    LENIENT = "lenient"
    """It is read with a warning: for predictions."""


@dataclass(slots=True)
class FormalFaults:
    """The faults of one file that leave its gray values certain: the first one ends a strict reading."""

    strictness: Strictness = Strictness.STRICT
    messages: list[str] = field(default_factory=list)
    """What was accepted, one line each; always empty for a strict reading."""

    @property
    def lenient(self) -> bool:
        """Whether faults are accepted."""
        return self.strictness is Strictness.LENIENT

    def add(self, fault: UnreadableImageError) -> None:
        """Accept a fault with its message as a warning, or raise it."""
        if not self.lenient:
            raise fault
        self.messages.append(str(fault))
