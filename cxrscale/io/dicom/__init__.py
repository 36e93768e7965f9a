"""DICOM files -> upright gray images with metadata, or a one-line reason why a file is unreadable."""

from cxrscale.io.dicom import tags
from cxrscale.io.dicom.reader import MAX_AGE, DicomHeader, DicomImage, read_dicom, read_header, read_stored, read_tags

__all__ = [
    "MAX_AGE",
    "DicomHeader",
    "DicomImage",
    "read_dicom",
    "read_header",
    "read_stored",
    "read_tags",
    "tags",
]
