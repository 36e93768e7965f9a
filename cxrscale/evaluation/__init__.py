"""Scores -> thresholds, calibrators, metrics with confidence intervals, comparisons. Pure: arrays in, plain data out.

Nothing here reads or writes a file, or imports torch. `artifacts` has the models of the JSON files that come of it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
