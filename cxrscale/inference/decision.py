"""What makes calls of a model's scores: a run's stored thresholds, and what its evaluation estimated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from cxrscale.evaluation import TestMetrics, Thresholds, artifacts, calibration, calls
from cxrscale.io import read_artifact, storage
from cxrscale.types import UserError


@dataclass(frozen=True, slots=True)
class Decision:
    """What makes calls of a run's scores."""

    thresholds: Thresholds | None = None
    """None where the run has no thresholds.json."""
    digest: str = ""
    """Of thresholds.json."""
    estimated: Mapping[str, calibration.PriorShift | None] = field(default_factory=dict)
    """With threshold.prior_shift=em: finding -> the correction that `cxrscale evaluate` estimated on the test split."""
    notes: tuple[str, ...] = ()

    def threshold(self) -> dict[str, float]:
        """Finding -> the threshold of its call, where it has one."""
        if self.thresholds is None:
            return {}
        values = {name: chosen.threshold.value for name, chosen in self.thresholds.thresholds.items()}
        return {name: value for name, value in values.items() if math.isfinite(value)}


def stored_thresholds(run: str, digest: str | None = None) -> Thresholds:
    """The run's thresholds.json.

    Args:
        digest: of the run's file of weights, where the caller knows it.

    Raises:
        UserError: there is none, it is damaged or of another version, or the run's weights have changed since.
    """
    path, remedy = storage.join(run, artifacts.THRESHOLDS), f"run `cxrscale threshold {run}`"
    stored = read_artifact(Thresholds, path, remedy)
    if stored.checkpoint == digest:
        return stored
    # Not above: torch comes with it, and an exported model is served without torch.
    from cxrscale.training import run_files

    weights = run_files.weights_file(run)
    if digest or stored.checkpoint != storage.digest(storage.read(weights)):
        raise UserError(f"{path} belongs to other weights than {weights.rpartition('/')[2]}; {remedy} again")
    return stored


def read_test_metrics(run: str) -> TestMetrics | None:
    """The run's test_metrics.json; None before it was evaluated.

    Raises:
        UserError: it is damaged or of another version.
    """
    address, remedy = storage.join(run, artifacts.TEST_METRICS), f"run `cxrscale evaluate {run}`"
    return read_artifact(TestMetrics, address, remedy) if storage.exists(address) else None


def read_decision(run: str, checkpoint_digest: str) -> Decision:
    """The stored thresholds of a run, and what its evaluation estimated.

    Raises:
        UserError: as `stored_thresholds`, but for a run without thresholds.json.
    """
    path, again = storage.join(run, artifacts.THRESHOLDS), f"run `cxrscale evaluate {run}`"
    if not storage.exists(path):
        note = f"no thresholds.json: probabilities are the model's own and no calls; run `cxrscale threshold {run}`"
        return Decision(notes=(note,))
    chosen, digest = stored_thresholds(run, checkpoint_digest), storage.digest(storage.read(path))
    if chosen.rule.prior_shift != "em":
        return Decision(chosen, digest)
    test = read_test_metrics(run)
    if test is None or test.thresholds != digest:
        note = f"not corrected for the prevalence that threshold.prior_shift=em estimates on the test split; {again}"
        return Decision(chosen, digest, notes=(note,))
    return Decision(chosen, digest, calls.estimated_shifts(test))
