"""What people read: tables in the terminal, plots, and HTML pages (audit, batch preview, search, test report)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
