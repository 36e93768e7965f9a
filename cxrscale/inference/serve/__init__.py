"""The service: models behind HTTP, in one process or as a deployment of Ray Serve."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
