"""Every recipe in jobs/ resolves, says what it is, and builds its net."""

from pathlib import Path

import pytest
import torch

from cxrscale import config, models

JOBS = sorted((Path(__file__).resolve().parent.parent / "jobs").glob("*.yaml"))


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_recipe_resolves_and_its_header_says_what_to_expect(path: Path) -> None:
    config.load_recipe(path)
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    text = "\n".join(header)
    assert f"cxrscale train jobs/{path.name}" in text
    assert "Hardware:" in text
    assert "Score to expect:" in text


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_recipe_states_only_differences(path: Path) -> None:
    import yaml

    defaults = config.Recipe().model_dump(mode="json")
    stated = yaml.safe_load(path.read_text())
    resolved = config.load_recipe(path).model_dump(mode="json")
    for section, values in stated.items():
        for name in values:
            assert name in resolved[section]
    assert any(resolved[section] != defaults[section] for section in stated)


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_recipe_builds_a_net_of_the_right_shape(path: Path) -> None:
    recipe = config.load_recipe(path, ["model.weights=none"])
    net = models.build(recipe.model, recipe.data).eval()
    side = 64
    with torch.no_grad():
        out = net(torch.zeros(2, 1, side, side))
    expected = (2, 1, side, side) if recipe.data.task == "segment" else (2, len(recipe.data.findings))
    assert out.shape == expected
