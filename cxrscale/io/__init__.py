"""Bytes in and out: storage (local disks and object stores), image files, DICOM, run-length encoded masks.

Nothing here knows what a dataset or a model is. Every reader returns an upright gray image or raises
`UnreadableImageError` with a one-line reason; every writer publishes a whole file or none.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
