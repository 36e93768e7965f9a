"""Weights from files: checkpoints of runs, public CheXNets and bare state dicts, under the names of our models."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cxrscale.io import storage
from cxrscale.models.tensors import load_tensors
from cxrscale.types import UserError, one_line

Weights = dict[str, torch.Tensor]


NAMES_SHOWN = 4
"""Names in a message before it says how many more there are."""
ENCODER_PREFIXES = ("", "encoder.", "encoder.model.", "model.")
"""What may stand before an encoder's keys: in a classifier nothing; the second and third in a segmenter of
segmentation_models_pytorch, whose tu- encoders wrap timm's model."""
WRAPPED = "model."
"""The prefix of all keys in a tu- encoder."""
HEADS = ("segmentation_head",)
"""Last layers of segmentation_models_pytorch's models; timm's models name theirs in `pretrained_cfg`."""


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """The content of a file of weights, under the names that our models have."""

    weights: Weights
    findings: tuple[str, ...] | None
    """The meaning of its last layer's outputs; None where the file does not say."""


def load_weights(
    model: nn.Module,
    address: str,
    reset_head: bool = False,
    findings: Sequence[str] | None = None,
    stated: Sequence[str] | None = None,
) -> tuple[str, ...]:
    """Load a file's weights into a model; every key must fit.

    The file is a run's best.pt or checkpoint, a public CheXNet (arnoweng/CheXNet and zoogzog/chexnet: torchvision's
    DenseNet-121 inside DataParallel, with the names of its time) or a bare state dict. A first convolution of three
    input channels is summed over them: on a gray image that is the same as three equal channels. Only
    `num_batches_tracked` may be missing, which files older than PyTorch 0.4.1 lack and nothing here reads.

    The findings of the file's last layer are never assumed. A public CheXNet does not say them: the layout of
    ChestX-ray14's 14 findings is also that of CheXpert's 14. Of a last layer whose findings are known, the model gets
    the rows of its own findings, in its own order.

    Args:
        address: a local path or an fsspec address.
        reset_head: leave the file's last layer out and keep the model's.
        findings: the meaning of the model's outputs; None: unknown, and not compared.
        stated: the meaning of the file's outputs, where the user knows it and the file does not say it.

    Returns:
        Sentences for the user: which rows of the last layer are used, where it is not all of them in their order.

    Raises:
        UserError: no such file, no weights in it, other findings or unknown ones, or keys that are missing or
            unexpected (they are listed).
    """
    stored = read_weights(address, "model.weights")
    own, weights, notes = model.state_dict(), dict(stored.weights), tuple[str, ...]()
    last = head_names(model)
    if reset_head:
        weights = {key: value for key, value in weights.items() if not _under(key, last)}
        weights |= {key: value for key, value in own.items() if _under(key, last)}
    elif findings is not None and (meaning := _meaning(address, stored, stated, findings)) != tuple(findings):
        notes = (_take_rows(weights, last, meaning, findings, address),)
    weights |= {key: own[key] for key in own.keys() - weights.keys() if key.endswith("num_batches_tracked")}
    _sum_channels(weights, own)
    _refuse_misfits(address, own, weights)
    model.load_state_dict(weights)
    return notes


def _meaning(
    address: str, stored: StoredWeights, stated: Sequence[str] | None, findings: Sequence[str]
) -> tuple[str, ...]:
    """The findings of the file's last layer, which are all that are asked for or more.

    Raises:
        UserError: they are not known, the file says others than the user, or one that is asked for is not there.
    """
    if stored.findings is None and stated is None:
        raise UserError(
            f"model.weights={address} does not say what findings its last layer was trained for, and none are assumed: "
            f"set model.reset_head=true to train a new last layer, or name them in their order, "
            f"model.weights_findings=[{findings[0]}, ...] (a public CheXNet of ChestX-ray14: "
            "model.weights_findings=chexnet14)"
        )
    if stored.findings is not None and stated is not None and tuple(stated) != stored.findings:
        raise UserError(
            f"model.weights_findings={list(stated)}: model.weights={address} itself says {list(stored.findings)}; "
            "remove the field"
        )
    meaning = stored.findings or tuple(stated or ())
    missing = [name for name in findings if name not in meaning]
    if missing:
        raise UserError(
            f"model.weights={address} was trained for {', '.join(meaning)}, not for {', '.join(missing)}; set "
            "data.findings to some of the same, or model.reset_head=true"
        )
    return meaning


def _take_rows(
    weights: Weights, last: Sequence[str], meaning: Sequence[str], findings: Sequence[str], address: str
) -> str:
    """Keep the rows of the last layer that stand for the findings, in their order; returns a sentence on that."""
    rows = torch.tensor([meaning.index(name) for name in findings])
    for key, value in weights.items():
        if _under(key, last) and value.ndim and len(value) == len(meaning):
            weights[key] = value[rows]
    return f"model.weights={address}: of its {len(meaning)} outputs those of {', '.join(findings)} are used"


def load_encoder_weights(encoder: nn.Module, address: str, name: str) -> tuple[str, ...]:
    """Load the weights of a file into a segmenter's encoder; every key of the encoder must be there.

    The file holds a classifier (ImageNet weights, a run's best.pt), or a segmenter of the same encoder. A first
    convolution of three input channels is summed over them, as in `load_weights`.

    Args:
        address: a local path or an fsspec address.
        name: the encoder's, for messages.

    Returns:
        A sentence for the user: how many tensors are used, and which of the file are not.

    Raises:
        UserError: no such file, no weights in it, or tensors that are missing or of another shape.
    """
    stored = read_weights(address, "model.encoder_weights").weights
    own = encoder.state_dict()
    inner = WRAPPED if all(key.startswith(WRAPPED) for key in own) else ""
    wanted = {key.removeprefix(inner): key for key in own}
    prefix = max(ENCODER_PREFIXES, key=lambda prefix: sum(prefix + key in stored for key in wanted))
    weights = {wanted[key]: stored[prefix + key] for key in wanted if prefix + key in stored}
    used = {prefix + key for key in wanted if prefix + key in stored}
    _sum_channels(weights, own)
    missing = sorted(own.keys() - weights.keys())
    lacking = [key for key in missing if not key.endswith("num_batches_tracked")]
    wrong = sorted(key for key in weights if weights[key].shape != own[key].shape)
    if lacking or wrong:
        raise UserError(
            f"model.encoder_weights={address} does not fit model.encoder={name} "
            f"({_listed({'missing': lacking, 'of other shape': wrong})}); name the encoder that the file is of, for "
            "timm's weights as tu-NAME"
        )
    encoder.load_state_dict({**{key: own[key] for key in missing}, **weights})
    left = sorted(stored.keys() - used)
    rest = f"not used are {', '.join(_modules(left))}" if left else "nothing is left over"
    return (f"model.encoder_weights={address}: {len(used)} tensors start the encoder {name}; {rest}",)


def _modules(keys: Sequence[str]) -> list[str]:
    """The modules that hold the keys, shortened where they are many."""
    names = list(dict.fromkeys(key.rpartition(".")[0] or key for key in keys))
    return names if len(names) <= NAMES_SHOWN else [*names[:NAMES_SHOWN], f"{len(names) - NAMES_SHOWN} more"]


def read_weights(address: str, field: str) -> StoredWeights:
    """The weights of a file, under the names of our models (see `load_weights`).

    Args:
        field: of the recipe, for messages.

    Raises:
        UserError: no such file, or no weights in it.
    """
    if not storage.exists(address):
        other = "imagenet, none, or " if field == "model.weights" else ""
        raise UserError(f"{field}={address}: no such file; give {other}a checkpoint's path")
    try:
        state = load_tensors(storage.read(address))
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error):  # it names a class or function that tensors have no need of
            raise UserError(
                f"{field}={address} holds pickled objects, which could run code as they load; if you trust it, "
                "keep its tensors alone: s = torch.load(FILE, 'cpu', weights_only=False); "
                "torch.save({'state_dict': s['state_dict']}, NEW), and give NEW"
            ) from None
        raise _no_weights(field, address, "no PyTorch file") from None
    except Exception as error:  # torch.load raises whatever the zip reader does
        raise _no_weights(field, address, error) from None
    weights: Any = state
    for name in ("model", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            weights = state[name]
            break
    if not isinstance(weights, Mapping) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in weights.items()
    ):
        raise _no_weights(field, address, "it has neither model nor state_dict")
    return _renamed(weights, _findings(state))


def _findings(state: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The findings of a run's checkpoint."""
    recipe = state.get("recipe")
    data = recipe.get("data") if isinstance(recipe, Mapping) else None
    findings = data.get("findings") if isinstance(data, Mapping) else None
    named = isinstance(findings, list | tuple) and all(isinstance(name, str) for name in findings)
    return tuple(findings) if findings and named else None


def _renamed(stored: Mapping[str, torch.Tensor], findings: tuple[str, ...] | None) -> StoredWeights:
    """The weights under our names: without the prefixes of DataParallel and the wrapping class, dense layers renamed.

    torchvision renamed `denselayer1.norm.1` to `denselayer1.norm1` in 2018, since a module's name may hold no dot;
    timm has its names. The public CheXNets end in Sequential(Linear, Sigmoid): their `classifier.0` is our classifier.
    Which findings its outputs are the file does not say.
    """
    weights = {key.removeprefix("module."): value for key, value in stored.items()}
    if not any(key.startswith("densenet121.") for key in weights):
        return StoredWeights(weights, findings)
    renamed: Weights = {}
    for key, value in weights.items():
        key = key.removeprefix("densenet121.").replace("classifier.0.", "classifier.")
        renamed[re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", key)] = value
    return StoredWeights(renamed, findings)


def head_names(model: nn.Module) -> tuple[str, ...]:
    """The names of a model's last layer, which turns features into logits."""
    config = getattr(model, "pretrained_cfg", None)
    named = config.get("classifier") if config else None
    if named is None:
        return HEADS
    return (named,) if isinstance(named, str) else tuple(named)


def _under(key: str, names: Sequence[str]) -> bool:
    return any(key.startswith(f"{name}.") for name in names)


def _sum_channels(weights: Weights, own: Mapping[str, torch.Tensor]) -> None:
    """Sum the first convolution over its three input channels where the model has one."""
    first = next((key for key, value in own.items() if value.ndim == 4), "")
    if first in weights and own[first].shape[1] == 1 and weights[first].shape[1:2] == (3,):
        # In double precision: three summands of opposite signs would lose digits that the comparison needs.
        weights[first] = weights[first].double().sum(dim=1, keepdim=True).to(own[first].dtype)


def _refuse_misfits(address: str, own: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> None:
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    wrong = sorted(key for key in own.keys() & weights.keys() if own[key].shape != weights[key].shape)
    if missing or unexpected or wrong:
        parts = _listed({"missing": missing, "left over": unexpected, "of other shape": wrong})
        raise UserError(
            f"model.weights={address} does not fit the model ({parts}); check model.arch and model.options, or set "
            "model.reset_head=true for another last layer"
        )


def _listed(keys_of: Mapping[str, Sequence[str]]) -> str:
    """3 missing: a, b, c; 1 left over: d."""
    return "; ".join(
        f"{len(keys)} {kind}: {', '.join(keys[:NAMES_SHOWN])}{' ...' if len(keys) > NAMES_SHOWN else ''}"
        for kind, keys in keys_of.items()
        if keys
    )


def _no_weights(field: str, address: str, reason: object) -> UserError:
    return UserError(f"{field}={address}: no weights in it ({one_line(str(reason), limit=120)}); give a run's best.pt")
