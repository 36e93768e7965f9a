"""The number of values that a Parquet file declares, and footers with a changed bit."""

from __future__ import annotations

import io
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxrscale.io import parquet, parquet_footer

FLIPS = """
import sys
from cxrscale.io import parquet
from cxrscale.types import UserError

data = sys.stdin.buffer.read()
footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
read = refused = 0
for bit in range(footer * 8, len(data) * 8, 3):
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    try:
        parquet.read_table(bytes(changed), "table", "make it again")
        read += 1
    except UserError:
        refused += 1
print(read, refused)
"""


def small_table(rows: int = 9) -> pa.Table:
    lists = pa.array([[n, n + 1] if n % 3 else None for n in range(rows)], pa.list_(pa.float32()))
    texts = pa.array([f"row {n}" if n % 2 else None for n in range(rows)])
    return pa.table({"number": pa.array(range(rows), pa.int64()), "text": texts, "list": lists})


@given(st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=40), st.integers(1, 40))
def test_the_values_are_those_that_arrow_counts(rows: list[list[int]], group: int) -> None:
    table = pa.table({"n": range(len(rows)), "list": pa.array(rows, pa.list_(pa.int32()))})
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=group)
    metadata = pq.ParquetFile(sink).metadata
    groups = [metadata.row_group(g) for g in range(metadata.num_row_groups)]
    counted = [tuple(one.column(i).num_values for i in range(metadata.num_columns)) for one in groups]
    assert parquet_footer.column_values(sink.getvalue()) == counted


@pytest.mark.parametrize("content", [b"", b"PAR1", b"\xff" * 20 + b"\x08\0\0\0PAR1", b"PAR1\xff\xff\xff\xffPAR1"])
def test_what_is_no_footer_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"Parquet file|footer"):
        parquet_footer.column_values(content)


def test_a_changed_bit_in_a_footer_never_ends_the_process() -> None:
    """In a process of its own: on some of them Arrow's own count of values calls abort()."""
    content = parquet.encode(small_table())
    ran = subprocess.run([sys.executable, "-c", FLIPS], input=content, capture_output=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    read, refused = map(int, ran.stdout.split())
    assert read > 100
    assert refused > 100
