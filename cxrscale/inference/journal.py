"""Predictions of many files, kept as they come: a command that is killed goes on where it was.

A folder of predictions holds `parts/00000.jsonl`, `00001.jsonl`, ... while it is being filled, each written whole, and
`parts/job.json` with what they were made by. At the end they become one file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import cache
from typing import Any

from pydantic import TypeAdapter

from cxrscale.inference.objects import has_object
from cxrscale.inference.prediction import Prediction, Provenance
from cxrscale.io import Artifact, read_artifact, seal, storage, write_artifact
from cxrscale.types import UserError

FOLDER, JOB = "parts", "job.json"
ROWS = 256
"""Predictions in a part: what a kill can cost."""


class Job(Artifact):
    """What the parts of a folder were made by."""

    schema_version: int = 1
    checkpoint: str
    """Digest of the weights."""
    thresholds: str
    """Digest of thresholds.json."""
    run: str
    settings: str = ""
    """Digest of all that a prediction follows from: weights, thresholds, the classifier before it."""


class Journal:
    """The parts of a folder of predictions."""

    def __init__(self, out: str, provenance: Provenance, kinds: Sequence[str] = ()) -> None:
        """Begin, or go on.

        Args:
            out: the folder or address of predictions.
            kinds: objects that each image gets beside its row.

        Raises:
            UserError: it holds parts of another run, or of other thresholds.
        """
        self._folder = storage.join(out, FOLDER)
        address = storage.join(self._folder, JOB)
        mine = _job(provenance)
        if not storage.exists(address):
            write_artifact(address, mine)
        elif (theirs := read_artifact(Job, address, f"remove {self._folder}")) != mine:
            same = theirs.run == mine.run
            what = "other thresholds, or another gate, of this run" if same else f"run {theirs.run}"
            raise UserError(f"{out} holds unfinished predictions of {what}; give another --out, or remove it")
        self._parts: list[str] = []
        self._last: dict[str, int] = {}
        """Input -> the part with its newest row: one that could not be reached was tried again."""
        self._first: list[str] = []
        """Of each part, its first input."""
        self._again: set[str] = set()
        self._kinds = kinds
        self._pending: list[Prediction] = []
        for name in storage.listing(self._folder, ".jsonl"):
            self._index(name, list(self._rows(name)))

    @property
    def done(self) -> set[str]:
        """Inputs whose predictions are kept, without those that could not be reached or lack an object."""
        return self._last.keys() - self._again

    def add(self, predictions: Sequence[Prediction]) -> None:
        """Keep more; every `ROWS` of them, or as soon as there are more, they become a part."""
        self._pending += predictions
        if len(self._pending) >= ROWS:
            self.flush()

    def flush(self) -> None:
        """Write what is not yet written."""
        if self._pending:
            name = f"{len(self._parts):05}.jsonl"
            text = "".join(f"{json.dumps(row(one))}\n" for one in self._pending)
            storage.write(storage.join(self._folder, name), seal.closed_text(text))
            self._index(name, self._pending)
            self._pending = []

    def newest(self, inputs: Sequence[str]) -> Iterator[Prediction]:
        """The newest row of each of these inputs: parts in the order of their first inputs, whoever was done first."""
        order = {path: number for number, path in enumerate(inputs)}
        for part in sorted(range(len(self._parts)), key=lambda one: order.get(self._first[one], -1)):
            for one in self._rows(self._parts[part]):
                if self._last[one.path] == part and one.path in order:
                    yield one

    def _index(self, name: str, rows: Sequence[Prediction]) -> None:
        part = len(self._parts)
        self._parts.append(name)
        self._first.append(rows[0].path if rows else "")
        for one in rows:
            self._last[one.path] = part
            whole = not one.unreachable and all(has_object(one, kind) for kind in self._kinds)
            (self._again.discard if whole else self._again.add)(one.path)

    def _rows(self, name: str) -> Iterator[Prediction]:
        address = storage.join(self._folder, name)
        content = seal.read(address, "remove it: its images are predicted again")
        for line in content.decode().splitlines()[:-1]:
            yield _adapter().validate_json(line)

    def remove(self) -> None:
        """Remove the parts, and their folder."""
        for name in [*self._parts, JOB]:
            storage.remove(storage.join(self._folder, name))
        storage.remove_empty_folder(self._folder)


def _job(provenance: Provenance) -> Job:
    settings = provenance.model_dump_json(exclude={"recipe", "notes"})
    return Job(
        run=provenance.run,
        checkpoint=provenance.checkpoint,
        thresholds=provenance.thresholds,
        settings=storage.digest(settings.encode()),
    )


def row(prediction: Prediction) -> dict[str, Any]:
    """What is known of an image; fields without a value are left out."""
    known = asdict(replace(prediction, maps={}, gray=None))
    if not prediction.unreachable:
        del known["unreachable"]
    return {name: value for name, value in known.items() if value is not None and value not in ("", {}, ())}


@cache
def _adapter() -> TypeAdapter[Prediction]:
    return TypeAdapter(Prediction)
