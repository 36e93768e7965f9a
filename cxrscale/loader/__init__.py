"""Datasets -> batches: which images make up which step, every random number of their augmentation, and the backends
(DALI and OpenCV) that turn both into tensors. A batch is a pure function of (seed, epoch, step, rank, world size).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
