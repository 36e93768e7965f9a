"""DICOM files -> upright grey pictures and what their headers say, or a one-line reason why not."""

from cxrscale.dicom.picture import DicomHeader, DicomPicture, header, read

__all__ = ["DicomHeader", "DicomPicture", "header", "read"]
