"""An exported model on a GPU: TensorRT where it is installed, else CUDA, with the probabilities of the run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cxrscale import config
from cxrscale.config import Recipe
from cxrscale.inference.export import to_onnx
from cxrscale.inference.export.runtime import OnnxModule, ProgramModule
from cxrscale.inference.export.session import GPU_PROVIDERS
from cxrscale.models import build_model
from tests.tiny import TINY_CLASSIFIER, TINY_SEGMENTER

onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_provider = pytest.mark.skipif(
    not set(GPU_PROVIDERS) & set(onnxruntime.get_available_providers()), reason="needs cxrscale[export-gpu]"
)
GPU = torch.device("cuda")


@pytest.fixture(params=[TINY_CLASSIFIER, TINY_SEGMENTER], ids=["classifier", "segmenter"])
def made(request: pytest.FixtureRequest) -> tuple[torch.nn.Module, int]:
    """A model in evaluation mode, and its input's side."""
    recipe = config.parse(Recipe, config.override({}, list(request.param)), where="test")
    torch.manual_seed(0)
    return build_model(recipe.model, recipe.data).eval(), recipe.augment.size


@needs_provider
@pytest.mark.parametrize(("half", "limit"), [(False, 1e-3), (True, 2e-2)])
def test_an_engine_gives_the_probabilities_of_the_model_for_any_batch(
    made: tuple[torch.nn.Module, int], half: bool, limit: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TF32 alone moves a probability by up to 1e-3, fp16 and bf16 by more."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, size = made
    engine = OnnxModule(to_onnx.to_onnx(model, size), GPU, half=half)
    assert engine.providers[0] in GPU_PROVIDERS
    for batch in (1, 7, 32):
        image_BCHW = torch.randn(batch, 1, size, size)
        with torch.no_grad():
            own = model(image_BCHW).sigmoid()
        found = engine(image_BCHW.to(GPU))
        assert found.device.type == "cuda"
        assert (found.sigmoid().cpu() - own).abs().max() < limit


def test_a_program_of_torch_export_moves_to_the_gpu(made: tuple[torch.nn.Module, int]) -> None:
    model, size = made
    program = ProgramModule(to_onnx.to_program(model, size), GPU)
    image_BCHW = torch.randn(3, 1, size, size)
    with torch.no_grad():
        found, own = program(image_BCHW.to(GPU)), model(image_BCHW)
    assert (found.sigmoid().cpu() - own.sigmoid()).abs().max() < 1e-3
