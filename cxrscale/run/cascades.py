"""A classifier before a segmenter: chosen on validation, measured on the test split."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np

from cxrscale.evaluation import (
    CASCADE,
    CASCADE_METRICS,
    DEFAULT_MASK_RULE,
    Cascade,
    CascadeTest,
    MaskRule,
    artifacts,
    calls,
    cascade,
    comparison,
    metrics,
    summary,
)
from cxrscale.evaluation.metrics import Floats
from cxrscale.io import storage, write_artifact
from cxrscale.run.trained_run import RESAMPLES, Progress, Run
from cxrscale.types import ScoreHistograms, Scores, UserError


def choose_cascade(
    segmenter: Run | str | Path, gate: Run | str | Path, resamples: int = RESAMPLES, progress: Progress | None = None
) -> Cascade:
    """Choose the gate's threshold and the segmenter's mask rule together on validation; writes cascade.json.

    What is chosen has the highest mean Dice over all validation images.

    Args:
        segmenter: the run whose masks are wanted; it keeps the file.
        gate: a classifier of the same finding with thresholds of its own, for their calibration.
        resamples: bootstrap resamples of the patients.

    Raises:
        UserError: the runs do not fit, or are not of the same images; the gate has no thresholds.
    """
    pair = Pair(segmenter, gate)
    scores, gate_N, maps = pair.split("val", progress)
    threshold, rule = cascade.search_cascade(maps, gate_N)
    weights_RN = metrics.bootstrap_weights(scores.patient, resamples, seed=0)
    alone = pair.segmenter_rule()
    summary.refuse_other_size(alone, maps)
    chosen = Cascade(
        **pair.rule(threshold, rule),
        gate_thresholds=pair.gate_thresholds,
        images=len(scores.image_id),
        patients=len(set(scores.patient.tolist())),
        validation=cascade.evaluate_cascade(maps, rule, alone, gate_N >= threshold, weights_RN),
    )
    write_artifact(pair.segmenter.artifact(CASCADE), chosen)
    return chosen


def evaluate_cascade(
    segmenter: Run | str | Path, gate: Run | str | Path, resamples: int = RESAMPLES, progress: Progress | None = None
) -> CascadeTest:
    """A segmenter behind a classifier against the segmenter alone on the test split; writes cascade_metrics.json.

    Threshold and mask rule are those of cascade.json where it is of these weights, else each run's own.

    Raises:
        UserError: the runs do not fit, or are not of the same images; the gate has no threshold for the finding.
    """
    from cxrscale.inference import read_cascade

    pair = Pair(segmenter, gate)
    scores, gate_N, maps = pair.split("test", progress)
    chosen = read_cascade(pair.segmenter.path, *pair.digests, pair.gate_thresholds)
    alone = pair.segmenter_rule()
    threshold, rule = (pair.gate_threshold(), alone) if chosen is None else (chosen.threshold, chosen.mask_rule)
    for one in (alone, rule):
        summary.refuse_other_size(one, maps)
    weights_RN = metrics.bootstrap_weights(scores.patient, resamples, seed=0)
    test = CascadeTest(
        **pair.rule(threshold, rule),
        chosen_together=chosen is not None,
        images=len(scores.image_id),
        patients=len(set(scores.patient.tolist())),
        resamples=resamples,
        test=cascade.evaluate_cascade(maps, rule, alone, gate_N >= threshold, weights_RN),
    )
    write_artifact(pair.segmenter.artifact(CASCADE_METRICS), test)
    return test


class Pair:
    """A segmenter and its gate."""

    def __init__(self, segmenter: Run | str | Path, gate: Run | str | Path) -> None:
        self.segmenter, self.gate = (one if isinstance(one, Run) else Run(one) for one in (segmenter, gate))
        self.finding = cascade.common_finding(
            (self.segmenter.path, self.segmenter.recipe.data), (self.gate.path, self.gate.recipe.data)
        )

    def split(self, name: str, progress: Progress | None) -> tuple[Scores, Floats, ScoreHistograms]:
        """The segmenter's scores of a split, the gate's final probabilities of the same images, and the maps."""
        scores, judged = self.segmenter.predictions(name, progress), self.gate.predictions(name, progress)
        metrics.require(scores, self.segmenter.path)
        row_N = comparison.rows_in_b(scores, judged, (self.segmenter.name, self.gate.name))
        called = calls.call_split(judged.logit_NF, judged.findings, self.gate.thresholds())
        assert scores.maps is not None
        return scores, np.asarray(called.probability_NF[row_N, judged.findings.index(self.finding)]), scores.maps

    @cached_property
    def digests(self) -> tuple[str, str]:
        """Of the weights of segmenter and gate."""
        from cxrscale.training import run_files

        first, second = (
            storage.digest(storage.read(run_files.weights_file(run.path))) for run in (self.segmenter, self.gate)
        )
        return first, second

    @cached_property
    def gate_thresholds(self) -> str:
        """Digest of the gate's thresholds.json."""
        return storage.digest(storage.read(self.gate.artifact(artifacts.THRESHOLDS)))

    def rule(self, threshold: float, mask_rule: MaskRule) -> dict[str, object]:
        """What decides, as the fields of an artifact."""
        sides = (
            artifacts.ComparedRun(name=run.name, run=run.path, checkpoint=digest)
            for run, digest in zip((self.segmenter, self.gate), self.digests, strict=True)
        )
        of_segmenter, of_gate = sides
        return {
            "segmenter": of_segmenter,
            "gate": of_gate,
            "finding": self.finding,
            "threshold": threshold,
            "mask_rule": mask_rule,
        }

    def decision(self) -> tuple[float, MaskRule]:
        """The gate's threshold and the mask rule behind it: chosen together for these weights, or each run's own.

        Raises:
            UserError: nothing was chosen together, and the gate has no threshold.
        """
        from cxrscale.inference import read_cascade

        chosen = read_cascade(self.segmenter.path, *self.digests, self.gate_thresholds)
        return (
            (self.gate_threshold(), self.segmenter_rule()) if chosen is None else (chosen.threshold, chosen.mask_rule)
        )

    def segmenter_rule(self) -> MaskRule:
        """The mask rule of the segmenter alone."""
        return self.rule_of(self.segmenter)

    @staticmethod
    def rule_of(segmenter: Run) -> MaskRule:
        """A segmenter's own mask rule; 0.5 where it has none."""
        stored = storage.exists(segmenter.artifact(artifacts.THRESHOLDS))
        return (segmenter.thresholds().mask_rule if stored else None) or DEFAULT_MASK_RULE

    def gate_threshold(self) -> float:
        """The gate's own threshold.

        Raises:
            UserError: it has none.
        """
        estimate = self.gate.thresholds().thresholds[self.finding].threshold
        if not estimate.defined:
            raise UserError(f"{self.gate.path} has no threshold for {self.finding}: {estimate.reason}")
        return estimate.value
