"""Which files of a source are images, and how tables and lists name them: one rule for all sources.

A file is an image of a source if its suffix, in upper or lower case, is one of the source's formats, or if it has no
suffix and begins like one. Links are followed. What looks like an image and is left out is counted, with the reason.

A table or list names an image by its file name. Folders before the name, the suffix and upper or lower case make no
difference: `images_001\\00000013_005` and `00000013_005.PNG` are the same image.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cxrscale.io import FoundFile, storage, walk
from cxrscale.sources.ledger import LedgerBook
from cxrscale.types import UserError


@dataclass(frozen=True, slots=True)
class Format:
    """A format of image files."""

    name: str
    suffixes: tuple[str, ...]
    magic: bytes
    """What each file has at `magic_at`."""
    magic_at: int = 0


PNG = Format("PNG", (".png",), b"\x89PNG\r\n\x1a\n")
JPEG = Format("JPEG", (".jpeg", ".jpg", ".jpe"), b"\xff\xd8\xff")
DICOM = Format("DICOM", (".dcm", ".dicom", ".dic"), b"DICM", 128)

Accept = Callable[[tuple[str, ...]], str]
"""Folders below the root -> why images there are left out, or '' where they are not."""

FORMATS = (PNG, JPEG, DICOM)
_IMAGE_SUFFIXES = frozenset(suffix for known in FORMATS for suffix in known.suffixes)
_HEAD = 132
_OTHER_IMAGES = (".bmp", ".gif", ".jp2", ".nii", ".npy", ".tif", ".tiff", ".webp")
_ARCHIVES = (".7z", ".rar", ".tar", ".tgz", ".zip")
_COMPRESSED = (".bz2", ".gz", ".xz", ".zst")
_SUFFIX = re.compile(r"\.[A-Za-z][A-Za-z0-9]{0,7}")
"""A suffix begins with a letter: what follows the last dot of a DICOM UID does not."""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image of a source."""

    name: str
    """File name without suffix, as it is written."""
    folders: tuple[str, ...]
    """Below the root."""
    path: str


def image_name(text: str) -> str:
    """The name of an image without folders and suffix, from what a table, a list or a file is called."""
    return _stem(text.replace("\\", "/").rsplit("/", 1)[-1].strip("\"' \t\r\n"))


def image_key(text: str) -> str:
    """What two names of one image have in common: `image_name` without upper case."""
    return image_name(text).casefold()


def absolute_root(root: str) -> str:
    """The root with a local path made absolute, but not resolved: images are read where the user has put them."""
    return root if storage.is_remote(root) else str(storage.local_path(root).absolute())


def find_images(root: str, formats: Collection[Format], accept: Accept, book: LedgerBook) -> list[ImageFile]:
    """The images under a root, sorted by path; what looks like an image and is none of them goes into the ledger.

    Raises:
        UserError: a folder or file cannot be read.
    """
    images = []
    for file in walk(root):
        reason = _reason_to_leave_out(file, formats, accept)
        if reason is None:
            images.append(ImageFile(_stem(file.parts[-1]), file.parts[:-1], file.path))
        elif reason:
            book.leave_out(reason, "/".join(file.parts))
    return images


def by_name(images: Collection[ImageFile], book: LedgerBook) -> dict[str, ImageFile]:
    """`image_key` -> image, for sources whose images have unique names.

    Raises:
        UserError: two files have the same name, and are not links to one file.
    """
    unique: dict[str, ImageFile] = {}
    for image in images:
        first = unique.setdefault(image_key(image.name), image)
        if first is not image:
            refuse_second(first, image, book)
    return unique


def refuse_second(first: ImageFile, second: ImageFile, book: LedgerBook) -> None:
    """Raise UserError for two files of one name, unless they are one file, which then goes into the ledger."""
    if not storage.is_remote(first.path) and Path(first.path).samefile(second.path):
        book.leave_out("a link to an image that is there already", "/".join((*second.folders, second.name)))
        return
    if first.folders == second.folders:
        raise UserError(f"{second.path} has the same name as {first.path}; remove one of them")
    name = PurePosixPath(second.path).name
    raise UserError(f"{name} is in two folders, {first.path} and {second.path}; remove one of them")


def _reason_to_leave_out(file: FoundFile, formats: Collection[Format], accept: Accept) -> str | None:
    """None for an image of the source, '' for what does not look like an image, else why it is left out."""
    *folders, name = file.parts
    format_ = _format_of(file)
    if format_ is None:
        return _reason_of_other(name)
    if file.problem:
        return file.problem
    if "__MACOSX" in folders or name.startswith("._"):
        return "metadata of macOS"
    if any(part.startswith(".") for part in file.parts):
        return "hidden"
    if not name.isprintable() or not "".join(folders).isprintable():
        return "its name is not printable UTF-8; rename it"
    if format_ not in formats:
        return f"{format_.name}, where the source has {' or '.join(wanted.name for wanted in formats)}"
    return accept(tuple(folders)) or None


def _reason_of_other(name: str) -> str:
    suffix = _suffix(name)
    inner = _suffix(name[: -len(suffix)]) if suffix in _COMPRESSED else ""
    if name.startswith("."):
        return ""
    if suffix in _ARCHIVES or inner == ".tar":
        return "an archive that is not unpacked"
    if inner in _IMAGE_SUFFIXES:
        return f"compressed ({inner}{suffix}); unpack it"
    return f"{suffix} is not read" if suffix in _OTHER_IMAGES else ""


def _format_of(file: FoundFile) -> Format | None:
    """The format that a suffix names, or, without one, that the file begins like."""
    name = file.parts[-1]
    suffix = _suffix(name)
    if suffix:
        return next((known for known in FORMATS if suffix in known.suffixes), None)
    if file.problem or name.startswith(".") or not name.isprintable():
        return None
    head = _head(file.path)
    return next((known for known in FORMATS if head[known.magic_at :].startswith(known.magic)), None)


def _head(path: str) -> bytes:
    if not storage.is_remote(path) and not Path(path).is_file():  # opening a pipe waits for who writes it
        return b""
    return storage.read_start(path, _HEAD)


def _suffix(name: str) -> str:
    """The suffix in lower case, with its dot; '' for a name without."""
    dot = name.rfind(".")
    return name[dot:].lower() if dot > 0 and _SUFFIX.fullmatch(name[dot:]) else ""


def _stem(name: str) -> str:
    """A file name without the suffix of an image."""
    suffix = _suffix(name)
    return name[: -len(suffix)] if suffix in _IMAGE_SUFFIXES else name
