"""Augmentation parameters: what the matrix does to known points, and what the parameters depend on."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from cxrscale.config import PRESETS, Augment
from cxrscale.loader.augment import (
    NOISE_STARTS,
    AugmentParams,
    fits_inside,
    noise_bank,
    sample_params,
    to_pixel_centers,
)

N = 4000


def sampled(
    size: int = 100, stored: tuple[int, int] = (100, 100), training: bool = True, **fields: Any
) -> AugmentParams:
    """Parameters of N images."""
    augment = Augment.model_validate({"size": size, **fields})
    key = np.arange(N) * 7919 - 10_000
    height, width = (np.full(N, side) for side in stored)
    return sample_params(augment, 3, key, np.arange(N), (height, width), training)


def mapped(params: AugmentParams, x: float, y: float) -> npt.NDArray[np.float64]:
    """(N, 2) source points of an output point."""
    return np.asarray(params.matrix_B23.astype(np.float64) @ np.array([x, y, 1.0]))


def test_nothing_to_do_is_the_identity() -> None:
    for training in (True, False):
        matrix = sampled(training=training).matrix_B23
        assert np.array_equal(matrix, np.broadcast_to(np.eye(3, dtype=np.float32)[:2], (N, 2, 3)))


def test_a_resize_maps_corners_to_corners() -> None:
    params = sampled(size=50, stored=(80, 200), training=False)
    assert np.array_equal(mapped(params, 0, 0), np.zeros((N, 2)))
    assert np.allclose(mapped(params, 50, 50), [200, 80], atol=1e-4)
    # OpenCV counts from the center of the first pixel: the center of the output's first pixel is at (0, 0).
    assert np.allclose(to_pixel_centers(params.matrix_B23)[0] @ [0, 0, 1], [0.5 * 4 - 0.5, 0.5 * 1.6 - 0.5])


def test_a_flip_swaps_left_and_right_only() -> None:
    params = sampled(hflip=1.0)
    assert np.allclose(mapped(params, 10, 20), [90, 20], atol=1e-4)
    share = (mapped(sampled(hflip=0.5), 10, 20)[:, 0] > 50).mean()
    assert share == pytest.approx(0.5, abs=0.03)


def test_a_rotation_turns_about_the_center_within_bounds() -> None:
    params = sampled(rotation=10.0)
    assert np.allclose(mapped(params, 50, 50), 50, atol=1e-4)
    offset = mapped(params, 90, 50) - 50
    assert np.allclose(np.hypot(*offset.T), 40, atol=1e-3)
    angle = np.rad2deg(np.arctan2(offset[:, 1], offset[:, 0]))
    assert angle.min() == pytest.approx(-10, abs=0.1)
    assert angle.max() == pytest.approx(10, abs=0.1)
    assert np.linalg.det(params.matrix_B23[:, :, :2].astype(float)) == pytest.approx(np.ones(N), abs=1e-5)


def test_a_zoom_above_one_enlarges() -> None:
    distance = mapped(sampled(scale=(2.0, 2.0)), 90, 50)[:, 0] - 50
    assert np.allclose(distance, 20, atol=1e-4)
    distance = mapped(sampled(scale=(0.8, 1.25)), 90, 50)[:, 0] - 50
    assert distance.min() == pytest.approx(40 / 1.25, abs=0.1)
    assert distance.max() == pytest.approx(40 / 0.8, abs=0.1)


def test_a_shift_moves_the_image_within_bounds() -> None:
    moved = mapped(sampled(translation=0.1), 50, 50) - 50
    assert np.abs(moved).max() == pytest.approx(10, abs=0.1)
    assert abs(np.corrcoef(moved[:, 0], moved[:, 1])[0, 1]) < 0.06


def test_a_crop_keeps_its_share_and_stays_inside() -> None:
    params = sampled(crop_area=(0.25, 0.81))
    low, high = mapped(params, 0, 0), mapped(params, 100, 100)
    assert low.min() >= -1e-4
    assert high.max() <= 100 + 1e-4
    area = (high - low).prod(axis=1) / 100**2
    assert area.min() == pytest.approx(0.25, abs=0.01)
    assert area.max() == pytest.approx(0.81, abs=0.01)


def test_the_probability_applies_to_everything() -> None:
    params = sampled(**{**PRESETS["effusion"], "probability": 0.5})
    untouched = (params.matrix_B23 == np.eye(3)[:2]).all(axis=(1, 2))
    assert untouched.mean() == pytest.approx(0.5, abs=0.03)
    assert not params.noise_on_B[untouched].any()
    assert (params.brightness_B[untouched] == 0).all()
    assert (params.contrast_B[untouched] == 1).all()
    assert params.noise_on_B[~untouched].all()


def test_brightness_contrast_blur_and_clahe() -> None:
    params = sampled(brightness=0.2, contrast=0.3, blur=0.25, clahe="random", noise=0.1)
    assert np.abs(params.brightness_B).max() == pytest.approx(0.2, abs=0.001)
    assert [params.contrast_B.min(), params.contrast_B.max()] == pytest.approx([0.7, 1.3], abs=0.001)
    assert params.blur_B.mean() == pytest.approx(0.25, abs=0.03)
    assert params.clahe_B.mean() == pytest.approx(0.5, abs=0.03)
    assert np.abs(np.corrcoef(params.brightness_B, params.contrast_B)[0, 1]) < 0.06


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_evaluation_never_augments(preset: str) -> None:
    params = sampled(preset=preset, training=False)
    assert (params.matrix_B23 == np.eye(3)[:2]).all()
    assert not params.blur_B.any()
    assert not params.noise_on_B.any()
    assert not params.brightness_B.any()
    assert (params.contrast_B == 1).all()
    assert (params.clahe_B == (preset == "siim")).all()


def test_a_row_depends_on_itself_alone() -> None:
    augment, key, position = Augment(preset="effusion"), np.arange(9) * 31, np.arange(9) + 5
    side = np.full(9, 300)
    batch = sample_params(augment, 1, key, position, (side, side), True)
    for i in range(9):
        one = sample_params(augment, 1, key[i : i + 1], position[i : i + 1], (side[:1], side[:1]), True)
        for name in AugmentParams.__slots__:
            assert np.array_equal(getattr(one, name)[0], getattr(batch, name)[i]), name
    others = [(2, key, position), (1, key + 1, position), (1, key, position + 1)]
    for seed, keys, positions in others:
        other = sample_params(augment, seed, keys, positions, (side, side), True)
        assert not np.array_equal(other.matrix_B23, batch.matrix_B23)


def test_the_noise_bank_is_standard_normal_and_cannot_be_changed() -> None:
    bank = noise_bank(64)
    assert bank.shape == (NOISE_STARTS + 64 * 64,)
    assert bank.mean() == pytest.approx(0, abs=0.005)
    assert bank.std() == pytest.approx(1, abs=0.005)
    assert (np.abs(bank) > 1.96).mean() == pytest.approx(0.05, abs=0.002)
    assert abs(np.corrcoef(bank[:-1], bank[1:])[0, 1]) < 0.005
    with pytest.raises(ValueError, match="read-only"):
        bank[0] = 0


@pytest.mark.parametrize("stored", [(100, 100), (64, 200), (48, 48), (47, 60)])
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_inside_is_where_the_border_does_not_matter(preset: str, stored: tuple[int, int]) -> None:
    params = sampled(size=48, stored=stored, preset=preset)
    height, width = stored
    inside_N = fits_inside(params.matrix_B23, 48, np.full(N, height), np.full(N, width))
    assert inside_N.any() or min(stored) < 48 or preset == "siim"
    source = np.full(stored, 128, np.float32)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    darkest = [
        float(cv2.warpAffine(source, matrix_23, (48, 48), flags=flags, borderValue=0).min())
        for matrix_23 in to_pixel_centers(params.matrix_B23)[:200]
    ]
    assert (np.array(darkest) == 128).tolist() == inside_N[:200].tolist()
