"""The service that one writes first: FastAPI, PIL, torch. The peer of `tests.benchmarks.serve`."""

from __future__ import annotations

import io
import sys

import numpy as np
import pydicom
import torch
import uvicorn
from fastapi import FastAPI, Request
from PIL import Image

from cxrscale.inference import load_cpu_model

app = FastAPI()
trained = load_cpu_model(sys.argv[1])


@app.get("/healthz")
def healthz() -> str:
    """Whether it answers."""
    return "ok"


@app.post("/v1/predict")
async def predict(request: Request) -> dict[str, float]:
    """Probabilities."""
    data = await request.body()
    if data[128:132] == b"DICM":
        pixels = pydicom.dcmread(io.BytesIO(data)).pixel_array.astype(np.float32)
        image = Image.fromarray((255 * (pixels - pixels.min()) / max(1.0, np.ptp(pixels))).astype(np.uint8))
    else:
        image = Image.open(io.BytesIO(data)).convert("L")
    size = trained.recipe.augment.size
    small_HW = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR), dtype=np.float32) / 255
    with torch.no_grad():
        (probability_F,) = torch.sigmoid(trained.model(torch.from_numpy(small_HW)[None, None])).numpy()
    return dict(zip(trained.recipe.data.findings, probability_F.tolist(), strict=True))


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[2]), log_level="warning")
