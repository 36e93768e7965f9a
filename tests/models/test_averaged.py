"""Several models as one: the mean of probabilities or of logits, also over a mirrored image."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import avg_pool2d

from cxrscale.models import MEANS, Averaged
from cxrscale.types import probabilities_of


class Weighted(nn.Module):
    """(B, F) logits that depend on where the image is bright."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.weight_FHW = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(seed))

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bhw,fhw->bf", image_BCHW[:, 0], self.weight_FHW)


class Shifted(nn.Module):
    """A (B, 1, H, W) map that is not symmetric: the image, moved to the right."""

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        return image_BCHW.roll(1, dims=-1)


@pytest.fixture
def image_BCHW() -> torch.Tensor:
    return torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_the_mean_is_of_probabilities_or_of_logits(image_BCHW: torch.Tensor) -> None:
    models = [Weighted(1), Weighted(2)]
    logit_MBF = np.stack([model(image_BCHW).numpy() for model in models]).astype(np.float64)
    of_logits = Averaged(models, "logits")(image_BCHW).numpy()
    np.testing.assert_allclose(of_logits, logit_MBF.mean(axis=0), atol=1e-5)
    of_probabilities = probabilities_of(Averaged(models)(image_BCHW).numpy())
    np.testing.assert_allclose(of_probabilities, probabilities_of(logit_MBF).mean(axis=0), atol=1e-6)
    assert abs(of_probabilities - probabilities_of(of_logits)).max() > 0.01


def test_certain_members_keep_their_order() -> None:
    # In fp32 both probabilities of the first image are 1; their mean's logit is not infinite.
    class Constant(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

        def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
            return torch.full((len(image_BCHW), 1), self.value)

    image_BCHW = torch.zeros(1, 1, 8, 8)
    values = [float(Averaged([Constant(a), Constant(b)])(image_BCHW)) for a, b in ((40, 44), (60, 64), (-60, -64))]
    assert 40 < values[0] < 44 < 60 < values[1] < 64
    assert values[2] == pytest.approx(-values[1])


def test_a_mirrored_image_counts_like_a_member_and_its_map_is_mirrored_back(image_BCHW: torch.Tensor) -> None:
    model = Weighted(1)
    expected_BF = (model(image_BCHW) + model(image_BCHW.flip(-1))) / 2
    torch.testing.assert_close(Averaged([model], "logits", hflip=True)(image_BCHW), expected_BF)
    map_BCHW = Averaged([Shifted()], "logits", hflip=True)(image_BCHW)
    torch.testing.assert_close(map_BCHW, (image_BCHW.roll(1, dims=-1) + image_BCHW.roll(-1, dims=-1)) / 2)


def test_members_take_their_own_inputs_and_maps_the_size_of_the_first(image_BCHW: torch.Tensor) -> None:
    large_BCHW = torch.randn(5, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    for mean in MEANS:
        map_BCHW = Averaged([nn.Identity(), nn.Identity()], mean, sees=(0, 1))(image_BCHW, large_BCHW)
        # Bilinear at half the size, between pixel centers, is the mean of 2 x 2 pixels.
        values = [one if mean == "logits" else one.sigmoid() for one in (image_BCHW, large_BCHW)]
        expected_BCHW = (values[0] + avg_pool2d(values[1], 2)) / 2
        found_BCHW = map_BCHW if mean == "logits" else map_BCHW.sigmoid()
        torch.testing.assert_close(found_BCHW, expected_BCHW)
    certain = Averaged([nn.Identity(), nn.Identity()], sees=(0, 1))(image_BCHW * 0 + 200, large_BCHW * 0 - 200)
    assert torch.isfinite(certain).all()
