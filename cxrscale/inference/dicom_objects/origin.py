"""What made an object: the model that all of a run's objects name, and the UIDs that follow from it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from logging import CRITICAL, getLogger

from cxrscale import __version__
from cxrscale.inference.prediction import Provenance
from cxrscale.io import dicom
from cxrscale.types import UnreadableImageError

MANUFACTURER = "cxrscale"
_NAMESPACE = uuid.UUID("6f1d3f0e-5b7c-5e0a-9f5e-0c3a7d1b2e44")
"""Of the UIDs; a fixed random one, so that they meet nobody else's."""
_LO = 64
"""Characters of the value representation LO (PS3.5 6.2)."""


@dataclass(frozen=True, slots=True)
class Origin:
    """The run behind an object."""

    run: str
    """The name of its folder in plain characters, without the path, which may name a person."""
    checkpoint: str
    """Digest of the weights, 64 hexadecimal digits: all that an LO holds."""
    thresholds: str
    """Digest of thresholds.json; empty where the run has none."""
    threshold: Mapping[str, float]
    """Finding -> the threshold of its call."""
    version: str
    """Of cxrscale."""

    @property
    def algorithm(self) -> str:
        """AlgorithmName."""
        return f"{MANUFACTURER} {self.run}"[:_LO].rstrip()

    def uid(self, source_uid: str, *names: str) -> str:
        """The same UID for the same weights, thresholds, source image and names (PS3.5 B.2: a UUID under 2.25).

        Args:
            source_uid: the source's SOPInstanceUID.
            names: what the UID is for.
        """
        text = "\n".join((self.checkpoint, self.thresholds, source_uid, *names))
        return f"2.25.{uuid.uuid5(_NAMESPACE, text).int}"


def origin_of(provenance: Provenance) -> Origin:
    """What a run's objects say of it."""
    name = provenance.run.rstrip("/").rpartition("/")[2]
    return Origin(
        plain(name),
        provenance.checkpoint,
        provenance.thresholds,
        provenance.threshold,
        __version__,
    )


def plain(text: str) -> str:
    """A name of our own as every character set and value representation holds it."""
    return "".join(char if char.isascii() and char.isprintable() and char != "\\" else "_" for char in text)


@contextmanager
def making(what: str) -> Iterator[None]:
    """Silence pydicom and highdicom, and turn their errors into the reason why there is no object.

    Both put values in messages: highdicom warns of a name without `^` and prints the name. So of an error only its type
    is told.

    Raises:
        UnreadableImageError: the library refuses the source's header.
    """
    log = getLogger("highdicom")
    with dicom.tags.silence_pydicom():
        level = log.level
        log.setLevel(CRITICAL + 1)
        try:
            yield
        except UnreadableImageError:
            raise
        except Exception as error:
            kind = type(error).__name__
            raise UnreadableImageError(f"no {what} can be made of this file's header: highdicom's {kind}") from None
        finally:
            log.setLevel(level)
