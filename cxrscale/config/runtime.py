"""Where a run happens, what is logged, what is chosen after it, and how a search over recipes runs."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from cxrscale.config.section import Section


class Scaling(Section):
    """On how many workers training runs, and what each of them needs."""

    learned: ClassVar[bool] = False

    num_workers: Annotated[int, Field(ge=0)] | tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = 1
    """Ray Train workers; 0: in this process without Ray, as with `--local`; [min, max]: as many as the cluster has
    room for, fewer after a node is lost and more when it is back, with the same global batch size."""
    elastic_check_seconds: float = Field(60, gt=0)
    """With num_workers=[min, max]: seconds between two checks whether there is room for more workers; to add workers,
    all of them restart from a checkpoint."""
    use_gpu: bool | None = None
    """One GPU per worker; null: if the cluster (or this machine) has any."""
    cpus_per_worker: float = Field(1, gt=0)
    """CPUs that Ray reserves per worker."""
    start_seconds: float = Field(1800, gt=0)
    """How long the run waits while no worker trains, at the start and after a loss, before it ends with its last
    checkpoint: for room on the cluster, which an autoscaler may need minutes to make, and for processes to start."""
    hang_seconds: float = Field(600, ge=1)
    """How long workers wait for each other within a step before all of them restart from the last checkpoint: one of
    them hangs. More than compiling the model or writing a checkpoint takes."""
    store_seconds: float = Field(300, ge=0)
    """How long a bucket that no longer answers is asked again before what needs it fails; a worker that fails restarts
    from the last checkpoint. Less than hang_seconds, since the other workers wait meanwhile."""
    max_failures: int = Field(3, ge=-1)
    """How often a run restarts from its last checkpoint after losing a worker; -1: without limit."""

    @field_validator("num_workers")
    @classmethod
    def _check_bounds(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        if isinstance(value, tuple) and value[0] > value[1]:
            raise ValueError(f"[min, max] needs the smaller number first: [{value[1]}, {value[0]}]")
        return value

    @property
    def workers(self) -> tuple[int, int]:
        """The fewest and the most workers."""
        return self.num_workers if isinstance(self.num_workers, tuple) else (self.num_workers, self.num_workers)


class Tracking(Section):
    """What is logged about a run, and where."""

    learned: ClassVar[bool] = False

    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The run's name; null: the recipe's name and the time. An unfinished run of this name is resumed."""
    runs_dir: str = "runs"
    """The folder or s3:// address for runs; every worker must be able to reach it."""
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Logging to Weights & Biases; offline writes files for a later `wandb sync`."""
    wandb_images: bool = False
    """Log samples.png and maps to Weights & Biases too: images of patients then leave this machine."""
    map_images: int = Field(0, ge=0, le=64)
    """After each validation, draw where the scores of so many validation images come from, always the same ones, into
    the run's maps/epoch-*.png; each with the finding that it has (of an image without any, the one that scores
    highest). Of classifiers with exact class activation maps and of segmenters; 0: none."""
    project: str = "cxrscale"
    """The project in Weights & Biases."""
    group: str | None = None
    """The group in Weights & Biases; `cxrscale tune` gives its trials the search's name."""
    log_steps: int = Field(10, ge=1)
    """Steps between two lines of train_log.jsonl."""
    gpu_hour_price: float | None = Field(None, ge=0)
    """Price per hour of one GPU (of one worker without GPUs) in your currency; run.json then has the total cost."""


class Threshold(Section):
    """What is chosen on the validation split after training: thresholds and calibration."""

    learned: ClassVar[bool] = False

    goal: Literal["f1", "youden", "recall", "precision", "cost", "fixed"] = "f1"
    """f1: highest F1; youden: highest recall + specificity; recall: highest threshold with a recall of `min_rate` or
    more; precision: highest recall with a precision of `min_rate` or more; cost: lowest total of `fn_cost` and
    `fp_cost`; fixed: `value`."""
    min_rate: float = Field(0.9, gt=0, le=1)
    """Smallest recall or precision, for goal=recall and goal=precision."""
    fn_cost: float = Field(1.0, gt=0)
    """Cost of a false negative, for goal=cost."""
    fp_cost: float = Field(1.0, gt=0)
    """Cost of a false positive, for goal=cost."""
    value: float = Field(0.5, ge=0, le=1)
    """The threshold, for goal=fixed."""
    report_at: tuple[Annotated[float, Field(ge=0, le=1)], ...] = ()
    """More thresholds at which `cxrscale evaluate` reports confusion matrices."""
    calibration: Literal["none", "platt", "temperature", "isotonic"] = "none"
    """Calibration of probabilities, fitted on the validation split; thresholds then apply to calibrated ones."""
    prior_shift: Literal["none", "em", "known"] = "none"
    """Correct probabilities for a different prevalence in the test split: em estimates the prevalence from the scores
    (Saerens et al. 2002); known uses `priors`."""
    priors: dict[str, Annotated[float, Field(gt=0, lt=1)]] = Field({})
    """For prior_shift=known: finding -> its prevalence where the model will be used."""


class Tune(Section):
    """A search over fields of the recipe, by `cxrscale tune`."""

    learned: ClassVar[bool] = False

    space: dict[str, Any] = Field({})
    """Dotted field -> its search space: uniform(a, b), loguniform(a, b), quniform(a, b, step), randint(a, b), or a
    list of choices. Both bounds are included."""
    method: Literal["asha", "tpe", "random", "grid"] = "asha"
    """asha: random search with early stopping of the worse trials; tpe: Optuna's TPE sampler with early stopping;
    random, grid: no early stopping."""
    trials: int = Field(16, ge=1)
    """Number of trials; grid runs one trial per combination instead."""
    workers: int = Field(1, ge=1)
    """Workers per trial; a trial with 1 worker runs as a plain function, which starts faster."""
    gpu_share: float = Field(1.0, gt=0, le=1)
    """Share of a GPU per trial with one worker; 0.5: two trials per GPU, if its memory is enough for both."""
    max_concurrent_trials: int | None = Field(None, ge=1)
    """Trials that run at the same time; null: as many as the cluster has room for."""
    grace_epochs: int = Field(1, ge=1)
    """asha, tpe: epochs of each trial before it can be stopped."""
    reduction_factor: int = Field(3, ge=2)
    """asha, tpe: one of this many trials continues after each rung."""
    retry_failed: bool = False
    """Run a trial that failed once more, from its last checkpoint; also for a finished search, with --resume."""
    baseline_seeds: int = Field(3, ge=0)
    """How many runs of the unchanged recipe with different seeds are trained besides the trials, to measure noise."""
