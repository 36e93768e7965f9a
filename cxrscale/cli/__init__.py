"""The command line: one file per group of commands. It prints, shows progress and turns errors into one line."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
