"""Names of recipe fields before version 0.2, so that the error message for an old recipe gives the new name."""

from __future__ import annotations

RENAMED_FIELDS = {
    "plan.batch": "sampler.batch_size",
    "plan.eval_batch": "sampler.eval_batch_size",
    "plan.mix": "sampler.dataset_weights",
    "plan.subset": "sampler.max_images",
    "plan.share_epochs": "sampler.positive_share_epochs",
    "plan.hard_scores": "sampler.hard_predictions",
    "data.reader": "loader.backend",
    "data.threads": "loader.num_threads",
    "data.prefetch": "loader.prefetch",
    "pack.repeats": "pack.duplicates",
    "pack.patients": "pack.patient_ids",
    "augment.normalise": "augment.normalize",
    "optim.accumulate": "optim.grad_accum_steps",
    "optim.ema": "optim.ema_decay",
    "optim.clip_norm": "optim.max_grad_norm",
    "train.keep": "train.keep_checkpoints",
    "train.metric": "train.monitor",
    "model.new_head": "model.reset_head",
    "model.freeze": "model.freeze_children",
    "model.freeze_names": "model.freeze_prefixes",
    "loss.balance": "loss.class_balance",
    "loss.penalty": "loss.cost_matrix_weight",
    "loss.penalty_matrix": "loss.cost_matrix",
    "threshold.also": "threshold.report_at",
    "threshold.alarm_cost": "threshold.fp_cost",
    "threshold.miss_cost": "threshold.fn_cost",
    "threshold.at_least": "threshold.min_rate",
    "tune.seeds": "tune.baseline_seeds",
    "tune.concurrent": "tune.max_concurrent_trials",
    "tune.reduction": "tune.reduction_factor",
    "scaling.regrow_seconds": "scaling.elastic_check_seconds",
    "tracking.root": "tracking.runs_dir",
}
"""Old dotted name -> new one. All other fields of the old section `plan` have the same name in `sampler`."""


def renamed_field(name: str) -> str | None:
    """The current name of an old dotted field or section; None if it is not an old name."""
    if name in RENAMED_FIELDS:
        return RENAMED_FIELDS[name]
    section, dot, field = name.partition(".")
    return f"sampler{dot}{field}" if section == "plan" else None
