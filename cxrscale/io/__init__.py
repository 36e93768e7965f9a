"""Reading and writing files: storage (local disks and object stores), images, DICOM, run-length encoded masks, JSON.

Nothing here knows what a dataset or a model is. `load_image` returns an upright gray image or raises
`UnreadableImageError` with a one-line reason; every writer publishes a complete file or none.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
