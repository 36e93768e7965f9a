"""Files of single images beside the file of predictions: its row names them, a command that is repeated keeps them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from cxrscale.inference.predictor import Prediction
from cxrscale.io import storage
from cxrscale.sources import image_name
from cxrscale.types import AccessError, UnreadableImageError, one_line

FOLDER = "objects"
"""Folder of these files, in the folder of predictions."""
_STEM = 80
"""Characters of an input's name in the name of its object: most file systems end at 255 bytes."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A file to be written for an image."""

    suffix: str
    """Of its name, with the dot."""
    identity: tuple[str, ...]
    """Digests of all that the content depends on: the input's bytes, the weights, the thresholds, ..."""
    encode: Callable[[], bytes]
    """Makes the content; called only where the file is not there yet. May raise UnreadableImageError."""


Drafter = Callable[[Prediction], Draft]
"""Says what to write for an image that was read. Raises UnreadableImageError with the reason where there is nothing."""


def write_object(out: str, kind: str, prediction: Prediction, draft: Drafter) -> Prediction:
    """Write the file of one image into `out`/objects, whole or not at all, unless it is there.

    Args:
        out: the folder or address of predictions.
        kind: the key under which the prediction names the file or the reason.
        prediction: one without probabilities stays as it is.

    Returns:
        The prediction with `objects[kind]`, or with `object_errors[kind]` where there is nothing to write.

    Raises:
        UserError: the file cannot be written.
    """
    if prediction.error:
        return prediction
    try:
        chosen = draft(prediction)
        name = storage.join(FOLDER, object_name(prediction.path, chosen))
        address = storage.join(out, name)
        content = None if storage.exists(address) else chosen.encode()
    except AccessError as error:
        return replace(_failed(prediction, kind, error), unreachable=True)
    except UnreadableImageError as error:
        return _failed(prediction, kind, error)
    if content is not None:
        storage.write(address, content)
    return replace(prediction, objects={**prediction.objects, kind: name})


def object_name(path: str, draft: Draft) -> str:
    """The name of an image's file: the input's own, in plain characters, then a digest of what it is made of.

    Inputs of one name in two folders differ by the digest; what another run or other thresholds give does too.
    """
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", image_name(path))[:_STEM].lstrip(".") or "image"
    digest = storage.digest("\n".join((*draft.identity, draft.suffix)).encode())
    return f"{stem}-{digest[:16]}{draft.suffix}"


def has_object(prediction: Prediction, kind: str) -> bool:
    """Whether nothing is left to be written for an image."""
    return bool(prediction.error) or kind in prediction.objects or kind in prediction.object_errors


def _failed(prediction: Prediction, kind: str, error: Exception) -> Prediction:
    return replace(prediction, object_errors={**prediction.object_errors, kind: one_line(error)})
