"""Where a run happens, what is written down of it, and what is chosen after it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from cxrscale.config.section import Section


class Scaling(Section):
    """Where the loop runs."""

    num_workers: Annotated[int, Field(ge=0)] | tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = 1
    """Ray Train workers; 0: in this very process, without Ray, as `--local` does; [min, max]: as many as the cluster
    has room for, fewer after a node is lost and more when it is back, at the same global batch."""
    elastic_check_seconds: float = Field(60, gt=0)
    """With [min, max]: how often it is looked whether there is room for more workers; growing restarts them all from a
    checkpoint."""
    use_gpu: bool | None = None
    """A GPU a worker; None: when the cluster (or this machine) has one."""
    cpus_per_worker: float = Field(1, gt=0)
    """CPUs that Ray sets aside for each worker."""
    max_failures: int = Field(3, ge=-1)
    """How often a run starts again from its last checkpoint after losing a worker; -1: without end."""

    @field_validator("num_workers")
    @classmethod
    def _check_bounds(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        if isinstance(value, tuple) and value[0] > value[1]:
            raise ValueError(f"[min, max] wants the smaller first: [{value[1]}, {value[0]}]")
        return value

    @property
    def workers(self) -> tuple[int, int]:
        """The fewest and the most workers."""
        return self.num_workers if isinstance(self.num_workers, tuple) else (self.num_workers, self.num_workers)


class Tracking(Section):
    """What is written down of a run."""

    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The run's name; None: the recipe's name and the time. An unfinished run of this name goes on."""
    runs_dir: str = "runs"
    """The folder, or the s3:// address, that holds runs; every worker must reach it."""
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Weights & Biases; offline writes files that `wandb sync` sends later."""
    project: str = "cxrscale"
    """The project in Weights & Biases."""
    group: str | None = None
    """The group in Weights & Biases; `cxrscale tune` gives its trials the search's name."""
    log_steps: int = Field(10, ge=1)
    """metrics.jsonl gets a line every so many steps."""
    gpu_hour_price: float | None = Field(None, ge=0)
    """Price of an hour of one GPU (of one worker where there is none), in your currency: run.json then says what the
    run cost."""


class Threshold(Section):
    """What is chosen on the validation split after training: thresholds, and whether probabilities are calibrated."""

    goal: Literal["f1", "youden", "recall", "precision", "cost", "fixed"] = "f1"
    """f1: highest F1; youden: highest recall + specificity; recall: the highest threshold whose recall is `min_rate`;
    precision: the best recall whose precision is `min_rate`; cost: the lowest sum of `fn_cost` and `fp_cost`;
    fixed: `value`."""
    min_rate: float = Field(0.9, gt=0, le=1)
    """For goal=recall and goal=precision."""
    fn_cost: float = Field(1.0, gt=0)
    """For goal=cost: what a missed finding costs."""
    fp_cost: float = Field(1.0, gt=0)
    """For goal=cost: what a false alarm costs."""
    value: float = Field(0.5, ge=0, le=1)
    """For goal=fixed."""
    report_at: tuple[Annotated[float, Field(ge=0, le=1)], ...] = ()
    """Further thresholds, at which `evaluate` shows confusion matrices too."""
    calibration: Literal["none", "platt", "temperature", "isotonic"] = "none"
    """Fitted on the validation split; thresholds are then of calibrated probabilities."""
    prior_shift: Literal["none", "em", "known"] = "none"
    """Correct probabilities for another prevalence in the test split: em estimates it from the scores alone (Saerens
    et al. 2002), known takes `priors`."""
    priors: dict[str, Annotated[float, Field(gt=0, lt=1)]] = Field({})
    """For prior_shift=known: finding -> its prevalence where the model will be used."""


class Tune(Section):
    """A search over fields of the recipe."""

    space: dict[str, Any] = Field({})
    """Dotted field -> where it is searched: uniform(a, b), loguniform(a, b), quniform(a, b, step), randint(a, b), or a
    list of choices. Both bounds can be drawn."""
    method: Literal["asha", "tpe", "pbt", "random", "grid"] = "asha"
    """asha: random trials, the worse of them stopped early; tpe: Optuna's sampler with early stopping; pbt: population
    based training; random, grid: no early stopping."""
    trials: int = Field(16, ge=1)
    """Trials in all (pbt: the population); grid has one for each combination instead."""
    workers: int = Field(1, ge=1)
    """Workers a trial; 1 runs the trial as a plain function, which starts sooner."""
    gpu_share: float = Field(1.0, gt=0, le=1)
    """Share of a GPU that a trial with one worker takes; 0.5: two trials a GPU, if its memory holds both."""
    max_concurrent_trials: int | None = Field(None, ge=1)
    """Trials at a time; None: as many as the cluster has room for."""
    grace_epochs: int = Field(1, ge=1)
    """asha, tpe: epochs that every trial may run before it can be stopped; pbt: epochs between two exchanges."""
    reduction_factor: int = Field(3, ge=2)
    """asha, tpe: of so many trials at a rung, one goes on."""
    baseline_seeds: int = Field(3, ge=0)
    """How often the unchanged recipe is trained beside the trials, with other seeds: the noise a gain must beat."""
