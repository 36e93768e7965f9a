"""Class activation maps: exact where a model averages and weighs, none where it does not."""

import pytest
import timm
import torch

from cxrscale.models import pooled_features


@pytest.mark.parametrize(
    ("arch", "exact"),
    [
        ("densenet121", True),
        ("resnet18", True),
        ("efficientnet_lite0", True),
        ("mobilenetv3_small_050", False),
        ("vit_tiny_patch16_224", False),
    ],
)
def test_maps_average_to_logits_where_nothing_stands_between(arch: str, exact: bool) -> None:
    torch.manual_seed(0)
    options = {"img_size": 64} if arch.startswith("vit") else {}
    model = timm.create_model(arch, pretrained=False, in_chans=1, num_classes=3, **options).eval()
    image_BCHW = torch.randn(2, 1, 64, 64)
    with torch.no_grad(), pooled_features(model) as features:
        logit_BF = model(image_BCHW)
        map_BFhw = features.maps(logit_BF)
    assert (map_BFhw is not None) == exact
    if map_BFhw is not None:
        assert map_BFhw.shape[:2] == (2, 3)
        torch.testing.assert_close(map_BFhw.mean(dim=(2, 3)), logit_BF, atol=1e-4, rtol=1e-4)


def test_a_model_that_is_none_of_timm_has_no_maps() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2))
    with pooled_features(model) as features:
        assert features.maps(model(torch.randn(1, 1, 8, 8))) is None


def test_the_hook_goes_with_the_block() -> None:
    model = timm.create_model("resnet18", pretrained=False, in_chans=1, num_classes=1).eval()
    with pooled_features(model):
        pass
    assert not model.global_pool._forward_pre_hooks
