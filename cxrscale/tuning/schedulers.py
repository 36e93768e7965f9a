"""Which point comes next, and which trial goes on: Ray Tune's schedulers and Optuna's sampler over our domains.

Population based training is not among them: the values of its best trial change while it trains, so that no `best.yaml`
could reproduce it.
"""

from __future__ import annotations

import math
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from cxrscale.config import LOWER_IS_BETTER, Recipe
from cxrscale.tuning.search_space import Domain, Point, Space
from cxrscale.tuning.trial import NUMBER


class BaselineMixin:
    """Mixed into a scheduler: trainings of the unchanged recipe (the seeds) run to their ends, and decide nothing.

    Nor is a trial stopped after its last epoch: it is about to end by itself, with all the files of a finished run.
    """

    seeds: int
    epochs: int
    grace: int

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Continue a seed, or a trial at its end; stop one whose metric is undefined; else ask the scheduler."""
        if trial.config[NUMBER] < self.seeds or result["epoch"] >= self.epochs:
            return TrialScheduler.CONTINUE
        if not math.isfinite(result["best"]):  # NaN is below no threshold: ASHA would let it go on
            return TrialScheduler.STOP if result["epoch"] >= self.grace else TrialScheduler.CONTINUE
        return str(super().on_trial_result(controller, trial, result))  # type: ignore[misc]

    def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Pass the result to the scheduler, unless it is a seed's."""
        if trial.config[NUMBER] >= self.seeds:
            super().on_trial_complete(controller, trial, result)  # type: ignore[misc]


class SparedASHA(BaselineMixin, ASHAScheduler):
    """Asynchronous successive halving (Li et al. 2020), which spares the seeds."""


def scheduler(recipe: Recipe) -> TrialScheduler:
    """The scheduler that stops trials early, or one that stops none."""
    settings = recipe.tune
    if settings.method not in ("asha", "tpe"):
        return FIFOScheduler()  # type: ignore[no-untyped-call]
    asha = SparedASHA(
        time_attr="epoch",
        max_t=recipe.train.epochs,
        grace_period=settings.grace_epochs,
        reduction_factor=settings.reduction_factor,
    )
    asha.seeds, asha.epochs, asha.grace = settings.baseline_seeds, recipe.train.epochs, settings.grace_epochs
    return asha


class Sampler(OptunaSearch):
    """Optuna's TPE (Bergstra et al. 2011) over our domains; the seeds come first, and it does not learn from them."""

    def __init__(self, space: Space, recipe: Recipe) -> None:
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        def distribution(domain: Domain) -> Any:
            if domain.kind == "choice":
                # By index: Optuna's categories may not be lists.
                return CategoricalDistribution(list(range(len(domain.choices))))
            if domain.kind == "randint":
                return IntDistribution(int(domain.low), int(domain.high))
            step = domain.step if domain.kind == "quniform" else None
            return FloatDistribution(domain.low, domain.high, log=domain.kind == "loguniform", step=step)

        super().__init__(
            space={name: distribution(domain) for name, domain in space.items()},
            metric="best",
            mode="min" if recipe.train.monitor in LOWER_IS_BETTER else "max",
            seed=recipe.sampler.seed,
        )
        self._domains, self._seeds, self._suggested = space, recipe.tune.baseline_seeds, 0
        self._seed_ids: set[str] = set()

    def suggest(self, trial_id: str) -> Point | None:
        """The next seed, or the next point."""
        number, self._suggested = self._suggested, self._suggested + 1
        if number < self._seeds:
            self._seed_ids.add(trial_id)
            return {NUMBER: number, **dict.fromkeys(self._domains)}
        values = super().suggest(trial_id) or {}
        point = {
            name: domain.choices[values[name]] if domain.kind == "choice" else domain.snap(values[name])
            for name, domain in self._domains.items()
        }
        return {NUMBER: number, **point}

    def on_trial_result(self, trial_id: str, result: Point) -> None:
        """Nothing: TPE learns from finished trials only."""

    def on_trial_complete(self, trial_id: str, result: Point | None = None, error: bool = False) -> None:
        """Learn from the best metric of a trial, stopped early or not."""
        if trial_id not in self._seed_ids:
            failed = error or not math.isfinite((result or {}).get("best", math.nan))
            super().on_trial_complete(trial_id, None if failed else result, failed)
