"""Recipes, overrides, and the one-line message for every wrong field or value."""

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

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
        ("data.size=96", ["unknown field data.size", "did you mean augment.size or pack.size?"]),
        ("train.lr=1", ["unknown field train.lr", "did you mean optim.lr?"]),
        ("optim.lr=fast", ["optim.lr='fast'", "number"]),
        ("optim.lr=-1", ["optim.lr=-1", "greater than 0"]),
        ("optim.lr", ["section.field=value"]),
        ("data.task=segment", ["segmentation needs exactly one"]),
        ("loss.dice=1", ["loss.dice needs pixels"]),
        ("train.monitor=dice", ["train.monitor=dice needs pixels"]),
        ("optim.lr=.inf", ["optim.lr=inf", "finite number"]),
        ("optim.betas=[0.9, 1.0]", ["optim.betas.1=1.0", "less than 1"]),
        ("optim.weight_decay=.nan", ["optim.weight_decay", "finite number"]),
        ("loss.positive_weight=.inf", ["loss.positive_weight", "finite number"]),
        ("loss.bce=0", ["no term has a weight above 0", "e.g. loss.bce=1"]),
        ("sampler.seed=4294967296", ["sampler.seed", "less than or equal to 4294967295"]),
        ("data.findings=[Mass, Edema, Mass]", ["Mass is there twice"]),
        ("data.findings=[]", ["data.findings", "at least 1 item"]),
        ("augment.scale=[1.1, 0.9]", ["augment.scale", "the smaller number comes first: [0.9, 1.1]"]),
        ("augment.crop_area=[0, 1]", ["augment.crop_area.0=0", "greater than 0"]),
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


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("tracking.runs_dir=/data/a #b", "runs_dir", "/data/a #b"),
        ("tracking.runs_dir=~", "runs_dir", "~"),
        ("tracking.runs_dir=010", "runs_dir", "010"),
        ("tracking.project=2:24", "project", "2:24"),
        ("tracking.project=on", "project", "on"),
        ("tracking.project={x: y}", "project", "{x: y}"),
        ("tracking.project='a: b'", "project", "a: b"),
        ("tracking.project=2026-11-29", "project", "2026-11-29"),
        ("tracking.name=1e3", "name", "1e3"),
        ("tracking.name=null", "name", None),
        ("tracking.group=a b: c", "group", "a b: c"),
    ],
)
def test_a_text_is_taken_as_typed(override: str, field: str, value: str | None) -> None:
    assert getattr(resolve(override).tracking, field) == value


def test_names_in_a_list_are_taken_as_typed() -> None:
    assert resolve("data.shards=[010, ~/nih, 2:24]").data.shards == ("010", "~/nih", "2:24")
    assert resolve("data.train_split=010").data.train_split == ("010",)


@pytest.mark.parametrize(("text", "epochs"), [("010", 10), ("0o10", 8), ("0x10", 16)])
def test_integers_are_those_of_yaml_1_2(text: str, epochs: int, tmp_path: Path) -> None:
    assert resolve(f"train.epochs={text}").train.epochs == epochs
    (tmp_path / "r.yaml").write_text(f"train:\n  epochs: {text}\n")
    assert config.load_recipe(tmp_path / "r.yaml").train.epochs == epochs


@pytest.mark.parametrize("text", ["2:24", "yes", "2026-11-29"])
def test_what_yaml_1_1_would_change_is_refused_where_a_number_belongs(text: str) -> None:
    with pytest.raises(UserError, match=rf"train.epochs='{text}'"):
        resolve(f"train.epochs={text}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"train: {epochs: 2}\noptim: {lr: 1}\ntrain: {patience: 3}\n", "train stands twice, on lines 1 and 3"),
        (b"train:\n  epochs: 2\n  epochs: 3\n", "epochs stands twice, on lines 2 and 3"),
        ("train: {epochs: 2}\n".encode("utf-16"), "is in UTF-16, not UTF-8"),
        ("# caf\xe9\ntracking: {project: \xe9}".encode("latin-1"), "is in another encoding, not UTF-8 (line 1)"),
        (b"train: {epochs: \x00}\n", "is not YAML"),
        (b"- a\n", "holds a list, not sections"),
        (b"train: !!python/object:os.system {}\n", "is not YAML"),
        (b"[" * 5000, "is not YAML"),
    ],
    ids=["section twice", "field twice", "UTF-16", "Latin-1", "NUL", "list", "tag", "too deep"],
)
def test_a_recipe_that_cannot_be_read_is_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(UserError) as caught:
        config.load_recipe(tmp_path / "r.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_and_an_empty_file_are_no_mistake(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"\xef\xbb\xbftrain: {epochs: 2}\n")
    assert config.load_recipe(tmp_path / "r.yaml").train.epochs == 2
    (tmp_path / "r.yaml").write_bytes(b"")
    assert config.load_recipe(tmp_path / "r.yaml") == Recipe()


@given(st.text(min_size=1), st.lists(st.text(), max_size=3))
@example("1e-3", ["010", "on", "~", "2:24", "0o17", ".5", "<<", "=", "null", "2026-11-29"])
@example("\x85", ["\u2028", " a\ufeffb ", "\r\n", "'", '"'])
def test_any_text_is_written_and_read_back(project: str, findings: list[str]) -> None:
    tree = {"tracking": {"project": project}, "data": {"findings": findings}}
    for flow in (False, None):
        assert config.read_yaml(config.write_yaml(tree, flow).encode("utf-8", "surrogatepass"), "r") == tree


def test_a_metric_of_the_only_finding_has_a_shorter_name() -> None:
    with pytest.raises(UserError, match=r"with one finding the metric is called auroc; set train\.monitor=auroc"):
        resolve("data.findings=[Mass]", "train.monitor=auroc.Mass")
    resolve("data.findings=[Mass, Edema]", "train.monitor=auroc.Mass")


def test_every_number_has_a_bound_and_every_field_says_what_it_takes() -> None:
    ranges = config.ranges(Recipe)
    assert ranges.keys() == config.fields(Recipe).keys()
    assert ranges["optim.betas"] == (
        "[number, at least 0 and below 1, number, at least 0 and below 1]; default: [0.9, 0.999]"
    )
    assert ranges["train.patience"] == "integer, at least 1 or null; default: null"
    assert ranges["data.task"] == "classify or segment; default: classify"
    bounds = ("at least", "above")
    numbers = [name for name, text in ranges.items() if "integer" in text or "number" in text]
    assert len(numbers) > 60
    assert [name for name in numbers if not any(bound in ranges[name] for bound in bounds)] == []


def test_a_field_declares_whether_it_changes_what_is_learned() -> None:
    learned = config.learned_fields(Recipe)
    assert {"optim.lr", "sampler.seed", "model.weights", "train.monitor", "data.val_split", "loss.bce"} <= learned
    free = {
        "data.shards",  # a run knows them by their digest, wherever they are
        "data.test_split",
        "data.allow_leaks",
        "data.max_bad_rows",
        "sampler.eval_batch_size",
        "train.channels_last",
        "train.compile",
        "train.patience",
        "train.checkpoint_steps",
        "train.keep_checkpoints",
    }
    sections = {"pack", "loader", "scaling", "tracking", "threshold", "tune", "reference"}
    others = config.fields(Recipe).keys() - learned
    assert {name for name in others if name.split(".")[0] not in sections} == free
    assert {name for name in learned if name.split(".")[0] in sections} == set()
