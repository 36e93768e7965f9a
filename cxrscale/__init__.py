"""cxrscale: chest X-rays from raw archives to honest metrics.

raw source -> WebDataset shards -> DALI batches -> Ray Train -> thresholds -> evaluation -> predictions.

The public API is below; everything else is reached through the rooms (`cxrscale.shards`, `cxrscale.training`, ...).
Names are imported when they are first used, so `import cxrscale` takes milliseconds and loads no torch.

    import cxrscale as cx

    run = cx.open_run("runs/chexnet14")
    predictor = run.predictor(device="cuda")
    predictor("a.dcm").probabilities
"""

import lazy_loader

__version__ = "0.2.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
