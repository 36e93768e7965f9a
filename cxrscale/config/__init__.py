"""The settings of a system: a recipe with frozen, validated sections, and the vocabulary of findings.

`load_recipe` reads a YAML file and applies overrides such as `optim.lr=3e-4`; `parse` validates a nested mapping. The
docstring under each field is its help text (`cxrscale config RECIPE --help-fields`). A wrong recipe gives one line that
names the field, its value and how to fix it; a field's old name gives one line with the new name. The names of the
environment variables that cxrscale reads are here too.
"""

from cxrscale.config.data import Augment, Data, Loader, Pack, Sampler
from cxrscale.config.env import (
    API_KEY,
    CACHE_FOLDER,
    CACHE_GIGABYTES,
    DEFAULT_CACHE_FOLDER,
    DEFAULT_CACHE_GIGABYTES,
    DEFAULT_STATE_HOME,
    PATIENT_KEY,
    STATE_HOME,
)
from cxrscale.config.findings import (
    ABSENT,
    AGE_BANDS,
    NIH14,
    NO_FINDING,
    PRESENT,
    UNKNOWN,
    age_band,
    closed_world,
    has_no_finding,
    label_row,
)
from cxrscale.config.presets import PRESETS
from cxrscale.config.ranges import ranges
from cxrscale.config.recipe import Recipe, fields, learned_fields, load_recipe, override, parse, to_yaml
from cxrscale.config.reference import PublishedFigure, Reference
from cxrscale.config.runtime import Scaling, Threshold, Tracking, Tune
from cxrscale.config.section import Names, Section
from cxrscale.config.serving import Serve, ServeApplication
from cxrscale.config.training import LOSS_WEIGHTS, LOWER_IS_BETTER, METRICS, Loss, Model, Optim, Train
from cxrscale.config.unused import unused, unused_settings
from cxrscale.config.yaml_text import read_yaml, write_yaml

__all__ = [
    "ABSENT",
    "AGE_BANDS",
    "API_KEY",
    "CACHE_FOLDER",
    "CACHE_GIGABYTES",
    "DEFAULT_CACHE_FOLDER",
    "DEFAULT_CACHE_GIGABYTES",
    "DEFAULT_STATE_HOME",
    "LOSS_WEIGHTS",
    "LOWER_IS_BETTER",
    "METRICS",
    "NIH14",
    "NO_FINDING",
    "PATIENT_KEY",
    "PRESENT",
    "PRESETS",
    "STATE_HOME",
    "UNKNOWN",
    "Augment",
    "Data",
    "Loader",
    "Loss",
    "Model",
    "Names",
    "Optim",
    "Pack",
    "PublishedFigure",
    "Recipe",
    "Reference",
    "Sampler",
    "Scaling",
    "Section",
    "Serve",
    "ServeApplication",
    "Threshold",
    "Tracking",
    "Train",
    "Tune",
    "age_band",
    "closed_world",
    "fields",
    "has_no_finding",
    "label_row",
    "learned_fields",
    "load_recipe",
    "override",
    "parse",
    "ranges",
    "read_yaml",
    "to_yaml",
    "unused",
    "unused_settings",
    "write_yaml",
]
