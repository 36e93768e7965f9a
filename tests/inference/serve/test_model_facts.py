"""What a page says of a model. Milliseconds."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from cxrscale.config import Threshold
from cxrscale.evaluation import Thresholds
from cxrscale.evaluation.metrics import AtThreshold, at_threshold
from cxrscale.inference.serve import model_facts


def stored(rule: Threshold, prevalence: float) -> Thresholds:
    """Of one finding, with no more than is asked for."""
    return cast(Thresholds, SimpleNamespace(rule=rule, calibration={"Mass": SimpleNamespace(prevalence=prevalence)}))


@pytest.fixture(scope="module")
def at() -> AtThreshold:
    """8 of 10 found, 10 of 90 called although absent."""
    score_N = np.r_[np.ones(8), np.zeros(2), np.ones(10), np.zeros(80)]
    return at_threshold(score_N, np.r_[np.ones(10), np.zeros(90)], 0.5)


def test_the_predictive_value_is_that_of_validation_or_of_the_prior(at: AtThreshold) -> None:
    assert model_facts.predictive_value(stored(Threshold(), 0.1), "Mass", at) == (8 / 18, 0.1)
    known = Threshold(calibration="isotonic", prior_shift="known", priors={"Mass": 0.01})
    value, prevalence = model_facts.predictive_value(stored(known, 0.1), "Mass", at)
    assert prevalence == 0.01
    assert value == pytest.approx(0.8 * 0.01 / (0.8 * 0.01 + (10 / 90) * 0.99))


def test_without_a_threshold_there_is_none() -> None:
    value, prevalence = model_facts.predictive_value(stored(Threshold(), 0.1), "Mass", None)
    assert math.isnan(value)
    assert prevalence == 0.1
