"""Datasets: raw sources -> verified WebDataset shards and their manifest; splits, duplicates, leakage, audit.

The manifest is the dataset: one Parquet row per image. The tars only hold the bytes that it points to.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
