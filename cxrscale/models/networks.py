"""Nets: classifiers from timm, segmenters from segmentation_models_pytorch, all with one gray input channel.

Weights come from ImageNet, from another run or from a public CheXNet; some of them can be kept as they are.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import segmentation_models_pytorch as smp
import timm
from torch import nn

from cxrscale.config import Data, Model
from cxrscale.models.weights import load_weights
from cxrscale.types import UserError


def build_model(model: Model, data: Data) -> nn.Module:
    """The model of a recipe: (B, 1, H, W) -> logits (B, F) to classify, (B, 1, H, W) to segment.

    Frozen parameters do not require a gradient; put the model into training mode with `train_mode`.

    Raises:
        UserError: an unknown architecture or constructor argument, weights that cannot be had or do not fit, more
            children to freeze than there are, a name to freeze that nothing has.
    """
    pretrained = model.weights == "imagenet"
    try:
        net = _segmenter(model, pretrained) if data.task == "segment" else _classifier(model, data, pretrained)
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"model.options={model.options}: {' '.join(str(error).split())}; see the constructor") from None
    if model.weights not in ("imagenet", "none"):
        load_weights(net, model.weights, model.reset_head, data.findings)
    freeze(net, model.freeze_children, model.freeze_prefixes)
    return net


def freeze(net: nn.Module, children: int = 0, names: Sequence[str] = ()) -> None:
    """Keep the weights of the model's first children, in the order of named_children, and of what the names begin.

    Raises:
        UserError: more children than there are, a name that no parameter begins with, or nothing left to train.
    """
    every = [name for name, _ in net.named_children()]
    if children > len(every):
        raise UserError(f"model.freeze_children={children}: the model has {len(every)} children, {', '.join(every)}")
    held = tuple(f"{name}." for name in every[:children])
    parameters = dict(net.named_parameters())
    for name in names:
        if not any(parameter.startswith(name) for parameter in parameters):
            raise UserError(f"model.freeze_prefixes: no parameter begins with {name!r}; there are {_near(name, net)}")
    for name, parameter in parameters.items():
        if name.startswith((*held, *names)):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise UserError(
            f"model.freeze_children={children} and model.freeze_prefixes={list(names)} leave nothing to train; freeze less"
        )


def train_mode(net: nn.Module) -> None:
    """Training mode, except for modules whose parameters are all frozen: their batch statistics must not drift.

    Takes a wrapped or compiled model as well.
    """
    net.train()
    for module in net.modules():
        own = list(module.parameters())
        if own and not any(parameter.requires_grad for parameter in own):
            module.eval()


def count_trainable(net: nn.Module) -> int:
    """How many parameters are trained."""
    return sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)


def _classifier(model: Model, data: Data, pretrained: bool) -> nn.Module:
    if not timm.is_model(model.arch):
        near = ", ".join(timm.list_models(f"*{model.arch.split('_')[0][:8]}*")[:6]) or "densenet121, resnet18"
        raise UserError(f"model.arch={model.arch}: timm has no such model; it has {near}")
    try:
        net: nn.Module = timm.create_model(
            model.arch, pretrained=pretrained, in_chans=1, num_classes=len(data.findings), **model.options
        )
    except (OSError, RuntimeError) as error:
        if pretrained:
            raise _offline(error) from None
        raise
    return net


def _segmenter(model: Model, pretrained: bool) -> nn.Module:
    makers: dict[str, Any] = {
        name.lower(): getattr(smp, name)
        for name in (
            "Unet",
            "UnetPlusPlus",
            "FPN",
            "Linknet",
            "PSPNet",
            "DeepLabV3",
            "DeepLabV3Plus",
            "MAnet",
            "PAN",
            "UPerNet",
            "Segformer",
        )
    }
    maker = makers.get(model.arch.lower())
    if maker is None:
        raise UserError(
            f"model.arch={model.arch}: not a segmenter; data.task=segment takes Unet, UnetPlusPlus, FPN, ..."
        )
    weights = "imagenet" if pretrained else None
    try:
        net: nn.Module = maker(
            encoder_name=model.encoder, encoder_weights=weights, in_channels=1, classes=1, **model.options
        )
    except OSError as error:
        raise _offline(error) from None
    return net


def _offline(error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:160]
    return UserError(f"model.weights=imagenet cannot be fetched ({reason}); connect once, or set model.weights=none")


def _near(name: str, net: nn.Module) -> str:
    """What could have been meant by a prefix: modules with parameters, the likest first."""
    there = [module for module, _ in net.named_modules() if module]
    close = difflib.get_close_matches(name, there, n=4, cutoff=0.5)
    return ", ".join(
        close or [child for child, module in net.named_children() if any(True for _ in module.parameters())]
    )
