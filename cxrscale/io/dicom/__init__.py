"""DICOM files -> upright gray images with metadata, or a one-line reason why a file is unreadable."""

from cxrscale.io.dicom.reader import DicomHeader, DicomImage, read_dicom, read_header

__all__ = [
    "DicomHeader",
    "DicomImage",
    "read_dicom",
    "read_header",
]
