"""Parquet tables: written with checksums of their pages, and read as what others may have damaged or forged.

Their size is bounded before memory is spent on them.

A few kilobytes can declare a billion rows, or one long text for each of a million rows: encoded once, repeated by a
run length. What such a file would take in memory is asked of its metadata and its dictionaries first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cxrscale.io import parquet_footer, seal
from cxrscale.types import UserError, one_line

FREE_BYTES, BYTES_PER_BYTE = 64 << 20, 64
"""A table may take this many bytes in memory, and this many for each byte of its file. The manifest of ChestX-ray14
takes 6 for each, since keys, checksums and hashed ids do not shrink."""
_VALUE = 8
"""Bytes of the widest plain value."""


class _TooLargeError(Exception):
    """The table would take too much memory."""


def encode(table: pa.Table, *, sealed: bool = False, row_group_size: int | None = None) -> bytes:
    """The bytes of a Parquet file; the same table gives the same bytes under one version of pyarrow.

    Args:
        sealed: put a seal into the metadata, for a file whose digest is kept nowhere else.
        row_group_size: rows that are compressed together; None: pyarrow's default.
    """
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema, compression="zstd", write_page_checksum=True) as writer:
        writer.write_table(table, row_group_size=row_group_size)
        if sealed:
            writer.add_key_value_metadata({seal.FIELD: seal.BLANK})
    content: bytes = sink.getvalue().to_pybytes()
    return seal.close(content) if sealed else content


def read_table(data: bytes, address: str, remedy: str, names: Sequence[str] | None = None) -> pa.Table:
    """The table of a Parquet file, whole and valid: its texts are UTF-8, no column is there twice.

    Args:
        data: the file's bytes.
        address: of the file, for messages.
        remedy: what the user can do when the file is unusable.
        names: the columns to read; None: all. One that the file lacks is left out.

    Raises:
        UserError: it is no Parquet file, is damaged, does not fit its seal, or would take far more memory than its size
            explains.
    """
    seal.check(data, address, remedy)
    try:
        return _read(data, names)
    except _TooLargeError as error:
        raise UserError(f"{address} of {len(data):,} bytes {error}, which no table of ours does; {remedy}") from None
    except Exception as error:  # Arrow, its decoders and decompressors have a dozen types for a damaged file
        raise UserError(f"{address} is not a Parquet file ({one_line(error, limit=120)}); {remedy}") from None


def read_metadata(data: bytes, address: str, remedy: str) -> Mapping[bytes, bytes]:
    """The metadata of a Parquet file's schema; its columns are not read.

    Raises:
        UserError: it is no Parquet file.
    """
    seal.check(data, address, remedy)
    try:
        return dict(pq.read_schema(pa.BufferReader(data)).metadata or {})
    except Exception as error:
        raise UserError(f"{address} is not a Parquet file ({one_line(error, limit=120)}); {remedy}") from None


def check_columns(table: pa.Table, wanted: Mapping[str, pa.DataType], address: str, remedy: str) -> None:
    """Check that a table has these columns, in these types.

    Raises:
        UserError: a column is missing or of another type.
    """
    for name, kind in wanted.items():
        if name not in table.column_names:
            raise UserError(f"{address} has no column {name}; {remedy}")
        if table.schema.field(name).type != kind:
            raise UserError(f"{address}: column {name} is {table.schema.field(name).type}, not {kind}; {remedy}")


def check_no_nulls(table: pa.Table, names: Sequence[str], address: str, remedy: str) -> None:
    """Check that every row has a value in these columns.

    Raises:
        UserError: one has none.
    """
    for name in names:
        if table[name].null_count:
            row = pc.index(table[name].is_null(), True).as_py()
            raise UserError(f"{address}: column {name} has no value in row {row}; {remedy}")


def _read(data: bytes, names: Sequence[str] | None) -> pa.Table:
    limit = FREE_BYTES + BYTES_PER_BYTE * len(data)
    file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
    _check_declared(file.metadata, parquet_footer.column_values(data), limit)
    schema = file.schema_arrow
    if len(set(schema.names)) < len(schema.names):
        twice = next(name for name in schema.names if schema.names.count(name) > 1)
        raise ValueError(f"column {twice} is there twice")
    for field in schema:
        if pa.types.is_nested(field.type) and not (
            pa.types.is_list(field.type) and pa.types.is_primitive(field.type.value_type)
        ):
            raise ValueError(f"column {field.name} is a {field.type}")
    texts = [field.name for field in schema if pa.types.is_string(field.type) or pa.types.is_binary(field.type)]
    if texts:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True, read_dictionary=texts)
    wanted = None if names is None else [name for name in names if name in schema.names]
    # Threads of Arrow that are alive when the process ends can abort it.
    table = file.read(columns=wanted, use_threads=False)
    total = sum(_text_bytes(column) for column in table.columns if pa.types.is_dictionary(column.type))
    if total > limit:
        raise _TooLargeError(f"holds {total:,} bytes of text")
    plain = pa.schema([schema.field(name) for name in table.column_names], metadata=schema.metadata)
    table = table.cast(plain)
    table.validate(full=True)
    return table


def _check_declared(metadata: pq.FileMetaData, groups: Sequence[Sequence[int]], limit: int) -> None:
    """Refuse values that take more memory than the limit, by what the file says of their number and width.

    Args:
        groups: the number of values of each column, row group by row group.
    """
    widths = [max(_VALUE, metadata.schema.column(i).length or 0) for i in range(metadata.num_columns)]
    if any(len(values) != len(widths) for values in groups):
        raise ValueError("a row group has not the columns of the schema")
    total = sum(count * width for values in groups for count, width in zip(values, widths, strict=True))
    if max(total, _VALUE * metadata.num_rows) > limit:
        raise _TooLargeError(f"declares {metadata.num_rows:,} rows of {total:,} bytes")


def _text_bytes(column: pa.ChunkedArray) -> int:
    """Bytes of a dictionary column's values when each row has its own copy."""
    return sum(
        pc.sum(pc.binary_length(chunk.dictionary).take(chunk.indices)).as_py() or 0
        for chunk in column.chunks
        if len(chunk)
    )
