"""What values a field takes, in words: from its type and its bounds, for `--help-fields`."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from cxrscale.config.section import Section

_KINDS: dict[Any, str] = {
    int: "integer",
    float: "number",
    str: "text",
    bool: "true or false",
    Any: "any value",
    type(None): "null",
}
_BOUNDS: dict[type, tuple[str, str]] = {
    annotated_types.Ge: ("ge", "at least {}"),
    annotated_types.Gt: ("gt", "above {}"),
    annotated_types.Le: ("le", "at most {}"),
    annotated_types.Lt: ("lt", "below {}"),
    annotated_types.MinLen: ("min_length", "{} or more of them"),
}


def ranges(section: type[Section], prefix: str = "") -> dict[str, str]:
    """Dotted field name -> its values and its default, for every field of a section."""
    described: dict[str, str] = {}
    for name, info in section.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            described |= ranges(kind, f"{prefix}{name}.")
        else:
            described[f"{prefix}{name}"] = f"{_values(kind, info.metadata)}; default: {_default(info)}"
    return described


def _values(kind: Any, metadata: list[Any] | tuple[Any, ...] = ()) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _values(arguments[0], (*arguments[1:], *metadata))
    bounds = " and ".join(_bound(item) for item in _flat(metadata) if type(item) in _BOUNDS)
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        parts = [_values(argument, metadata if argument is not type(None) else ()) for argument in arguments]
        return " or ".join(dict.fromkeys(parts))
    if origin is tuple:
        several = len(arguments) == 2 and arguments[1] is Ellipsis
        inner = f"list of {_values(arguments[0])}" if several else f"[{', '.join(map(_values, arguments))}]"
    elif origin is dict or (isinstance(origin, type) and issubclass(origin, Mapping)):
        inner = f"map of {_values(arguments[0])} to {_values(arguments[1])}"
    elif isinstance(kind, type) and issubclass(kind, Section):
        inner = f"map of {', '.join(kind.model_fields)}"
    else:
        inner = _KINDS[kind]
    return f"{inner}, {bounds}" if bounds else inner


def _flat(metadata: list[Any] | tuple[Any, ...]) -> list[Any]:
    """The constraints; those of an inner Field come packed in a FieldInfo."""
    return [part for item in metadata for part in (item.metadata if isinstance(item, FieldInfo) else (item,))]


def _bound(item: Any) -> str:
    attribute, words = _BOUNDS[type(item)]
    value = getattr(item, attribute)
    return words.format(f"{value:g}" if isinstance(value, float) else f"{value:,}")


def _default(info: FieldInfo) -> str:
    value = info.default
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if value is PydanticUndefined:
        return "none"
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return "{}" if value == {} else str(value)
