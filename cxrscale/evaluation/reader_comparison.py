"""A run against readers, such as radiologists, who labeled the same images: their tables, and CheXNet's F1 protocol."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt

from cxrscale import sources
from cxrscale.evaluation import metrics
from cxrscale.evaluation.artifacts import ComparedRun, ReaderComparison, ReaderFinding
from cxrscale.evaluation.calls import Calls
from cxrscale.types import Scores, UserError

READER = "reader"
"""The column that names the reader, where a table holds several."""
VALUES = {"1": 1.0, "1.0": 1.0, "0": 0.0, "0.0": 0.0, "": np.nan, "-1": np.nan, "-1.0": np.nan}
"""What a reader's table may say of an image; -1 is uncertain (as in CheXpert), which is no label."""


@dataclass(frozen=True, slots=True)
class ReaderTable:
    """What one reader said, as text."""

    path: str
    columns: Mapping[str, str]
    """Folded name of each column -> its name."""
    rows: dict[str, tuple[int, dict[str, str]]] = field(default_factory=dict)
    """Image -> (line, folded column -> text)."""


def read_tables(paths: Sequence[str]) -> dict[str, ReaderTable]:
    """The tables of readers, by the reader's name.

    A CSV table's first column names the image. It is of one reader, called as the file is, or has a column `reader`.
    Other columns are findings, or are ignored.

    Raises:
        UserError: a file cannot be read, names an image twice for a reader, or there are fewer than two readers.
    """
    tables: dict[str, ReaderTable] = {}
    for path in paths:
        lines = sources.read_rows(path)
        top = next(lines, None)
        if top is None or len(top[1]) < 2:
            raise UserError(f"{path}: no table; it needs a column of images and one per finding")
        header = [fold(name) for name in top[1]]
        columns = dict(zip(header[1:], top[1][1:], strict=True))
        for line, row in lines:
            cells = dict(zip(header[1:], row[1:], strict=False))
            name = cells.get(READER) or PurePosixPath(path.replace("\\", "/")).stem
            table = tables.setdefault(name, ReaderTable(path, columns))
            if row[0] in table.rows:
                raise UserError(
                    f"{path}, line {line}: reader {name!r:.60} has image {row[0]!r:.80} twice (line "
                    f"{table.rows[row[0]][0]} of {table.path}); keep one"
                )
            table.rows[row[0]] = (line, cells)
    if len(tables) < 2:
        raise UserError(
            f"--readers {' '.join(paths)}: {len(tables)} reader; two or more are needed, as one file each or with a "
            f"column {READER!r}"
        )
    return tables


def compare_with_readers(
    scores: Scores,
    calls: Calls,
    tables: Mapping[str, ReaderTable],
    row_of: Callable[[str], int | None],
    resamples: int = 2000,
    seed: int = 0,
) -> ReaderComparison:
    """F1 of a run's calls and of each reader against all others (Rajpurkar et al. 2017, see `metrics.annotator_f1`).

    Intervals resample patients; the paper's 420 images were resampled as images. Images that a reader did not label are
    left out, finding by finding.

    Args:
        calls: of the run's scores, at its thresholds.
        tables: from `read_tables`.
        row_of: the row of the scores that a reader's name of an image means; None: it is not among them.

    Raises:
        UserError: no image or no finding in common, a label that is none, or fewer than two patients.
    """
    metrics.require(scores, "the run")
    place = {reader: _place(table, row_of) for reader, table in tables.items()}
    found = {row for rows in place.values() for row in rows.values()}
    if not found:
        first = next(iter(tables.values()))
        raise UserError(
            f"{first.path}: none of the readers' images (e.g. {next(iter(first.rows), '')!r:.80}) is one of the "
            f"{len(scores.image_id)} that the run scored; name images as the source does, and give the split's readers"
        )
    weights_RN = metrics.bootstrap_weights(scores.patient, resamples, seed)
    findings: dict[str, ReaderFinding] = {}
    for f, name in enumerate(scores.findings):
        having = [reader for reader, table in tables.items() if fold(name) in table.columns]
        if len(having) == len(tables):
            labels = [_labels(tables[reader], place[reader], name, len(scores.image_id)) for reader in having]
            findings[name] = _finding(calls.called_NF[:, f], np.stack(labels, axis=1), having, weights_RN)
    if not findings:
        columns = ", ".join(next(iter(tables.values())).columns.values())
        raise UserError(f"the readers' tables ({columns:.200}) have no column for any of {', '.join(scores.findings)}")
    return ReaderComparison(
        run=ComparedRun(name="the run"),
        readers=tuple(tables),
        images=len(found),
        patients=len({scores.patient[row] for row in found}),
        resamples=resamples,
        seed=seed,
        rows_without_image={reader: len(table.rows) - len(place[reader]) for reader, table in tables.items()},
        findings=findings,
        not_compared=tuple(name for name in scores.findings if name not in findings),
    )


def fold(name: str) -> str:
    """A finding's name without case, and with spaces for underscores: Pleural_Thickening is pleural thickening."""
    return " ".join(re.split(r"[\s_]+", name.strip())).casefold()


def _place(table: ReaderTable, row_of: Callable[[str], int | None]) -> dict[str, int]:
    """Image, as the table names it -> row of the scores."""
    place: dict[str, int] = {}
    name_of: dict[int, str] = {}
    for name, (line, _) in table.rows.items():
        row = row_of(name)
        if row is None:
            continue
        if row in name_of:
            raise UserError(
                f"{table.path}, line {line}: {name!r:.80} and {name_of[row]!r:.80} are the same image; keep one"
            )
        place[name], name_of[row] = row, name
    return place


def _labels(table: ReaderTable, place: Mapping[str, int], finding: str, images: int) -> npt.NDArray[np.float64]:
    """(N,) the reader's labels: 1, 0, or NaN for none."""
    label_N = np.full(images, np.nan)
    for name, row in place.items():
        line, cells = table.rows[name]
        text = cells.get(fold(finding), "")
        if text not in VALUES:
            raise UserError(
                f"{table.path}, line {line}: {finding} is {text!r:.40}; give 1, 0, -1 (uncertain) or nothing"
            )
        label_N[row] = VALUES[text]
    return label_N


def _finding(
    called_N: npt.NDArray[np.float64],
    label_NA: npt.NDArray[np.float64],
    readers: Sequence[str],
    weights_RN: metrics.BootstrapWeights,
) -> ReaderFinding:
    complete_N = np.isfinite(label_NA).all(axis=1)
    images = int(complete_N.sum())
    if not np.isfinite(called_N).all() or not images:
        reason = "no image that all readers labeled" if not images else "the run has no threshold for it"
        none = metrics.undefined(reason)
        return ReaderFinding(
            images=images, run=none, readers=dict.fromkeys(readers, none), reader_mean=none, difference=none
        )
    raters = metrics.annotator_f1(called_N, label_NA, weights_RN)
    own = dict(zip(readers, raters.annotators, strict=True))
    return ReaderFinding(
        images=images, run=raters.model, readers=own, reader_mean=raters.annotator_mean, difference=raters.difference
    )
