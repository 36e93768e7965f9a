"""Every recipe's model, and a vision transformer, as an ONNX file; predict.py in an environment without torch."""

from __future__ import annotations

import json
import os
import subprocess
import venv
from pathlib import Path

import pytest
import torch

from cxrscale import config
from cxrscale.config import Recipe
from cxrscale.inference import Predictor
from cxrscale.inference.export import judging, latency, to_onnx
from cxrscale.inference.export.parity import EXACT
from cxrscale.inference.export.runtime import OnnxModule
from cxrscale.models import build_model
from cxrscale.run import Run, export
from cxrscale.sources.synthetic.archive import SyntheticPaths
from tests.inference.test_ensemble import changed_copy

JOBS = sorted(Path(__file__).parents[2].glob("jobs/*.yaml"))
VIT = ("model.arch=vit_tiny_patch16_224", "data.findings=[Effusion, Mass]")
MODELS = {path.stem: config.load_recipe(path, ["model.weights=none"]) for path in JOBS}
MODELS["vit"] = config.parse(Recipe, config.override({}, [*VIT, "model.weights=none"]), where="test")
DISTINCT = {
    repr((recipe.model.without_weights(), recipe.data.task, len(recipe.data.findings), recipe.augment.size)): name
    for name, recipe in MODELS.items()
}
"""Models that differ -> one recipe of each."""


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(DISTINCT.values()))
def test_the_model_of_every_recipe_is_exported_for_batches_of_any_size(name: str) -> None:
    recipe = MODELS[name]
    torch.manual_seed(0)
    model, size = build_model(recipe.model.without_weights(), recipe.data), recipe.augment.size
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(torch.randn(4, 1, size, size))
    model.eval()
    exported = OnnxModule(to_onnx.to_onnx(model, size), torch.device("cpu"))
    images = torch.randn(max(judging.DYNAMIC) if size <= 256 else 7, 1, size, size)
    with torch.no_grad():
        own = model(images).sigmoid()
    # Maps of random weights round more than trained ones: those of torch's two memory layouts differ by 3e-5.
    limit = EXACT if recipe.data.task == "classify" else 1e-4
    for batch in (one for one in judging.DYNAMIC if one <= len(images)):
        assert (exported(images[:batch]).sigmoid() - own[:batch]).abs().max() <= limit


@pytest.mark.slow
def test_predict_py_runs_in_an_environment_of_four_packages(
    classifier_run: str, drawn: SyntheticPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "ROUNDS", 1)
    run = changed_copy(classifier_run, tmp_path / "run", 1.0)
    Run(run).choose_thresholds(resamples=20)
    export(run, str(tmp_path / "out"))
    given = os.environ.get("CXRSCALE_BARE_PYTHON")
    python = Path(given) if given else tmp_path / "bare" / "bin" / "python"
    if not given:
        venv.create(tmp_path / "bare", with_pip=True)
        packages = ("onnxruntime", "numpy", "opencv-python-headless", "pydicom")
        subprocess.run([str(python), "-m", "pip", "install", "-q", *packages], check=True)
    missing = [str(python), "-c", "import torch"]
    assert subprocess.run(missing, capture_output=True, env={}).returncode == 1
    paths = [*sorted(map(str, drawn.nih.rglob("*.png")))[:3], *sorted(map(str, drawn.siim.rglob("*.dcm")))[:3]]
    command = [str(python), str(tmp_path / "out" / "predict.py"), *paths]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={})
    assert ran.returncode == 0, ran.stderr
    for line, own in zip(ran.stdout.splitlines(), Predictor(run, "cpu").predict(paths), strict=True):
        found = json.loads(line)
        # DALI and OpenCV differ by a fraction of a gray level.
        assert found["probabilities"] == pytest.approx(dict(own.probabilities), abs=2e-3)
