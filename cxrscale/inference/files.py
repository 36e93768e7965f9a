"""Predictions of any number of files, into a folder: one row for each, interrupted and resumed at will."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from cxrscale.inference import dicom_objects, overlay
from cxrscale.inference.formats import FORMATS, check_format, write_predictions
from cxrscale.inference.journal import Journal
from cxrscale.inference.objects import Drafter, write_object
from cxrscale.inference.prediction import Prediction
from cxrscale.inference.streaming import GroupPredictor
from cxrscale.io import lease

OnPrediction = Callable[[Prediction], None]


@dataclass(frozen=True, slots=True)
class FilePredictions:
    """What became of the inputs."""

    address: str
    """Of the file of predictions."""
    read: int
    not_read: int
    """Inputs that could not be read; their rows say why."""
    unreachable: int
    """Those of them that could not be reached: the same command tries them again."""
    resumed: int
    """Inputs that an earlier command, which was interrupted, has predicted."""
    objects: int = 0
    """Images that have a DICOM object beside the file, where the format is one of these."""
    empty_masks: int = 0
    """Those of them with an empty mask: their object is a report instead of a segmentation."""
    without_object: int = 0
    """Images that were predicted and lack an object or overlay; their rows say why."""


def predict_files(
    predictor: GroupPredictor,
    paths: Sequence[str],
    out: str,
    kind: str = "json",
    on_prediction: OnPrediction | None = None,
    *,
    overlays: bool = False,
    drafters: Mapping[str, Drafter] | None = None,
) -> FilePredictions:
    """Predict files and write `out`/predictions.json (or .csv, .parquet, submission.csv).

    What is done is kept in `out`/parts, some 256 predictions at a time and at a Ctrl-C, until the file is written; the
    same call resumes there.

    Args:
        predictor: a `Predictor`, a `GatedPredictor`, or a `ClusterPredictor` of either.
        paths: local paths or addresses; each once.
        out: a folder or address, made where it is not there.
        kind: json, csv, parquet, rle, or one of `dicom_objects.KINDS`: these write an object per image into
            `out`/objects too, and predictions.json, whose rows name it.
        on_prediction: called with each new prediction.
        overlays: also draw an overlay per image into `out`/objects; with a heat map where the predictor gives `maps`.
        drafters: more files per image, by the key under which its row names them.

    Raises:
        UserError: no such format, or the folder holds predictions of another run.
        BusyError: another process writes this folder.
    """
    check_format(kind, predictor.provenance)
    drafters = dict(drafters or {})
    if FORMATS[kind].objects:
        drafters[kind] = dicom_objects.drafter(kind, predictor.provenance)
    if overlays:
        drafters[overlay.KIND] = overlay.overlay_drafter(predictor.provenance)
    with lease.held(out, f"the folder of predictions {out}"):
        journal = Journal(out, predictor.provenance, tuple(drafters))
        done = journal.done
        todo = [path for path in paths if path not in done]
        try:
            # By whole groups: what is left then falls into the same batches as if nothing had stopped it.
            for predicted in predictor.groups(todo):
                # Before their rows: no row names an object that is not there.
                group = [_with_objects(out, one, drafters) for one in predicted]
                journal.add(group)
                if on_prediction is not None:
                    for prediction in group:
                        on_prediction(prediction)
        finally:
            journal.flush()
        counted = _Counted(journal.newest(paths), tuple(drafters))
        journal.own()
        address = write_predictions(out, kind, counted, predictor.provenance)
        # Else the parts are kept, so that the same call tries only what could not be reached.
        if not counted.unreachable:
            journal.remove()
    return counted.result(address, resumed=len(paths) - len(todo))


def _with_objects(out: str, prediction: Prediction, drafters: Mapping[str, Drafter]) -> Prediction:
    """The prediction, with the files of its image written and named; its maps are not needed any more."""
    for kind, draft in drafters.items():
        prediction = write_object(out, kind, prediction, draft)
    return replace(prediction, maps={}) if prediction.maps else prediction


class _Counted:
    """Predictions, counted as they pass."""

    def __init__(self, rows: Iterator[Prediction], kinds: Sequence[str]) -> None:
        self._rows, self._kinds = rows, kinds
        self.read, self.not_read, self.unreachable = 0, 0, 0
        self.objects, self.empty_masks, self.without_object = 0, 0, 0

    def result(self, address: str, resumed: int) -> FilePredictions:
        """The counts, once all have passed."""
        return FilePredictions(
            address,
            self.read,
            self.not_read,
            self.unreachable,
            resumed,
            self.objects,
            self.empty_masks,
            self.without_object,
        )

    def __iter__(self) -> Iterator[Prediction]:
        for one in self._rows:
            self.read += not one.error
            self.not_read += bool(one.error)
            self.unreachable += one.unreachable
            self.objects += any(kind in dicom_objects.KINDS for kind in one.objects if kind in self._kinds)
            segmentation = one.objects.get(dicom_objects.SEG, "") if dicom_objects.SEG in self._kinds else ""
            self.empty_masks += segmentation.endswith(dicom_objects.EMPTY_MASK_SUFFIX)
            self.without_object += any(kind in one.object_errors for kind in self._kinds)
            yield one
