"""How many values a Parquet file declares, read from its footer alone.

Arrow's own way to ask, `RowGroupMetaData.column`, lets a C++ exception through on some damaged footers (a histogram of
the wrong length, for one), which ends the process; its readers catch it. The footer is a struct in Thrift's compact
protocol (apache/thrift, doc/specs/thrift-compact-protocol.md) with the fields of apache/parquet-format's
parquet.thrift.
"""

from __future__ import annotations

from collections.abc import Iterator

MAGIC = b"PAR1"
_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = 1, 2, 3, 7, 8, 9, 10, 11, 12
_VARINTS = (4, 5, 6)
_ROW_GROUPS, _COLUMNS, _META_DATA, _NUM_VALUES = 4, 1, 3, 5
_DEPTH = 32
"""Structs within structs; Parquet's own go 6 deep."""


def column_values(data: bytes) -> list[tuple[int, ...]]:
    """The declared number of values of each column, row group by row group.

    Args:
        data: a whole Parquet file.

    Raises:
        ValueError: its footer is damaged.
    """
    length = int.from_bytes(data[-8:-4], "little")
    if data[-4:] != MAGIC or length > len(data) - 12:
        raise ValueError("its last bytes are not those of a Parquet file")
    footer = _Compact(data[len(data) - 8 - length : -8])
    groups: list[tuple[int, ...]] = []
    try:
        for field, kind in footer.fields():
            if (field, kind) == (_ROW_GROUPS, _LIST):
                groups += [_of_group(footer) for _ in footer.structs()]
            else:
                footer.skip(kind)
    except IndexError:
        raise ValueError("its footer is cut short") from None
    return groups


def _of_group(footer: _Compact) -> tuple[int, ...]:
    values: list[int] = []
    for field, kind in footer.fields():
        if (field, kind) == (_COLUMNS, _LIST):
            values += [_of_column(footer) for _ in footer.structs()]
        else:
            footer.skip(kind)
    return tuple(values)


def _of_column(footer: _Compact) -> int:
    values = 0
    for field, kind in footer.fields():
        if (field, kind) != (_META_DATA, _STRUCT):
            footer.skip(kind)
            continue
        for inner, inner_kind in footer.fields():
            if inner == _NUM_VALUES and inner_kind in _VARINTS:
                values = max(values, footer.integer())
            else:
                footer.skip(inner_kind)
    return values


class _Compact:
    """A reader of Thrift's compact protocol; past the end it raises IndexError."""

    def __init__(self, content: bytes) -> None:
        self._content, self._at = content, 0

    def fields(self) -> Iterator[tuple[int, int]]:
        """(number, type) of each field of a struct; its value is to be read or skipped before the next."""
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self.integer()
            yield number, head & 15

    def structs(self) -> range:
        """One item per struct of a list, each of which is to be read."""
        size, kind = self._list()
        if kind != _STRUCT:
            raise ValueError("its footer is damaged")
        return range(size)

    def integer(self) -> int:
        """A signed number."""
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def skip(self, kind: int, depth: int = 0) -> None:
        """Go over a value."""
        if depth > _DEPTH:
            raise ValueError("its footer is nested too deeply")
        if kind in _VARINTS:
            self._varint()
        elif kind == _BYTE:
            self._at += 1
        elif kind == _DOUBLE:
            self._at += 8
        elif kind == _BINARY:
            length = self._varint()
            self._at += length
        elif kind in (_LIST, _SET):
            size, inner = self._list()
            for _ in range(size):
                self._element(inner, depth)
        elif kind == _MAP:
            size = self._varint()
            kinds = self._byte() if size else 0
            for _ in range(size):
                self._element(kinds >> 4, depth)
                self._element(kinds & 15, depth)
        elif kind == _STRUCT:
            for _, inner in self.fields():
                self.skip(inner, depth + 1)
        elif kind not in (_TRUE, _FALSE):
            raise ValueError("its footer is damaged")

    def _element(self, kind: int, depth: int) -> None:
        """Go over a value of a list or map, in which a truth value takes a byte."""
        if kind in (_TRUE, _FALSE):
            self._byte()
        else:
            self.skip(kind, depth + 1)

    def _list(self) -> tuple[int, int]:
        head = self._byte()
        size = head >> 4
        return (self._varint() if size == 15 else size), head & 15

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("its footer is damaged")

    def _byte(self) -> int:
        byte = self._content[self._at]
        self._at += 1
        return byte
