"""The check for images unlike the training images."""

import numpy as np
import pytest

from cxrscale.evaluation import ood
from cxrscale.evaluation.metrics import Floats
from cxrscale.evaluation.ood import OodReference, choose_limit, fit_reference
from cxrscale.io import decode_artifact, encode_artifact
from cxrscale.types import UserError


def chests(count: int, seed: int) -> Floats:
    """(N, D) thumbnails of two dark lungs of varying place, size and brightness on a bright body."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:16, 0:16]
    images = []
    for _ in range(count):
        cx, cy, width, height = rng.normal([3.8, 7.5, 2.2, 4.5], [0.3, 0.6, 0.2, 0.4])
        lung_HW = sum(np.exp(-((((x - c) / width) ** 2 + ((y - cy) / height) ** 2) ** 2)) for c in (cx, 15 - cx))
        body_HW = 0.6 * np.exp(-(((x - 7.5) / 9) ** 4)) - 0.5 * lung_HW
        images.append(
            (body_HW * rng.uniform(0.6, 1.4) + rng.uniform(-0.3, 0.3) + rng.normal(0, 0.02, (16, 16))).ravel()
        )
    return np.stack(images)


@pytest.fixture(scope="module")
def reference() -> OodReference:
    made = fit_reference(chests(300, 0), "manifest")
    assert made is not None
    return made


def test_other_images_of_the_kind_are_as_near_as_those_that_it_was_fitted_on(reference: OodReference) -> None:
    limit = choose_limit(reference.distance(chests(400, 1)))
    assert (reference.distance(chests(400, 2)) > limit).mean() < 0.03
    assert np.median(reference.distance(chests(400, 2))) == pytest.approx(np.sqrt(2), abs=0.3)


@pytest.mark.parametrize("change", ["inverted", "turned", "upside down", "shifted", "noise", "one lung", "blank"])
def test_another_kind_of_image_is_far(change: str, reference: OodReference) -> None:
    limit = choose_limit(reference.distance(chests(400, 1)))
    image_N2 = chests(50, 3).reshape(-1, 16, 16)
    rng = np.random.default_rng(4)
    changed = {
        "inverted": -image_N2,
        "turned": np.rot90(image_N2, axes=(1, 2)),
        "upside down": np.roll(image_N2, 6, axis=1),
        "shifted": np.roll(image_N2, 4, axis=2),
        "noise": rng.random(image_N2.shape),
        "one lung": np.where(np.arange(16) < 8, image_N2, image_N2[..., ::-1].mean()),
        "blank": np.full(image_N2.shape, 0.3),
    }[change]
    assert (reference.distance(changed.reshape(50, -1)) > limit).mean() >= 0.98


def test_brightness_and_contrast_do_not_count(reference: OodReference) -> None:
    images = chests(20, 5)
    np.testing.assert_allclose(reference.distance(images), reference.distance(3 * images - 7), rtol=1e-6)


def test_it_is_kept_as_an_artifact(reference: OodReference) -> None:
    again = decode_artifact(OodReference, encode_artifact(reference), "ood.json", "make it again")
    np.testing.assert_allclose(again.distance(chests(20, 6)), reference.distance(chests(20, 6)))


@pytest.mark.parametrize(
    "damage",
    [{"mean": (0.0,)}, {"components": ()}, {"scale": (0.0,) * 16}, {"residual": 0.0}, {"residual": float("nan")}],
)
def test_a_damaged_reference_is_refused(damage: dict[str, object], reference: OodReference) -> None:
    wrong = reference.model_copy(update=damage)
    with pytest.raises(UserError, match=r"ood\.json"):
        decode_artifact(OodReference, encode_artifact(wrong), "ood.json", "make it again")


def test_too_few_or_equal_images_give_none() -> None:
    assert fit_reference(chests(ood.FEWEST - 1, 0), "") is None
    assert fit_reference(np.repeat(chests(1, 0), 50, axis=0), "") is None
    assert fit_reference(np.full((50, 256), 0.5), "") is None
    assert np.isnan(choose_limit([]))
