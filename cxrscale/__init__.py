"""cxrscale: chest X-rays from raw archives to honest metrics.

raw archive -> WebDataset shards -> DALI batches -> Ray Train -> thresholds -> evaluation -> predictions.
"""

__version__ = "0.1.0"
