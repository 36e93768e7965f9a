"""The same batches in numpy and OpenCV, an image at a time: slow, and the definition of what is right."""

from __future__ import annotations

from collections.abc import Generator, Iterable

import cv2
import numpy as np
import numpy.typing as npt
import torch

from cxrscale.config import Augment, Data
from cxrscale.loader.augment import HALF, AugmentParams, noise_bank, sample_params, to_pixel_centers
from cxrscale.loader.hashing import Rows
from cxrscale.loader.reader import UNDECODABLE, EncodedBytes, Reader, find_undecodable
from cxrscale.loader.sampler import BatchIndices
from cxrscale.types import Batch, UnreadableImageError

Levels = npt.NDArray[np.float32]


def batches(
    steps: Iterable[BatchIndices],
    source: Reader,
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
        except UnreadableImageError:
            for place in find_undecodable(source.read(step.row_B, segment)).tolist():
                source.reject(int(step.row_B[place]), UNDECODABLE)
            yield _batch(step, source, label_NF, augment, segment, key_N, seed, training, device)


def _batch(
    step: BatchIndices,
    source: Reader,
    label_NF: npt.NDArray[np.float32],
    augment: Augment,
    segment: bool,
    key_N: Rows,
    seed: int,
    training: bool,
    device: torch.device,
) -> Batch:
    encoded = source.read(step.row_B, segment)
    numbers = sample_params(augment, seed, key_N[step.row_B], step.draw_B, *source.sizes(step.row_B), training)
    matrix_B23 = to_pixel_centers(numbers.matrix_B23)
    image_list = [augmented_image(file, i, matrix_B23[i], numbers, augment) for i, file in enumerate(encoded.images)]
    masks = None
    if encoded.masks is not None:
        drawn = [mask(file, matrix_B23[i], augment) for i, file in enumerate(encoded.masks)]
        masks = torch.from_numpy(np.stack(drawn)[:, None]).to(device)
    return Batch(
        image_BCHW=torch.from_numpy(np.stack(image_list)[:, None]).to(device),
        label_BF=torch.from_numpy(label_NF[step.row_B]).to(device),
        mask_B1HW=masks,
        row_B=torch.from_numpy(step.row_B).to(device),
        valid_B=torch.from_numpy(step.valid_B & encoded.ok_B).to(device),
    )


def augmented_image(
    file: EncodedBytes, index: int, matrix_23: npt.NDArray[np.float64], numbers: AugmentParams, augment: Augment
) -> Levels:
    """(H, W) float32, normalized: the image of one file under the index-th of the numbers."""
    level = warped(decoded(file), matrix_23, augment.size)
    if numbers.clahe_B[index]:
        level = equalized(level, augment)
    if numbers.blur_B[index]:
        level = blurred(level, augment.blur_sigma)
    level = 127.5 + numbers.contrast_B[index] * (level - 127.5) + 255 * numbers.brightness_B[index]
    if numbers.noise_on_B[index]:
        start = int(numbers.noise_offset_B[index])
        noise = noise_bank(augment.size)[start : start + augment.size**2].reshape(level.shape)
        level = level + np.float32(255 * augment.noise) * noise
    return normalized(np.clip(level, 0, 255), augment)


def mask(file: EncodedBytes, matrix_23: npt.NDArray[np.float64], augment: Augment) -> Levels:
    """(H, W) float32, 0 or 1: a mask's file under its image's map, 1 where the interpolated mask is at least half."""
    drawn = warped(decoded(file), matrix_23, augment.size)
    return (drawn > 255 * HALF).astype(np.float32)


def decoded(file: EncodedBytes) -> npt.NDArray[np.uint8]:
    """(H, W) uint8 of a JPEG or PNG; as stored, whatever orientation its header claims.

    Raises:
        UnreadableImageError: it cannot be decoded.
    """
    image = cv2.imdecode(file, cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION)
    if image is None:
        raise UnreadableImageError(UNDECODABLE)
    return np.asarray(image, np.uint8)


def warped(image: npt.NDArray[np.uint8], matrix_23: npt.NDArray[np.float64], size: int) -> Levels:
    """(size, size) float32: bilinear samples at matrix @ (x, y, 1), counted in pixel centers; black outside."""
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    level = cv2.warpAffine(image.astype(np.float32), matrix_23, (size, size), flags=flags, borderValue=0)
    return np.asarray(level, np.float32)


def equalized(level: Levels, augment: Augment) -> Levels:
    """Contrast-limited adaptive histogram equalization of the levels, rounded (Zuiderveld, Graphics Gems IV, 1994)."""
    whole = np.floor(level + np.float32(HALF)).astype(np.uint8)
    tiles = augment.clahe_tiles, augment.clahe_tiles
    return np.asarray(cv2.createCLAHE(augment.clahe_clip, tiles).apply(whole), np.float32)


def blurred(level: Levels, sigma: float) -> Levels:
    """A Gaussian blur whose window reaches to three standard deviations, mirrored at the border."""
    window = 2 * int(np.ceil(3 * sigma)) + 1
    smooth = cv2.GaussianBlur(level, (window, window), sigma, borderType=cv2.BORDER_REFLECT_101)
    return np.asarray(smooth, np.float32)


def normalized(level: Levels, augment: Augment) -> Levels:
    """Gray levels 0..255 -> what the model sees: (x / 255 - mean) / std, or 0..1 between the image's extremes."""
    if augment.normalize == "minmax":
        low, high = level.min(), level.max()
        return np.asarray((level - low) / max(high - low, np.float32(1e-6)), np.float32)
    return np.asarray((level / 255 - augment.mean) / augment.std, np.float32)
