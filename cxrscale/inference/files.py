"""Predictions of any number of files, into a folder: one row for each, interrupted and resumed at will."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from cxrscale.inference.formats import check_format, write_predictions
from cxrscale.inference.journal import Journal
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


def predict_files(
    predictor: GroupPredictor,
    paths: Sequence[str],
    out: str,
    kind: str = "json",
    on_prediction: OnPrediction | None = None,
) -> FilePredictions:
    """Predict files and write `out`/predictions.json (or .csv, .parquet, submission.csv).

    What is done is kept in `out`/parts, some 256 predictions at a time and at a Ctrl-C, until the file is written; the
    same call resumes there.

    Args:
        predictor: a `Predictor`, a `GatedPredictor`, or a `ClusterPredictor` of either.
        paths: local paths or addresses; each once.
        out: a folder or address, made where it is not there.
        kind: json, csv, parquet or rle.
        on_prediction: called with each new prediction.

    Raises:
        UserError: no such format, or the folder holds unfinished predictions of another run.
        BusyError: another process writes this folder.
    """
    check_format(kind, predictor.provenance)
    with lease.held(out, f"the folder of predictions {out}"):
        journal = Journal(out, predictor.provenance)
        done = journal.done
        todo = [path for path in paths if path not in done]
        try:
            # By whole groups: what is left then falls into the same batches as if nothing had stopped it.
            for group in predictor.groups(todo):
                journal.add(group)
                if on_prediction is not None:
                    for prediction in group:
                        on_prediction(prediction)
        finally:
            journal.flush()
        counted = _Counted(journal.newest(paths))
        address = write_predictions(out, kind, counted, predictor.provenance)
        # Else the parts are kept, so that the same call tries only what could not be reached.
        if not counted.unreachable:
            journal.remove()
    return FilePredictions(address, counted.read, counted.not_read, counted.unreachable, len(paths) - len(todo))


class _Counted:
    """Predictions, counted as they pass."""

    def __init__(self, rows: Iterator[Prediction]) -> None:
        self._rows = rows
        self.read, self.not_read, self.unreachable = 0, 0, 0

    def __iter__(self) -> Iterator[Prediction]:
        for one in self._rows:
            self.read += not one.error
            self.not_read += bool(one.error)
            self.unreachable += one.unreachable
            yield one
