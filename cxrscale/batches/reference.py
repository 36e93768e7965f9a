"""The same batches in numpy and OpenCV, a picture at a time: slow, and the definition of what is right."""

from __future__ import annotations

from collections.abc import Generator, Iterable

import cv2
import numpy as np
import numpy.typing as npt
import torch

from cxrscale.batches.numbers import HALF, Numbers, about_centres, draw, noise_bank
from cxrscale.batches.plan import Rows, Step
from cxrscale.batches.source import UNDECODABLE, Bytes, Source, undecodable
from cxrscale.config import Augment, Data
from cxrscale.schema import Batch, Unreadable

Levels = npt.NDArray[np.float32]


def batches(
    steps: Iterable[Step],
    source: Source,
    label_NF: npt.NDArray[np.float32],
    augment: Augment,
    data: Data,
    key_N: Rows,
    seed: int,
    training: bool,
    device: torch.device | str,
) -> Generator[Batch, None, None]:
    """The steps' batches, one by one; arguments as in `dali.batches`, the device only says where they are put."""
    device = torch.device(device)
    segment = data.task == "segment"
    for step in steps:
        try:
            yield _batch(step, source, label_NF, augment, segment, key_N, seed, training, device)
        except Unreadable:
            for place in undecodable(source.read(step.row_B, segment)).tolist():
                source.reject(int(step.row_B[place]), UNDECODABLE)
            yield _batch(step, source, label_NF, augment, segment, key_N, seed, training, device)


def _batch(
    step: Step,
    source: Source,
    label_NF: npt.NDArray[np.float32],
    augment: Augment,
    segment: bool,
    key_N: Rows,
    seed: int,
    training: bool,
    device: torch.device,
) -> Batch:
    encoded = source.read(step.row_B, segment)
    numbers = draw(augment, seed, key_N[step.row_B], step.draw_B, *source.sizes(step.row_B), training)
    matrix_B23 = about_centres(numbers.matrix_B23)
    pictures = [picture(file, i, matrix_B23[i], numbers, augment) for i, file in enumerate(encoded.images)]
    masks = None
    if encoded.masks is not None:
        drawn = [mask(file, matrix_B23[i], augment) for i, file in enumerate(encoded.masks)]
        masks = torch.from_numpy(np.stack(drawn)[:, None]).to(device)
    return Batch(
        image_BCHW=torch.from_numpy(np.stack(pictures)[:, None]).to(device),
        label_BF=torch.from_numpy(label_NF[step.row_B]).to(device),
        mask_B1HW=masks,
        row_B=torch.from_numpy(step.row_B).to(device),
        valid_B=torch.from_numpy(step.valid_B & encoded.ok_B).to(device),
    )


def picture(file: Bytes, index: int, matrix_23: npt.NDArray[np.float64], numbers: Numbers, augment: Augment) -> Levels:
    """(H, W) float32, normalised: the picture of one file under the index-th of the numbers."""
    level = warped(decoded(file), matrix_23, augment.size)
    if numbers.clahe_B[index]:
        level = equalised(level, augment)
    if numbers.blur_B[index]:
        level = blurred(level, augment.blur_sigma)
    level = 127.5 + numbers.contrast_B[index] * (level - 127.5) + 255 * numbers.brightness_B[index]
    if numbers.noise_on_B[index]:
        start = int(numbers.noise_offset_B[index])
        noise = noise_bank(augment.size)[start : start + augment.size**2].reshape(level.shape)
        level = level + np.float32(255 * augment.noise) * noise
    return normalised(np.clip(level, 0, 255), augment)


def mask(file: Bytes, matrix_23: npt.NDArray[np.float64], augment: Augment) -> Levels:
    """(H, W) float32, 0 or 1: a mask's file under its picture's map, 1 where the interpolated mask is at least half."""
    drawn = warped(decoded(file), matrix_23, augment.size)
    return (drawn > 255 * HALF).astype(np.float32)


def decoded(file: Bytes) -> npt.NDArray[np.uint8]:
    """(H, W) uint8 of a JPEG or PNG; as stored, whatever orientation its header claims.

    Raises:
        Unreadable: it cannot be decoded.
    """
    image = cv2.imdecode(file, cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION)
    if image is None:
        raise Unreadable(UNDECODABLE)
    return np.asarray(image, np.uint8)


def warped(image: npt.NDArray[np.uint8], matrix_23: npt.NDArray[np.float64], size: int) -> Levels:
    """(size, size) float32: bilinear samples at matrix @ (x, y, 1), counted in pixel centres; black outside."""
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    level = cv2.warpAffine(image.astype(np.float32), matrix_23, (size, size), flags=flags, borderValue=0)
    return np.asarray(level, np.float32)


def equalised(level: Levels, augment: Augment) -> Levels:
    """Contrast-limited adaptive histogram equalisation of the levels, rounded (Zuiderveld, Graphics Gems IV, 1994)."""
    whole = np.floor(level + np.float32(HALF)).astype(np.uint8)
    tiles = augment.clahe_tiles, augment.clahe_tiles
    return np.asarray(cv2.createCLAHE(augment.clahe_clip, tiles).apply(whole), np.float32)


def blurred(level: Levels, sigma: float) -> Levels:
    """A Gaussian blur whose window reaches to three standard deviations, mirrored at the border."""
    window = 2 * int(np.ceil(3 * sigma)) + 1
    smooth = cv2.GaussianBlur(level, (window, window), sigma, borderType=cv2.BORDER_REFLECT_101)
    return np.asarray(smooth, np.float32)


def normalised(level: Levels, augment: Augment) -> Levels:
    """Grey levels 0..255 -> what the net sees: (x / 255 - mean) / std, or 0..1 between the picture's extremes."""
    if augment.normalise == "minmax":
        low, high = level.min(), level.max()
        return np.asarray((level - low) / max(high - low, np.float32(1e-6)), np.float32)
    return np.asarray((level / 255 - augment.mean) / augment.std, np.float32)
