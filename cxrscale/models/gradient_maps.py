"""Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391) by pytorch-grad-cam, for classifiers without exact maps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from cxrscale.types import UserError, one_line

Reshape = Callable[[torch.Tensor], torch.Tensor]
"""A layer's output -> (B, C, h, w)."""


class GradientMaps:
    """Grad-CAM of a classifier of timm: one forward pass, and one backward pass per finding."""

    def __init__(self, model: nn.Module) -> None:
        """Find the layer to look at.

        Raises:
            UserError: the package is missing, or the model has no layer of features that lie over the image.
        """
        self._model = model
        self._layer, self._reshape = _target(model)
        self._cam_class = _grad_cam()

    def maps(self, image_BCHW: torch.Tensor, findings: Sequence[int]) -> torch.Tensor:
        """(B, F, h, w) maps of the findings with these indices, on the images' device, in logits.

        Grad-CAM weighs channels by the mean gradient; here by its sum, so that the map of pooled and linearly weighted
        features is the exact class activation map without its bias. Negative parts are kept.

        Raises:
            UserError: the layer's output does not lie over the image.
        """
        with warnings.catch_warnings(), torch.enable_grad():
            # On modules whose inputs need no gradient, such as the first one of the network.
            warnings.filterwarnings("ignore", message="For backward hooks to be called")
            # It does nothing but hold hooks: they are released again, since a predictor lives long.
            cam: Any = self._cam_class(self._model, [self._layer], self._reshape)
            hooks = cam.activations_and_grads
            try:
                logit_BF = hooks(image_BCHW.detach().float().requires_grad_())
                maps = [self._map(cam, logit_BF[:, f], image_BCHW) for f in findings]
            finally:
                hooks.release()
                self._model.zero_grad(set_to_none=True)
        return torch.stack(maps, dim=1)

    def _map(self, cam: Any, logit_B: torch.Tensor, image_BCHW: torch.Tensor) -> torch.Tensor:
        hooks = cam.activations_and_grads
        hooks.gradients = []
        torch.autograd.backward(logit_B.sum(), retain_graph=True)
        feature_BChw, gradient_BChw = hooks.activations[-1], hooks.gradients[-1]
        if feature_BChw.ndim != 4:
            raise UserError(
                f"model.arch: the features of {type(self._model).__name__} have the shape {tuple(feature_BChw.shape)}, "
                "which does not lie over the image; it has no maps"
            )
        # With the number of places, a mean becomes a sum.
        places = feature_BChw.shape[2] * feature_BChw.shape[3]
        map_Bhw = cam.get_cam_image(image_BCHW, self._layer, [], feature_BChw.numpy(), gradient_BChw.numpy()) * places
        return torch.from_numpy(map_Bhw).to(image_BCHW.device)


def _grad_cam() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it imports for methods that are not used here
            from pytorch_grad_cam import GradCAM
    except ImportError as error:
        raise UserError(
            f"this network has no exact maps, and Grad-CAM needs another package ({one_line(error, limit=80)}); "
            "pip install 'cxrscale[explain]'"
        ) from None
    return GradCAM


def _target(model: nn.Module) -> tuple[nn.Module, Reshape]:
    """The last layer whose output lies over the image and on which the logits depend at every place."""
    blocks = getattr(model, "blocks", None)
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if isinstance(blocks, nn.Sequential) and grid is not None and hasattr(blocks[-1], "norm1"):
        # After the last attention the class token alone goes on: other tokens have no gradient there.
        prefix, (rows, columns) = int(getattr(model, "num_prefix_tokens", 0)), grid
        tokens: Any = blocks[-1].norm1
        return tokens, lambda token_BNC: token_BNC[:, prefix:].unflatten(1, (rows, columns)).permute(0, 3, 1, 2)
    stages = getattr(model, "feature_info", None)
    name = stages[-1].get("module") if isinstance(stages, list) and stages else None
    width = getattr(model, "num_features", None)
    layer = dict(model.named_modules()).get(name) if name else None
    if layer is None:
        raise UserError(
            f"model.arch: {type(model).__name__} names no layer of features that lie over the image; it has no maps"
        )

    def channels_first(feature: torch.Tensor) -> torch.Tensor:
        last = feature.ndim == 4 and feature.shape[-1] == width and feature.shape[1] != width
        return feature.permute(0, 3, 1, 2) if last else feature

    return layer, channels_first
