"""Calibrators, fitted on validation scores, and the correction of probabilities for another prevalence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Discriminator
from scipy.special import expit, logit

from cxrscale.evaluation.metrics import Estimate, Floats, absent_class, known, undefined
from cxrscale.types import probabilities_of


@dataclass(frozen=True, slots=True)
class Unchanged:
    """No calibration."""

    reason: str = ""
    """Why there is none where the rule asks for one."""
    kind: Literal["none"] = "none"

    def apply(self, logit_N: npt.ArrayLike) -> Floats:
        """(N,) the model's own probabilities."""
        return probabilities_of(logit_N)


@dataclass(frozen=True, slots=True)
class Platt:
    """sigmoid(slope x logit + offset) (Platt 1999)."""

    slope: float
    """At least 0, so that images keep their order; 0 where higher scores are not more likely to be positive."""
    offset: float
    kind: Literal["platt"] = "platt"

    def apply(self, logit_N: npt.ArrayLike) -> Floats:
        """(N,) calibrated probabilities."""
        return probabilities_of(self.slope * np.asarray(logit_N, dtype=np.float64) + self.offset)


@dataclass(frozen=True, slots=True)
class Temperature:
    """sigmoid(logit / temperature) (Guo et al. 2017); above 1 it corrects an overconfident model."""

    temperature: float
    kind: Literal["temperature"] = "temperature"

    def apply(self, logit_N: npt.ArrayLike) -> Floats:
        """(N,) calibrated probabilities."""
        return probabilities_of(np.asarray(logit_N, dtype=np.float64) / self.temperature)


@dataclass(frozen=True, slots=True)
class Isotonic:
    """Isotonic regression, linear between its knots (Zadrozny & Elkan 2002). It produces ties, 0 and 1."""

    score: tuple[float, ...]
    """The model's own probabilities at the knots."""
    probability: tuple[float, ...]
    kind: Literal["isotonic"] = "isotonic"

    def apply(self, logit_N: npt.ArrayLike) -> Floats:
        """(N,) calibrated probabilities."""
        return np.asarray(np.interp(probabilities_of(logit_N), self.score, self.probability))


@dataclass(frozen=True, slots=True)
class PriorShift:
    """Corrects probabilities that are calibrated for one prevalence to another one."""

    source: float
    """Share of images with the finding in the data that the scores are calibrated on, in 0..1."""
    target: float
    """Share in the data that they are used on."""

    def apply(self, score_N: npt.ArrayLike) -> Floats:
        """(N,) probabilities under the target's prevalence.

        Each class's odds are multiplied by new / old prior (Elkan 2001, theorem 2; Saerens, Latinne & Decaestecker
        2002, equation 2.4). Correct if only the prevalence differs, not how the finding looks. The order stays.
        """
        score = np.asarray(score_N, dtype=np.float64)
        present = score * (self.target / self.source)
        return np.asarray(present / (present + (1 - score) * ((1 - self.target) / (1 - self.source))))


Calibrator = Annotated[Unchanged | Platt | Temperature | Isotonic, Discriminator("kind")]
"""What `fit` returns; thresholds.json holds one per finding, its class by `kind`."""


def fit(kind: str, logit_N: npt.ArrayLike, label_N: npt.ArrayLike) -> Calibrator:
    """A calibrator fitted on validation scores; NaN labels are left out.

    Args:
        kind: none, platt, temperature or isotonic.
        logit_N: the model's logits.

    Where nothing can be fitted it is `Unchanged` with the reason: a class is absent, or no temperature is the most
    likely one.
    """
    assert kind in ("none", "platt", "temperature", "isotonic"), kind
    logits, label = known(logit_N, label_N)
    reason = absent_class(label)
    if kind == "none" or reason:
        return Unchanged(f"{reason} in validation" if reason and kind != "none" else "")
    if kind == "isotonic":
        # Not above: it takes half a second, and what is fitted already is applied without it.
        from sklearn.isotonic import IsotonicRegression

        fitted = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip").fit(probabilities_of(logits), label)
        return Isotonic(tuple(fitted.X_thresholds_.tolist()), tuple(fitted.y_thresholds_.tolist()))
    return _platt(logits, label) if kind == "platt" else _temperature(logits, label)


def estimate_prior(score_N: npt.ArrayLike, source: float, tolerance: float = 1e-9, max_steps: int = 20_000) -> Estimate:
    """The share of images with the finding among unlabeled ones, by expectation maximization from their scores.

    Saerens, Latinne & Decaestecker 2002, equation 2.9: correct the scores to the current prior and take their mean as
    the next prior, until it converges. The likelihood has one maximum.

    Args:
        score_N: probabilities calibrated for prevalence `source`; from others the estimate is meaningless.
        source: prevalence in the data that the calibration was fitted on, in 0..1.

    NaN with the reason where there are no scores or the source has only one class.
    """
    score = np.asarray(score_N, dtype=np.float64)
    if not len(score):
        return undefined("no score")
    if not 0 < source < 1:
        return undefined("one class only where the scores were calibrated")
    prior = source
    for _ in range(max_steps):
        update = float(PriorShift(source, prior).apply(score).mean())
        change, prior = abs(update - prior), update
        if not 0 < prior < 1:
            break
        if change < tolerance:
            return Estimate(prior)
    return Estimate(prior, reason=f"not converged after {max_steps} steps" if 0 < prior < 1 else "one class left")


def _platt(logits: Floats, label: Floats) -> Platt:
    """Maximum likelihood with Platt's targets, (p + 1) / (p + 2) and 1 / (n + 2), which keep a separable fit finite."""
    positives = float((label == 1).sum())
    target = np.where(label == 1, (positives + 1) / (positives + 2), 1 / (len(label) - positives + 2))

    def loss(parameters: Floats) -> tuple[float, Floats]:
        z = parameters[0] * logits + parameters[1]
        error = expit(z) - target
        nll = float((np.logaddexp(0, z) - target * z).mean())
        return nll, np.array([(error * logits).mean(), error.mean()])

    start = np.array([0.0, float(logit(target.mean()))])
    from scipy.optimize import minimize  # a quarter of a second, which whoever applies a calibrator need not wait

    result = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[(0, None), (None, None)], tol=1e-12)
    return Platt(float(result.x[0]), float(result.x[1]))


def _temperature(logits: Floats, label: Floats) -> Temperature | Unchanged:
    """Maximum likelihood: the slope 1 / temperature at which the derivative, which rises with it, is 0."""
    sign = 2 * label - 1

    def derivative(slope: float) -> float:
        return float(-(sign * logits * expit(-sign * slope * logits)).mean())

    if derivative(0.0) >= 0:
        return Unchanged("in validation higher scores are not more likely to be positive: no temperature is best")
    if (sign * logits >= 0).all():
        return Unchanged(
            "the sign of the logit tells the classes apart in validation: the lower the temperature, the likelier"
        )
    # Slopes in units of the logits' own size, whatever that is.
    unit = 1 / float(np.abs(logits).mean())
    low, high = unit, unit
    while derivative(low) >= 0:
        low /= 4
    while derivative(high) <= 0:
        high *= 4
    from scipy.optimize import brentq

    return Temperature(1 / float(brentq(derivative, low, high, xtol=1e-300, rtol=1e-12)))
