"""Every knob: frozen sections, one function that reads a recipe and one that applies `section.field=value`."""

from cxrscale.config.inputs import PRESETS, Augment, Data, Pack, Plan
from cxrscale.config.learning import LOWER_IS_BETTER, Loss, Model, Optim, Train
from cxrscale.config.recipe import Recipe, fields, load_recipe, override, parse, to_yaml
from cxrscale.config.running import Scaling, Threshold, Tracking, Tune
from cxrscale.config.section import Names, Section

__all__ = [
    "LOWER_IS_BETTER",
    "PRESETS",
    "Augment",
    "Data",
    "Loss",
    "Model",
    "Names",
    "Optim",
    "Pack",
    "Plan",
    "Recipe",
    "Scaling",
    "Section",
    "Threshold",
    "Tracking",
    "Train",
    "Tune",
    "fields",
    "load_recipe",
    "override",
    "parse",
    "to_yaml",
]
