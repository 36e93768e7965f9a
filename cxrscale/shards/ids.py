"""Keyed IDs: what stands in a dataset for the patient and image IDs of its source.

Names of published files name patients (`00000013_005.png`), and whoever has the archive's list can hash all of it: only
a secret key hides them. The key stays with the person who packs; tasks get hashes, and the manifest gets the key's
fingerprint, so that datasets of different keys are not joined as if they had no patient in common.
"""

from __future__ import annotations

import csv
import hashlib
import io
import logging
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cxrscale import sources
from cxrscale.config import DEFAULT_STATE_HOME, PATIENT_KEY, STATE_HOME, Pack
from cxrscale.io import storage
from cxrscale.types import UserError

LOG = logging.getLogger("cxrscale")
ORIGINAL = "original"
"""The scheme of a dataset with its source's own IDs; that of the others is the fingerprint of their key."""
MAP_COLUMNS = ("image_id", "source_image_id", "patient", "source_patient")

_LONGEST_KEY = hashlib.blake2b.MAX_KEY_SIZE
_OLD_DEFAULT = b"cxrscale"
"""The key of older versions where the user gave none."""


@dataclass(frozen=True, slots=True)
class Key:
    """A secret key of IDs."""

    secret: bytes = field(repr=False)
    """1 to 64 bytes."""

    def hash(self, source: str, name: str) -> str:
        """The ID that stands for a source's ID: 16 hexadecimal digits of keyed BLAKE2b (RFC 7693).

        A patient and an image of the same name get the same ID: so an image that is its own patient stays one.
        """
        # A file's name need not be UTF-8: Python has its other bytes as surrogates.
        text = f"{source}:{name}".encode(errors="surrogatepass")
        return hashlib.blake2b(text, key=self.secret, digest_size=8).hexdigest()

    @property
    def fingerprint(self) -> str:
        """Equal for equal keys, and says nothing else about a key that cannot be guessed: 16 hexadecimal digits."""
        hasher = hashlib.blake2b(b"fingerprint", key=self.secret, digest_size=8, person=b"cxrscale key")
        return hasher.hexdigest()


def read_key(settings: Pack) -> Key | None:
    """The key that the settings ask for; None with pack.patient_ids=original.

    It is read from pack.key_file, else from CXRSCALE_PATIENT_KEY, else from the user's key file, which is made with a
    random key at first use.

    Raises:
        UserError: the key is empty, or its file cannot be read or made.
    """
    if settings.patient_ids == "original":
        return None
    if settings.key_file is not None:
        return _key(storage.read(settings.key_file).strip(), settings.key_file)
    if PATIENT_KEY in os.environ:
        return _key(os.fsencode(os.environ[PATIENT_KEY]), PATIENT_KEY)
    path = user_key_file()
    try:
        if not path.exists():
            _make_key_file(path)
        if path.stat().st_mode & 0o077:
            raise UserError(f"{path} can be read by other users; run `chmod 600 {path}`")
        return _key(path.read_bytes().strip(), str(path))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; set {PATIENT_KEY} or pack.key_file to a key of your own") from None


def user_key_file() -> Path:
    """Where this user's key is kept unless another is given.

    Raises:
        UserError: the user has no home folder.
    """
    given = os.environ.get(STATE_HOME, "")
    try:
        # A relative path is to be ignored (XDG Base Directory 0.8).
        folder = Path(given if given.startswith("/") else DEFAULT_STATE_HOME).expanduser()
    except RuntimeError:
        raise UserError(f"no home folder to keep a key in; set {PATIENT_KEY} or pack.key_file") from None
    return folder / "cxrscale" / "patient.key"


def old_patient_hash(source: str, patient: str) -> str:
    """A patient's ID in a hashed dataset of an older version, which did not record its key."""
    key = os.environ.get(PATIENT_KEY, "").encode(errors="surrogateescape") or _OLD_DEFAULT
    return Key(key[:_LONGEST_KEY]).hash(source, patient)


def _key(secret: bytes, where: str) -> Key:
    if not secret.strip():
        raise UserError(f"{where} is empty, which would hide nobody; give a long random text, or unset it")
    return Key(secret if len(secret) <= _LONGEST_KEY else hashlib.blake2b(secret).digest())


def _make_key_file(path: Path) -> None:
    """Two processes may race: the one that is later takes the key of the other."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32) + "\n")
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(draft, path)
    except FileExistsError:
        return
    finally:
        draft.unlink()
    LOG.warning(
        "made a random key for patient and image ids: %s; keep it, datasets of different keys cannot be joined", path
    )


# The scheme of a dataset's IDs


def scheme(metadata: Mapping[str, Any]) -> str | None:
    """ORIGINAL, or the fingerprint of the key; None for a dataset of an older version, which did not record it."""
    fingerprint = metadata.get("key_fingerprint")
    return ORIGINAL if _choice(metadata) == "original" else None if fingerprint is None else str(fingerprint)


def is_old(metadata: Mapping[str, Any]) -> bool:
    """Whether its patients are hashed, but neither its image IDs nor by a key that is recorded."""
    return _choice(metadata) == "hashed" and metadata.get("key_fingerprint") is None


def refuse_other_keys(roots: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> None:
    """Refuse datasets whose patients cannot be compared: they would be taken for different ones.

    Raises:
        UserError: two datasets have IDs of different keys; or patient IDs of the same source, but different schemes.
    """
    for b in range(1, len(roots)):
        for a in range(b):
            if not _comparable(metadata[a], metadata[b]):
                raise UserError(
                    f"{roots[a]} ({_describe(metadata[a])}) and {roots[b]} ({_describe(metadata[b])}) cannot be used "
                    "together, because the same patient has different ids in them; shard one of them again as the other"
                )


def refuse_other_key(root: str, metadata: Mapping[str, Any], key: Key | None) -> None:
    """Refuse to take patients from a dataset whose IDs have another scheme than those that are to be written.

    Raises:
        UserError: they have.
    """
    ours = ORIGINAL if key is None else key.fingerprint
    if scheme(metadata) != ours:
        wanted = "pack.patient_ids=original" if key is None else f"the key {ours}"
        raise UserError(
            f"--patients-from {root}: it has {_describe(metadata)}, this command {wanted}; give the same key, or shard "
            "it again"
        )


def _choice(metadata: Mapping[str, Any]) -> str | None:
    pack = metadata.get("pack", {})
    choice = pack.get("patient_ids", pack.get("patients"))
    return None if choice is None else str(choice)


def _comparable(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    one, other = scheme(a), scheme(b)
    if one == other or _choice(a) is None or _choice(b) is None:
        return True
    keyed = ORIGINAL not in (one, other) and None not in (one, other)
    return not keyed and _namespace(a) != _namespace(b)


def _namespace(metadata: Mapping[str, Any]) -> Any:
    return metadata.get("patients_from", metadata.get("source"))


def _describe(metadata: Mapping[str, Any]) -> str:
    known = scheme(metadata)
    if known is None:
        return "hashed by an older version"
    return "original ids" if known == ORIGINAL else f"ids of the key {known}"


# What others call an image


def row_finder(
    image_ids: Sequence[str], metadata: Sequence[Mapping[str, Any]], settings: Pack
) -> Callable[[str], int | None]:
    """The row of `image_ids` that an image's name in its source means, with or without folders and suffix.

    Names in datasets with keyed IDs are found with the key of this user, where that is the datasets' own.

    Args:
        image_ids: (N,) IDs of images of the datasets.
        metadata: of each dataset.
        settings: say where the key is.
    """
    exact = {name: row for row, name in enumerate(image_ids)}
    folded: dict[str, set[int]] = {}
    for name, row in exact.items():
        folded.setdefault(sources.image_key(name), set()).add(row)
    keyed = [item for item in metadata if item.get("key_fingerprint")]
    key = read_key(settings) if keyed else None
    namespaces = [item["source"] for item in keyed if key is not None and item["key_fingerprint"] == key.fingerprint]

    def row_of(name: str) -> int | None:
        if name in exact:
            return exact[name]
        file = name.replace("\\", "/").rpartition("/")[2]
        stem = file.rpartition(".")[0] or file
        for source in namespaces:
            for spelling in (name, file, stem, f"{file}.png", f"{stem}.png", f"{stem}.jpeg"):
                assert key is not None
                if (row := exact.get(key.hash(source, spelling))) is not None:
                    return row
        rows = folded.get(sources.image_key(name), set())
        return next(iter(rows)) if len(rows) == 1 else None

    return row_of


# The private map


def write_map(address: str, dataset: str, rows: Sequence[tuple[str, str, str, str]]) -> None:
    """Write the private map from a dataset's IDs to those of its source, as CSV that only its owner can read.

    Args:
        address: a local path outside the dataset.
        dataset: the dataset's folder or address.
        rows: (image ID, the source's image ID, patient, the source's patient); the last is empty where the patient was
            taken from another dataset.

    Raises:
        UserError: see `check_map_address`; or the file cannot be written.
    """
    check_map_address(address, dataset)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([MAP_COLUMNS, *rows])
    storage.write(address, text.getvalue().encode(errors="surrogateescape"), private=True)


def check_map_address(address: str, dataset: str) -> None:
    """Check that a private map can be written there.

    Raises:
        UserError: it is inside the dataset, where whoever gets the dataset gets the map, or not on a local disk.
    """
    if storage.is_remote(address):
        raise UserError(f"--keep-map {address}: the map is private, so it stays on a local disk; give a path")
    path = storage.local_path(address).resolve()
    if not storage.is_remote(dataset) and path.is_relative_to(storage.local_path(dataset).resolve()):
        raise UserError(f"--keep-map {address} is inside the dataset {dataset}; keep it apart from it")


def read_map(address: str) -> dict[str, str]:
    """Image ID of a dataset -> the source's own, from the file that `cxrscale shard --keep-map` wrote.

    Raises:
        UserError: the file does not exist or is not such a map.
    """
    text = storage.read(address).decode(errors="surrogateescape")
    try:
        header, *rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    except (csv.Error, ValueError):
        header, rows = [], []
    if tuple(header) != MAP_COLUMNS or any(len(row) != len(MAP_COLUMNS) for row in rows):
        raise UserError(f"{address} is not a map of ids; give the file that `cxrscale shard --keep-map` wrote")
    return {image_id: source_image_id for image_id, source_image_id, *_ in rows}
