"""What a backend has to know to turn batch indices into batches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cxrscale.config import Augment
from cxrscale.loader.hashing import Rows
from cxrscale.loader.reader import Reader


@dataclass(frozen=True, slots=True)
class LoaderSpec:
    """One loader's input and settings; N is the number of rows in the manifest."""

    reader: Reader
    """Source of the encoded images and masks."""
    label_NF: npt.NDArray[np.float32]
    """1 present, 0 absent, NaN unlabeled."""
    key_N: Rows
    """The manifest's 64-bit number of each image, which its augmentation depends on."""
    augment: Augment
    seed: int
    """sampler.seed."""
    training: bool
    """Whether to augment; without it, images are only resized and normalized."""
    masks: bool
    """Whether batches carry masks."""
    num_threads: int
    """DALI's CPU threads."""
    prefetch: int
    """Batches that DALI prepares ahead."""
