"""What a manifest has to be before anything trusts it: its columns, its metadata, and where its rows point to.

A dataset can come from anybody. Its manifest names files and places in them, which are read as it says: so every name
is that of a file in the dataset's own folder, and every place is inside of that file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from cxrscale.io import parquet
from cxrscale.types import UserError, one_line

MAX_SIDE = 65_535
"""Pixels of an image's side: DICOM's Rows and Columns have 16 bits."""
MAX_MASK_PIXELS = 100_000_000
REQUIRED = ("image_id", "key", "source", "patient", "split", "shard", "image_offset", "image_length", "image_crc")
"""Columns in which every row has a value."""
NAMES = ("image_id", "source", "patient", "split")
MAX_NAME = 512
"""Characters of a name; ids of the sources have at most 64, those that name folders too some 200."""
KINDS = ("image", "mask", "json")
"""Members of a tar that a row points to."""
REMEDY = "shard it again"

_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Extent = Annotated[float, Field(allow_inf_nan=False, ge=0)]
_BOXES = TypeAdapter(
    list[tuple[Annotated[str, Field(min_length=1, max_length=MAX_NAME)], _Finite, _Finite, _Extent, _Extent]]
)
_SHARD = re.compile(r"[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]{0,250}\.tar")


def _shard_name(name: str) -> str:
    if not _SHARD.fullmatch(name):
        raise ValueError("is not the name of a tar in the dataset's folder")
    return name


class _Lenient(BaseModel):
    """Metadata that this version reads; fields of other versions are kept as they are."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)


class _Tar(_Lenient):
    blake3: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=0)]


class _Packed(_Lenient):
    codec: Literal["jpeg", "png", "source"]
    size: Annotated[int, Field(ge=1, le=MAX_SIDE)]
    quality: Annotated[int, Field(ge=1, le=100)] = 95
    masks: bool = False


def _share_or_nan(value: float) -> float:
    if not math.isnan(value) and not 0 <= value <= 1:
        raise ValueError("it is not between 0 and 1")
    return value


class _Quarantined(_Lenient):
    image_id: str
    reason: str


class _Metadata(_Lenient):
    """The part of a manifest's metadata that is used."""

    pack: _Packed
    shards: dict[Annotated[str, AfterValidator(_shard_name)], _Tar] = {}
    source: str = ""
    patients_from: str | None = None
    key_fingerprint: str | None = None
    input: Any = ""
    version: str = ""
    images: Annotated[int, Field(ge=0)] = 0
    quarantined: list[_Quarantined] = []
    burned_in: Annotated[int, Field(ge=0)] = 0
    tiny_masks: Annotated[int, Field(ge=0)] = 0
    # NaN in a dataset without training images.
    pixel_mean: Annotated[float, AfterValidator(_share_or_nan)] = 0.5
    pixel_std: Annotated[float, AfterValidator(_share_or_nan)] = 0.25


def read_metadata(text: bytes, address: str, version: int) -> dict[str, Any]:
    """The metadata of a manifest, as a mapping.

    Args:
        version: the format that this version of cxrscale reads.

    Raises:
        UserError: it is no JSON object, of another format, or a field of it has an impossible value.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{address}: its metadata is not JSON ({one_line(error, limit=120)}); {REMEDY}") from None
    if not isinstance(content, dict) or "format" not in content:
        raise UserError(f"{address}: its metadata does not say the manifest's format; {REMEDY}")
    if content["format"] != version or isinstance(content["format"], bool):
        shown = one_line(repr(content["format"]), limit=40)
        raise UserError(f"{address}: manifest format {shown}, this version reads {version}; {REMEDY}")
    try:
        _Metadata.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        field = ".".join(one_line(str(part), limit=60) for part in first["loc"])
        value = one_line(repr(first["input"]), limit=60)
        reason = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{address}: metadata {field} is {value}: {reason}; {REMEDY}") from None
    return content


def check_table(
    table: pa.Table,
    fields: Sequence[tuple[str, pa.DataType]],
    optional: Sequence[str],
    metadata: Mapping[str, Any],
    address: str,
) -> None:
    """Check columns, values and places of a manifest's rows.

    Args:
        fields: the columns that it has beside labels.
        optional: those of them that older versions lack.
        metadata: as `read_metadata` returns it.

    Raises:
        UserError: a row that cannot be, with its number, its column and its value.
    """
    wanted = {name: kind for name, kind in fields if name in table.column_names or name not in optional}
    parquet.check_columns(table, wanted, address, REMEDY)
    if not len(table):
        raise UserError(f"{address} has no images; {REMEDY}")
    parquet.check_no_nulls(table, REQUIRED, address, REMEDY)
    for name in NAMES:
        length_N = pc.utf8_length(table[name])
        _refuse(pc.or_(pc.equal(length_N, 0), pc.greater(length_N, MAX_NAME)), table, name, address, "no name")
    for name, low, high in (
        ("width", 1, MAX_SIDE),
        ("height", 1, MAX_SIDE),
        ("age", 0, 150),
        ("mask_pixels", 0, None),
        *((f"{kind}_{part}", least, None) for kind in KINDS for part, least in (("offset", 0), ("length", 1))),
    ):
        _check_range(table, name, low, high, address)
    for name in ("spacing_row_mm", "spacing_column_mm"):
        ok_N = pc.and_(pc.is_finite(table[name]), pc.greater(table[name], 0))
        _refuse(pc.invert(ok_N), table, name, address, "no distance between pixels")
    if "boxes" in table.column_names:
        _check_boxes(table, address)
    _check_shards(table, metadata, address)


def _check_boxes(table: pa.Table, address: str) -> None:
    """Every box has a finding, a finite place and an extent that is not negative."""
    wrong = []
    for text in pc.unique(table["boxes"]).drop_null().to_pylist():
        try:
            _BOXES.validate_json(text, strict=True)
        except ValidationError:
            wrong.append(text)
    _refuse(pc.is_in(table["boxes"], value_set=pa.array(wrong, pa.string())), table, "boxes", address, "no boxes")


def _check_range(table: pa.Table, name: str, low: int, high: int | None, address: str) -> None:
    wrong_N = pc.less(table[name], low)
    if high is not None:
        wrong_N = pc.or_(wrong_N, pc.greater(table[name], high))
    _refuse(wrong_N, table, name, address, f"not in {low}..{'' if high is None else high}")


def _check_shards(table: pa.Table, metadata: Mapping[str, Any], address: str) -> None:
    """Every member that a row points to is inside of a tar in the dataset's folder."""
    sizes: dict[str, int | None] = {name: tar.get("bytes") for name, tar in metadata.get("shards", {}).items()}
    for name in pc.unique(table["shard"]).to_pylist():
        try:
            _shard_name(name)
        except ValueError as error:
            raise UserError(f"{address}: column shard {error}: {one_line(repr(name), limit=80)}; {REMEDY}") from None
        if sizes and name not in sizes:
            raise UserError(f"{address}: shard {name:.80} is not among those of its metadata; {REMEDY}")
    known = [name for name, size in sizes.items() if size is not None]
    index_N = pc.index_in(table["shard"], value_set=pa.array(known, pa.string()))
    size_N = pa.array([sizes[name] for name in known], pa.int64()).take(index_N.combine_chunks())
    for kind in KINDS:
        offset, length, crc = (table[f"{kind}_{part}"] for part in ("offset", "length", "crc"))
        partial_N = pc.or_(
            pc.not_equal(offset.is_null(), length.is_null()), pc.not_equal(offset.is_null(), crc.is_null())
        )
        _refuse(partial_N, table, f"{kind}_offset", address, f"without all of {kind}_offset, _length and _crc")
        # A difference, since a sum could overflow.
        beyond_N = pc.greater(length, pc.subtract(size_N, pc.if_else(pc.greater(offset, size_N), size_N, offset)))
        _refuse(beyond_N, table, f"{kind}_offset", address, f"beyond the end of its tar with {kind}_length")


def _refuse(wrong_N: Any, table: pa.Table, name: str, address: str, why: str) -> None:
    """Raise a UserError for the first row that is marked; null marks nothing."""
    row = pc.index(pc.fill_null(wrong_N, False), True).as_py()
    if row >= 0:
        value = one_line(repr(table[name][row].as_py()), limit=60)
        raise UserError(f"{address}: {name} of row {row} is {value}, {why}; {REMEDY}")
