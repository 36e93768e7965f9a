"""Which point comes next, and which trial goes on: Ray Tune's schedulers and Optuna's sampler over our domains."""

from __future__ import annotations

import math
import random
from functools import partial
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from cxrscale.config import LOWER_IS_BETTER, Recipe
from cxrscale.tuning.search_space import Domain, Point, Space
from cxrscale.tuning.trial import NUMBER


class BaselineMixin:
    """Mixed into a scheduler: the seeds' trainings of the unchanged recipe run to their ends, and decide nothing.

    Nor is a trial stopped or given other weights after its last epoch: it is about to end with all that a run leaves.
    """

    seeds: int
    epochs: int

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Go on with a seed, or at the end; else ask the scheduler."""
        if trial.config[NUMBER] < self.seeds or result["epoch"] >= self.epochs:
            return TrialScheduler.CONTINUE
        return str(super().on_trial_result(controller, trial, result))  # type: ignore[misc]

    def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Tell the scheduler, unless it was a seed."""
        if trial.config[NUMBER] >= self.seeds:
            super().on_trial_complete(controller, trial, result)  # type: ignore[misc]


class SparedASHA(BaselineMixin, ASHAScheduler):
    """Asynchronous successive halving (Li et al. 2020), which spares the seeds."""


class SparedPBT(BaselineMixin, PopulationBasedTraining):
    """Population based training (Jaderberg et al. 2017), which spares the seeds."""

    def _get_new_config(self, trial: Any, trial_to_clone: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        # Ray copies the whole configuration of the better trial: the number, and so the folder, stays the trial's own.
        settings, operations = super()._get_new_config(trial, trial_to_clone)
        return {**settings, NUMBER: trial.config[NUMBER]}, operations


def scheduler(space: Space, recipe: Recipe) -> TrialScheduler:
    """What stops trials, or moves weights between them."""
    settings = recipe.tune
    found: SparedASHA | SparedPBT
    if settings.method in ("asha", "tpe"):
        found = SparedASHA(
            time_attr="epoch",
            max_t=recipe.train.epochs,
            grace_period=settings.grace_epochs,
            reduction_factor=settings.reduction_factor,
        )
    elif settings.method == "pbt":
        found = SparedPBT(
            time_attr="epoch",
            perturbation_interval=settings.grace_epochs,
            hyperparam_mutations={name: _mutation(domain) for name, domain in space.items()},
            custom_explore_fn=partial(_snapped, space=space),
            log_config=False,
        )
    else:
        return FIFOScheduler()  # type: ignore[no-untyped-call]
    found.seeds, found.epochs = settings.baseline_seeds, recipe.train.epochs
    return found


def _mutation(domain: Domain) -> Any:
    return list(domain.choices) if domain.kind == "choice" else partial(_sampled, domain)


def _sampled(domain: Domain) -> Any:
    return domain.at(random.random())


def _snapped(config: dict[str, Any], space: Space) -> dict[str, Any]:
    return {name: space[name].fit(value) if name in space else value for name, value in config.items()}


class Sampler(OptunaSearch):
    """Optuna's TPE (Bergstra et al. 2011) over our domains; first come the seeds, of which it learns nothing."""

    def __init__(self, space: Space, recipe: Recipe) -> None:
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        def distribution(domain: Domain) -> Any:
            if domain.kind == "choice":
                # By place: Optuna's categories may not be lists.
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
        self._domains, self._seeds, self._given = space, recipe.tune.baseline_seeds, 0
        self._spared: set[str] = set()

    def suggest(self, trial_id: str) -> Point | None:
        """The next seed, or the next point."""
        number, self._given = self._given, self._given + 1
        if number < self._seeds:
            self._spared.add(trial_id)
            return {NUMBER: number, **dict.fromkeys(self._domains)}
        found = super().suggest(trial_id) or {}
        point = {
            name: domain.choices[found[name]] if domain.kind == "choice" else domain.fit(found[name])
            for name, domain in self._domains.items()
        }
        return {NUMBER: number, **point}

    def on_trial_result(self, trial_id: str, result: Point) -> None:
        """Nothing: TPE learns from ends alone."""

    def on_trial_complete(self, trial_id: str, result: Point | None = None, error: bool = False) -> None:
        """Learn from the best metric of a trial, stopped early or not."""
        if trial_id not in self._spared:
            failed = error or not math.isfinite((result or {}).get("best", math.nan))
            super().on_trial_complete(trial_id, None if failed else result, failed)
