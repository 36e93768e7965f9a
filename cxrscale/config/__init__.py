"""Every knob: frozen sections, one function that reads a recipe and one that applies `section.field=value`."""

from cxrscale.config.data import Augment, Data, Loader, Pack, Sampler
from cxrscale.config.env import CACHE_FOLDER, CACHE_GIGABYTES
from cxrscale.config.findings import ABSENT, NIH14, NO_FINDING, PRESENT, closed_world, has_no_finding, label_row
from cxrscale.config.presets import PRESETS
from cxrscale.config.recipe import Recipe, fields, load_recipe, override, parse, to_yaml
from cxrscale.config.runtime import Scaling, Threshold, Tracking, Tune
from cxrscale.config.section import Names, Section
from cxrscale.config.training import LOWER_IS_BETTER, Loss, Model, Optim, Train

__all__ = [
    "ABSENT",
    "CACHE_FOLDER",
    "CACHE_GIGABYTES",
    "LOWER_IS_BETTER",
    "NIH14",
    "NO_FINDING",
    "PRESENT",
    "PRESETS",
    "Augment",
    "Data",
    "Loader",
    "Loss",
    "Model",
    "Names",
    "Optim",
    "Pack",
    "Recipe",
    "Sampler",
    "Scaling",
    "Section",
    "Threshold",
    "Tracking",
    "Train",
    "Tune",
    "closed_world",
    "fields",
    "has_no_finding",
    "label_row",
    "load_recipe",
    "override",
    "parse",
    "to_yaml",
]
