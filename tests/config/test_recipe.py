"""Recipes, overrides, and the one-line message for every wrong field or value."""

from pathlib import Path

import pytest

from cxrscale import config
from cxrscale.config import Recipe
from cxrscale.types import UserError


def resolve(*overrides: str) -> Recipe:
    return config.parse(Recipe, config.override({}, overrides), where="test")


@pytest.mark.parametrize(
    ("text", "value"), [("3e-4", 3e-4), ("1e-3", 1e-3), ("0.1", 0.1), ("1", 1.0), ("1.5E-2", 1.5e-2)]
)
def test_numbers_are_numbers(text: str, value: float) -> None:
    assert resolve(f"optim.lr={text}").optim.lr == value


def test_overrides_reach_lists_nulls_and_maps() -> None:
    recipe = resolve("data.findings=[Effusion, Mass]", "sampler.max_images=null", "model.options={growth_rate: 8}")
    assert recipe.data.findings == ("Effusion", "Mass")
    assert recipe.sampler.max_images is None
    assert recipe.model.options == {"growth_rate": 8}


def test_override_does_not_change_its_input() -> None:
    tree = {"optim": {"lr": 1.0}}
    config.override(tree, ["optim.lr=2"])
    assert tree == {"optim": {"lr": 1.0}}


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("optim.learning_rat=1", ["unknown field optim.learning_rat"]),
        ("train.lr=1", ["unknown field train.lr", "did you mean optim.lr?"]),
        ("optim.lr=fast", ["optim.lr='fast'", "number"]),
        ("optim.lr=-1", ["optim.lr=-1", "greater than 0"]),
        ("optim.lr", ["section.field=value"]),
        ("data.task=segment", ["segmentation needs exactly one"]),
        ("loss.dice=1", ["loss.dice needs pixels"]),
        ("train.monitor=dice", ["train.monitor=dice needs pixels"]),
    ],
)
def test_a_wrong_recipe_is_one_line_with_the_field(override: str, fragments: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        resolve(override)
    assert "\n" not in str(caught.value)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_a_missing_recipe_lists_the_others_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("train: {epochs: 2}\n")
    assert config.load_recipe(tmp_path / "one.yaml").train.epochs == 2
    with pytest.raises(UserError, match=r"two.yaml does not exist; recipes in that folder: .*one.yaml"):
        config.load_recipe(tmp_path / "two.yaml")


def test_a_recipe_that_is_not_yaml_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("train: [1,\n")
    with pytest.raises(UserError, match=r"bad\.yaml is not YAML"):
        config.load_recipe(tmp_path / "bad.yaml")


def test_the_yaml_of_a_recipe_is_read_back_unchanged(tmp_path: Path) -> None:
    recipe = resolve("augment.preset=siim", "augment.rotation=3", "optim.lr=3e-4")
    (tmp_path / "r.yaml").write_text(config.to_yaml(recipe))
    assert config.load_recipe(tmp_path / "r.yaml") == recipe


def test_a_field_of_the_recipe_overrides_the_preset() -> None:
    assert resolve("augment.preset=rsna").augment.rotation == 5.0
    assert resolve("augment.preset=rsna", "augment.rotation=1").augment.rotation == 1.0


def test_every_field_has_a_help_text() -> None:
    assert [name for name, sentence in config.fields(Recipe).items() if not sentence.strip().endswith(".")] == []
