"""The loop's pure parts."""

import math

import numpy as np
import pytest

from cxrscale import config
from cxrscale.checkpoint import Progress
from cxrscale.config import Optim, Recipe
from cxrscale.optimizer import learning_rate
from cxrscale.schema import InputError
from cxrscale.splits import refuse_leaks
from cxrscale.train import advance


def resolve(*overrides: str) -> Recipe:
    return config.parse(Recipe, config.override({}, overrides), where="test")


def test_warm_up_then_cosine_to_nothing() -> None:
    optim = Optim(lr=1.0, schedule="cosine", warmup_steps=4)
    rates = [learning_rate(optim, step, total=104) for step in range(105)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[54] == pytest.approx(0.5)
    assert rates[104] == pytest.approx(0.0)


def test_the_rate_falls_tenfold_at_a_plateau_and_the_best_is_kept() -> None:
    recipe = resolve("optim.schedule=plateau", "train.metric=loss")
    progress = Progress()
    improved = [advance(progress, {"loss": loss}, recipe) for loss in (1.0, 0.8, 0.9, 0.7, 0.7)]
    assert improved == [True, True, False, True, False]
    assert progress.best == 0.7
    assert progress.rate_scale == pytest.approx(0.01)
    assert progress.bad_epochs == 1


def test_an_undefined_metric_never_is_the_best_but_the_first_epoch_is_kept() -> None:
    recipe = resolve()
    progress = Progress()
    assert advance(progress, {"auroc": math.nan}, recipe)
    assert not advance(progress, {"auroc": math.nan}, recipe)
    assert advance(progress, {"auroc": 0.6}, recipe)
    assert not advance(progress, {"auroc": math.nan}, recipe)
    assert progress.best == 0.6


def refuse(patients: list[str], split: list[str], *overrides: str) -> None:
    refuse_leaks(np.array(split, dtype=object), patients, resolve(*overrides).data)


def test_a_patient_in_two_splits_is_refused_unless_allowed() -> None:
    with pytest.raises(
        InputError, match=r"1 patients stand in more than one of train, val and test, e\.g\. a; .*data.allow_leaks=true"
    ):
        refuse(["a", "b", "a"], ["train", "train", "test"])
    refuse(["a", "b", "a"], ["train", "train", "test"], "data.allow_leaks=true")
    refuse(["a", "b", "a"], ["train", "test", "train"])
    # Splits that the recipe does not use are none of its business.
    refuse(["a", "a"], ["train", "fold9"])
    # Nor is it a leak that folds trained on together share a patient; that training and validation are one is.
    folds = ["a", "a", "b"], ["fold1", "fold2", "fold0"]
    several = ("data.train_split=[fold1, fold2]", "data.val_split=fold0", "data.test_split=none")
    refuse(*folds, *several)
    with pytest.raises(InputError, match="1 patients stand"):
        refuse(*folds, *several, "data.val_split=fold2")
