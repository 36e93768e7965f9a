"""What a source's files and tables have in common: what was matched, and what was left out and why."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import PurePosixPath

from cxrscale.io import Artifact, ArtifactPart
from cxrscale.types import UserError

LEDGER = "ledger.json"
"""The ledger's name in a dataset."""
_EXAMPLES = 3


class MatchedTable(ArtifactPart):
    """A table or list held against the images."""

    table: str
    """File name."""
    edition: str | None = None
    """Which edition of the table it is, where there are several."""
    rows: int
    """Rows below the header; in a list, names."""
    names: int
    """Images that it names; several rows may name one image."""
    matched: int
    """Images that it names and that are there."""
    images_without_row: int | None = None
    """Images that it does not name; null for tables that are not meant to name every image."""


class LeftOut(ArtifactPart):
    """Files that look like images and are not in the dataset."""

    reason: str
    files: int


class Ledger(Artifact):
    """The content of a dataset's `ledger.json`: counts only, no name of a file or patient."""

    schema_version: int = 1
    source: str
    images: int
    tables: tuple[MatchedTable, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()
    """What else a reader should know: tables that were not used, images that no split list names."""


class LedgerBook:
    """Collects a ledger while a source is read."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._tables: list[MatchedTable] = []
        self._left_out: dict[str, list[str]] = {}
        self._missing: dict[str, tuple[str, ...]] = {}
        self._notes: list[str] = []
        self._images = 0

    def leave_out(self, reason: str, file: str) -> None:
        """Count a file that looks like an image and is left out."""
        self._left_out.setdefault(reason, []).append(file)

    def note(self, sentence: str) -> None:
        """Add what the counts do not say."""
        self._notes.append(sentence)

    def count_images(self, images: int) -> None:
        """How many images the source has."""
        self._images = images

    def match(
        self,
        path: str,
        rows: int,
        names: Collection[str],
        images: Collection[str],
        *,
        edition: str | None = None,
        known: Collection[str] = (),
        names_every_image: bool = True,
    ) -> None:
        """Hold the images that a table names against those that are there.

        Args:
            path: the table's path or address.
            rows: how many rows it has.
            names: distinct keys of the images that it names.
            images: keys of those that are there.
            edition: of the table.
            known: keys of images that another table names; in a partial copy, a table may name none but those.
            names_every_image: whether an image without a row is worth counting.

        Raises:
            UserError: it names none of the images, and none of those that are known.
        """
        there, others = set(images), set(known)
        matched = sum(name in there for name in names)
        if not matched and not any(name in others for name in names):
            named = f"it names {min(names)!r:.80}" if names else "it names none"
            raise UserError(
                f"{path}: none of the {len(there)} images is in it ({named}, a file is {min(there)!r:.80}); "
                "use the one that belongs to these images, or remove it"
            )
        table = PurePosixPath(path).name
        self._missing[table] = tuple(sorted(name for name in names if name not in there)[:_EXAMPLES])
        self._tables.append(
            MatchedTable(
                table=table,
                edition=edition,
                rows=rows,
                names=len(names),
                matched=matched,
                images_without_row=len(there) - matched if names_every_image else None,
            )
        )

    def ledger(self) -> Ledger:
        """The counts so far, as they are stored."""
        return Ledger(
            source=self._source,
            images=self._images,
            tables=tuple(self._tables),
            left_out=tuple(LeftOut(reason=name, files=len(files)) for name, files in sorted(self._left_out.items())),
            notes=tuple(self._notes),
        )

    def hint(self) -> str:
        """The end of a message that there are no images: what looked like some."""
        reasons = [f"{len(files)} left out as {reason}" for reason, files in sorted(self._left_out.items())]
        return f" ({', '.join(reasons)})" if reasons else ""

    def lines(self, names: bool = False) -> list[str]:
        """The counts so far, one line per table and reason.

        Args:
            names: with a few names of files, for a person at a terminal; they may name patients, so logs have none.
        """
        lines = [f"{self._source}: {self._images} images found"]
        for table in self._tables:
            named = f"{table.names} images" if table.names != table.rows else "images"
            line = f"{table.table}: {table.rows} rows name {named}, {table.matched} of them found"
            if missing := table.names - table.matched:
                line += f"; {missing} rows without an image"
                line += f", such as {', '.join(self._missing[table.table])}" if names else ""
            if table.images_without_row:
                line += f"; {table.images_without_row} images without a row"
            lines.append(line)
        for reason, files in sorted(self._left_out.items()):
            examples = f" ({', '.join(sorted(files)[:_EXAMPLES])})" if names else ""
            lines.append(f"left out: {len(files)} files{examples}: {reason}")
        return [*lines, *(f"note: {sentence}" for sentence in self._notes)]
