"""Models by name, and weights that fit or fail loudly."""

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrscale import config
from cxrscale.config import Data, Model
from cxrscale.config.findings import NIH14
from cxrscale.io import storage
from cxrscale.models.networks import build_model, count_trainable, initial_weights, train_mode
from cxrscale.models.weights import head_names, load_weights
from cxrscale.types import UserError

SMALL = Model(weights="none", options={"growth_rate": 8, "block_config": [1, 1, 2]})
TWO = Data(findings=("Mass", "Nodule"))
ONE = Data(findings=("Pneumonia",))
ONE_MASK = Data(task="segment", findings=("Pneumothorax",))
TINY_UNET = Model(
    arch="Unet",
    encoder="resnet18",
    weights="none",
    options={"encoder_depth": 3, "decoder_channels": [16, 8, 8]},
)


def using(model_config: Model, weights: Path | str, data: Data = TWO) -> Model:
    """The model from a file that may not say its findings, which are those of `data`."""
    return model_config.model_copy(update={"weights": str(weights), "weights_findings": data.findings})


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def agree(ours: torch.nn.Module, theirs: torch.nn.Module, image_B1HW: torch.Tensor) -> None:
    """Ours on the gray images gives what theirs gives on three channels of them; in fp64, so that only the weights
    can differ."""
    image_B1HW = image_B1HW.double()
    with torch.no_grad():
        expected = theirs.double().eval()(image_B1HW.expand(-1, 3, -1, -1))
        torch.testing.assert_close(ours.double().eval()(image_B1HW), expected, rtol=1e-5, atol=1e-6)


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    torch.manual_seed(0)


def test_chexnet_is_densenet121_with_14_logits_on_one_gray_channel() -> None:
    model = build_model(Model(weights="none"), Data())
    # torchvision's DenseNet-121 has 6,953,856 before its head; one input channel instead of three takes 2 x 64 x 49.
    assert count_trainable(model) == 6_953_856 - 2 * 64 * 49 + (1024 + 1) * 14


def test_weights_of_another_run_load(tmp_path: Path) -> None:
    first = build_model(SMALL, TWO)
    torch.save({"model": first.state_dict()}, tmp_path / "best.pt")
    assert same_weights(first, build_model(using(SMALL, tmp_path / "best.pt"), TWO))


@pytest.mark.parametrize("change", ["missing", "left over", "of other shape"])
def test_weights_that_do_not_fit_are_listed(change: str, tmp_path: Path) -> None:
    state = build_model(SMALL, TWO).state_dict()
    if change == "missing":
        del state["classifier.bias"]
    elif change == "left over":
        state["head.bias"] = torch.zeros(2)
    else:
        state["classifier.bias"] = torch.zeros(7)
    torch.save({"model": state}, tmp_path / "best.pt")
    with pytest.raises(UserError, match=f"1 {change}: (classifier|head).bias"):
        build_model(using(SMALL, tmp_path / "best.pt"), TWO)


def test_only_the_count_of_batches_may_be_missing(tmp_path: Path) -> None:
    state = build_model(SMALL, TWO).state_dict()
    kept = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    torch.save({"model": kept}, tmp_path / "old.pt")
    build_model(using(SMALL, tmp_path / "old.pt"), TWO)
    del kept["features.norm0.running_mean"]
    torch.save({"model": kept}, tmp_path / "old.pt")
    with pytest.raises(UserError, match=r"1 missing: features\.norm0\.running_mean"):
        build_model(using(SMALL, tmp_path / "old.pt"), TWO)


@pytest.mark.parametrize("content", [b"nothing", b"", b"PK\x03\x04", None])
def test_a_file_without_weights_is_named(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    torch.save({"epoch": 3}, path) if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match="no weights in it") as caught:
        load_weights(torch.nn.Linear(1, 1), str(path))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no such file"):
        load_weights(torch.nn.Linear(1, 1), str(tmp_path / "other.pt"))


def test_pickled_objects_are_refused_with_the_remedy(tmp_path: Path) -> None:
    state = build_model(SMALL, TWO).state_dict()
    torch.save({"state_dict": state, "best": np.float64(0.8)}, tmp_path / "old.pth.tar")
    with pytest.raises(UserError, match=r"pickled objects.*if you trust it.*torch\.save") as caught:
        build_model(using(SMALL, tmp_path / "old.pth.tar"), TWO)
    assert "\n" not in str(caught.value)


def test_weights_are_read_from_a_bucket(s3: str) -> None:
    first = build_model(SMALL, TWO)
    content = io.BytesIO()
    torch.save({"model": first.state_dict()}, content)
    storage.write(f"{s3}/runs/first/best.pt", content.getvalue())
    second = build_model(using(SMALL, f"{s3}/runs/first/best.pt"), TWO)
    assert same_weights(first, second)
    with pytest.raises(UserError, match="no such file"):
        build_model(using(SMALL, f"{s3}/runs/none/best.pt"), TWO)


@pytest.mark.parametrize("arch", ["densenet121", "resnet18", "Unet"])
def test_a_new_head_leaves_out_the_files_last_layer_alone(arch: str, tmp_path: Path) -> None:
    data = ONE_MASK if arch == "Unet" else TWO
    model_config = {"densenet121": SMALL, "Unet": TINY_UNET}.get(arch, Model(weights="none", arch=arch))
    first = build_model(model_config, data)
    torch.nn.init.normal_(list(first.parameters())[-1])  # a bias that is not a fresh head's zeros
    torch.save({"model": first.state_dict()}, tmp_path / "best.pt")
    other = data if arch == "Unet" else Data(findings=("Hernia", "Edema", "Fibrosis"))
    second = build_model(using(model_config, tmp_path / "best.pt").model_copy(update={"reset_head": True}), other)
    last = head_names(second)[0]
    assert last == {"densenet121": "classifier", "resnet18": "fc", "Unet": "segmentation_head"}[arch]
    for name, value in second.state_dict().items():
        if name.startswith(last + "."):
            assert value.shape != first.state_dict()[name].shape or not torch.equal(value, first.state_dict()[name])
        else:
            assert torch.equal(value, first.state_dict()[name])
    # The rest must still fit.
    state = {key: value for key, value in first.state_dict().items() if key != next(iter(first.state_dict()))}
    torch.save({"model": state}, tmp_path / "best.pt")
    with pytest.raises(UserError, match="1 missing: "):
        build_model(using(model_config, tmp_path / "best.pt").model_copy(update={"reset_head": True}), other)


def test_the_rows_of_a_last_layer_follow_its_findings(tmp_path: Path) -> None:
    first = build_model(SMALL, TWO)
    state = {"model": first.state_dict(), "recipe": {"data": {"findings": ["Mass", "Nodule"]}}}
    torch.save(state, tmp_path / "best.pt")
    start = SMALL.model_copy(update={"weights": str(tmp_path / "best.pt")})
    assert same_weights(build_model(start, TWO), first)
    image = torch.randn(2, 1, 64, 64)
    logit_BF = first.eval()(image)
    for names, columns in ((("Nodule", "Mass"), [1, 0]), (("Nodule",), [1])):
        data = Data(findings=names)
        torch.testing.assert_close(build_model(start, data).eval()(image), logit_BF[:, columns])
        (line,) = initial_weights(start, data)
        assert line.endswith(f"of its 2 outputs those of {', '.join(names)} are used")
    with pytest.raises(UserError, match=r"trained for Mass, Nodule, not for Hernia; .*model\.reset_head=true"):
        build_model(start, Data(findings=("Mass", "Hernia")))
    build_model(start.model_copy(update={"reset_head": True}), Data(findings=("Mass", "Hernia")))
    stated = start.model_copy(update={"weights_findings": ("Nodule", "Mass")})
    with pytest.raises(UserError, match=r"model\.weights_findings=.*itself says .*; remove the field"):
        build_model(stated, TWO)


class PublicCheXNet(torch.nn.Module):
    """The class of both public repositories: torchvision's model as an attribute, ending in Linear and Sigmoid."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.densenet121 = torchvision.models.densenet121(weights=None)
        self.densenet121.classifier = torch.nn.Sequential(torch.nn.Linear(1024, outputs), torch.nn.Sigmoid())

    def forward(self, image_B3HW: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.densenet121(image_B3HW)
        return out


def as_published(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A state dict as torchvision and DataParallel of 2017 wrote it."""
    return {
        "module." + re.sub(r"(norm|conv)([12])\.", r"\1.\2.", key): value
        for key, value in model.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }


@pytest.fixture(scope="module")
def public() -> PublicCheXNet:
    torch.manual_seed(0)
    model = PublicCheXNet(14)
    with torch.no_grad():  # as after training: no buffer at the value that a fresh model has anyway
        model.train()(torch.randn(4, 3, 64, 64))
    return model.eval()


@pytest.mark.parametrize("layout", ["arnoweng", "zoogzog", "today", "bare"])
def test_public_chexnets_give_their_own_outputs(layout: str, public: PublicCheXNet, tmp_path: Path) -> None:
    old = as_published(public)
    assert "module.densenet121.features.denseblock1.denselayer1.norm.1.weight" in old
    assert "module.densenet121.classifier.0.weight" in old
    contents: dict[str, dict[str, Any]] = {
        "arnoweng": {"state_dict": old},
        "zoogzog": {
            "epoch": 3,
            "state_dict": old,
            "best_loss": 0.15,
            "optimizer": torch.optim.Adam(public.parameters()).state_dict(),
        },
        "today": {"state_dict": {"module." + key: value for key, value in public.state_dict().items()}},
        "bare": dict(public.state_dict()),
    }
    # Files of 2017 are no zip archives.
    torch.save(contents[layout], tmp_path / "model.pth.tar", _use_new_zipfile_serialization=layout == "today")
    stated = config.parse(Model, {"weights": str(tmp_path / "model.pth.tar"), "weights_findings": "chexnet14"}, "test")
    ours = build_model(stated, Data()).eval()
    gray = torch.randn(3, 1, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(ours(gray).sigmoid(), public(gray.expand(-1, 3, -1, -1)), rtol=0, atol=1e-5)
        assert (ours(gray).sigmoid() - public(gray.flip(-1).expand(-1, 3, -1, -1))).abs().max() > 1e-4


@pytest.mark.parametrize("change", ["missing", "left over"])
def test_a_public_chexnet_that_is_not_whole_is_refused(change: str, public: PublicCheXNet, tmp_path: Path) -> None:
    state = as_published(public)
    if change == "missing":
        del state["module.densenet121.features.denseblock3.denselayer7.conv.2.weight"]
    else:
        state["module.densenet121.features.denseblock9.weight"] = torch.zeros(1)
    torch.save({"state_dict": state}, tmp_path / "model.pth.tar")
    listed = "denseblock3.denselayer7.conv2.weight" if change == "missing" else "denseblock9.weight"
    with pytest.raises(UserError, match=f"1 {change}: features.{listed}"):
        build_model(Model(weights=str(tmp_path / "model.pth.tar"), weights_findings=NIH14), Data())


def test_the_findings_of_a_last_layer_that_does_not_say_them_are_never_assumed(
    public: PublicCheXNet, tmp_path: Path
) -> None:
    """CheXpert's 14 findings have the layout of ChestX-ray14's: a file of one would pass for the other."""
    torch.save({"state_dict": as_published(public)}, tmp_path / "model.pth.tar")
    start = Model(weights=str(tmp_path / "model.pth.tar"))
    for findings in (NIH14, NIH14[::-1], ("Pneumonia",)):
        with pytest.raises(UserError, match="does not say what findings its last layer was trained for") as caught:
            initial_weights(start, Data(findings=findings))
        for remedy in ("model.reset_head=true", "model.weights_findings=[", "model.weights_findings=chexnet14"):
            assert remedy in str(caught.value)
        assert "\n" not in str(caught.value)
    assert initial_weights(start.model_copy(update={"reset_head": True}), ONE) == ()
    stated = start.model_copy(update={"weights_findings": NIH14})
    assert initial_weights(stated, Data()) == ()
    assert "of its 14 outputs those of Pneumonia are used" in initial_weights(stated, ONE)[0]
    with pytest.raises(UserError, match=r"2 of other shape: classifier\.bias"):
        build_model(start.model_copy(update={"weights_findings": TWO.findings}), TWO)


UNET18 = Model(arch="Unet", encoder="resnet18", weights="none")


def starting_from(model_config: Model, weights: Path | str, encoder: str = "resnet18") -> Model:
    return model_config.model_copy(update={"encoder_weights": str(weights), "encoder": encoder})


@pytest.mark.parametrize("encoder", ["resnet18", "tu-resnet18"])
def test_a_classifier_starts_a_segmenters_encoder(encoder: str, tmp_path: Path) -> None:
    """The first run's features are the second's, whichever library wraps the encoder; its last layer is said to be
    left out."""
    first = build_model(Model(arch="resnet18", weights="none"), TWO)
    with torch.no_grad():
        first.train()(torch.randn(4, 1, 64, 64))
    torch.save({"model": first.state_dict()}, tmp_path / "best.pt")
    settings = starting_from(UNET18, tmp_path / "best.pt", encoder)
    (line,) = initial_weights(settings, ONE_MASK)
    assert line.endswith(f"best.pt: 120 tensors start the encoder {encoder}; not used are fc")
    second: Any = build_model(settings, ONE_MASK)
    gray = torch.randn(2, 1, 64, 64)
    features: Any = first.eval().double()
    with torch.no_grad():
        ours = second.eval().double().encoder(gray.double())[-1]
        torch.testing.assert_close(ours, features.forward_features(gray.double()))


def test_a_segmenter_starts_another_ones_encoder_and_not_its_decoder(tmp_path: Path) -> None:
    first: Any = build_model(UNET18, ONE_MASK)
    torch.save({"model": first.state_dict()}, tmp_path / "best.pt")
    settings = starting_from(UNET18.model_copy(update={"arch": "FPN"}), tmp_path / "best.pt")
    (line,) = initial_weights(settings, ONE_MASK)
    assert "120 tensors start the encoder resnet18; not used are decoder." in line
    second: Any = build_model(settings, ONE_MASK)
    assert same_weights(first.encoder, second.encoder)


def test_an_encoders_three_channels_become_one(tmp_path: Path) -> None:
    three = timm.create_model("resnet18", in_chans=3, num_classes=1000)
    torch.save(three.state_dict(), tmp_path / "imagenet.pth")
    ours: Any = build_model(starting_from(UNET18, tmp_path / "imagenet.pth"), ONE_MASK)
    gray = torch.randn(2, 1, 64, 64).double()
    with torch.no_grad():
        expected = three.double().eval().forward_features(gray.expand(-1, 3, -1, -1))
        torch.testing.assert_close(ours.double().eval().encoder(gray)[-1], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "data", "message"),
    [
        ({"encoder": "resnet34"}, ONE_MASK, r"does not fit model\.encoder=resnet34 \(.* missing: layer1\.2\.bn1\.bias"),
        ({"encoder": "efficientnet-b0"}, ONE_MASK, r"does not fit .* missing: _blocks.*for timm's weights as tu-NAME"),
        ({"encoder": "resnet50"}, ONE_MASK, r"[0-9]+ of other shape: layer1"),
        ({"arch": "resnet18"}, ONE, r"starts the encoder of a segmenter; .*model\.reset_head=true"),
        ({"weights": "runs/a/best.pt"}, ONE_MASK, r"and model\.weights=runs/a/best\.pt both name a file"),
        (
            {"encoder_weights": "nowhere.pt"},
            ONE_MASK,
            r"model\.encoder_weights=nowhere\.pt: no such file; give",
        ),
    ],
)
def test_encoder_weights_that_do_not_fit_are_one_line(
    changes: dict[str, Any], data: Data, message: str, tmp_path: Path
) -> None:
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "resnet18.pth")
    settings = starting_from(UNET18, tmp_path / "resnet18.pth").model_copy(update=changes)
    with pytest.raises(UserError, match=message) as caught:
        build_model(settings, data)
    assert "\n" not in str(caught.value)


def test_real_imagenet_weights_start_a_classifier_and_a_unet(real: Path) -> None:
    path = real / "weights/tf_efficientnet_lite0_imagenet.pth"
    lite0 = timm.create_model("tf_efficientnet_lite0", in_chans=3, num_classes=1000)
    lite0.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    gray = torch.randn(2, 1, 64, 64).double()
    classifier = Model(arch="tf_efficientnet_lite0", weights=str(path), reset_head=True)
    assert initial_weights(classifier, ONE) == ()
    ours: Any = build_model(classifier, ONE)
    unet: Any = build_model(starting_from(UNET18, path, "tu-tf_efficientnet_lite0"), ONE_MASK)
    (line,) = initial_weights(starting_from(UNET18, path, "tu-tf_efficientnet_lite0"), ONE_MASK)
    assert line.endswith("tensors start the encoder tu-tf_efficientnet_lite0; not used are bn2, classifier, conv_head")
    with torch.no_grad():
        rgb = gray.expand(-1, 3, -1, -1)
        expected = lite0.double().eval().forward_features(rgb)
        torch.testing.assert_close(ours.double().eval().forward_features(gray), expected, rtol=1e-4, atol=1e-5)
        levels = timm.create_model("tf_efficientnet_lite0", in_chans=3, features_only=True)
        known = levels.state_dict()
        levels.load_state_dict({key: value for key, value in lite0.state_dict().items() if key in known})
        deepest = levels.double().eval()(rgb)[-1]
        torch.testing.assert_close(unet.double().eval().encoder(gray)[-1], deepest, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ["resnet18", "densenet121", "Unet"])
def test_three_channels_become_one(arch: str, tmp_path: Path) -> None:
    data = ONE_MASK if arch == "Unet" else TWO
    model_config = {"Unet": TINY_UNET, "densenet121": SMALL}.get(arch, Model(arch=arch, weights="none"))
    if arch == "Unet":
        three = smp.Unet(model_config.encoder, encoder_weights=None, in_channels=3, classes=1, **model_config.options)
    else:
        three = timm.create_model(arch, in_chans=3, num_classes=2, **model_config.options)
    torch.save({"model": three.state_dict()}, tmp_path / "three.pt")
    gray = torch.randn(2, 1, 64, 64)
    agree(build_model(using(model_config, tmp_path / "three.pt", data), data), three, gray)


def test_imagenet_weights_are_adapted_by_timm_and_smp_likewise(tmp_path: Path) -> None:
    three = timm.create_model("resnet18", in_chans=3, num_classes=2)
    torch.save(three.state_dict(), tmp_path / "resnet18.pth")
    # timm's own way of loading pretrained weights, from a file instead of the network.
    local = {"pretrained_cfg_overlay": {"file": str(tmp_path / "resnet18.pth"), "num_classes": 2}}
    ours = build_model(Model(arch="resnet18", weights="imagenet", options=local), TWO)
    agree(ours, three, torch.randn(2, 1, 64, 64))
    encoder = smp.encoders.get_encoder("resnet34", in_channels=3, weights=None)
    one = smp.encoders.get_encoder("resnet34", in_channels=3, weights=None)
    one.load_state_dict(encoder.state_dict())
    one.set_in_channels(1, pretrained=True)  # what smp does with encoder_weights and in_channels=1
    gray = torch.randn(2, 1, 64, 64).double()
    with torch.no_grad():
        maps = one.double().eval()(gray), encoder.double().eval()(gray.expand(-1, 3, -1, -1))
    for mine, theirs in zip(maps[0][1:], maps[1][1:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@given(children=st.integers(0, 9))
@settings(deadline=None, max_examples=10)
def test_the_first_children_are_frozen(children: int) -> None:
    model = build_model(Model(arch="resnet18", weights="none", freeze_children=children), TWO)
    for index, (_, child) in enumerate(model.named_children()):
        assert all(parameter.requires_grad == (index >= children) for parameter in child.parameters())


def test_freezing_counts_what_is_trained() -> None:
    model_config = Model(arch="resnet18", weights="none")
    total = count_trainable(build_model(model_config, ONE))
    # conv1 on one channel and bn1; act1 and maxpool have none.
    assert (
        total - count_trainable(build_model(model_config.model_copy(update={"freeze_children": 4}), ONE))
        == 64 * 49 + 2 * 64
    )
    named = build_model(model_config.model_copy(update={"freeze_prefixes": ("layer1.0", "fc.bias")}), ONE)
    frozen = {name for name, parameter in named.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in named.named_parameters() if name.startswith(("layer1.0.", "fc.bias"))}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"freeze_children": 11}, "model.freeze_children=11: the model has 10 children, conv1, bn1, .*fc"),
        ({"freeze_children": 10}, "leave nothing to train"),
        ({"freeze_prefixes": ("layr1",)}, "no parameter begins with 'layr1'; there are .*layer1"),
        ({"freeze_prefixes": ("encoder",)}, "no parameter begins with 'encoder'; there are conv1, bn1, layer1"),
        ({"freeze_prefixes": ("",)}, "leave nothing to train"),
    ],
)
def test_freezing_what_is_not_there_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_model(Model(arch="resnet18", weights="none").model_copy(update=fields), ONE)


@pytest.mark.parametrize(
    ("model_config", "task"),
    [
        (Model(arch="resnet18", weights="none", freeze_children=5), "classify"),
        (Model(arch="resnet18", weights="none", freeze_prefixes=("layer3", "layer1.0.bn1")), "classify"),
        (SMALL.model_copy(update={"freeze_children": 1}), "classify"),
        (Model(arch="Unet", encoder="resnet18", weights="none", freeze_prefixes=("encoder",)), "segment"),
    ],
)
def test_a_step_moves_nothing_that_is_frozen(model_config: Model, task: str) -> None:
    model = build_model(model_config, ONE_MASK if task == "segment" else ONE)
    train_mode(model)
    assert model.training
    before = {key: value.clone() for key, value in model.state_dict().items()}
    frozen_names = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen_names
    frozen = {name.rsplit(".", 1)[0] for name in frozen_names}
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], 0.1)
    torch.autograd.backward(model(torch.randn(4, 1, 64, 64)).square().sum())
    optimizer.step()
    for key, value in model.state_dict().items():
        if key.rsplit(".", 1)[0] in frozen:
            assert torch.equal(value, before[key]), key
    moved = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert any(key.endswith("running_mean") for key in moved) or model_config.arch == SMALL.arch
    assert any(key.endswith("weight") for key in moved)


def test_imagenet_weights_that_cannot_be_fetched_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="weights=imagenet cannot be fetched") as caught:
        build_model(Model(weights="imagenet"), TWO)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"growth_rate": 8 * 10**9}, "more than 4000000000 weights"),
        ({"growth_rate": 1, "bn_size": 1, "block_config": [10**9]}, "more than 500 layers"),
    ],
)
def test_constructor_arguments_that_would_fill_the_memory_are_refused(
    options: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cxrscale.models.networks.MOST_MODULES", 500)
    with pytest.raises(UserError, match=reason):
        build_model(Model(weights="none", options=options), TWO)


def test_a_model_of_more_weights_than_its_file_holds_is_refused() -> None:
    weights = sum(parameter.numel() for parameter in build_model(SMALL, TWO).parameters())
    assert build_model(SMALL, TWO, weights)
    with pytest.raises(UserError, match=f"more than {weights - 1} weights; check the numbers"):
        build_model(SMALL, TWO, weights - 1)
