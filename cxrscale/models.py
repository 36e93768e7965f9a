"""Nets: classifiers from timm, segmenters from segmentation_models_pytorch, all with one grey input channel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch
from torch import nn

from cxrscale.config import Data, Model
from cxrscale.schema import InputError


def build(model: Model, data: Data) -> nn.Module:
    """The net of a recipe: (B, 1, H, W) -> logits (B, F) to classify, (B, 1, H, W) to segment.

    Raises:
        InputError: an unknown architecture or constructor argument, weights that cannot be had or do not fit.
    """
    pretrained = model.weights == "imagenet"
    try:
        net = _segmenter(model, pretrained) if data.task == "segment" else _classifier(model, data, pretrained)
    except (TypeError, KeyError, ValueError) as error:
        raise InputError(
            f"model.options={model.options}: {' '.join(str(error).split())}; see the constructor"
        ) from None
    if model.weights not in ("imagenet", "none"):
        load_weights(net, model.weights)
    return net


def load_weights(net: nn.Module, path: str) -> None:
    """Load a cxrscale checkpoint's weights into a net; every key must fit.

    Raises:
        InputError: no such file, not a checkpoint, or keys that are missing or left over (they are listed).
    """
    if not Path(path).is_file():
        raise InputError(f"model.weights={path}: no such file; give imagenet, none, or a checkpoint's path")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        weights: dict[str, torch.Tensor] = state["model"]
    except Exception as error:  # torch.load raises whatever the pickle or zip reader does
        raise InputError(
            f"model.weights={path}: not a cxrscale checkpoint ({' '.join(str(error).split())[:120]})"
        ) from None
    own = net.state_dict()
    missing, left = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    wrong = [key for key in own.keys() & weights.keys() if own[key].shape != weights[key].shape]
    if missing or left or wrong:
        listed = [
            f"{kind}: {', '.join(keys[:4])}{' ...' if len(keys) > 4 else ''}"
            for kind, keys in (("missing", missing), ("left over", left), ("other shape", sorted(wrong)))
            if keys
        ]
        raise InputError(f"model.weights={path} does not fit the net ({'; '.join(listed)}); check model.arch")
    net.load_state_dict(weights)


def parameters(net: nn.Module) -> int:
    """How many parameters are trained."""
    return sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)


def _classifier(model: Model, data: Data, pretrained: bool) -> nn.Module:
    if not timm.is_model(model.arch):
        near = ", ".join(timm.list_models(f"*{model.arch.split('_')[0][:8]}*")[:6]) or "densenet121, resnet18"
        raise InputError(f"model.arch={model.arch}: timm has no such model; it has {near}")
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
        raise InputError(
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


def _offline(error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:160]
    return InputError(f"model.weights=imagenet cannot be fetched ({reason}); connect once, or set model.weights=none")
