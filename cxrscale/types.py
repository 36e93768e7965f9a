"""What every room shares: plain data types, the errors, and how an error becomes one line.

Each type is plain data and knows nothing of the code that made it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # the commands that touch no model start two seconds sooner without torch
    import torch


def _cpu() -> torch.device:
    import torch

    return torch.device("cpu")


Mean = Literal["probabilities", "logits"]
"""What of several models is averaged."""

GrayImage = npt.NDArray[np.uint8]
"""An upright gray image, (H, W) uint8, 0 = black: bone is bright."""


class UserError(ValueError):
    """Something that the user gave is wrong. The message is one line: what is wrong, where, and how to fix it."""

    exit_code = 2
    """The exit code of a command that ends so."""


class NonFiniteError(UserError):
    """A loss, a gradient, a weight or a score became infinite or NaN; the message says which, and in which step."""

    exit_code = 4


class UnreadInputsError(UserError):
    """Some of the inputs could not be read; everything else is done."""

    exit_code = 3


class WaitLimitError(UserError):
    """Something that a command waited for did not come within its limit: room on a cluster, workers."""

    exit_code = 6


class AccessError(UserError):
    """A file could not be reached: a permission, the network, an expired login. It says nothing about its content, so
    no image may be left out for it: the command stops, and continues when it is run again."""


class UnreadableImageError(ValueError):
    """One image cannot be used; its message is the reason in `quarantine.jsonl`. The command continues without it."""


def one_line(error: BaseException | str, *, with_type: bool = False, limit: int | None = None) -> str:
    """The message of another library's error as a part of our own one-line message.

    Args:
        error: the error, or its text.
        with_type: put the name of the error's type first.
        limit: cut the line after this many characters.

    Returns:
        The text with single spaces and without unprintable characters. An error without a message gives the name of
        its type, an empty text "no reason given".
    """
    text = f"{type(error).__name__}: {error}" if with_type else str(error)
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())[:limit].rstrip(": ")
    return line or (type(error).__name__ if isinstance(error, BaseException) else "no reason given")


def last_line(error: BaseException | str) -> str:
    """The last line that is not blank, as by `one_line`: Ray and child processes put the cause below a traceback."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return one_line(lines[-1] if lines else error)


@dataclass(frozen=True, slots=True)
class Box:
    """A finding's bounding box in pixels of the original image; (x, y) is its upper left corner."""

    finding: str
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image of a source with its metadata from the source's tables; no pixel has been read yet."""

    image_id: str
    """The source's own id of the image, a file name or a DICOM UID, or the keyed hash that stands for it in a dataset;
    unique within the source."""
    source: str
    """The source's name: nih, siim, rsna, kermany."""
    path: str
    """Where the file is: a local path or an fsspec address."""
    patient: str
    """The patient's id, or its keyed hash; unique within the source. Images of one patient are always in one split."""
    findings: Mapping[str, int] = field(default_factory=dict)
    """Finding -> config.PRESENT or config.ABSENT. A finding that is missing here is unlabeled."""
    split: str | None = None
    """The source's own split (train_val, test), or None if it publishes none."""
    view: str | None = None
    """PA or AP, or None if unknown."""
    sex: str | None = None
    """F or M, or None if unknown."""
    age: int | None = None
    """Age in years, or None if unknown or impossible (above 120)."""
    spacing_mm: tuple[float, float] | None = None
    """Distance between pixels of the original image in millimeters: (rows, columns)."""
    tables_HW: tuple[int, int] | None = None
    """(H, W) of the image that the tables speak of: `boxes` and `spacing_mm` are in its pixels. A copy may have another
    size, which is known when it is read; None: the size of the file."""
    rles: tuple[str, ...] | None = None
    """Run-length encodings whose union is the mask; () is an empty mask, None means not labeled."""
    boxes: tuple[Box, ...] = ()


@dataclass(frozen=True)
class DistContext:
    """Where this process stands in a distributed run."""

    rank: int = 0
    """The index of this process, 0 to world - 1."""
    world: int = 1
    """The number of processes."""
    device: torch.device = field(default_factory=_cpu)
    """Where the tensors of this process live."""


@dataclass(slots=True)
class Batch:
    """One rank's share of a step. Padding rows and rows whose bytes cannot be decoded have valid = False."""

    image_BCHW: torch.Tensor
    """float32 or float16, normalized; C = 1."""
    label_BF: torch.Tensor
    """float32: 1 present, 0 absent, NaN unlabeled; columns in the order of `data.findings`."""
    mask_B1HW: torch.Tensor | None
    """float32, 0 or 1, on the image's pixel grid; None unless the task is segmentation."""
    row_B: torch.Tensor
    """int64 row indices of the manifest: `manifest.image_id[row]` is the image's id."""
    valid_B: torch.Tensor
    """bool; rows with False enter no loss and no metric."""
    also_BCHW: tuple[torch.Tensor, ...] = ()
    """The same images as other members of an ensemble see them: of other sizes, or otherwise normalized."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Model outputs for N images, gathered from all ranks, each image exactly once."""

    image_id: npt.NDArray[np.object_]
    patient: npt.NDArray[np.object_]
    logit_NF: npt.NDArray[np.float32] | npt.NDArray[np.float64]
    """Logits, columns in the order of `findings`; for segmentation of the map's highest pixel. They rank images:
    probabilities of logits above 17 are all 1 in float32. float64 where they were computed from probabilities."""
    label_NF: npt.NDArray[np.float32]
    """1 present, 0 absent, NaN unlabeled."""
    findings: tuple[str, ...]
    maps: ScoreHistograms | None = None
    """For segmentation: what the choice of thresholds needs from the score maps."""
    ood_distance_N: npt.NDArray[np.float64] | None = None
    """How unlike the training images each image is (see `evaluation.ood`); None where it was not measured."""

    @property
    def probability_NF(self) -> npt.NDArray[np.float64]:
        """Probabilities in 0..1 of the logits; not calibrated."""
        return probabilities_of(self.logit_NF)


def probabilities_of(logit: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """The probability of each logit, in float64: distinct for logits up to 36."""
    from scipy.special import expit

    return np.asarray(expit(np.asarray(logit, dtype=np.float64)), dtype=np.float64)


def logits_of(probability: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """The logit of each probability, in float64, for scores that were stored as float32 probabilities.

    0 and 1, which a float32 sigmoid reaches, become -104 and 17.4, beyond the logits of their neighbors; NaN stays.
    """
    from scipy.special import logit

    value = np.asarray(probability, dtype=np.float64)
    return np.asarray(logit(np.clip(value, 2.0**-150, 1 - 2.0**-25)), dtype=np.float64)


@dataclass(frozen=True, slots=True)
class ScoreHistograms:
    """Histograms of N score maps: enough to compute Dice at every threshold without the maps themselves."""

    all_NT: npt.NDArray[np.int32]
    """Number of pixels whose score falls into bin t of T equal bins over 0..1."""
    true_NT: npt.NDArray[np.int32]
    """The same for pixels inside the true mask only."""
    own_size: bool = False
    """Whether the maps were enlarged to each image's own size, as SIIM-ACR scored them; else they have the size of
    the model's input."""
