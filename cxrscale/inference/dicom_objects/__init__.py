"""Predictions as DICOM objects in the study of their image: segmentation, structured report, secondary capture.

Patient and study are those of the source's header and of nothing else. highdicom is imported by the first object.
"""

from __future__ import annotations

from importlib.util import find_spec

from cxrscale.inference.objects import Drafter
from cxrscale.inference.prediction import Prediction, Provenance
from cxrscale.types import UserError

SEG, SR, SC = "dicom-seg", "dicom-sr", "dicom-sc"
KINDS: tuple[str, ...] = (SEG, SR, SC)
"""Values of --format."""
EMPTY_MASK_SUFFIX = ".sr.dcm"
"""How the name of a report ends, which stands for the segmentation of an empty mask."""


def check_kind(kind: str, provenance: Provenance) -> None:
    """Check that objects of this kind can be made of a run's predictions.

    Raises:
        UserError: highdicom is not installed, or the kind is one of masks and the run gives none.
    """
    if find_spec("highdicom") is None:
        raise UserError(f"--format {kind} needs highdicom; install cxrscale[dicom]")
    if kind == SEG and provenance.recipe.data.task != "segment":
        raise UserError(f"--format {SEG} is one of masks, and {provenance.run} is a classifier; give {SR} or {SC}")


def drafter(kind: str, provenance: Provenance) -> Drafter:
    """What makes the object of an image.

    Args:
        kind: one of `KINDS`.
    """
    from cxrscale.inference.dicom_objects.drafts import object_drafter

    return object_drafter(kind, provenance)


def encode_object(kind: str, provenance: Provenance, prediction: Prediction, data: bytes) -> bytes:
    """The object of an image that is in memory; see `drafts.encode_object`."""
    from cxrscale.inference.dicom_objects import drafts

    return drafts.encode_object(kind, provenance, prediction, data)
