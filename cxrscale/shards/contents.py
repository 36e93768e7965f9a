"""dataset.json: the digests of all files of a dataset, under one that is the dataset's name.

It is published last. A dataset that has a manifest but no dataset.json is of an earlier version, which is said once, or
its publishing was cut short, which the same `cxrscale shard` completes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import lru_cache

from cxrscale.io import Artifact, ArtifactPart, encode_artifact, read_artifact, storage
from cxrscale.types import UserError

LOG = logging.getLogger("cxrscale")
NAME = "dataset.json"
_Bytes = bytes  # the name is that of a field below


class FileDigest(ArtifactPart):
    """What a file has to be."""

    blake3: str
    bytes: int

    @classmethod
    def of(cls, content: _Bytes) -> FileDigest:
        """The digest of these bytes."""
        return cls(blake3=storage.digest(content), bytes=len(content))

    def difference(self, content: _Bytes) -> str | None:
        """How the bytes of a file differ, in a few words; None where they do not."""
        if len(content) != self.bytes:
            return f"{len(content)} bytes, {NAME} has {self.bytes}"
        return None if storage.digest(content) == self.blake3 else f"differs from its digest in {NAME}"


class Contents(Artifact):
    """The content of dataset.json."""

    schema_version: int = 1
    digest: str
    """Of all the digests below: the name by which runs refer to the dataset (`manifest` in their run.json)."""
    files: Mapping[str, FileDigest]
    """Name -> digest of each file of the dataset: manifest, fingerprints, lists, tars and their indices."""


def write(root: str, files: Mapping[str, FileDigest]) -> None:
    """Publish dataset.json."""
    ordered = dict(sorted(files.items()))
    storage.write(storage.join(root, NAME), encode_artifact(Contents(digest=_digest(ordered), files=ordered)))


def read(root: str) -> Contents | None:
    """A dataset's dataset.json; None for a dataset of an earlier version.

    Raises:
        UserError: it is damaged.
    """
    address = storage.join(root, NAME)
    if not storage.exists(address):
        return None
    contents = read_artifact(Contents, address, remedy(root))
    if contents.digest != _digest(contents.files):
        raise UserError(f"{address}: field digest is not that of its files; {remedy(root)}")
    return contents


def read_file(root: str, name: str, contents: Contents | None) -> bytes:
    """The bytes of a dataset's file, held against its digest where there is one.

    Raises:
        UserError: they differ, or the file does not exist.
    """
    address = storage.join(root, name)
    content = storage.read(address)
    if contents is not None:
        if name not in contents.files:
            raise UserError(f"{address} is not in {NAME} beside it; remove the file")
        if (difference := contents.files[name].difference(content)) is not None:
            raise UserError(f"{address} is damaged ({difference}); {remedy(root)}")
    return content


def remedy(root: str) -> str:
    """How a damaged dataset is mended."""
    return f"see `cxrscale verify {root}`; indices and fingerprints come back with --repair, all else by sharding again"


UNSEALED = f"it has no {NAME}, so damage to its tables may stay unseen; shard it again into another folder to have one"


@lru_cache(maxsize=256)
def tell_of_older(root: str, what: str) -> None:
    """Say what a dataset of an earlier version lacks: once per process, dataset and lack."""
    LOG.warning("%s is of an older version: %s", root, what)


def _digest(files: Mapping[str, FileDigest]) -> str:
    lines = [f"{name} {file.blake3} {file.bytes}\n" for name, file in sorted(files.items())]
    return storage.digest("".join(lines).encode(errors="surrogateescape"))
