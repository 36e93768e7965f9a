"""The search space: strings of the recipe -> domains -> points -> recipes. Pure; does not know Ray."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from scipy.stats import qmc

from cxrscale import config
from cxrscale.config import Augment, Recipe
from cxrscale.io import storage
from cxrscale.types import UserError

FORMS = "uniform(a, b), loguniform(a, b), quniform(a, b, step), randint(a, b) or a list of choices"
DIGITS = 4
"""Significant digits of a sampled number, and at least as many of its domain's width: readable in a recipe, and exactly
what was trained."""
SEARCHED = frozenset({"data", "sampler", "augment", "model", "loss", "optim", "train"})
"""Sections that change what is learned."""
FIXED = {
    "data.shards": "trials on other images cannot be compared",
    "data.task": "trials of other tasks cannot be compared",
    "data.findings": "trials of other findings cannot be compared",
    "data.negatives": "trials on other images cannot be compared",
    "data.train_split": "trials on other images cannot be compared",
    "data.val_split": "trials validated on other images cannot be compared",
    "data.test_split": "a search never looks at the test split",
    "data.allow_leaks": "leaks are not a matter of search",
    "sampler.seed": "its effect is the noise that tune.baseline_seeds measures",
    "sampler.eval_batch_size": "it changes no metric",
    "train.epochs": "trials are compared epoch by epoch; raise it in the recipe",
    "train.monitor": "it is what trials are compared by",
    "train.keep_checkpoints": "it changes no metric",
    "train.checkpoint_steps": "it changes no metric",
}
"""Fields that cannot be searched, and why."""
Point = dict[str, Any]
"""Dotted field -> its value in one trial."""


@dataclass(frozen=True, slots=True)
class Domain:
    """The values of one field that are searched."""

    kind: Literal["uniform", "loguniform", "quniform", "randint", "choice"]
    low: float = 0.0
    high: float = 0.0
    """Both bounds are included."""
    step: float = 0.0
    """quniform only."""
    choices: tuple[Any, ...] = ()

    def ppf(self, unit: float) -> Any:
        """The quantile of `unit` (0..1): the value below which that share of the domain lies, rounded to `DIGITS`."""
        if self.kind == "choice":
            return self.choices[min(int(unit * len(self.choices)), len(self.choices) - 1)]
        if self.kind == "randint":
            return min(math.floor(self.low + unit * (self.high - self.low + 1)), int(self.high))
        if self.kind == "quniform":
            return self.snap(self.low + min(int(unit * (self._steps + 1)), self._steps) * self.step)
        if self.kind == "loguniform":
            return self.snap(math.exp(math.log(self.low) + unit * (math.log(self.high) - math.log(self.low))))
        return self.snap(self.low + unit * (self.high - self.low))

    def snap(self, value: Any) -> Any:
        """The nearest value of the domain to one that a sampler suggests; a choice must be one of the choices."""
        if self.kind == "choice":
            return value
        bounded = min(max(value, self.low), self.high)
        if self.kind == "randint":
            return round(bounded)
        if self.kind == "quniform":
            bounded = self.low + min(round((bounded - self.low) / self.step), self._steps) * self.step
        return min(max(round(bounded, self._decimals(bounded)), self.low), self.high)

    def _decimals(self, value: float) -> int:
        """Decimal places that keep `DIGITS` significant digits of the value, and of the width of the domain."""
        sizes = [size for size in (abs(value), self.high - self.low) if size > 0]
        return DIGITS - 1 - math.floor(math.log10(min(sizes)))

    def unit(self, value: Any) -> float:
        """Position of a value between the bounds, 0..1; choices at equal distances in their order."""
        if self.kind == "choice":
            return self.choices.index(value) / max(1, len(self.choices) - 1)
        if self.kind == "loguniform":
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return float((value - self.low) / (self.high - self.low))

    @property
    def _steps(self) -> int:
        """How many steps of a quniform fit between its bounds."""
        return math.floor((self.high - self.low) / self.step + 1e-9)

    @property
    def probes(self) -> tuple[Any, ...]:
        """Values that must all fit the recipe: every choice, or both bounds and one value between them."""
        if self.kind == "choice":
            return self.choices
        return self.snap(self.low), self.snap(self.high), self.ppf(0.37)


Space = dict[str, Domain]


def parse_space(given: Mapping[str, Any]) -> Space:
    """The recipe's `tune.space` as domains, in its order.

    Raises:
        UserError: it is empty, or a value has none of the forms; names the field and the forms.
    """
    if not given:
        raise UserError(f"tune.space is empty; give e.g. tune.space={{optim.lr: loguniform(1e-4, 1e-2)}} ({FORMS})")
    return {name: _domain(name, value) for name, value in given.items()}


def _domain(name: str, value: Any) -> Domain:
    wrong = f"tune.space: {name}={value!r}"
    if isinstance(value, list | tuple):
        if not value:
            raise UserError(f"{wrong}: no choices; give {FORMS}")
        return Domain("choice", choices=tuple(value))
    match = re.fullmatch(r"\s*(\w+)\s*\((.*)\)\s*", value) if isinstance(value, str) else None
    if match is None:
        raise UserError(f"{wrong}: is not searched; give {FORMS}, or set {name} in the recipe itself")
    kind, arguments = match.groups()
    expected = {"uniform": 2, "loguniform": 2, "quniform": 3, "randint": 2}
    if kind not in expected:
        raise UserError(f"{wrong}: no such form; there are {FORMS}")
    try:
        numbers = [float(part) for part in arguments.split(",")]
    except ValueError:
        raise UserError(f"{wrong}: {arguments!r} are not numbers; give {FORMS}") from None
    if len(numbers) != expected[kind] or not all(map(math.isfinite, numbers)):
        raise UserError(f"{wrong}: {kind} takes {expected[kind]} finite numbers; the forms are {FORMS}")
    low, high = numbers[:2]
    if low >= high:
        raise UserError(f"{wrong}: the smaller bound comes first: {kind}({high:g}, {low:g}...)")
    if kind == "loguniform" and low <= 0:
        raise UserError(f"{wrong}: loguniform wants bounds above 0; the logarithm of {low:g} does not exist")
    if kind == "randint" and (low % 1 or high % 1):
        raise UserError(f"{wrong}: randint takes integers; uniform takes any number")
    if kind == "quniform" and not 0 < numbers[2] <= high - low:
        raise UserError(f"{wrong}: the step lies between 0 and b - a = {high - low:g}")
    return Domain(kind, low, high, *numbers[2:])  # type: ignore[arg-type]


def check_space(space: Space, recipe: Recipe) -> list[Recipe]:
    """The recipes at the bounds or choices of each field, one field changed at a time; each must be valid.

    Raises:
        UserError: an unknown field (with the one you may have meant), one that a search may not change, a bound or
            choice that the recipe does not accept, or a method that cannot search this space.
    """
    recipes = []
    for name, domain in space.items():
        if domain.kind == "choice":
            _check_choices(name, domain)
        for value in domain.probes:
            try:
                recipes.append(apply_point(recipe, {name: value}))
            except UserError as error:
                raise UserError(f"{error}{_integer_remedy(name, domain, recipe)}") from None
        _check_searchable(name, domain, recipe)
    _check_effects(space, recipe)
    if recipe.train.monitor == "loss" and any(name.startswith("loss.") for name in space):
        searched = ", ".join(name for name in space if name.startswith("loss."))
        raise UserError(
            f"train.monitor=loss changes with {searched}, so trials cannot be compared by it; set train.monitor=auroc "
            "or another that does not"
        )
    return recipes


def _check_choices(name: str, domain: Domain) -> None:
    if any(isinstance(choice, Mapping) for choice in domain.choices):
        raise UserError(f"tune.space: {name}: choices are numbers, words or lists; search the fields one by one")
    twice = [choice for n, choice in enumerate(domain.choices) if choice in domain.choices[:n]]
    if twice:
        raise UserError(f"tune.space: {name}: {twice[0]!r} is there twice; name each choice once")


def _check_effects(space: Space, recipe: Recipe) -> None:
    """Each dimension must change something, in the recipe itself or together with another dimension.

    Raises:
        UserError: one does not.
    """
    for name, domain in space.items():
        if len({repr(apply_point(recipe, {name: value})) for value in domain.probes}) == 1:
            value = domain.probes[0]
            raise UserError(f"tune.space: {name} has one value, {value!r}; set it in the recipe, or give more of them")
        others = [
            apply_point(recipe, {other: value})
            for other, searched in space.items()
            if other != name
            for value in searched.probes
        ]
        needs = [
            config.unused(apply_point(base, {name: value}), name)
            for base in (recipe, *others)
            for value in domain.probes
        ]
        if all(needs):
            raise UserError(
                f"tune.space: {name} changes nothing here, since it needs {needs[0]}; set that in the recipe, search "
                f"it too, or leave {name} out"
            )


def _check_searchable(name: str, domain: Domain, recipe: Recipe) -> None:
    if name.split(".")[0] not in SEARCHED:
        sections = ", ".join(sorted(SEARCHED))
        raise UserError(f"tune.space: {name} does not change what is learned; search fields of {sections}")
    if name in FIXED:
        raise UserError(f"tune.space: {name} cannot be searched: {FIXED[name]}")
    if recipe.tune.method == "grid" and domain.kind != "choice":
        raise UserError(f"tune.space: {name}: grid takes lists of choices; give a list or another tune.method")


def _integer_remedy(name: str, domain: Domain, recipe: Recipe) -> str:
    """A remedy where only the integers of a domain fit the field."""
    if domain.kind not in ("uniform", "loguniform", "quniform"):
        return ""
    try:
        apply_point(recipe, {name: math.ceil(domain.low)})
    except UserError:
        return ""
    return f"; if {name} takes integers, randint({math.ceil(domain.low)}, {math.floor(domain.high)})"


def apply_point(recipe: Recipe, point: Mapping[str, Any]) -> Recipe:
    """The recipe with the point's fields set.

    Raises:
        UserError: as `config.parse`.
    """
    tree = recipe.model_dump(mode="json")
    if "augment.preset" in point:
        # Else the values that the preset filled in would count as the recipe's own and win over the trial's preset.
        filled = Augment(preset=recipe.augment.preset).model_dump(mode="json")
        tree["augment"] = {key: value for key, value in tree["augment"].items() if value != filled[key]}
    for name, value in point.items():
        *parents, leaf = name.split(".")
        section = tree
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise UserError(f"tune.space: {name}: {parent} is a value, not a section")
        section[leaf] = list(value) if isinstance(value, tuple) else value
    return config.parse(Recipe, tree, where="tune.space")


def points(space: Space, recipe: Recipe) -> list[Point]:
    """The points of the methods that know them beforehand, the same for the same recipe.

    grid: every combination, the last field changing fastest. Others: `tune.trials` points of a scrambled Halton
    sequence (Owen 2017) seeded with sampler.seed, which covers the space more evenly than independent samples, and of
    which the first n are the same however many follow.
    """
    if recipe.tune.method == "grid":
        combinations = itertools.product(*(domain.choices for domain in space.values()))
        return [dict(zip(space, values, strict=True)) for values in combinations]
    unit_ND = qmc.Halton(d=len(space), scramble=True, rng=recipe.sampler.seed).random(recipe.tune.trials)
    return [
        {name: domain.ppf(float(unit)) for (name, domain), unit in zip(space.items(), unit_D, strict=True)}
        for unit_D in unit_ND
    ]


def absolute_space(space: Space) -> Space:
    """The space with absolute paths among its choices: workers run in other directories."""

    def absolute(choice: Any) -> Any:
        return storage.absolute(choice) if isinstance(choice, str) and choice not in ("imagenet", "none") else choice

    paths = {name for name in ("model.weights", "model.encoder_weights", "sampler.hard_predictions") if name in space}
    return {
        **space,
        **{name: Domain("choice", choices=tuple(map(absolute, space[name].choices))) for name in sorted(paths)},
    }


def differences(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Section -> the fields that differ from the defaults: the content of a recipe file."""
    default = Recipe().model_dump(mode="json")
    default["augment"] = {**Augment(preset=recipe.augment.preset).model_dump(mode="json"), "preset": "none"}
    tree = recipe.model_dump(mode="json")
    changed = {
        section: {name: value for name, value in values.items() if value != default[section][name]}
        for section, values in tree.items()
    }
    return {section: values for section, values in changed.items() if values}
