"""Field names from before version 0.2: a recipe or an override with one gets one line with the new name."""

from pathlib import Path

import pytest

from cxrscale import config
from cxrscale.config import Recipe
from cxrscale.config.renamed import RENAMED_FIELDS, renamed_field
from cxrscale.types import UserError

OLD_NEW = [
    ("plan.batch", "sampler.batch_size"),
    ("plan.eval_batch", "sampler.eval_batch_size"),
    ("plan.mix", "sampler.dataset_weights"),
    ("plan.subset", "sampler.max_images"),
    ("plan.share_epochs", "sampler.positive_share_epochs"),
    ("plan.hard_scores", "sampler.hard_predictions"),
    ("data.reader", "loader.backend"),
    ("data.threads", "loader.num_threads"),
    ("data.prefetch", "loader.prefetch"),
    ("pack.repeats", "pack.duplicates"),
    ("pack.patients", "pack.patient_ids"),
    ("augment.normalise", "augment.normalize"),
    ("optim.accumulate", "optim.grad_accum_steps"),
    ("optim.ema", "optim.ema_decay"),
    ("optim.clip_norm", "optim.max_grad_norm"),
    ("train.keep", "train.keep_checkpoints"),
    ("train.metric", "train.monitor"),
    ("model.new_head", "model.reset_head"),
    ("model.freeze", "model.freeze_children"),
    ("model.freeze_names", "model.freeze_prefixes"),
    ("loss.balance", "loss.class_balance"),
    ("loss.penalty", "loss.cost_matrix_weight"),
    ("loss.penalty_matrix", "loss.cost_matrix"),
    ("threshold.also", "threshold.report_at"),
    ("threshold.alarm_cost", "threshold.fp_cost"),
    ("threshold.miss_cost", "threshold.fn_cost"),
    ("threshold.at_least", "threshold.min_rate"),
    ("tune.seeds", "tune.baseline_seeds"),
    ("tune.concurrent", "tune.max_concurrent_trials"),
    ("tune.reduction", "tune.reduction_factor"),
    ("scaling.regrow_seconds", "scaling.elastic_check_seconds"),
    ("tracking.root", "tracking.runs_dir"),
]
"""Every renamed field; fields of the old section `plan` that are not here kept their names in `sampler`."""

KEPT = ("seed", "steps_per_epoch", "sampling", "positive_share", "weights", "hard_share", "hard_repeats")
"""Fields of the old section `plan` whose own names did not change."""

ALL = [*OLD_NEW, *((f"plan.{name}", f"sampler.{name}") for name in KEPT)]


@pytest.mark.parametrize(("old", "new"), ALL, ids=[old for old, _ in ALL])
def test_an_old_name_gives_one_line_with_the_new_name(old: str, new: str, tmp_path: Path) -> None:
    section, _, field = old.partition(".")
    path = tmp_path / "old.yaml"
    path.write_text(f"{section}:\n  {field}: 1\n")
    with pytest.raises(UserError) as from_yaml:
        config.load_recipe(path)
    assert str(from_yaml.value) == f"{path}: {old} is now called {new}; rename it"
    path.write_text("train: {epochs: 1}\n")
    with pytest.raises(UserError) as from_override:
        config.load_recipe(path, [f"{old}=1"])
    assert str(from_override.value) == f"{path}: {old} is now called {new}; rename it"


def test_every_new_name_is_a_field_and_no_old_name_is() -> None:
    names = set(config.fields(Recipe))
    assert {new for _, new in ALL} <= names
    assert {old for old, _ in ALL} & names == set()
    assert dict(OLD_NEW) == RENAMED_FIELDS


def test_the_section_plan_is_now_the_sampler() -> None:
    assert renamed_field("plan") == "sampler"
    assert renamed_field("optim.lr") is None
    with pytest.raises(UserError, match="test: plan is now called sampler; rename it"):
        config.parse(Recipe, {"plan": {}}, where="test")
