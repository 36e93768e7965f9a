"""Nets by name, and weights that fit or fail loudly."""

from pathlib import Path

import pytest
import torch

from cxrscale import models
from cxrscale.config import Data, Model
from cxrscale.schema import InputError

SMALL = Model(weights="none", options={"growth_rate": 8, "block_config": [1, 1, 2]})
TWO = Data(findings=("Mass", "Nodule"))


def test_chexnet_is_densenet121_with_14_logits_on_one_grey_channel() -> None:
    net = models.build(Model(weights="none"), Data())
    # torchvision's DenseNet-121 has 6,953,856 before its head; one input channel instead of three takes 2 x 64 x 49.
    assert models.parameters(net) == 6_953_856 - 2 * 64 * 49 + (1024 + 1) * 14


def test_weights_of_another_run_load(tmp_path: Path) -> None:
    first = models.build(SMALL, TWO)
    torch.save({"model": first.state_dict()}, tmp_path / "best.pt")
    second = models.build(SMALL.model_copy(update={"weights": str(tmp_path / "best.pt")}), TWO)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])


@pytest.mark.parametrize("change", ["missing", "left over", "other shape"])
def test_weights_that_do_not_fit_are_listed(change: str, tmp_path: Path) -> None:
    state = models.build(SMALL, TWO).state_dict()
    if change == "missing":
        del state["classifier.bias"]
    elif change == "left over":
        state["head.bias"] = torch.zeros(2)
    else:
        state["classifier.bias"] = torch.zeros(7)
    torch.save({"model": state}, tmp_path / "best.pt")
    with pytest.raises(InputError, match=f"{change}: (classifier|head).bias"):
        models.build(SMALL.model_copy(update={"weights": str(tmp_path / "best.pt")}), TWO)


def test_a_file_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "best.pt").write_bytes(b"nothing")
    with pytest.raises(InputError, match="not a cxrscale checkpoint"):
        models.load_weights(torch.nn.Linear(1, 1), str(tmp_path / "best.pt"))


def test_imagenet_weights_that_cannot_be_fetched_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="weights=imagenet cannot be fetched") as caught:
        models.build(Model(weights="imagenet"), TWO)
    assert "\n" not in str(caught.value)
