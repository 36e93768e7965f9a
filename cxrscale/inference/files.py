"""Predictions of any number of files, into a folder: one row for each, interrupted and resumed at will."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from cxrscale.inference import dicom_objects
from cxrscale.inference.formats import FORMATS, check_format, write_predictions
from cxrscale.inference.journal import Journal
from cxrscale.inference.objects import has_object, write_object
from cxrscale.inference.predictor import Prediction, Predictor
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
    """Images that were predicted and have none; their rows say why."""


def predict_files(
    predictor: Predictor, paths: Sequence[str], out: str, kind: str = "json", on_prediction: OnPrediction | None = None
) -> FilePredictions:
    """Predict files and write `out`/predictions.json (or .csv, .parquet, submission.csv).

    What is done is kept in `out`/parts, 256 predictions at a time and at a Ctrl-C, until the file is written; the same
    call resumes there.

    Args:
        paths: local paths or addresses; each once.
        out: a folder or address, made where it is not there.
        kind: json, csv, parquet, rle, or one of `dicom_objects.KINDS`: these write an object per image into
            `out`/objects too, and predictions.json, whose rows name it.
        on_prediction: called with each new prediction.

    Raises:
        UserError: no such format, or the folder holds unfinished predictions of another run.
        BusyError: another process writes this folder.
    """
    check_format(kind, predictor.provenance)
    draft = dicom_objects.drafter(kind, predictor.provenance) if FORMATS[kind].objects else None
    with lease.held(out, f"the folder of predictions {out}"):
        journal = Journal(out, predictor.provenance)
        rows = (one for one in journal.rows() if not one.unreachable)
        done = {one.path for one in rows if draft is None or has_object(one, kind)}
        todo = [path for path in paths if path not in done]
        try:
            for predicted in predictor.stream(todo):
                # Before its row: no row names an object that is not there.
                prediction = predicted if draft is None else write_object(out, kind, predicted, draft)
                journal.add(prediction)
                if on_prediction is not None:
                    on_prediction(prediction)
        finally:
            journal.flush()
        counted = _Counted(_newest(journal, set(paths)), kind)
        address = write_predictions(out, kind, counted, predictor.provenance)
        # Else the parts are kept, so that the same call tries only what could not be reached.
        if not counted.unreachable:
            journal.remove()
    return FilePredictions(
        address,
        counted.read,
        counted.not_read,
        counted.unreachable,
        len(paths) - len(todo),
        counted.objects,
        counted.empty_masks,
        counted.without_object,
    )


class _Counted:
    """Predictions, counted as they pass."""

    def __init__(self, rows: Iterator[Prediction], kind: str) -> None:
        self._rows, self._kind = rows, kind
        self.read, self.not_read, self.unreachable = 0, 0, 0
        self.objects, self.empty_masks, self.without_object = 0, 0, 0

    def __iter__(self) -> Iterator[Prediction]:
        for one in self._rows:
            self.read += not one.error
            self.not_read += bool(one.error)
            self.unreachable += one.unreachable
            name = one.objects.get(self._kind, "")
            self.objects += bool(name)
            self.empty_masks += self._kind == dicom_objects.SEG and name.endswith(dicom_objects.EMPTY_MASK_SUFFIX)
            self.without_object += self._kind in one.object_errors
            yield one


def _newest(journal: Journal, wanted: set[str]) -> Iterator[Prediction]:
    """The last row of each input: a file that could not be reached was tried again."""
    last = {one.path: number for number, one in enumerate(journal.rows())}
    return (one for number, one in enumerate(journal.rows()) if one.path in wanted and last[one.path] == number)
