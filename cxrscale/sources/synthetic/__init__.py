"""Synthetic chest X-rays: drawn thoraxes with planted findings, on disk in exactly the layouts of NIH and SIIM."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
