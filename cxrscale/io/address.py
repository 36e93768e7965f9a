"""What an address may be: a local path, a file URI, or a folder or object in a store that fsspec reaches."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote

from cxrscale.types import UserError

STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "http", "https", "memory")
"""Schemes of network file systems. Others would be read as local folders or fail deep inside fsspec."""
LOCAL = ("file", "local")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_ONE_SLASH = re.compile(rf"({'|'.join(STORES)}):", re.IGNORECASE)
_FILE = re.compile(r"(?:file|local):(?://)?", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@lru_cache(maxsize=8192)
def normalize(address: str) -> str:
    """The one spelling of an address: a local path, or `scheme://bucket/path` with the scheme in lower case.

    `file:///x`, `file://localhost/x` and `file:/x` (RFC 8089, percent signs decoded) are the local path /x; `~/x` is in
    the home folder. A local path may hold any character but control characters.

    Raises:
        UserError: nothing, an unknown scheme, one slash too few, no bucket, a password in it, `..` in a store, or
            another machine's file.
    """
    if not address.strip():
        raise UserError("an empty address; give a path or s3://bucket/folder")
    if _CONTROL.search(unquote(address) if _FILE.match(address) else address):
        raise UserError(f"{address!r} holds a control character; correct the path")
    if _FILE.match(address):
        return _local_uri(address)
    match = _SCHEME.match(address)
    if match is None:
        return _local(address)
    scheme, rest = match[1].lower(), address[match.end() :]
    if scheme not in STORES:
        raise UserError(f"{scheme}:// is not supported; give a path, or s3://, gs://, az://")
    bucket = rest.split("/", 1)[0]
    if "@" in bucket and scheme not in ("az", "abfs", "abfss"):
        # Not shown: it may hold a password.
        raise UserError(f"a {scheme}:// address with credentials in it; put them into the environment instead")
    if not bucket and scheme != "memory":
        raise UserError(f"{address} names no bucket; write {scheme}://bucket/folder")
    if ".." in rest.split("/"):
        raise UserError(f"{address} holds '..', which a store does not resolve; write the folder itself")
    return f"{scheme}://{rest}"


def is_remote(address: str) -> bool:
    """Whether the address needs a network file system (s3://, gs://, ...)."""
    return _SCHEME.match(normalize(address)) is not None


def local_path(address: str) -> Path:
    """The path of a local address."""
    return Path(normalize(address))


def join(root: str | Path, *names: str) -> str:
    """root/name/..., for local paths and addresses."""
    root = normalize(str(root))
    return "/".join([root.rstrip("/"), *names]) if _SCHEME.match(root) else str(Path(root).joinpath(*names))


def absolute(address: str) -> str:
    """The address with an absolute path, because workers run in other directories."""
    address = normalize(address)
    return address if _SCHEME.match(address) else str(Path(address).resolve())


def _local(address: str) -> str:
    if one := _ONE_SLASH.match(address):
        scheme, rest = one[1].lower(), address[one.end() :].lstrip("/")
        raise UserError(f"{address} has too few slashes; write {scheme}://{rest} (or ./{address} for a local file)")
    if "::" in address and "://" in address:
        raise UserError(f"{address}: chained file systems are not supported; give one address")
    if address == "~" or address.startswith("~/"):
        try:
            return str(Path(address).expanduser())
        except RuntimeError:
            raise UserError(f"{address}: there is no home folder here; give an absolute path") from None
    return address


def _local_uri(address: str) -> str:
    rest = address[address.index(":") + 1 :]
    if rest.startswith("//"):
        host, slash, path = rest[2:].partition("/")
        if host.lower() not in ("", "localhost") or not slash:
            raise UserError(f"{address} names the machine {host!r}; write file:///{host}{slash}{path} for a local path")
        rest = f"/{path}"
    if not rest.startswith("/") or not rest.strip("/"):
        raise UserError(f"{address} is not a file address; write file:///folder")
    return unquote(rest)
