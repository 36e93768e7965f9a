"""From scores to probabilities that come true: calibrators fitted on validation scores, and another prevalence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit, logit
from sklearn.isotonic import IsotonicRegression

from cxrscale.evaluation.metrics import Estimate, Floats, absent_class, known, undefined
from cxrscale.types import UserError

EDGE = 1e-7
"""Scores are held this far from 0 and 1 before their logit is taken: a float32 sigmoid reaches both."""


@dataclass(frozen=True, slots=True)
class Unchanged:
    """No calibration, and why where one was asked for."""

    kind: ClassVar[str] = "none"
    reason: str = ""

    def apply(self, score_N: npt.ArrayLike) -> Floats:
        """(N,) the same probabilities."""
        return np.asarray(score_N, dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Platt:
    """sigmoid(slope x logit + offset) (Platt 1999)."""

    kind: ClassVar[str] = "platt"
    slope: float
    """At least 0: images keep their order. 0 where higher scores are no likelier to be positive."""
    offset: float

    def apply(self, score_N: npt.ArrayLike) -> Floats:
        """(N,) calibrated probabilities."""
        return np.asarray(expit(self.slope * _logit(score_N) + self.offset), dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Temperature:
    """sigmoid(logit / temperature) (Guo et al. 2017); above 1 it makes an overconfident model humbler."""

    kind: ClassVar[str] = "temperature"
    temperature: float

    def apply(self, score_N: npt.ArrayLike) -> Floats:
        """(N,) calibrated probabilities."""
        return np.asarray(expit(_logit(score_N) / self.temperature), dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Isotonic:
    """The best rising step line, straight between its knots (Zadrozny & Elkan 2002). It makes ties, 0 and 1."""

    kind: ClassVar[str] = "isotonic"
    score: tuple[float, ...]
    probability: tuple[float, ...]

    def apply(self, score_N: npt.ArrayLike) -> Floats:
        """(N,) calibrated probabilities."""
        return np.asarray(np.interp(np.asarray(score_N, dtype=np.float64), self.score, self.probability))


@dataclass(frozen=True, slots=True)
class PriorShift:
    """From the prevalence that the scores were calibrated for to another one."""

    kind: ClassVar[str] = "prior_shift"
    source: float
    """Share of images with the finding where the scores are calibrated, in 0..1."""
    target: float
    """Share where they are used."""

    def apply(self, score_N: npt.ArrayLike) -> Floats:
        """(N,) probabilities under the target's prevalence.

        Each class's odds are multiplied by new / old prior (Elkan 2001, theorem 2; Saerens, Latinne & Decaestecker
        2002, equation 2.4). Right if only the prevalence differs, not how the finding looks. The order stays.
        """
        score = np.asarray(score_N, dtype=np.float64)
        present = score * (self.target / self.source)
        return np.asarray(present / (present + (1 - score) * ((1 - self.target) / (1 - self.source))))


Calibrator = Unchanged | Platt | Temperature | Isotonic | PriorShift
KINDS: Mapping[str, Callable[..., Calibrator]] = {
    kind.kind: kind for kind in (Unchanged, Platt, Temperature, Isotonic, PriorShift)
}


def fit(kind: str, score_N: npt.ArrayLike, label_N: npt.ArrayLike) -> Calibrator:
    """A calibrator fitted on validation scores; NaN labels are left out.

    Args:
        kind: none, platt, temperature or isotonic.
        score_N: probabilities in 0..1.

    With a class absent there is nothing to fit: `Unchanged` with the reason.
    """
    assert kind in ("none", "platt", "temperature", "isotonic"), kind
    score, label = known(score_N, label_N)
    reason = absent_class(label)
    if kind == "none" or reason:
        return Unchanged(f"{reason} in validation" if reason and kind != "none" else "")
    if kind == "isotonic":
        line = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip").fit(score, label)
        return Isotonic(tuple(line.X_thresholds_.tolist()), tuple(line.y_thresholds_.tolist()))
    return _platt(score, label) if kind == "platt" else _temperature(score, label)


def plain(calibrator: Calibrator) -> dict[str, Any]:
    """The calibrator as JSON has it."""
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(calibrator).items()}
    return {"kind": calibrator.kind, **values}


def read(found: Mapping[str, Any], where: str = "calibration") -> Calibrator:
    """What `plain` gave.

    Raises:
        UserError: not a calibrator of this version.
    """
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in found.items() if key != "kind"}
    try:
        return KINDS[found["kind"]](**values)
    except (KeyError, TypeError):
        raise UserError(f"{where}: {dict(found)} is no calibrator; run `cxrscale threshold` again") from None


def estimated_prior(score_N: npt.ArrayLike, source: float, tolerance: float = 1e-9, limit: int = 20_000) -> Estimate:
    """The share of images with the finding among unlabeled ones, by expectation maximization from their scores.

    Saerens, Latinne & Decaestecker 2002, equation 2.9: correct the scores to the prior so far, take their mean as the
    next prior, until it moves no more. The likelihood has one maximum.

    Args:
        score_N: probabilities calibrated for prevalence `source`; of scores that are not, it estimates nonsense.
        source: prevalence in the data that the calibration was fitted on, in 0..1.

    NaN with the reason where there are no scores or the source has one class only.
    """
    score = np.asarray(score_N, dtype=np.float64)
    if not len(score):
        return undefined("no score")
    if not 0 < source < 1:
        return undefined("one class only where the scores were calibrated")
    prior = source
    for _ in range(limit):
        after = float(PriorShift(source, prior).apply(score).mean())
        moved, prior = abs(after - prior), after
        if not 0 < prior < 1:
            break
        if moved < tolerance:
            return Estimate(prior)
    return Estimate(prior, reason=f"still moving after {limit} steps" if 0 < prior < 1 else "one class left")


def _platt(score: Floats, label: Floats) -> Platt:
    """Maximum likelihood with Platt's targets, (p + 1) / (p + 2) and 1 / (n + 2), which keep a separable fit finite."""
    value, positives = _logit(score), float((label == 1).sum())
    target = np.where(label == 1, (positives + 1) / (positives + 2), 1 / (len(label) - positives + 2))

    def loss(line: Floats) -> tuple[float, Floats]:
        z = line[0] * value + line[1]
        wrong = expit(z) - target
        nll = float((np.logaddexp(0, z) - target * z).mean())
        return nll, np.array([(wrong * value).mean(), wrong.mean()])

    rate = float(target.mean())
    start = np.array([0.0, float(logit(rate))])
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[(0, None), (None, None)], tol=1e-12)
    return Platt(float(found.x[0]), float(found.x[1]))


def _temperature(score: Floats, label: Floats) -> Temperature:
    """Maximum likelihood over temperatures of 0.01 to 100."""
    value = _logit(score)

    def loss(log_temperature: float) -> float:
        z = value * np.exp(-log_temperature)
        return float((np.logaddexp(0, z) - label * z).mean())

    edge = float(np.log(100))
    found = minimize_scalar(loss, bounds=(-edge, edge), method="bounded", options={"xatol": 1e-8})
    return Temperature(float(np.exp(found.x)))


def _logit(score_N: npt.ArrayLike) -> Floats:
    return np.asarray(logit(np.clip(np.asarray(score_N, dtype=np.float64), EDGE, 1 - EDGE)), dtype=np.float64)
