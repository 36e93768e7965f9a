"""A mask as a DICOM segmentation (PS3.3 A.51), on the pixels of its image."""

from __future__ import annotations

from highdicom import AlgorithmIdentificationSequence, PixelMeasuresSequence
from highdicom.seg import SegmentAlgorithmTypeValues, Segmentation, SegmentationTypeValues, SegmentDescription
from pydicom.dataset import Dataset

from cxrscale.inference.dicom_objects import codes
from cxrscale.inference.dicom_objects.origin import MANUFACTURER, Origin
from cxrscale.io import rle_masks

SERIES_NUMBER = 9801
_THICKNESS = 1.0
"""Of the slice, in millimeters: a projection has none, but readers of highdicom refuse pixel measures without it."""


def encode_mask(
    source: Dataset, origin: Origin, finding: str, mask_HW: rle_masks.Mask, spacing_mm: tuple[float, float] | None
) -> Dataset:
    """The segmentation of one finding.

    BINARY, not LABELMAP, which is of 2024 and most viewers do not show.

    Args:
        source: by `source.read_source`.
        mask_HW: (H, W) bool of the source's Rows and Columns, not empty.
        spacing_mm: distance between (rows, columns), where it is known.
    """
    uid = source.SOPInstanceUID
    segment = SegmentDescription(
        segment_number=1,
        segment_label=codes.finding(finding).meaning,
        segmented_property_category=codes.ABNORMALITY,
        segmented_property_type=codes.finding(finding),
        algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=AlgorithmIdentificationSequence(
            name=origin.algorithm,
            family=codes.ARTIFICIAL_INTELLIGENCE,
            version=origin.checkpoint,
            source=MANUFACTURER,
            parameters={"thresholds": origin.thresholds or "none"},
        ),
        tracking_uid=origin.uid(uid, "tracking", finding),
        tracking_id=codes.finding(finding).meaning,
        anatomic_regions=[codes.THORAX],
    )
    result = Segmentation(
        source_images=[source],
        pixel_array=mask_HW[None],
        segmentation_type=SegmentationTypeValues.BINARY,
        segment_descriptions=[segment],
        series_instance_uid=origin.uid(uid, "seg", "series"),
        series_number=SERIES_NUMBER,
        sop_instance_uid=origin.uid(uid, "seg"),
        instance_number=1,
        manufacturer=MANUFACTURER,
        manufacturer_model_name=origin.algorithm,
        software_versions=origin.version,
        device_serial_number=origin.checkpoint,
        content_label="SEGMENTATION",
        content_description=f"{codes.finding(finding).meaning}, automatic"[:64],
        series_description=f"{codes.finding(finding).meaning}, automatic segmentation"[:64],
        pixel_measures=None if spacing_mm is None else PixelMeasuresSequence(spacing_mm, _THICKNESS),
        omit_empty_frames=False,
    )
    result.PatientOrientation = source.PatientOrientation
    # highdicom draws a random one at each call.
    organization = origin.uid(uid, "seg", "dimensions")
    for item in (*result.DimensionOrganizationSequence, *result.DimensionIndexSequence):
        item.DimensionOrganizationUID = organization
    return result
