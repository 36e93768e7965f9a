"""Grad-CAM: the same as the exact map where that exists, and a map over the image where it does not."""

import importlib.util

import numpy as np
import pytest
import timm
import torch

from cxrscale.models import GradientMaps, pooled_features
from cxrscale.types import UserError

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("pytorch_grad_cam") is None, reason="pip install 'cxrscale[explain]'"
)


def classifier(arch: str, **options: object) -> torch.nn.Module:
    """Three findings, weights at random."""
    torch.manual_seed(0)
    model: torch.nn.Module = timm.create_model(arch, pretrained=False, in_chans=1, num_classes=3, **options)
    return model.eval()


@pytest.mark.parametrize(
    ("arch", "options"),
    [("densenet121", {"growth_rate": 8, "block_config": (1, 1, 2)}), ("resnet10t", {})],
)
def test_it_is_the_exact_map_without_its_bias(arch: str, options: dict[str, object]) -> None:
    model, image_BCHW = classifier(arch, **options), torch.rand(2, 1, 64, 64)
    with torch.no_grad(), pooled_features(model) as features:
        exact_BFhw = features.maps(model(image_BCHW))
    assert exact_BFhw is not None
    head = model.get_classifier()  # type: ignore[operator]
    found_BFhw = GradientMaps(model).maps(image_BCHW, [0, 2]) + head.bias[[0, 2], None, None]
    torch.testing.assert_close(found_BFhw.detach(), exact_BFhw[:, [0, 2]].detach(), atol=1e-5, rtol=1e-4)


def test_the_library_as_it_is_draws_the_exact_map() -> None:
    """Its own result is cut at 0 and scaled to 0..1."""
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, image_BCHW = classifier("densenet121", growth_rate=8, block_config=(1, 1, 2)), torch.rand(2, 1, 64, 64)
    head = model.get_classifier()  # type: ignore[operator]
    with torch.no_grad(), pooled_features(model) as features:
        head.weight *= 1000  # beside its 1e-7 against a division by zero
        exact_BFhw = features.maps(model(image_BCHW))
    assert exact_BFhw is not None
    layer = model.get_submodule("features.norm5")
    theirs = GradCAM(model, [layer])
    found_BHW = theirs(image_BCHW, [ClassifierOutputTarget(1)] * 2)
    theirs.activations_and_grads.release()
    positive_Bhw = (exact_BFhw[:, 1] - head.bias[1]).clamp_min(0)
    # It scales, enlarges by cv2.resize, and scales again.
    enlarged_BHW = torch.nn.functional.interpolate(positive_Bhw[:, None], (64, 64), mode="bilinear")[:, 0]
    low_B11, high_B11 = enlarged_BHW.amin(dim=(1, 2), keepdim=True), enlarged_BHW.amax(dim=(1, 2), keepdim=True)
    expected_BHW = (enlarged_BHW - low_B11) / (high_B11 - low_B11)
    np.testing.assert_allclose(found_BHW, expected_BHW.detach().numpy(), atol=2e-4)


@pytest.mark.parametrize(
    ("arch", "options", "size"),
    [
        ("vit_tiny_patch16_224", {"img_size": 64}, (4, 4)),
        ("convnext_atto", {}, (2, 2)),
        ("mobilenetv3_small_050", {}, (2, 2)),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 2, "depths": (1, 1, 1, 1)}, (2, 2)),
    ],
)
def test_other_networks_have_maps_over_the_image(arch: str, options: dict[str, object], size: tuple[int, int]) -> None:
    model, image_BCHW = classifier(arch, **options), torch.rand(2, 1, 64, 64)
    map_BFhw = GradientMaps(model).maps(image_BCHW, [1])
    assert map_BFhw.shape == (2, 1, *size)
    assert float(map_BFhw.abs().max()) > 0
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    # A batch is no more than its images.
    torch.testing.assert_close(GradientMaps(model).maps(image_BCHW[1:], [1])[0], map_BFhw[1], atol=1e-6, rtol=1e-3)


def test_frozen_parameters_do_not_stop_it() -> None:
    model = classifier("mobilenetv3_small_050")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert float(GradientMaps(model).maps(torch.rand(1, 1, 64, 64), [0]).abs().max()) > 0


def test_a_network_without_places_is_refused() -> None:
    with pytest.raises(UserError, match="it has no maps"):
        GradientMaps(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2)))
