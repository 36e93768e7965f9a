"""The training loop and what it stands on: state, checkpoints, distributed workers, tracking, launch on Ray Train."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
