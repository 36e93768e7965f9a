"""The complete recipe, reading it from YAML, and overriding its fields by `section.field=value`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import ValidationError, model_validator

from cxrscale.config.data import Augment, Data, Loader, Pack, Sampler
from cxrscale.config.reference import Reference
from cxrscale.config.renamed import renamed_field
from cxrscale.config.runtime import Scaling, Threshold, Tracking, Tune
from cxrscale.config.section import NOT_LEARNED, Section
from cxrscale.config.training import LOSS_WEIGHTS, Loss, Model, Optim, Train
from cxrscale.config.yaml_text import read_text, read_texts, read_value, read_yaml, write_yaml
from cxrscale.types import UserError


class Recipe(Section):
    """All settings of one system; a file in `jobs/` lists those that differ from the defaults."""

    pack: Pack = Pack()
    data: Data = Data()
    loader: Loader = Loader()
    sampler: Sampler = Sampler()
    augment: Augment = Augment()
    model: Model = Model()
    loss: Loss = Loss()
    optim: Optim = Optim()
    train: Train = Train()
    scaling: Scaling = Scaling()
    tracking: Tracking = Tracking()
    threshold: Threshold = Threshold()
    tune: Tune = Tune()
    reference: Reference = Reference()

    @model_validator(mode="after")
    def _check_across_sections(self) -> Recipe:
        if self.data.task == "segment" and len(self.data.findings) != 1:
            raise ValueError(
                f"data.findings={list(self.data.findings)}: segmentation needs exactly one, e.g. data.findings=[X]"
            )
        for name, weight in LOSS_WEIGHTS.items():
            if weight.segment_only and getattr(self.loss, name) and self.data.task != "segment":
                raise ValueError(f"loss.{name} needs pixels: set data.task=segment or loss.{name}=0")
        if self.train.monitor in ("dice", "dice_positives", "iou") and self.data.task == "classify":
            raise ValueError(
                f"train.monitor={self.train.monitor} needs pixels: set data.task=segment or train.monitor=auroc"
            )
        metric, dot, finding = self.train.monitor.partition(".")
        if dot and finding not in self.data.findings:
            raise ValueError(f"train.monitor={self.train.monitor}: {finding} is not in data.findings")
        if dot and len(self.data.findings) == 1:
            raise ValueError(
                f"train.monitor={self.train.monitor}: with one finding the metric is called {metric}; "
                f"set train.monitor={metric}"
            )
        return self


AnySection = TypeVar("AnySection", bound=Section)


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe and apply `section.field=value` overrides; values are as in YAML (`3e-4`, `[a, b]`, `null`).

        recipe = cx.load_recipe("jobs/chexnet14.yaml", ["optim.lr=3e-4", "data.shards=[shards/nih]"])

    Raises:
        UserError: no such file, not UTF-8, not YAML, a key twice, an unknown field (the message names a similar one),
            or a wrong value.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        near = sorted(str(other) for other in path.parent.glob("*.yaml"))[:12] if path.parent.is_dir() else []
        remedy = f"recipes in that folder: {', '.join(near)}" if near else "recipes are in jobs/"
        raise UserError(f"recipe {path} does not exist; {remedy}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"recipe {path} cannot be read: {reason}; give a YAML file") from None
    return parse(Recipe, override(read_yaml(data, f"recipe {path}"), overrides), where=str(path))


def override(tree: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of the nested mapping with each `a.b=value` set.

    The value of a field that holds text (a name, a path) is taken as typed; others are parsed as YAML.

    Raises:
        UserError: an override has no `=`, or its section is a field.
    """
    result: dict[str, Any] = {key: dict(value) if isinstance(value, dict) else value for key, value in tree.items()}
    for item in overrides:
        name, equals, text = item.partition("=")
        if not equals or not name:
            raise UserError(f"override {item!r} is not of the form section.field=value, e.g. optim.lr=3e-4")
        *parents, leaf = name.strip().split(".")
        node = result
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise UserError(f"override {item!r}: {parent} is a field, not a section")
        node[leaf] = _value(name.strip(), text)
    return result


def _value(name: str, text: str) -> Any:
    """The value of an override: as typed where the field holds text, else YAML."""
    kind = _annotations().get(name)
    optional = type(None) in get_args(kind)
    if kind is None or (optional and text == "null"):
        return read_value(text)
    kinds = [one for one in (get_args(kind) if optional else (kind,)) if one is not type(None)]
    if kinds == [str]:
        return read_text(text)
    return read_texts(text) if kinds == [tuple[str, ...]] else read_value(text)


@cache
def _annotations() -> dict[str, Any]:
    """Dotted name -> type of every field of a recipe."""
    sections = {name: info.annotation for name, info in Recipe.model_fields.items()}
    return {
        f"{name}.{field}": info.annotation
        for name, section in sections.items()
        if section is not None
        for field, info in section.model_fields.items()
    }


def parse(section: type[AnySection], tree: Mapping[str, Any], where: str) -> AnySection:
    """Validate a nested mapping; the first error becomes one line with the field, its value and how to fix it."""
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            if isinstance(first["input"], dict) and first["input"]:  # an unknown section: its first field tells more
                inner = f"{field}.{next(iter(first['input']))}"
                field = inner if renamed_field(inner) else field
            if new := renamed_field(field):
                raise UserError(f"{where}: {field} is now called {new}; rename it") from None
            raise UserError(f"{where}: unknown field {field}; {_nearest(section, field)}") from None
        message = first["msg"].removeprefix("Value error, ")
        value = "" if not field else f"={first['input']!r}"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise UserError(f"{where}: {field}{value}{': ' if field else ''}{message}{more}") from None


def to_yaml(section: Section) -> str:
    """A section as YAML with all defaults, in the order of its definition."""
    return write_yaml(section.model_dump(mode="json"))


def fields(section: type[Section], prefix: str = "") -> dict[str, str]:
    """Dotted field name -> help text, for every field of a section."""
    names: dict[str, str] = {}
    for name, info in section.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            names |= fields(kind, f"{prefix}{name}.")
        else:
            names[f"{prefix}{name}"] = info.description or ""
    return names


def learned_fields(section: type[Section], prefix: str = "") -> frozenset[str]:
    """Dotted names of the fields that change what is learned: a run is resumed with the same values of them."""
    names: set[str] = set()
    for name, info in section.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            names |= learned_fields(kind, f"{prefix}{name}.")
        elif section.learned and NOT_LEARNED not in info.metadata:
            names.add(f"{prefix}{name}")
    return frozenset(names)


def _nearest(section: type[Section], field: str) -> str:
    names = list(fields(section))
    same_leaf = [name for name in names if name.rsplit(".", 1)[-1] == field.rsplit(".", 1)[-1]]
    # A stable sort: whoever misses data.size while training means the input's size before that of the shards.
    same_leaf.sort(key=lambda name: name.startswith(("pack.", "tune.", "reference.")))
    close = same_leaf[:3] or difflib.get_close_matches(field, names, n=1, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else "`cxrscale config RECIPE --help-fields` lists all fields"
