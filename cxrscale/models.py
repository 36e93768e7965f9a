"""Nets: classifiers from timm, segmenters from segmentation_models_pytorch, all with one grey input channel.

Weights come from ImageNet, from another run or from a public CheXNet; some of them can be kept as they are.
"""

from __future__ import annotations

import difflib
import io
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch
from torch import nn

from cxrscale import storage
from cxrscale.config import Data, Model
from cxrscale.labels import NIH14
from cxrscale.schema import InputError

Weights = dict[str, torch.Tensor]
HEADS = ("segmentation_head",)
"""Last layers of segmentation_models_pytorch's nets; timm's say themselves which it is."""


@dataclass(frozen=True, slots=True)
class Stored:
    """What a file of weights holds, under the names that our nets have."""

    weights: Weights
    findings: tuple[str, ...] | None
    """What its last layer's outputs mean; None where the file does not say."""


def build(model: Model, data: Data) -> nn.Module:
    """The net of a recipe: (B, 1, H, W) -> logits (B, F) to classify, (B, 1, H, W) to segment.

    Frozen parameters do not require a gradient; put the net into training mode with `train_mode`.

    Raises:
        InputError: an unknown architecture or constructor argument, weights that cannot be had or do not fit, more
            children to freeze than there are, a name to freeze that nothing has.
    """
    pretrained = model.weights == "imagenet"
    try:
        net = _segmenter(model, pretrained) if data.task == "segment" else _classifier(model, data, pretrained)
    except (TypeError, KeyError, ValueError) as error:
        raise InputError(
            f"model.options={model.options}: {' '.join(str(error).split())}; see the constructor"
        ) from None
    if model.weights not in ("imagenet", "none"):
        load_weights(net, model.weights, model.new_head, data.findings)
    freeze(net, model.freeze, model.freeze_names)
    return net


def load_weights(net: nn.Module, address: str, new_head: bool = False, findings: Sequence[str] | None = None) -> None:
    """Load a file's weights into a net; every key must fit.

    Read are a run's best.pt or checkpoint, the public CheXNets (arnoweng/CheXNet and zoogzog/chexnet: torchvision's
    DenseNet-121 inside DataParallel, with the names of its time) and a bare state dict. A first convolution of three
    input channels is summed over them: on a grey picture that is the same as three equal channels. Only
    `num_batches_tracked` may be missing, which files older than PyTorch 0.4.1 lack and nothing here reads.

    Args:
        address: a local path or an fsspec address.
        new_head: leave the file's last layer out and keep the net's own.
        findings: what the net's outputs mean; compared with the file's, where that says.

    Raises:
        InputError: no such file, no weights in it, other findings, or keys that are missing or left over (they are
            listed).
    """
    stored = read_weights(address)
    if findings is not None and stored.findings not in (None, tuple(findings)) and not new_head:
        known = ", ".join(stored.findings or ())
        raise InputError(
            f"model.weights={address} was trained for {known}, not for {', '.join(findings)}; set data.findings to the "
            "same, or model.new_head=true"
        )
    own, weights = net.state_dict(), dict(stored.weights)
    if new_head:
        last = head(net)
        weights = {key: value for key, value in weights.items() if not _under(key, last)}
        weights |= {key: value for key, value in own.items() if _under(key, last)}
    weights |= {key: own[key] for key in own.keys() - weights.keys() if key.endswith("num_batches_tracked")}
    _sum_channels(weights, own)
    _refuse_misfits(address, own, weights)
    net.load_state_dict(weights)


def read_weights(address: str) -> Stored:
    """The weights of a file, under the names of our nets (see `load_weights`).

    Raises:
        InputError: no such file, or no weights in it.
    """
    if not storage.exists(address):
        raise InputError(f"model.weights={address}: no such file; give imagenet, none, or a checkpoint's path")
    try:
        state = torch.load(io.BytesIO(storage.read(address)), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error):  # it names a class or function that tensors have no need of
            raise InputError(
                f"model.weights={address} holds pickled objects, which could run code as they load; if you trust it, "
                "keep its tensors alone: s = torch.load(FILE, 'cpu', weights_only=False); "
                "torch.save({'state_dict': s['state_dict']}, NEW), and give NEW"
            ) from None
        raise _no_weights(address, "no PyTorch file") from None
    except Exception as error:  # torch.load raises whatever the zip reader does
        raise _no_weights(address, error) from None
    found: Any = state
    for name in ("model", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            found = state[name]
            break
    if not isinstance(found, Mapping) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise _no_weights(address, "it has neither model nor state_dict")
    return _named_as_ours(found, _findings(state))


def _findings(state: Mapping[str, Any]) -> tuple[str, ...] | None:
    """What a run's checkpoint says of its outputs."""
    recipe = state.get("recipe")
    findings = recipe.get("data", {}).get("findings") if isinstance(recipe, Mapping) else None
    return tuple(findings) if findings else None


def _named_as_ours(found: Mapping[str, torch.Tensor], findings: tuple[str, ...] | None) -> Stored:
    """Names without DataParallel's and the wrapping class's prefixes, and with today's names of dense layers.

    torchvision renamed `denselayer1.norm.1` to `denselayer1.norm1` in 2018, since a module's name may hold no dot;
    timm has its names. The public CheXNets end in Sequential(Linear, Sigmoid): their `classifier.0` is our classifier.
    """
    weights = {key.removeprefix("module."): value for key, value in found.items()}
    if not any(key.startswith("densenet121.") for key in weights):
        return Stored(weights, findings)
    renamed: Weights = {}
    for key, value in weights.items():
        key = key.removeprefix("densenet121.").replace("classifier.0.", "classifier.")
        renamed[re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", key)] = value
    outputs = renamed["classifier.bias"].numel() if "classifier.bias" in renamed else 0
    return Stored(renamed, NIH14 if outputs == len(NIH14) else findings)


def head(net: nn.Module) -> tuple[str, ...]:
    """The names of a net's last layer, which makes logits of features."""
    config = getattr(net, "pretrained_cfg", None)
    named = config.get("classifier") if config else None
    if named is None:
        return HEADS
    return (named,) if isinstance(named, str) else tuple(named)


def freeze(net: nn.Module, children: int = 0, names: Sequence[str] = ()) -> None:
    """Keep the weights of the net's first children, in the order of named_children, and of what the names begin.

    Raises:
        InputError: more children than there are, a name that no parameter begins with, or nothing left to train.
    """
    every = [name for name, _ in net.named_children()]
    if children > len(every):
        raise InputError(f"model.freeze={children}: the net has {len(every)} children, {', '.join(every)}")
    held = tuple(f"{name}." for name in every[:children])
    parameters = dict(net.named_parameters())
    for name in names:
        if not any(parameter.startswith(name) for parameter in parameters):
            raise InputError(f"model.freeze_names: no parameter begins with {name!r}; there are {_near(name, net)}")
    for name, parameter in parameters.items():
        if name.startswith((*held, *names)):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise InputError(
            f"model.freeze={children} and model.freeze_names={list(names)} leave nothing to train; freeze less"
        )


def train_mode(net: nn.Module) -> None:
    """Training mode, except for modules whose parameters are all frozen: their batch statistics must not drift.

    Takes a wrapped or compiled net as well.
    """
    net.train()
    for module in net.modules():
        own = list(module.parameters())
        if own and not any(parameter.requires_grad for parameter in own):
            module.eval()


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


def _under(key: str, names: Sequence[str]) -> bool:
    return any(key.startswith(f"{name}.") for name in names)


def _sum_channels(weights: Weights, own: Mapping[str, torch.Tensor]) -> None:
    """Sum the first convolution over its three input channels where the net has one."""
    first = next((key for key, value in own.items() if value.ndim == 4), "")
    if first in weights and own[first].shape[1] == 1 and weights[first].shape[1:2] == (3,):
        # In double precision: three summands of opposite signs would lose digits that the comparison needs.
        weights[first] = weights[first].double().sum(dim=1, keepdim=True).to(own[first].dtype)


def _refuse_misfits(address: str, own: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> None:
    missing, left = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    wrong = sorted(key for key in own.keys() & weights.keys() if own[key].shape != weights[key].shape)
    if missing or left or wrong:
        listed = [
            f"{len(keys)} {kind}: {', '.join(keys[:4])}{' ...' if len(keys) > 4 else ''}"
            for kind, keys in (("missing", missing), ("left over", left), ("of other shape", wrong))
            if keys
        ]
        raise InputError(
            f"model.weights={address} does not fit the net ({'; '.join(listed)}); check model.arch and model.options, "
            "or set model.new_head=true for another last layer"
        )


def _near(name: str, net: nn.Module) -> str:
    """What could have been meant by a prefix: modules with parameters, the likest first."""
    there = [module for module, _ in net.named_modules() if module]
    close = difflib.get_close_matches(name, there, n=4, cutoff=0.5)
    return ", ".join(
        close or [child for child, module in net.named_children() if any(True for _ in module.parameters())]
    )


def _no_weights(address: str, reason: object) -> InputError:
    return InputError(
        f"model.weights={address}: no weights in it ({' '.join(str(reason).split())[:120]}); give a run's best.pt"
    )
