"""Predictions of files as one file: JSON, CSV, Parquet, or the submission of the SIIM-ACR challenge."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cxrscale.inference import dicom_objects
from cxrscale.inference.journal import row
from cxrscale.inference.prediction import Prediction, Provenance
from cxrscale.io import storage
from cxrscale.sources import image_name
from cxrscale.types import UserError

GATE = "gate."
"""Prefix of the column of a cascade's classifier; `gate.call` is its call."""
CALL, LOGIT = ".call", ".logit"
"""Suffixes of a finding's columns; its probability has its name alone."""
INFO = "cxrscale"
"""Key of the provenance in a Parquet file's metadata."""
EMPTY_MASK = "-1"
_BATCH = 1024
"""Rows in a row group of Parquet: what is in memory."""

Rows = Iterable[Prediction]


@dataclass(frozen=True, slots=True)
class Format:
    """A form of the result."""

    file: str
    """Its name in the folder of predictions."""
    write: Callable[[Path, Rows, Provenance], None]
    objects: bool = False
    """Whether each image gets a DICOM object beside it, which its row names."""


def write_predictions(out: str, kind: str, rows: Rows, provenance: Provenance) -> str:
    """Write the file of a format into the folder `out`, whole or not at all; returns its address.

    Args:
        kind: a key of `FORMATS`.
        rows: one for each input, read or not.
    """
    chosen = FORMATS[kind]
    address = storage.join(out, chosen.file)
    with storage.publishing(address) as path:
        chosen.write(path, rows, provenance)
    return address


def check_format(kind: str, provenance: Provenance) -> None:
    """Check that a run's predictions have this form.

    Raises:
        UserError: there is no such format, it is one of masks and the run gives none, or what writes it is missing.
    """
    if kind not in FORMATS:
        raise UserError(f"--format {kind}: give one of {', '.join(FORMATS)}")
    if FORMATS[kind].objects:
        dicom_objects.check_kind(kind, provenance)
    if kind == "rle" and provenance.recipe.data.task != "segment":
        raise UserError(
            f"--format rle is one of masks, and {provenance.run} is a classifier; give json, csv or parquet"
        )


def _write_json(path: Path, rows: Rows, provenance: Provenance) -> None:
    about = json.dumps(provenance.model_dump(mode="json"), indent=2)
    with path.open("w") as file:
        file.write('{\n  "predictions": [')
        for number, prediction in enumerate(rows):
            file.write(f"{',' if number else ''}\n    {json.dumps(row(prediction))}")
        file.write(f"\n  ],{about[1:]}\n")


def _write_csv(path: Path, rows: Rows, provenance: Provenance) -> None:
    names = list(_schema(provenance).names)
    with path.open("w", newline="", errors="surrogateescape") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        for prediction in rows:
            flat = _flat(prediction)
            flat |= {"warnings": "; ".join(flat["warnings"])}
            writer.writerow({name: int(value) if isinstance(value, bool) else value for name, value in flat.items()})


def _write_parquet(path: Path, rows: Rows, provenance: Provenance) -> None:
    about = json.dumps(provenance.model_dump(mode="json"))
    schema = _schema(provenance).with_metadata({INFO: about})
    with pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
        for group in _groups(rows):
            flat = [_flat(prediction) for prediction in group]
            for values in flat:
                # A path need not be UTF-8, as a column has to; the reason why it was not read names it too.
                values |= {name: _utf8(values[name]) for name in ("path", "error") if values[name]}
            writer.write_table(pa.Table.from_pylist(flat, schema))


def _write_submission(path: Path, rows: Rows, provenance: Provenance) -> None:
    """One row per image as sample_submission.csv of the challenge has it; an image that was not read has no mask."""
    del provenance
    with path.open("w", newline="", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("ImageId", "EncodedPixels"))
        for prediction in rows:
            writer.writerow((image_name(prediction.path), prediction.mask_rle or EMPTY_MASK))


FORMATS: Mapping[str, Format] = {
    "json": Format("predictions.json", _write_json),
    "csv": Format("predictions.csv", _write_csv),
    "parquet": Format("predictions.parquet", _write_parquet),
    "rle": Format("submission.csv", _write_submission),
    **{kind: Format("predictions.json", _write_json, objects=True) for kind in dicom_objects.KINDS},
}


def _schema(provenance: Provenance) -> pa.Schema:
    """The columns of a table of predictions."""
    number, whole = pa.float64(), pa.int64()
    findings = [
        field
        for name in provenance.recipe.data.findings
        for field in ((name, number), (name + CALL, pa.bool_()), (name + LOGIT, number))
    ]
    gate = [] if provenance.gate is None else [(GATE + provenance.gate.finding, number), (GATE + "call", pa.bool_())]
    size = [("height", whole), ("width", whole), ("row_spacing_mm", number), ("column_spacing_mm", number)]
    mask = [("mask_rle", pa.string()), ("mask_area", whole), ("mask_area_mm2", number)]
    of_masks = mask if provenance.recipe.data.task == "segment" else []
    said = [("ood_distance", number), ("warnings", pa.list_(pa.string())), ("error", pa.string())]
    return pa.schema([("path", pa.string()), ("image_id", pa.string()), *gate, *findings, *of_masks, *size, *said])


def _flat(prediction: Prediction) -> dict[str, Any]:
    """Column -> value; columns without a value are left out."""
    spacing = prediction.spacing_mm or (None, None)
    values: dict[str, Any] = {"path": prediction.path, "warnings": list(prediction.warnings)}
    values |= {"image_id": prediction.image_id or None}
    values |= {"height": prediction.height, "width": prediction.width, "error": prediction.error or None}
    values |= {"ood_distance": prediction.ood_distance}
    values |= {"row_spacing_mm": spacing[0], "column_spacing_mm": spacing[1]}
    values |= prediction.probabilities
    values |= {name + CALL: value for name, value in prediction.calls.items()}
    values |= {name + LOGIT: value for name, value in prediction.logits.items()}
    values |= {GATE + name: value for name, value in prediction.gate.items()}
    values |= {} if prediction.gate_call is None else {GATE + "call": prediction.gate_call}
    if prediction.mask_rle is not None:
        values |= {"mask_rle": prediction.mask_rle, "mask_area": prediction.mask_area}
        values |= {"mask_area_mm2": prediction.mask_area_mm2}
    return values


def _utf8(text: str) -> str:
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _groups(rows: Rows) -> Iterator[list[Prediction]]:
    left = iter(rows)
    while group := list(islice(left, _BATCH)):
        yield group
