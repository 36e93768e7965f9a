"""A trained run as an object: its recipe, its files, and everything that can be computed from them; what makes runs,
and what compares and combines them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
