"""Models: classifiers from timm, segmenters from segmentation_models_pytorch, all with one gray input channel.

Weights come from ImageNet, from another run or from a public CheXNet; some of them can be frozen.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from cxrscale.config import Data, Model
from cxrscale.models.weights import load_encoder_weights, load_weights
from cxrscale.types import UserError, one_line

MOST_MODULES, MOST_WEIGHTS = 10_000, 4_000_000_000
"""Layers and weights of a model: more than the largest ones of timm and smp have."""


def build_model(settings: Model, data: Data, most_weights: int = MOST_WEIGHTS) -> nn.Module:
    """The model of a recipe: (B, 1, H, W) -> logits (B, F) to classify, (B, 1, H, W) to segment.

    Frozen parameters do not require a gradient; put the model into training mode with `train_mode`.

    Args:
        most_weights: a model whose constructor arguments give it more is refused before it takes memory.

    Raises:
        UserError: an unknown architecture or constructor argument, weights that cannot be loaded or do not fit, more
            children to freeze than there are, a prefix to freeze that no parameter has.
    """
    return _build(settings, data, most_weights)[0]


def initial_weights(settings: Model, data: Data) -> tuple[str, ...]:
    """Sentences on the files that a recipe's weights come from: what is used of them, and what they do not say.

    Raises:
        UserError: as `build_model`.
    """
    return _build(settings, data)[1]


def _build(settings: Model, data: Data, most_weights: int = MOST_WEIGHTS) -> tuple[nn.Module, tuple[str, ...]]:
    """The model, and the sentences of `initial_weights`."""
    if settings.encoder_weights is not None:
        _check_encoder_weights(settings, data)
    pretrained = settings.weights == "imagenet" and settings.encoder_weights is None
    try:
        if settings.options:
            _check_size(settings, data, most_weights)
        model = _segmenter(settings, pretrained) if data.task == "segment" else _classifier(settings, data, pretrained)
    except UserError:
        raise
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"model.options={settings.options}: {one_line(error)}; see the constructor") from None
    notes: tuple[str, ...] = ()
    if settings.encoder_weights is not None:
        encoder: Any = model.encoder
        notes = load_encoder_weights(encoder, settings.encoder_weights, settings.encoder)
    elif settings.weights not in ("imagenet", "none"):
        stated = settings.weights_findings
        notes = load_weights(model, settings.weights, settings.reset_head, data.findings, stated)
    freeze(model, settings.freeze_children, settings.freeze_prefixes)
    return model, notes


def _check_size(settings: Model, data: Data, most_weights: int) -> None:
    """Refuse constructor arguments of which a slip, or a forged file, makes a model that fills the memory."""
    modules = weights = 0

    def on_module(_parent: nn.Module, _name: str, _module: nn.Module | None) -> None:
        nonlocal modules
        modules += 1
        if modules > MOST_MODULES:
            raise UserError(f"model.options={settings.options}: more than {MOST_MODULES} layers; check the numbers")

    def on_parameter(_parent: nn.Module, _name: str, parameter: nn.Parameter | None) -> None:
        nonlocal weights
        weights += 0 if parameter is None else parameter.numel()
        if weights > most_weights:
            raise UserError(f"model.options={settings.options}: more than {most_weights} weights; check the numbers")

    hooks = (
        register_module_module_registration_hook(on_module),
        register_module_parameter_registration_hook(on_parameter),
    )
    try:
        # Without memory: nothing is allocated there.
        with torch.device("meta"):
            _segmenter(settings, False) if data.task == "segment" else _classifier(settings, data, False)
    finally:
        for hook in hooks:
            hook.remove()


def _check_encoder_weights(settings: Model, data: Data) -> None:
    if data.task != "segment":
        raise UserError(
            f"model.encoder_weights={settings.encoder_weights} starts the encoder of a segmenter; to start a "
            f"classifier from it, set model.weights={settings.encoder_weights} model.reset_head=true"
        )
    if settings.weights not in ("imagenet", "none"):
        raise UserError(
            f"model.encoder_weights={settings.encoder_weights} and model.weights={settings.weights} both name a file; "
            "give one of them"
        )


def freeze(model: nn.Module, children: int = 0, prefixes: Sequence[str] = ()) -> None:
    """Freeze the model's first children, in the order of named_children, and parameters whose names have a prefix.

    Raises:
        UserError: more children than there are, a prefix that no parameter has, or nothing left to train.
    """
    child_names = [name for name, _ in model.named_children()]
    if children > len(child_names):
        raise UserError(
            f"model.freeze_children={children}: the model has {len(child_names)} children, {', '.join(child_names)}"
        )
    frozen = (*(f"{name}." for name in child_names[:children]), *prefixes)
    parameters = dict(model.named_parameters())
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in parameters):
            near = _similar_modules(prefix, model)
            raise UserError(f"model.freeze_prefixes: no parameter begins with {prefix!r}; there are {near}")
    for name, parameter in parameters.items():
        if name.startswith(frozen):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise UserError(
            f"model.freeze_children={children} and model.freeze_prefixes={list(prefixes)} leave nothing to train; "
            "freeze less"
        )


def train_mode(model: nn.Module) -> None:
    """Training mode, except for modules whose parameters are all frozen: their batch statistics must not drift.

    The model may be wrapped or compiled.
    """
    model.train()
    for module in model.modules():
        own = list(module.parameters())
        if own and not any(parameter.requires_grad for parameter in own):
            module.eval()


def count_trainable(model: nn.Module) -> int:
    """Number of parameters that are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _classifier(settings: Model, data: Data, pretrained: bool) -> nn.Module:
    if not timm.is_model(settings.arch):
        near = ", ".join(timm.list_models(f"*{settings.arch.split('_')[0][:8]}*")[:6]) or "densenet121, resnet18"
        raise UserError(f"model.arch={settings.arch}: timm has no such model; it has {near}")
    try:
        model: nn.Module = timm.create_model(
            settings.arch, pretrained=pretrained, in_chans=1, num_classes=len(data.findings), **settings.options
        )
    except (OSError, RuntimeError) as error:
        if pretrained:
            raise _offline(error) from None
        raise
    return model


def _segmenter(settings: Model, pretrained: bool) -> nn.Module:
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
    maker = makers.get(settings.arch.lower())
    if maker is None:
        raise UserError(
            f"model.arch={settings.arch}: not a segmenter; data.task=segment needs Unet, UnetPlusPlus, FPN, ..."
        )
    weights = "imagenet" if pretrained else None
    try:
        model: nn.Module = maker(
            encoder_name=settings.encoder, encoder_weights=weights, in_channels=1, classes=1, **settings.options
        )
    except OSError as error:
        raise _offline(error) from None
    return model


def _offline(error: Exception) -> UserError:
    reason = one_line(error, limit=160)
    return UserError(f"model.weights=imagenet cannot be fetched ({reason}); connect once, or set model.weights=none")


def _similar_modules(prefix: str, model: nn.Module) -> str:
    """Names of modules that a wrong prefix may stand for, the most similar first; the model's children if none is."""
    names = [module for module, _ in model.named_modules() if module]
    close = difflib.get_close_matches(prefix, names, n=4, cutoff=0.5)
    return ", ".join(
        close or [child for child, module in model.named_children() if any(True for _ in module.parameters())]
    )
