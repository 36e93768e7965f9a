"""The nouns that cross stages. Each is plain data; none knows the stage that made it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # the commands that touch no model start two seconds sooner without torch
    import torch

GrayImage = npt.NDArray[np.uint8]
"""An upright gray image, (H, W) uint8, 0 = black: bone is bright."""


class UserError(ValueError):
    """Something the user gave is wrong. The message is one line: what, where, and the remedy."""


class UnreadableImageError(ValueError):
    """One image cannot be used; the message is the reason that `quarantine.jsonl` holds. The run goes on."""


@dataclass(frozen=True, slots=True)
class Box:
    """A finding's rectangle in pixels of the original image; (x, y) is the upper left corner."""

    finding: str
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image of a raw archive and all that its tables say of it; no pixel is read yet."""

    image_id: str
    """The archive's own name for the image: a file name or a DICOM UID; unique within the archive."""
    source: str
    """The archive: nih, siim, rsna, kermany."""
    path: str
    """Where the image lies: a local path or an fsspec address."""
    patient: str
    """The patient, unique within the archive. Splits never part what shares it."""
    findings: Mapping[str, int] = field(default_factory=dict)
    """Finding -> labels.PRESENT or labels.ABSENT. A finding that is not named here is unlabeled."""
    split: str | None = None
    """The archive's own split (train_val, test), or None where it publishes none."""
    view: str | None = None
    """PA or AP, or None where unknown."""
    sex: str | None = None
    """F or M, or None where unknown."""
    age: int | None = None
    """Years, or None where unknown or impossible (above 120)."""
    spacing_mm: tuple[float, float] | None = None
    """Millimeters between pixels of the original image: (rows, columns)."""
    rles: tuple[str, ...] | None = None
    """Run-length encodings whose union is the mask; () is an empty mask, None an unlabeled one."""
    boxes: tuple[Box, ...] = ()


@dataclass(slots=True)
class Batch:
    """One rank's share of a step. Rows of padding and rows whose bytes were bad have valid = False."""

    image_BCHW: torch.Tensor
    """float32 or float16, normalized; C = 1."""
    label_BF: torch.Tensor
    """float32: 1 present, 0 absent, NaN unlabeled; columns in the order of `data.findings`."""
    mask_B1HW: torch.Tensor | None
    """float32, 0 or 1, on the image's own grid; None unless the task is segmentation."""
    row_B: torch.Tensor
    """int64 rows of the manifest: `manifest.image_id[row]` names the image."""
    valid_B: torch.Tensor
    """bool; what is False enters no loss and no metric."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Gathered outputs of N images, each exactly once."""

    image_id: npt.NDArray[np.object_]
    patient: npt.NDArray[np.object_]
    score_NF: npt.NDArray[np.float32]
    """Probabilities in 0..1, columns in the order of `findings`."""
    label_NF: npt.NDArray[np.float32]
    """1 present, 0 absent, NaN unlabeled."""
    findings: tuple[str, ...]
    maps: ScoreHistograms | None = None
    """For segmentation: what thresholds need to know of the score maps."""


@dataclass(frozen=True, slots=True)
class ScoreHistograms:
    """Histograms of N score maps, enough to know Dice at every threshold without the maps themselves."""

    all_NT: npt.NDArray[np.int32]
    """Pixels whose score falls into bin t of T equal bins over 0..1."""
    true_NT: npt.NDArray[np.int32]
    """The same, counting only pixels inside the true mask."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a model says of one file, or why it could not."""

    path: str
    scores: Mapping[str, float] = field(default_factory=dict)
    """Finding -> probability in 0..1."""
    rle: str | None = None
    """For segmentation: the mask at the file's own size, run-length encoded as in SIIM-ACR; '-1' is empty."""
    error: str = ""
    """Why there are no scores; empty where there are."""
