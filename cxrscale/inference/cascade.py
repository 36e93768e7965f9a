"""A cascade: a classifier decides which images a segmenter sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cxrscale.evaluation import CASCADE, Cascade, cascade
from cxrscale.inference.prediction import Gate, Prediction, Provenance
from cxrscale.inference.predictor import Predictor
from cxrscale.inference.stored_images import Pixels
from cxrscale.inference.streaming import ImagePredictor, Prepared
from cxrscale.io import read_artifact, rle_masks, storage
from cxrscale.types import UserError


class GatedPredictor(ImagePredictor):
    """Two runs, loaded once: only what the classifier calls positive goes to the segmenter.

    predictor = GatedPredictor("runs/siim-unet", "runs/siim-classifier")
    predictor("a.dcm").gate_call, predictor("a.dcm").mask_rle
    """

    def __init__(
        self, segmenter: str | Path, gate: str | Path, device: str | None = None, *, maps: bool = False
    ) -> None:
        """Load both runs' best checkpoints.

        Threshold and mask rule are those of the segmenter's cascade.json, where `cxrscale threshold SEGMENTER --gate
        GATE` has chosen them together for these weights; else each run's own.

        Args:
            maps: give each prediction that the segmenter made its `Prediction.maps`.

        Raises:
            UserError: as `Predictor`; the runs do not fit, or the gate has no threshold.
        """
        self._gate, self._segmenter = Predictor(gate, device), Predictor(segmenter, device, maps=maps)
        about = self._gate.provenance
        finding = cascade.common_finding(
            (self._segmenter.provenance.run, self._segmenter.recipe.data), (about.run, about.recipe.data)
        )
        chosen = read_cascade(str(segmenter), self._segmenter.provenance.checkpoint, about.checkpoint, about.thresholds)
        again = f"`cxrscale threshold {segmenter} --gate {gate}` chooses them together"
        self._notes = () if chosen is not None else (f"each run's own threshold and mask rule; {again}",)
        threshold = about.threshold.get(finding) if chosen is None else chosen.threshold
        if threshold is None:
            raise UserError(f"{gate} has no threshold for {finding}; run `cxrscale threshold {gate}`")
        if chosen is not None:
            self._segmenter.mask_rule = chosen.mask_rule
        self._about = Gate(
            run=about.run,
            checkpoint=about.checkpoint,
            thresholds=about.thresholds,
            finding=finding,
            threshold=threshold,
            mask_rule=self._segmenter.mask_rule,
        )

    @property
    def provenance(self) -> Provenance:
        """That of the segmenter, with the gate."""
        alone = self._segmenter.provenance
        return alone.model_copy(update={"gate": self._about, "notes": (*alone.notes, *self._notes)})

    @property
    def stores(self) -> tuple[Pixels, ...]:
        """Those of the gate and of the segmenter."""
        return *self._gate.stores, *self._segmenter.stores

    def predict_prepared(self, batch: Sequence[Prepared]) -> list[Prediction]:
        judged = self._gate.predict_stored([one.prediction for one in batch], [one.stored[0] for one in batch])
        named = [
            one if one.error else self._decided(before.prediction, one)
            for before, one in zip(batch, judged, strict=True)
        ]
        passed = [index for index, one in enumerate(named) if one.gate_call]
        masks = self._segmenter.predict_stored(
            [named[index] for index in passed], [batch[index].stored[1] for index in passed]
        )
        for index, prediction in zip(passed, masks, strict=True):
            named[index] = prediction
        return named

    def _decided(self, known: Prediction, judged: Prediction) -> Prediction:
        """What is known of an image after the classifier: where it is negative, that is all."""
        probability = judged.probabilities[self._about.finding]
        known = replace(known, warnings=judged.warnings, ood_distance=judged.ood_distance, gray=judged.gray)
        known = replace(known, gate={self._about.finding: probability}, gate_call=probability >= self._about.threshold)
        if known.gate_call:
            return known
        area_mm2 = None if known.spacing_mm is None else 0.0
        absent = dict.fromkeys(self.findings, False)
        return replace(known, calls=absent, mask_rle=rle_masks.EMPTY, mask_area=0, mask_area_mm2=area_mm2)


def read_cascade(segmenter: str, digest: str, gate_digest: str, gate_thresholds: str) -> Cascade | None:
    """The segmenter's cascade.json; None where there is none, or it is of other weights or calibration than these.

    Args:
        digest: of the segmenter's weights.
        gate_digest: of the gate's.
        gate_thresholds: of the gate's thresholds.json.

    Raises:
        UserError: it is damaged or of another version.
    """
    address = storage.join(segmenter, CASCADE)
    if not storage.exists(address):
        return None
    stored = read_artifact(Cascade, address, f"run `cxrscale threshold {segmenter} --gate GATE` again")
    same = (stored.segmenter.checkpoint, stored.gate.checkpoint) == (digest, gate_digest)
    return stored if same and stored.gate_thresholds in ("", gate_thresholds) else None
