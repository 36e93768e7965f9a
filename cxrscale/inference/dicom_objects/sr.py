"""Probabilities and calls as a DICOM structured report (PS3.3 A.35.3), after TID 1500 (PS3.16)."""

from __future__ import annotations

from highdicom.sr import (
    AlgorithmIdentification,
    ComprehensiveSR,
    DeviceObserverIdentifyingAttributes,
    Measurement,
    MeasurementReport,
    MeasurementsAndQualitativeEvaluations,
    ObservationContext,
    ObserverContext,
    QualitativeEvaluation,
    SourceImageForMeasurementGroup,
    TrackingIdentifier,
)
from pydicom.dataset import Dataset

from cxrscale.inference.dicom_objects import codes
from cxrscale.inference.dicom_objects.origin import MANUFACTURER, Origin
from cxrscale.inference.prediction import Prediction

SERIES_NUMBER = 9802


def encode_report(source: Dataset, origin: Origin, prediction: Prediction) -> Dataset:
    """The report of an image: for each finding its probability, threshold and call, and the area of the mask.

    It is complete and unverified: no person has seen it.

    Args:
        source: by `source.read_source`.
    """
    uid = source.SOPInstanceUID
    observer = DeviceObserverIdentifyingAttributes(
        uid=origin.uid("", "device"),
        name=origin.algorithm,
        manufacturer_name=MANUFACTURER,
        model_name=origin.algorithm,
        serial_number=origin.checkpoint,
    )
    report = MeasurementReport(
        observation_context=ObservationContext(observer_device_context=ObserverContext(codes.DEVICE, observer)),
        procedure_reported=codes.CHEST_X_RAY,
        imaging_measurements=[_group(source, origin, prediction, name) for name in prediction.probabilities],
        title=codes.REPORT,
    )
    return ComprehensiveSR(
        evidence=[source],
        content=report[0],
        series_instance_uid=origin.uid(uid, "sr", "series"),
        series_number=SERIES_NUMBER,
        sop_instance_uid=origin.uid(uid, "sr"),
        instance_number=1,
        manufacturer=MANUFACTURER,
        manufacturer_model_name=origin.algorithm,
        software_versions=origin.version,
        device_serial_number=origin.checkpoint,
        series_description="Findings, automatic report",
        is_complete=True,
        is_final=False,
        is_verified=False,
    )


def _group(source: Dataset, origin: Origin, prediction: Prediction, name: str) -> MeasurementsAndQualitativeEvaluations:
    """A finding's measurements (TID 1501)."""
    concept = codes.finding(name)
    values = [(codes.CERTAINTY, 100 * prediction.probabilities[name], codes.PERCENT)]
    if name in origin.threshold:
        values.append((codes.OPERATING_POINT, 100 * origin.threshold[name], codes.PERCENT))
    if prediction.mask_area_mm2 is not None:
        values.append((codes.AREA, prediction.mask_area_mm2, codes.SQUARE_MILLIMETER))
    called = prediction.calls.get(name)
    presence = codes.PRESENT if called else codes.ABSENT
    return MeasurementsAndQualitativeEvaluations(
        tracking_identifier=TrackingIdentifier(
            uid=origin.uid(source.SOPInstanceUID, "tracking", name), identifier=concept.meaning
        ),
        finding_type=concept,
        algorithm_id=AlgorithmIdentification(
            name=origin.algorithm,
            version=origin.checkpoint,
            parameters=[f"thresholds={origin.thresholds or 'none'}"],
            family=codes.ARTIFICIAL_INTELLIGENCE,
            manufacturer=MANUFACTURER,
        ),
        # A DS holds 16 characters (PS3.5 6.2).
        measurements=[Measurement(concept_name, round(value, 6), unit) for concept_name, value, unit in values],
        qualitative_evaluations=[] if called is None else [QualitativeEvaluation(codes.PRESENCE, presence)],
        source_images=[SourceImageForMeasurementGroup.from_source_image(source)],
    )
