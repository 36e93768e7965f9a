"""Values that a careless or malicious hand could put into an artifact, and where it would put them."""

from __future__ import annotations

import copy
import io
import json
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

from tests.fuzz.mutations import Rng, bytewise

ESCAPES = (
    "../outside/canary.tar",
    "../outside",
    "..",
    ".",
    "/etc/passwd",
    "/etc",
    "a/../../outside/canary.tar",
    "file:///etc/passwd",
    "s3://b/canary.tar",
    "~/x.tar",
    "train-00000.tar/../../outside/canary.tar",
)
"""Names that lead out of the folder of what names them."""
TEXTS = (
    *ESCAPES[:7],
    "",
    " ",
    "x" * 70_000,
    "\x00",
    "\n\n",
    "<script>alert(1)</script>",
    "[bold]",
    "\u202e",
    "nan",
    "-1",
)
NUMBERS = (0, -1, 1, 2, 3, 2**31, -(2**31), 2**63, 2**70, 1e308, -0.5, 1.5, math.nan, math.inf, -math.inf)
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [None], {"a": 1}, [[]], [1, 2, 3], {"": ""}, ["x"] * 300)


def value(rng: Rng) -> Any:
    """Any value that JSON or YAML can hold."""
    group = (TEXTS, NUMBERS, OTHERS)[int(rng.integers(3))]
    return copy.deepcopy(group[int(rng.integers(len(group)))])


def mutated_tree(tree: Any, rng: Rng) -> Any:
    """A copy of nested mappings and lists with a value replaced, removed, renamed, moved, repeated or added."""
    tree = copy.deepcopy(tree)
    places = list(_places(tree))
    holder, key = places[int(rng.integers(len(places)))]
    other_holder, other = places[int(rng.integers(len(places)))]
    match int(rng.integers(9)):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[str(value(rng))[:50]] = holder.pop(key)
        case 2 if isinstance(holder, dict):
            holder[("surprise", "", "../x", "schema_version")[int(rng.integers(4))]] = value(rng)
        case 3:
            holder[key] = copy.deepcopy(other_holder[other])
        case 4 if isinstance(holder, list):
            holder.extend(copy.deepcopy(holder) * 3)
        case 5:
            holder[key] = [holder[key]]
        case 6 if isinstance(holder[key], int | float):
            holder[key] = (-holder[key], holder[key] * 10**9, float(holder[key]), str(holder[key]))[
                int(rng.integers(4))
            ]
        case 7:
            deep: Any = 1
            for _ in range((5, 150)[int(rng.integers(2))]):
                deep = [deep]
            holder[key] = deep
        case _:
            holder[key] = value(rng)
    return tree


def _places(tree: Any) -> Any:
    """(container, key) of every value."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, inner in list(items):
        yield tree, key
        yield from _places(inner)


def mutated_json(data: bytes, rng: Rng) -> bytes:
    """A JSON file with up to three faults; its seal, which would show each, is removed."""
    sample = rng.random()
    if sample < 0.15:
        return bytewise(data, rng)
    if sample < 0.17:
        return b'{"schema_version": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    tree = json.loads(data)
    for digest in ("seal", "crc"):
        tree.pop(digest, None)
    for _ in range(int(rng.choice([1, 1, 1, 2, 3]))):
        tree = mutated_tree(tree, rng) if tree else tree
    return _dumped(tree)


def _dumped(tree: Any) -> bytes:
    return json.dumps(tree).encode(errors="surrogatepass")


def mutated_yaml(data: bytes, rng: Rng) -> bytes:
    """A recipe with up to three faults."""
    sample = rng.random()
    if sample < 0.15:
        return bytewise(data, rng)
    if sample < 0.2:
        return b"a: &a [x]\n" + b"".join(
            b"%c: &%c [*%c,*%c,*%c]\n" % (n, n, n - 1, n - 1, n - 1) for n in range(98, 116)
        )
    if sample < 0.23:
        return b"[" * 5000
    if sample < 0.26:
        return b"!!python/object/apply:os.system ['touch ../outside/run']\n"
    tree = yaml.safe_load(data)
    for _ in range(int(rng.choice([1, 1, 1, 2, 3]))):
        tree = mutated_tree(tree, rng) if tree else tree
    return yaml.safe_dump(tree, allow_unicode=True).encode(errors="surrogatepass")


def mutated_parquet(data: bytes, rng: Rng) -> bytes:
    """A table with other values, types, columns, rows or metadata, or with damaged bytes."""
    if rng.random() < 0.2:
        return bytewise(data, rng)
    table = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
    for _ in range(int(rng.choice([1, 1, 1, 2]))):
        try:
            table = _mutated_table(table, rng)
        except (pa.ArrowException, OverflowError, ValueError, TypeError, KeyError, IndexError):
            continue  # the value does not fit the column's type: another fault
    sink = io.BytesIO()
    pq.write_table(table, sink, compression=("zstd", "snappy", "none", "gzip")[int(rng.integers(4))])
    return sink.getvalue()


_TYPES = (
    pa.string(),
    pa.float64(),
    pa.int64(),
    pa.int8(),
    pa.bool_(),
    pa.large_string(),
    pa.binary(),
    pa.list_(pa.int64()),
)


def _mutated_table(table: pa.Table, rng: Rng) -> pa.Table:
    metadata = table.schema.metadata
    column = int(rng.integers(table.num_columns))
    field, values = table.schema.field(column), table.column(column)
    match int(rng.integers(12)):
        case 0 | 1 | 2 | 3:
            cells = values.to_pylist()
            cells[int(rng.integers(len(cells)))] = _cell(field.type, rng)
            table = table.set_column(column, field.name, pa.array(cells, field.type))
        case 4:
            kind = _TYPES[int(rng.integers(len(_TYPES)))]
            cast = pa.nulls(len(table), kind) if pa.types.is_nested(kind) else values.cast(kind, safe=False)
            table = table.set_column(column, field.name, cast)
        case 5:
            table = table.remove_column(column)
        case 6:
            names = table.column_names
            names[column] = (*TEXTS[:8], "label.X", "image_id", "root", "logit.X")[int(rng.integers(12))]
            table = table.rename_columns(names)
        case 7:
            table = table.append_column(field, values)
        case 8:
            table = table.slice(0, int(rng.choice([0, 0, 1, len(table) - 1])))
        case 9:
            table = pa.concat_tables([table, table.slice(0, 2)])
        case 10:
            table = table.set_column(column, field.name, pa.array([_cell(field.type, rng)] * len(table), field.type))
        case _:
            metadata = _mutated_metadata(dict(metadata or {}), rng)
    return table.replace_schema_metadata(metadata)


def _mutated_metadata(metadata: dict[bytes, bytes], rng: Rng) -> dict[bytes, bytes]:
    name = b"cxrscale"
    text = metadata.get(name, b"{}")
    match int(rng.integers(8)):
        case 0:
            metadata.pop(name, None)
        case 1:
            metadata[name] = bytewise(text, rng)
        case 2:
            metadata[name] = _dumped(value(rng))
        case _:
            tree = json.loads(text)
            metadata[name] = _dumped(mutated_tree(tree, rng)) if tree else text
    return metadata


def _cell(kind: pa.DataType, rng: Rng) -> Any:
    """A value of a column's type that may not be one of its meaning; now and then null."""
    if rng.random() < 0.15:
        return None
    if pa.types.is_string(kind):
        names = (*ESCAPES, *TEXTS)
        return names[int(rng.integers(len(names)))]
    if pa.types.is_integer(kind):
        top = 2 ** (kind.bit_width - 1)
        low = 0 if pa.types.is_unsigned_integer(kind) else -top
        return int(rng.choice([low, top - 1, 0, 1, 2, 3, 7, max(low, -1), 10_000 % top]))
    if pa.types.is_floating(kind):
        return float(rng.choice([math.nan, math.inf, -math.inf, -1.0, 0.0, 0.5, 1e30, 1e308]))
    if pa.types.is_list(kind):
        return [[], [1], [-1] * 256, [2**31 - 1] * 256, list(range(300)), [None] * 256][int(rng.integers(6))]
    if pa.types.is_fixed_size_binary(kind):
        return bytes(kind.byte_width)
    return b""


def mutated_checkpoint(data: bytes, rng: Rng) -> bytes:
    """A checkpoint with other values or tensors, or with damaged bytes."""
    if rng.random() < 0.25:
        return bytewise(data, rng)
    state = torch.load(io.BytesIO(data), weights_only=True)
    if rng.random() < 0.4:
        weights = state["model"] or state["members"][0]["model"]  # an ensemble's are its members'
        name = list(weights)[int(rng.integers(len(weights)))]
        weights[name] = _tensor(weights[name], rng)
    else:
        tree = {key: inner for key, inner in state.items() if key not in ("model", "optimizer")}
        kept = {key: inner for key, inner in state.items() if key in ("model", "optimizer")}
        state = {**mutated_tree(tree, rng), **kept}
        if rng.random() < 0.3:
            state[list(state)[int(rng.integers(len(state)))]] = value(rng)
    out = io.BytesIO()
    torch.save(state, out)
    return out.getvalue()


def _tensor(tensor: torch.Tensor, rng: Rng) -> Any:
    choices: tuple[Any, ...] = (
        None,
        3.0,
        "x",
        [1.0],
        tensor.to(torch.complex64),
        tensor.to(torch.int8),
        tensor.reshape(-1),
        tensor[:0] if tensor.ndim else tensor,
        torch.full_like(tensor.float(), math.nan),
        torch.zeros(1).expand(10**6, 10**6),
        torch.zeros(3, 3).to_sparse(),
        torch.zeros(2, 2, device="meta"),
    )
    return choices[int(rng.integers(len(choices)))]


_CSV = ("", "1", "0", "-1", "2", "nan", "x" * 70_000, "=1+1", "\x00", '"', "'", ",", "\n", "../outside/canary.tar", "٣")


def mutated_csv(data: bytes, rng: Rng) -> bytes:
    """A table of readers or ids with other cells, rows or columns, or damaged bytes."""
    if rng.random() < 0.3:
        return bytewise(data, rng)
    rows = [line.split(",") for line in data.decode().splitlines()]
    row = rows[int(rng.integers(len(rows)))] if rng.random() < 0.7 else rows[0]
    cell = int(rng.integers(len(row)))
    match int(rng.integers(4)):
        case 0:
            del row[cell]
        case 1:
            row.insert(cell, _CSV[int(rng.integers(len(_CSV)))])
        case 2:
            rows.append(list(row))
        case _:
            row[cell] = _CSV[int(rng.integers(len(_CSV)))]
    return "\n".join(map(",".join, rows)).encode()


def mutated_lines(data: bytes, rng: Rng) -> bytes:
    """A log of one JSON object per line with one of them changed."""
    lines = data.splitlines()
    at = int(rng.integers(len(lines)))
    lines[at] = mutated_json(lines[at], rng)
    return b"\n".join(lines) + b"\n"


BOMBS = ("rows", "texts", "lists")


def bomb(kind: str) -> bytes:
    """A table of less than a megabyte that would take gigabytes."""
    zeros = np.zeros(4_000_000, np.int64)
    if kind == "rows":
        made = pa.table({f"c{n}": zeros for n in range(8)})
    elif kind == "texts":
        indices = pa.array(np.zeros(200_000, np.int32))
        made = pa.table({"image_id": pa.DictionaryArray.from_arrays(indices, pa.array(["x" * 20_000]))})
    else:
        one = pa.ListArray.from_arrays(pa.array([0, len(zeros)], pa.int32()), zeros)
        made = pa.table({f"c{n}": one for n in range(8)})
    sink = io.BytesIO()
    pq.write_table(made, sink, compression="zstd", store_schema=False)
    return sink.getvalue()
