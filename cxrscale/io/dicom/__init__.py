"""DICOM files -> upright gray images and what their headers say, or a one-line reason why not."""

from cxrscale.io.dicom.reader import DicomHeader, DicomImage, read_dicom, read_header

__all__ = [
    "DicomHeader",
    "DicomImage",
    "read_dicom",
    "read_header",
]
