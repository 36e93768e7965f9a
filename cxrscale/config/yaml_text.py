"""YAML as recipes use it: version 1.2's scalars, no key twice, and text that stays as it was typed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from cxrscale.types import UserError, one_line

# YAML 1.2.2, section 10.3.2 (core schema). PyYAML's own resolvers are those of 1.1, where 1e-3 is text, `on` is true,
# 010 is 8 and 2:24 is 144.
_NULL = re.compile(r"(?:~|null|Null|NULL|)$")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$")
_FLOAT = re.compile(
    r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)


class _Loader(yaml.SafeLoader):
    """Reads 1.2's scalars and refuses a key that stands twice: the last of the two would win in silence."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's way of declaring them

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            if key_node.value in lines:
                raise _TwiceError(f"{key_node.value} stands twice, on lines {lines[key_node.value]} and {line}")
            lines[str(key_node.value)] = line
        return super().construct_mapping(node, deep)


class _TextLoader(yaml.SafeLoader):
    """Reads lists and maps, and leaves every scalar as text."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012


class _Dumper(yaml.SafeDumper):
    """Quotes whatever version 1.1 or 1.2 would not read as text."""

    def ignore_aliases(self, data: Any) -> bool:
        """A list that occurs twice is written twice: a person edits the one and not the other."""
        del data
        return True


class _TwiceError(yaml.YAMLError):
    """A key that occurs twice in a mapping."""


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """A text; PyYAML writes these line breaks unescaped, and reads them as spaces, unless the quotes are double."""
    style = '"' if re.search("[\x85\u2028\u2029\ufeff]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"<<$"), ["<"])
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", _NULL, ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Dumper.add_representer(str, _text)


def read_yaml(data: bytes, where: str) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping.

    Raises:
        UserError: not UTF-8, not YAML, a key twice in one mapping, or no mapping; the message begins with `where`.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        kind = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "another encoding"
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{where} is in {kind}, not UTF-8 (line {line}); save it as UTF-8") from None
    try:
        tree = yaml.load(text, _Loader)
    except _TwiceError as error:
        raise UserError(f"{where}: {error}; merge the two") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{where} is not YAML: {one_line(error)}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{where} holds a {type(tree).__name__}, not sections; see `cxrscale config`")
    return {str(key): value for key, value in tree.items()}


def read_value(text: str) -> Any:
    """A value from the command line (`3e-4`, `[a, b]`, `null`); what is not YAML is text."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text


def read_text(text: str) -> str:
    """A text from the command line, as typed; only quotes around all of it are removed."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        value = read_value(text)
        return value if isinstance(value, str) else text
    return text


def read_texts(text: str) -> Any:
    """`[a, b]` as a list of texts (`010` and `~` stay as typed), and anything else as a list of one text."""
    if not text.strip().startswith("["):
        return [read_text(text)]
    try:
        return yaml.load(text, _TextLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text


def write_yaml(tree: Mapping[str, Any], flow: bool | None = False) -> str:
    """The mapping as YAML that reads back as the same, in its own order; `flow=None` writes inner lists in brackets."""
    text: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=flow)
    return text
