"""Which object an image gets, and what its content and its name follow from."""

from __future__ import annotations

import io
from dataclasses import dataclass

from pydicom.dataset import Dataset

from cxrscale.inference.dicom_objects import EMPTY_MASK_SUFFIX, SC, SEG, SR
from cxrscale.inference.dicom_objects.origin import Origin, making, origin_of
from cxrscale.inference.dicom_objects.sc import encode_capture
from cxrscale.inference.dicom_objects.seg import encode_mask
from cxrscale.inference.dicom_objects.source import read_source
from cxrscale.inference.dicom_objects.sr import encode_report
from cxrscale.inference.objects import Draft, Drafter
from cxrscale.inference.prediction import Prediction, Provenance
from cxrscale.inference.stored_images import read_input
from cxrscale.io import Strictness, load_image, rle_masks, storage
from cxrscale.types import GrayImage, UnreadableImageError

_SUFFIX = {SEG: ".seg.dcm", SR: EMPTY_MASK_SUFFIX, SC: ".sc.dcm"}


def object_drafter(kind: str, provenance: Provenance) -> Drafter:
    """What makes the objects of a kind; see `dicom_objects.drafter`."""
    origin = origin_of(provenance)

    def draft(prediction: Prediction) -> Draft:
        data = read_input(prediction.path)
        made, image = _chosen(kind, provenance, prediction, data)
        identity = (origin.checkpoint, origin.thresholds, storage.digest(data))
        return Draft(_SUFFIX[made], identity, lambda: image.encode(made))

    return draft


def encode_object(kind: str, provenance: Provenance, prediction: Prediction, data: bytes) -> bytes:
    """The object of an image that is in memory; of an empty mask a report instead of a segmentation.

    Args:
        kind: see `dicom_objects.KINDS`.
        data: the image's file.

    Raises:
        UnreadableImageError: the file is no DICOM, or its header lacks what an object must name.
    """
    made, image = _chosen(kind, provenance, prediction, data)
    return image.encode(made)


def _chosen(kind: str, provenance: Provenance, prediction: Prediction, data: bytes) -> tuple[str, _Predicted]:
    """What is made of an image, and of what."""
    source = read_source(data)
    if (source.Rows, source.Columns) != (prediction.height, prediction.width):
        raise UnreadableImageError("the file has another size than when it was predicted")
    mask_HW = _mask(prediction)
    # A segmentation of an empty mask says less than a report of what was not found, and viewers refuse it.
    made = SR if kind == SEG and (mask_HW is None or not mask_HW.any()) else kind
    # Segmenters have one; a prediction may name others beside it, such as a gate's.
    finding = provenance.recipe.data.findings[0]
    return made, _Predicted(source, origin_of(provenance), prediction, finding, mask_HW, data)


@dataclass(frozen=True, slots=True)
class _Predicted:
    """All that an object is made of."""

    source: Dataset
    origin: Origin
    prediction: Prediction
    finding: str
    """What the mask is of."""
    mask_HW: rle_masks.Mask | None
    data: bytes

    def encode(self, kind: str) -> bytes:
        """The file of an object.

        Raises:
            UnreadableImageError: highdicom refuses the header.
        """
        # Before `making`, which holds the lock that reading takes.
        image_HW = self._image() if kind == SC else None
        with making(kind):
            file = io.BytesIO()
            self._dataset(kind, image_HW).save_as(file, enforce_file_format=True)
            return file.getvalue()

    def _image(self) -> GrayImage:
        return load_image(self.data, name=self.prediction.path, strictness=Strictness.LENIENT).image_HW

    def _dataset(self, kind: str, image_HW: GrayImage | None) -> Dataset:
        if image_HW is not None:
            return encode_capture(self.source, self.origin, self.prediction, image_HW, self.mask_HW)
        if kind == SEG and self.mask_HW is not None:
            return encode_mask(self.source, self.origin, self.finding, self.mask_HW, self.prediction.spacing_mm)
        return encode_report(self.source, self.origin, self.prediction)


def _mask(prediction: Prediction) -> rle_masks.Mask | None:
    """(H, W) bool at the image's own size; None for a classifier."""
    if prediction.mask_rle is None or prediction.height is None or prediction.width is None:
        return None
    return rle_masks.decode(prediction.mask_rle, (prediction.height, prediction.width))
