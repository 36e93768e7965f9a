"""Predictions of many files, kept as they come: a command that is killed goes on where it was.

A folder of predictions holds `parts/00000.parquet`, `00001.parquet`, ... while it is being filled, and `parts/job.json`
with what they were made by. Each part is published whole, and is itself the sign that its images are done, wherever
they were predicted. At the end they become one file, and `predictions-of.json` beside it keeps whose it is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from heapq import heappop, heappush
from typing import Any

from cxrscale.inference import parts
from cxrscale.inference.objects import has_object
from cxrscale.inference.prediction import Prediction, Provenance
from cxrscale.io import Artifact, read_artifact, storage, write_artifact
from cxrscale.types import UserError

FOLDER, JOB = "parts", "job.json"
OWNER = "predictions-of.json"
"""In a folder of finished predictions: the `Job` that they were made by."""
ROWS = 256
"""Predictions in a part: what a kill can cost."""


class Job(Artifact):
    """What the parts of a folder were made by."""

    schema_version: int = 2
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
            UserError: it holds predictions of another run, or parts of other thresholds.
        """
        self._folder = storage.join(out, FOLDER)
        address = storage.join(self._folder, JOB)
        mine = _job(provenance)
        self._owner, self._job = storage.join(out, OWNER), mine
        if storage.exists(self._owner):
            owner = read_artifact(Job, self._owner, f"give another --out, or remove {out}")
            # Those of other thresholds of one run are made anew; another run's would stand among them.
            if owner.run != mine.run:
                raise UserError(f"{out} holds predictions of run {owner.run}; give another --out, or remove it")
        if not storage.exists(address):
            write_artifact(address, mine)
        elif (theirs := read_artifact(Job, address, f"remove {self._folder}")) != mine:
            same = theirs.run == mine.run
            what = "other thresholds, or another gate, of this run" if same else f"run {theirs.run}"
            raise UserError(f"{out} holds unfinished predictions of {what}; give another --out, or remove it")
        self._parts: list[str] = []
        self._last: dict[str, int] = {}
        """Input -> the part with its newest row: one that could not be reached was tried again."""
        self._again: set[str] = set()
        self._kinds = kinds
        self._pending: list[Prediction] = []
        for name in sorted(storage.listing(self._folder, parts.SUFFIX)):
            address = storage.join(self._folder, name)
            self._index(name, list(parts.decode_state(storage.read(address), address, kinds)))

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
            # Not their count: a damaged one may have been removed.
            number = int(self._parts[-1].removesuffix(parts.SUFFIX)) + 1 if self._parts else 0
            name = f"{number:05}{parts.SUFFIX}"
            storage.write(storage.join(self._folder, name), parts.encode(self._pending))
            self._index(name, self._pending)
            self._pending = []

    def newest(self, inputs: Sequence[str]) -> Iterator[Prediction]:
        """The newest row of each of these inputs, in their order, whoever was done first.

        A part is in memory from its first row to its last: one at a time where they were filled in order.
        """
        order = {path: number for number, path in enumerate(inputs)}
        starts: dict[int, int] = {}
        for path, number in order.items():
            if path in self._last:
                starts.setdefault(self._last[path], number)
        waiting, read = deque(starts.items()), list[tuple[int, Prediction]]()
        while waiting or read:
            while waiting and (not read or waiting[0][1] < read[0][0]):
                part, _ = waiting.popleft()
                # Of an input that is there twice the newer row.
                for path, one in {one.path: one for one in self._rows(self._parts[part])}.items():
                    if self._last[path] == part and path in order:
                        heappush(read, (order[path], one))
            yield heappop(read)[1]

    def _index(self, name: str, rows: Sequence[Prediction]) -> None:
        part = len(self._parts)
        self._parts.append(name)
        for one in rows:
            self._last[one.path] = part
            whole = not one.unreachable and all(has_object(one, kind) for kind in self._kinds)
            (self._again.discard if whole else self._again.add)(one.path)

    def _rows(self, name: str) -> Iterator[Prediction]:
        address = storage.join(self._folder, name)
        return parts.decode(storage.read(address), address)

    def own(self) -> None:
        """Note that the folder's predictions are those of this run."""
        write_artifact(self._owner, self._job)

    def remove(self) -> None:
        """Remove the parts, and their folder."""
        for name in [*self._parts, JOB]:
            storage.remove(storage.join(self._folder, name))
        storage.remove_empty_folder(self._folder)


def settings_of(provenance: Provenance) -> str:
    """Digest of all that a prediction follows from: weights, thresholds, the classifier before it."""
    return storage.digest(provenance.model_dump_json(exclude={"recipe", "notes"}).encode())


def _job(provenance: Provenance) -> Job:
    return Job(
        run=provenance.run,
        checkpoint=provenance.checkpoint,
        thresholds=provenance.thresholds,
        settings=settings_of(provenance),
    )


def row(prediction: Prediction) -> dict[str, Any]:
    """What is known of an image; fields without a value are left out."""
    known = asdict(replace(prediction, maps={}, gray=None))
    if not prediction.unreachable:
        del known["unreachable"]
    return {name: value for name, value in known.items() if value is not None and value not in ("", {}, ())}
