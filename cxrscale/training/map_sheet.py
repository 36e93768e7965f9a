"""Where the scores of a few validation images come from, drawn over them: what a tracker keeps of each epoch."""

from __future__ import annotations

import logging
import math

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from cxrscale.config import PRESENT, Recipe
from cxrscale.io import draw_heat
from cxrscale.loader import evaluation_batches, usable_rows
from cxrscale.models import forward, pooled_features, probabilities
from cxrscale.shards import Manifest
from cxrscale.types import Batch, DistContext

LOG = logging.getLogger("cxrscale")
SIDE = 224
"""Pixels of a tile's side, at least: a smaller input is enlarged, so that its text can be read."""
NAME = "the images of the map sheet"


def fixed_rows(data: Manifest, recipe: Recipe) -> list[int]:
    """The validation images whose maps are drawn, the same in every epoch and session: those with the smallest keys,
    images with a finding first."""
    rows = usable_rows(data, recipe.data.val_split, recipe.data)
    present_N = (data.labels(recipe.data.findings)[rows] == PRESENT).any(axis=1)
    order = np.lexsort((data.key[rows], ~present_N))
    return sorted(rows[order[: recipe.tracking.map_images]].tolist())


@torch.no_grad()
def draw(model: nn.Module, data: Manifest, recipe: Recipe, device: torch.device) -> npt.NDArray[np.uint8]:
    """(H, W, 3) the images side by side, BGR, each under its map and with the finding's name and probability.

    Args:
        model: not wrapped; its training mode is restored afterwards.
    """
    was_training = model.training
    model.eval()
    tiles = []
    chosen = data.only(fixed_rows(data, recipe), NAME)
    label_NF = data.labels(recipe.data.findings)
    for batch in evaluation_batches(chosen, (NAME,), recipe, DistContext(device=device)):
        logit_BF, map_BFhw = _maps(model, batch, recipe, device)
        image_BHW = batch.image_BCHW[:, 0].float().cpu().numpy()
        for index in np.flatnonzero(batch.valid_B.cpu().numpy()):
            present = np.flatnonzero(label_NF[int(batch.row_B[index])] == PRESENT)
            among = present if len(present) else np.arange(logit_BF.shape[1])
            f = int(among[logit_BF[index, among].argmax()])
            text = f"{recipe.data.findings[f]} {1 / (1 + math.exp(-float(logit_BF[index, f]))):.2f}"
            tiles.append(_tile(image_BHW[index], None if map_BFhw is None else map_BFhw[index, f], text))
    model.train(was_training)
    columns = math.ceil(len(tiles) ** 0.5)
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    return np.concatenate([np.concatenate(tiles[i : i + columns], axis=1) for i in range(0, len(tiles), columns)])


def _maps(
    model: nn.Module, batch: Batch, recipe: Recipe, device: torch.device
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None]:
    """((B, F) logits, (B, F, h, w) maps, None for a model that has none)."""
    settings = recipe.train.model_copy(update={"precision": "fp32"})
    with pooled_features(model) as features:
        logits = forward(model, batch, settings, device)
        if logits.ndim == 4:
            return logits.flatten(2).amax(dim=2).cpu().numpy(), probabilities(logits).cpu().numpy()
        map_BFhw = features.maps(logits)
    if map_BFhw is None:
        LOG.warning(
            "tracking.map_images: %s has no exact class activation maps; use `cxrscale explain`", recipe.model.arch
        )
    return logits.cpu().numpy(), None if map_BFhw is None else map_BFhw.cpu().numpy()


def _tile(
    image_HW: npt.NDArray[np.float32], map_hw: npt.NDArray[np.float32] | None, text: str
) -> npt.NDArray[np.uint8]:
    low, high = float(image_HW.min()), float(image_HW.max())
    gray_HW = (255 * (image_HW - low) / max(high - low, 1e-6)).round().astype(np.uint8)
    side = max(SIDE, len(gray_HW))
    gray_HW = np.asarray(cv2.resize(gray_HW, (side, side), interpolation=cv2.INTER_LINEAR), dtype=np.uint8)
    color_HW3 = draw_heat(gray_HW, np.zeros((1, 1)) if map_hw is None else map_hw)
    plain, scale = "".join(char if " " <= char <= "~" else "?" for char in text), len(gray_HW) / 400
    origin = (round(8 * scale), len(gray_HW) - round(10 * scale))
    for color, width in (((0, 0, 0), 3), ((255, 255, 255), 1)):
        cv2.putText(color_HW3, plain, origin, cv2.FONT_HERSHEY_SIMPLEX, scale, color, width, cv2.LINE_AA)
    return color_HW3
