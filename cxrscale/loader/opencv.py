"""The batches in numpy and OpenCV, one image at a time: slower than DALI, and the definition of what is right."""

from __future__ import annotations

from collections.abc import Generator, Iterable

import cv2
import numpy as np
import numpy.typing as npt
import torch

from cxrscale.config import Augment
from cxrscale.loader.augment import HALF, AugmentParams, blur_window, noise_bank, sample_params, to_pixel_centers
from cxrscale.loader.reader import UNDECODABLE, EncodedBytes, find_undecodable
from cxrscale.loader.sampler import BatchIndices
from cxrscale.loader.spec import LoaderSpec
from cxrscale.types import Batch, UnreadableImageError

Levels = npt.NDArray[np.float32]


def batches(
    indices: Iterable[BatchIndices], spec: LoaderSpec, device: torch.device | str
) -> Generator[Batch, None, None]:
    """The batches of the indices, one by one; made on the CPU and moved to the device."""
    device = torch.device(device)
    for step in indices:
        try:
            yield _batch(step, spec, device)
        except UnreadableImageError:
            encoded = spec.reader.read(step.row_B, spec.masks)
            for index in find_undecodable(encoded).tolist():
                spec.reader.reject(int(step.row_B[index]), UNDECODABLE)
            yield _batch(step, spec, device)


def _batch(step: BatchIndices, spec: LoaderSpec, device: torch.device) -> Batch:
    reader, augment = spec.reader, spec.augment
    encoded = reader.read(step.row_B, spec.masks)
    size_B = reader.sizes(step.row_B)
    params = sample_params(augment, spec.seed, spec.key_N[step.row_B], step.stream_pos_B, size_B, spec.training)
    matrix_B23 = to_pixel_centers(params.matrix_B23)
    images = [augmented_image(file, i, matrix_B23[i], params, augment) for i, file in enumerate(encoded.images)]
    mask_B1HW = None
    if encoded.masks is not None:
        masks = [augmented_mask(file, matrix_B23[i], augment) for i, file in enumerate(encoded.masks)]
        mask_B1HW = torch.from_numpy(np.stack(masks)[:, None]).to(device)
    return Batch(
        image_BCHW=torch.from_numpy(np.stack(images)[:, None]).to(device),
        label_BF=torch.from_numpy(spec.label_NF[step.row_B]).to(device),
        mask_B1HW=mask_B1HW,
        row_B=torch.from_numpy(step.row_B).to(device),
        valid_B=torch.from_numpy(step.valid_B & encoded.valid_B).to(device),
    )


def augmented_image(
    file: EncodedBytes, index: int, matrix_23: npt.NDArray[np.float64], params: AugmentParams, augment: Augment
) -> Levels:
    """(H, W) float32, normalized: the image of one file under the index-th parameters."""
    level = warped(decoded(file), matrix_23, augment.size)
    if params.clahe_B[index]:
        level = equalized(level, augment)
    if params.blur_B[index]:
        level = blurred(level, augment.blur_sigma)
    level = 127.5 + params.contrast_B[index] * (level - 127.5) + 255 * params.brightness_B[index]
    if params.noise_on_B[index]:
        start = int(params.noise_offset_B[index])
        noise = noise_bank(augment.size)[start : start + augment.size**2].reshape(level.shape)
        level = level + np.float32(255 * augment.noise) * noise
    return normalized(np.clip(level, 0, 255), augment)


def augmented_mask(file: EncodedBytes, matrix_23: npt.NDArray[np.float64], augment: Augment) -> Levels:
    """(H, W) float32, 0 or 1: a mask's file under its image's map, 1 where the interpolated mask is at least half."""
    level = warped(decoded(file), matrix_23, augment.size)
    return (level > 255 * HALF).astype(np.float32)


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
    rounded = np.floor(level + np.float32(HALF)).astype(np.uint8)
    tiles = augment.clahe_tiles, augment.clahe_tiles
    return np.asarray(cv2.createCLAHE(augment.clahe_clip, tiles).apply(rounded), np.float32)


def blurred(level: Levels, sigma: float) -> Levels:
    """A Gaussian blur whose window reaches to three standard deviations, mirrored at the border."""
    window = blur_window(sigma)
    smooth = cv2.GaussianBlur(level, (window, window), sigma, borderType=cv2.BORDER_REFLECT_101)
    return np.asarray(smooth, np.float32)


def normalized(level: Levels, augment: Augment) -> Levels:
    """Gray levels 0..255 -> what the model sees: (x / 255 - mean) / std, or 0..1 between the image's extremes."""
    if augment.normalize == "minmax":
        low, high = level.min(), level.max()
        return np.asarray((level - low) / max(high - low, np.float32(1e-6)), np.float32)
    return np.asarray((level / 255 - augment.mean) / augment.std, np.float32)
