"""Fields that change nothing in a recipe, since another field switches off what they belong to."""

from __future__ import annotations

from collections.abc import Callable

from cxrscale.config.data import Augment
from cxrscale.config.recipe import Recipe

Condition = tuple[Callable[[Recipe], bool], str]

_RANDOM = ("hflip", "rotation", "translation", "scale", "crop_area", "brightness", "contrast", "blur", "noise")

USED_WHEN: dict[str, Condition] = {
    "loss.positive_weight": (lambda r: r.loss.bce > 0, "loss.bce above 0"),
    "loss.negative_weight": (lambda r: r.loss.bce > 0, "loss.bce above 0"),
    "loss.class_balance": (lambda r: r.loss.bce > 0, "loss.bce above 0"),
    "loss.cost_matrix": (lambda r: r.loss.cost_matrix_weight > 0, "loss.cost_matrix_weight above 0"),
    "loss.focal_gamma": (lambda r: r.loss.focal > 0, "loss.focal above 0"),
    "loss.focal_alpha": (lambda r: r.loss.focal > 0, "loss.focal above 0"),
    "loss.asymmetric_gammas": (lambda r: r.loss.asymmetric > 0, "loss.asymmetric above 0"),
    "loss.asymmetric_clip": (lambda r: r.loss.asymmetric > 0, "loss.asymmetric above 0"),
    "optim.plateau_factor": (lambda r: r.optim.schedule == "plateau", "optim.schedule=plateau"),
    "optim.plateau_patience": (lambda r: r.optim.schedule == "plateau", "optim.schedule=plateau"),
    "train.patience": (lambda r: (r.train.patience or 1) < r.train.epochs, "train.epochs above train.patience"),
    "sampler.positive_share": (lambda r: r.sampler.sampling == "ratio", "sampler.sampling=ratio"),
    "sampler.positive_share_epochs": (lambda r: r.sampler.sampling == "ratio", "sampler.sampling=ratio"),
    "sampler.weights": (lambda r: r.sampler.sampling == "weighted", "sampler.sampling=weighted"),
    "sampler.hard_predictions": (lambda r: r.sampler.sampling == "hard", "sampler.sampling=hard"),
    "sampler.hard_share": (lambda r: r.sampler.sampling == "hard", "sampler.sampling=hard"),
    "sampler.hard_repeats": (lambda r: r.sampler.sampling == "hard", "sampler.sampling=hard"),
    **{f"augment.{name}": (lambda r: r.augment.probability > 0, "augment.probability above 0") for name in _RANDOM},
    "augment.blur_sigma": (lambda r: r.augment.blur * r.augment.probability > 0, "augment.blur above 0"),
    "augment.clahe_clip": (lambda r: r.augment.clahe != "never", "augment.clahe"),
    "augment.clahe_tiles": (lambda r: r.augment.clahe != "never", "augment.clahe"),
    "augment.mean": (lambda r: r.augment.normalize == "fixed", "augment.normalize=fixed"),
    "augment.std": (lambda r: r.augment.normalize == "fixed", "augment.normalize=fixed"),
    "model.encoder": (lambda r: r.data.task == "segment", "data.task=segment"),
    "model.encoder_weights": (lambda r: r.data.task == "segment", "data.task=segment (or model.weights)"),
    "model.weights_findings": (
        lambda r: r.model.weights not in ("imagenet", "none") and not r.model.reset_head,
        "a file in model.weights, and model.reset_head=false",
    ),
    "model.reset_head": (lambda r: r.model.weights not in ("imagenet", "none"), "a file in model.weights"),
}
"""Field -> when it has an effect, and that in words."""


def unused(recipe: Recipe, field: str) -> str:
    """What the field would need to have an effect in this recipe; empty where it has one."""
    used, needs = USED_WHEN.get(field, (lambda _: True, ""))
    return "" if used(recipe) else needs


def unused_settings(recipe: Recipe) -> dict[str, str]:
    """The fields that differ from their defaults and change nothing -> what each needs to have an effect."""
    tree = recipe.model_dump()
    default = Recipe().model_dump() | {"augment": Augment(preset=recipe.augment.preset).model_dump()}
    found = {}
    for name in USED_WHEN:
        section, _, field = name.partition(".")
        if tree[section][field] != default[section][field] and (needs := unused(recipe, name)):
            found[name] = needs
    return found
